"""Checkpoints and their tokenizers that are damaged or none; odd targets of exports, odd prompts."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from bad.case import Case, put

RUN = "results/tiny/runs/baseline"
LAST = f"{RUN}/checkpoints/step-0000006"
CONFIG = f"{LAST}/config.json"
WEIGHTS = f"{LAST}/model.safetensors"
TOKENIZER = f"{RUN}/checkpoints/tokenizer"
GENERATE = ("generate", "tiny/baseline", "A", "--tokens", "5")
Spoil = Callable[[Path], None]


def change(path: str, **keys: Any) -> Spoil:
    """Other values in a JSON file; `a__b` is the key b of a, and ... takes a key away."""

    def spoil(project: Path) -> None:
        content = json.loads((project / path).read_text())
        for key, value in keys.items():
            *above, last = key.split("__")
            place = content
            for part in above:
                place = place[part]
            if value is ...:
                del place[last]
            else:
                place[last] = value
        # As a program that knows no checksums would: with one, any change is told as damage.
        content.pop("checksum", None)
        (project / path).write_text(json.dumps(content))

    return spoil


def tensors(**changed: torch.Tensor | None) -> Spoil:
    """Other tensors in the last checkpoint, whose config.json has their digest; None takes one away.

    `norm_weight` is the tensor norm.weight.
    """

    def spoil(project: Path) -> None:
        named = {name.replace("_", ".", 1): tensor for name, tensor in changed.items()}
        weights = load_file(project / WEIGHTS) | named
        save_file({name: own for name, own in weights.items() if own is not None}, project / WEIGHTS)
        _digest(project)

    return spoil


def _digest(project: Path) -> None:
    digest = hashlib.sha256((project / WEIGHTS).read_bytes()).hexdigest()
    change(CONFIG, weights_sha256=digest)(project)


def _nan_at_the_end(project: Path) -> None:
    content = (project / WEIGHTS).read_bytes()
    (project / WEIGHTS).write_bytes(content[:-4] + b"\x00\x00\xc0\x7f")
    _digest(project)


def _vocabulary(change_it: Callable[[dict[str, Any]], Any]) -> Spoil:
    """Another tokenizer.json beside the checkpoints, whose description has its digest."""

    def spoil(project: Path) -> None:
        folder = project / TOKENIZER
        path = folder / "tokenizer.json"
        content = change_it(json.loads(path.read_text()))
        path.write_text(json.dumps(content))
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        change(f"{TOKENIZER}/tokenizer-name.json", sha256={"tokenizer.json": digest})(project)

    return spoil


def _no_single_bytes(content: dict[str, Any]) -> dict[str, Any]:
    """Words alone, none of 256 bytes: on such ranks tiktoken panics."""
    content["model"]["vocab"] = {f"word{number}": number for number in range(319)}
    return content


def _ids_twice(content: dict[str, Any]) -> dict[str, Any]:
    vocabulary = content["model"]["vocab"]
    last = max(vocabulary, key=vocabulary.get)
    vocabulary[last] = 5
    return content


def _letters_of_another_kind(content: dict[str, Any]) -> dict[str, Any]:
    vocabulary = content["model"]["vocab"]
    return {**content, "model": {**content["model"], "vocab": {f"▁{k}": v for k, v in vocabulary.items()}}}


def _rename(old: str, new: str) -> Spoil:
    return lambda project: (project / old).rename(project / new)


def _no_weights(project: Path) -> None:
    for path in (project / RUN / "checkpoints").glob("step-*/model.safetensors"):
        path.unlink()


def _folder(path: str) -> Spoil:
    return lambda project: (project / path).mkdir(parents=True)


def _folder_for_file(path: str) -> Spoil:
    def spoil(project: Path) -> None:
        (project / path).unlink()
        (project / path).mkdir()

    return spoil


def _unwritable(project: Path) -> None:
    (project / "locked").mkdir()
    (project / "locked").chmod(0o555)


def _descriptions() -> list[Case]:
    wrong: list[tuple[str, dict[str, Any], str]] = [
        ("no step", {"step": ...}, r"config\.json: step: this key is missing"),
        ("a step that is text", {"step": "six"}, r"config\.json: step: .*'six'"),
        ("a step below zero", {"step": -6}, r"config\.json: step: .*-6"),
        ("no tokens", {"tokens": ...}, r"config\.json: tokens: this key is missing"),
        ("no digest", {"weights_sha256": ...}, r"config\.json: weights_sha256: this key is missing"),
        ("a digest that is a number", {"weights_sha256": 7}, r"config\.json: weights_sha256: "),
        ("no model", {"model": ...}, r"config\.json: model: this key is missing"),
        ("an empty model", {"model": {}}, r"config\.json: model\.vocab_size: this key is missing"),
        ("a model that is a list", {"model": []}, r"config\.json: model: "),
        ("no vocab_size", {"model__vocab_size": None}, r"model\.vocab_size: this key is missing"),
        ("layers that are text", {"model__layers": "1"}, r"model\.layers: .*'1'"),
        ("more layers than there are", {"model__layers": 3}, r"not the weights of the model in config\.json"),
        (
            "a width that fits no weight",
            {"model__width": 10**7},
            r"not the weights of|model\.width",
        ),
        ("an unknown key", {"model__layer": 3}, r"model\.layer: no such key .*layers"),
        ("a kind that there is not", {"model__ffn": "swigloo"}, r"model\.ffn: .*swiglu"),
        ("a list of norms", {"model__norm": ["rmsnorm"]}, r"model\.norm: "),
        ("format 9", {"format": 9}, r"not a checkpoint's description of format 1"),
    ]
    return [
        Case(f"checkpoint: {name}", GENERATE, change(CONFIG, **keys), expects)
        for name, keys, expects in wrong
    ]


def _files() -> list[Case]:
    arguments: dict[str, tuple[str, ...]] = {
        "generate": GENERATE,
        "evaluate": ("evaluate", "tiny", "baseline"),
        "export": ("export", "tiny/baseline", "new"),
    }
    shapes = torch.ones(4, 8)
    wrong: list[tuple[str, str, Spoil, str]] = [
        ("NaN in a weight", "generate", _nan_at_the_end, r"the tensor \S+ has NaN or infinite values"),
        ("NaN in a weight", "evaluate", _nan_at_the_end, r"the tensor \S+ has NaN or infinite values"),
        ("NaN in a weight", "export", _nan_at_the_end, r"train\.json does not list the weights"),
        ("no step", "evaluate", change(CONFIG, step=...), r"config\.json: step: this key is missing"),
        ("an empty model", "export", change(CONFIG, model={}), r"model\.vocab_size: this key is missing"),
        ("a tensor that is missing", "generate", tensors(norm_weight=None), r"numbers, expected"),
        (
            "a tensor of another name",
            "generate",
            tensors(norm_weight=None, nrom_weight=torch.ones(32)),
            r"no tensor norm\.weight",
        ),
        ("a tensor too many", "generate", tensors(extra_weight=torch.ones(3)), r"numbers, expected"),
        ("a tensor of another shape", "generate", tensors(norm_weight=shapes), r"norm\.weight is .*\[4, 8\]"),
        ("a tensor of whole numbers", "evaluate", tensors(norm_weight=torch.ones(32).int()), r"torch\.int32"),
        ("config.json is a list", "generate", put(CONFIG, "[]"), r"not a checkpoint's description"),
        ("config.json is cut", "generate", put(CONFIG, '{"format": 1, '), r"config\.json: not valid JSON"),
        ("config.json is empty", "export", put(CONFIG, ""), r"config\.json: not valid JSON"),
        ("config.json nests deeply", "generate", put(CONFIG, "[" * 100_000), r"config\.json: not valid JSON"),
        ("config.json with NaN", "generate", put(CONFIG, '{"step": NaN}'), r"not valid JSON \(NaN"),
        ("config.json is a folder", "generate", _folder_for_file(CONFIG), r"config\.json: cannot be read"),
        ("weights are empty", "generate", put(WEIGHTS, b""), r"model\.safetensors: the weights are damaged"),
        ("weights are text", "export", put(WEIGHTS, "weights"), r"the weights are damaged"),
        ("weights are a folder", "generate", _folder_for_file(WEIGHTS), r"model\.safetensors"),
        ("no weights", "generate", _no_weights, r"model\.safetensors: no such file"),
        ("no weights", "export", _no_weights, r"model\.safetensors: no such file"),
        ("no weights", "evaluate", _no_weights, r"model\.safetensors: no such file"),
    ]
    cases = [
        Case(f"{verb}: checkpoint: {name}", arguments[verb], spoil, expects)
        for name, verb, spoil, expects in wrong
    ]
    for name in ("step-abc", "step-", "step-٣", "step-" + "9" * 200):
        folder = f"{RUN}/checkpoints/{name}"
        cases.append(Case(f"checkpoint: a folder {name[:12]}", GENERATE, _folder(folder), status=0))
    only = _rename(LAST, f"{RUN}/checkpoints/step-abc")
    alone = _rename(f"{RUN}/checkpoints/step-0000003", f"{RUN}/checkpoints/old")

    def both(project: Path) -> None:
        only(project)
        alone(project)

    cases.append(Case("checkpoint: none but step-abc", GENERATE, both, r"has no checkpoints"))
    return cases


def _tokenizers() -> list[Case]:
    path = f"{TOKENIZER}/tokenizer-name.json"
    vocabulary = r"tokenizer\.json: no vocabulary as bpe-320 has"
    wrong: list[tuple[str, Spoil, str]] = [
        ("a name without files", change(path, sha256={}), r"sha256 names no tokenizer\.json"),
        ("gpt2 without its files", change(path, name="gpt2"), r"names no encoder\.json and no vocab\.bpe"),
        ("words without their files", change(path, name="words"), r"names no chunks\.bin"),
        ("a name that is none", change(path, name="own"), r"unknown tokenizer 'own'"),
        ("a name that is a number", change(path, name=7), r"tokenizer-name\.json: not what its stage writes"),
        ("bytes, of another size", change(path, name="bytes", sha256={}), r"vocab_size and eot are 320"),
        ("another size", change(path, vocab_size=400), r"vocab_size and eot are 400"),
        ("no single bytes", _vocabulary(_no_single_bytes), vocabulary),
        ("ids twice", _vocabulary(_ids_twice), vocabulary),
        ("letters of another kind", _vocabulary(_letters_of_another_kind), vocabulary),
        ("a list", _vocabulary(lambda content: []), vocabulary),
        ("no model", _vocabulary(lambda content: {"version": "1.0"}), vocabulary),
        (
            "ids that are text",
            _vocabulary(lambda content: {"model": {"vocab": {"a": "b"}}}),
            vocabulary,
        ),
        ("cut", put(f"{TOKENIZER}/tokenizer.json", "{"), r"tokenizer\.json: corrupt"),
        ("gone", lambda project: shutil.rmtree(project / TOKENIZER), r"tokenizer-name\.json: no such file"),
    ]
    cases = [Case(f"tokenizer: {name}", GENERATE, spoil, expects) for name, spoil, expects in wrong]
    cases.append(
        Case(
            "export: a tokenizer of another size",
            ("export", "tiny/baseline", "new"),
            change(CONFIG, model__vocab_size=321),
            r"not the weights of the model",
        )
    )
    return cases


def _exports() -> list[Case]:
    def export(target: str, *more: str) -> tuple[str, ...]:
        return ("export", "tiny/baseline", target, *more)

    other = r"holds other files than an exported model"
    return [
        Case("export: onto a file", export("dvc.yaml"), None, r"dvc\.yaml: is a file"),
        Case("export: below a file", export("dvc.yaml/new"), None, r"dvc\.yaml/new: cannot write: .*file"),
        Case("export: onto its own checkpoint", export(LAST), None, other),
        Case("export: onto its own checkpoint, by force", export(LAST, "--force"), None, other),
        Case("export: onto its run", export(RUN, "--force"), None, other),
        Case("export: onto the project", export(".", "--force"), None, other),
        Case("export: onto the project's parent", export("..", "--force"), None, other),
        Case("export: onto the root", export("/", "--force"), None, other),
        Case("export: where one is", export("exported"), None, r"holds an exported model already; --force"),
        Case("export: where one is, by force", export("exported", "--force"), status=0),
        Case("export: a folder's name that is empty", export(""), None, other),
        Case("export: a name too long", export("n" * 300), None, r"too long"),
        Case("export: a name with a null byte", export("a\0b"), None, r"null|no name|cannot"),
        Case(
            "export: where no one may write",
            export("locked/new"),
            _unwritable,
            r"locked.*permission denied",
            unprivileged=True,
        ),
        Case(
            "export: onto a link to nowhere",
            export("link"),
            lambda project: (project / "link").symlink_to("nowhere"),
            r"link",
        ),
        Case("export: of no run", ("export", "tiny/nothing", "new"), None, r"tiny/nothing: neither"),
        Case("export: of learned positions", ("export", "tiny/learned", "new"), None, r"model\.positions"),
        Case("export: of a published model", ("export", "published/other", "new"), None, r"published model"),
    ]


def _prompts() -> list[Case]:
    def generate(*more: str, run: str = "tiny/baseline") -> tuple[str, ...]:
        return ("generate", run, *(more or ("A",)))

    five = ("--tokens", "5")
    cases = [
        Case("generate: a temperature nan", generate("A", "--temperature", "nan"), None, r"temperature: nan"),
        Case("generate: a temperature inf", generate("A", "--temperature", "inf"), None, r"temperature: inf"),
        Case("generate: a temperature -1", generate("A", "--temperature=-1"), None, r"temperature: -1"),
        Case("generate: a temperature 1e-320", generate("A", *five, "--temperature", "1e-320"), status=0),
        Case("generate: a temperature 1e300", generate("A", *five, "--temperature", "1e300"), status=0),
        Case("generate: a top-p nan", generate("A", "--top-p", "nan"), None, r"top-p: nan"),
        Case("generate: a min-p nan", generate("A", "--min-p", "nan"), None, r"min-p: nan"),
        Case("generate: a top-k 0", generate("A", "--top-k", "0"), None, r"whole number of at least 1"),
        Case("generate: a top-k 10^17", generate("A", *five, "--top-k", str(10**17)), status=0),
        Case(
            "generate: tokens -1",
            generate("A", "--tokens", "-1"),
            None,
            r"--tokens",
        ),
        Case("generate: tokens of 5,000 digits", generate("A", "--tokens", "9" * 5000), None, r"--tokens"),
        Case(
            "generate: a seed 2^64",
            generate("A", "--seed", str(2**64)),
            None,
            r"--seed: \d+: expected",
        ),
        Case("generate: a seed -1", generate("A", "--seed=-1"), None, r"whole number of at least 0"),
        Case("generate: 2^65 samples", generate("A", "--samples", str(2**65)), None, r"--samples"),
        Case("generate: an empty prompt", generate("", *five), status=0),
        Case("generate: a lone surrogate", generate("a\udcff"), None, r"lone surrogate"),
        Case("generate: stdin that is no UTF-8", generate("-"), None, r"not UTF-8", stdin=b"\xff\xfe"),
        Case("generate: an empty stdin", generate("-", *five), status=0, stdin=b""),
        Case("generate: null bytes", generate("-", *five), status=0, stdin=b"\0\0\0"),
        Case("generate: a prompt of 1 MB", generate("-", *five), status=0, stdin=b"\n" * 2**20),
        Case("generate: a device of no kind", generate("A", "--device", "gpu9"), None, r"--device gpu9"),
        Case("generate: the device meta", generate("A", "--device", "meta"), None, r"--device meta"),
    ]
    names = {
        "a step of 5,000 digits": f"tiny/baseline@{'9' * 5000}",
        "a step that is not there": "tiny/baseline@4",
        "a name of 5,000 letters": f"tiny/{'b' * 5000}",
        "a null byte": "tiny/base\0line",
        "an empty name": "",
        "a slash": "/",
        "a folder up": "..",
        "a line break": "tiny/baseline\n@6",
        "a file": "dvc.yaml",
        "a study": "tiny",
        "a study and a slash": "tiny/",
    }
    cases += [Case(f"generate: {name}", generate(run=run), None, r"error: ") for name, run in names.items()]
    return cases


def cases() -> list[Case]:
    """About what `stlm train` leaves, and those that read it: generate, evaluate, export."""
    return [*_descriptions(), *_files(), *_tokenizers(), *_exports(), *_prompts()]
