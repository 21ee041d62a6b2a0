"""`stlm import FILE.gguf NAME`: a GGUF file becomes a published model, as what `stlm export` wrote does."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from test_export import STORY, write_run
from tiny_llama import write_gguf

from stlm.cli import main
from stlm.corpora.gguf_file import GgufError, GgufFile
from stlm.files import read_json, sha256
from stlm.generation.find import load_generator
from stlm.model.llama import NotLlamaError, llama_weights, read_llama_config
from stlm.study.catalogues import load_models
from stlm.tokens.published import fetched_tokenizer
from stlm.training.checkpoints import load_checkpoint
from stlm.training.published import load_published

SAID = ["--licence", "MIT", "--origin", "a friend", "--prefix", "<|endoftext|>", "--training-tokens", "77"]


@pytest.fixture
def exported(project: Path) -> Path:
    """A project with a run and its GGUF file in float32."""
    write_run(Path("results/toy/runs/first"))
    assert main(["export", "toy/first", "out/first.gguf"]) == 0
    return Path("out/first.gguf")


def test_what_was_exported_comes_back_to_the_bit(exported: Path, capsys) -> None:
    """Weights, tokenizer, and what the file says of itself; nothing has to be told."""
    before = Path("params/models.yaml").read_text()
    assert main(["import", str(exported), "back"]) == 0
    assert "`stlm generate data/raw/back PROMPT` writes text with it" in capsys.readouterr().out
    checkpoint = Path("results/toy/runs/first/checkpoints/step-0000010")
    original, _ = load_checkpoint(checkpoint)
    ours = load_published(Path("data/raw/back"))
    expected, found = llama_weights(original), llama_weights(ours)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    entry = load_models()["back"]
    assert Path("params/models.yaml").read_text().startswith(before)
    assert (entry.licence, entry.training_tokens, entry.prefix) == ("unknown", 3200, "<|endoftext|>")
    assert entry.description.startswith("A language model of ") and entry.origin == "the file first.gguf"
    assert entry.model.config.width == original.config.width and entry.model.tied
    (source,) = entry.sources
    assert source.path == "out" and source.sha256 == {"first.gguf": sha256(exported)}
    tokenizer, own = (
        fetched_tokenizer("hf:back", Path("data/raw/back")),
        load_generator(checkpoint, torch.device("cpu")),
    )
    assert tokenizer.eot == own.eot and tokenizer.vocab_size == 270
    assert read_json(Path("data/raw/back/source.json"))["stored"] == {"F32": 20}
    capsys.readouterr()
    for place in ("toy/first", "data/raw/back"):
        assert main(["generate", place, STORY, "--temperature", "0", "--tokens", "8"]) == 0
    text = capsys.readouterr().out
    assert text[: len(text) // 2] == text[len(text) // 2 :], "both write the same"
    assert main(["fetch", "back"]) == 0, "the entry gives the model again"


def test_a_file_of_others_needs_what_it_does_not_say(project: Path, capsys) -> None:
    write_gguf(Path("model.gguf"))

    def refused(*arguments: str) -> str:
        assert main(["import", "model.gguf", *arguments]) == 2
        assert not Path("data/raw/tiny").exists()
        return capsys.readouterr().err

    before = Path("params/models.yaml").read_text()
    assert "model.gguf: does not say it (general.license); give --licence" in refused("tiny")
    assert "(stlm.training_tokens); give --training-tokens" in refused("tiny", *SAID[:4])
    told = [*SAID[:4], *SAID[6:]]
    assert (
        "does not say which token texts began with in training (tokenizer.ggml.add_bos_token); give --prefix "
        "TOKEN (its special tokens: bos_token <|im_start|>, eos_token <|im_end|>, unk_token <|endoftext|>)"
    ) in refused("tiny", *told)
    assert "prefix: '<|endofetxt|>' is none of its tokens" in refused(
        "tiny", *told, "--prefix", "<|endofetxt|>"
    )
    assert Path("params/models.yaml").read_text() == before
    assert main(["import", "model.gguf", "tiny", *SAID]) == 0
    entry = load_models()["tiny"]
    assert (entry.licence, entry.origin, entry.prefix, entry.training_tokens) == (
        *("MIT", "a friend", "<|endoftext|>", 77),
    )
    assert "'tiny' is a model in params/models.yaml already; --force replaces it" in refused_again(capsys)
    assert main(["import", "model.gguf", "tiny", *SAID[2:], "--licence", "BSD", "--force"]) == 0
    assert load_models()["tiny"].licence == "BSD"
    assert Path("params/models.yaml").read_text().count("tiny:") == 1


def refused_again(capsys) -> str:
    assert main(["import", "model.gguf", "tiny", *SAID]) == 2
    return capsys.readouterr().err


def test_a_file_that_changed_is_not_taken_for_the_imported_one(project: Path, capsys) -> None:
    write_gguf(Path("model.gguf"))
    assert main(["import", "model.gguf", "tiny", *SAID]) == 0
    with Path("model.gguf").open("ab") as file:
        file.write(b"\0")
    assert main(["fetch", "tiny"]) == 2
    assert "model.gguf: SHA-256 is" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("blimp", "'blimp' is the name of a benchmark, which has data/raw/blimp; choose another"),
        ("synthetic", "'synthetic' is the name of a corpus"),
        ("smollm2_135m", "'smollm2_135m' is a model in params/models.yaml already"),
        ("a/b", "'a/b' cannot be a name"),
    ],
)
def test_names_are_checked(project: Path, name: str, message: str, capsys) -> None:
    write_gguf(Path("model.gguf"))
    assert main(["import", "model.gguf", name, *SAID]) == 2
    assert message in capsys.readouterr().err


def test_other_files_are_refused(project: Path, capsys) -> None:
    def refused(path: str) -> str:
        assert main(["import", path, "tiny", *SAID]) == 2
        return capsys.readouterr().err

    before = Path("params/models.yaml").read_text()
    assert "none.gguf: no such file; expected a GGUF file" in refused("none.gguf")
    Path("text.gguf").write_text("no GGUF")
    assert "text.gguf: damaged, or no GGUF" in refused("text.gguf")
    write_gguf(Path("qwen.gguf"), metadata={"tokenizer.ggml.pre": "qwen2"})
    assert "tokenizer.ggml.pre: 'qwen2' is not supported; expected gpt-2 or smollm" in refused("qwen.gguf")
    write_gguf(Path("scaled.gguf"), metadata={"llama.rope.scaling.type": "yarn"})
    assert "scaled.gguf: llama.rope.scaling.type: 'yarn'" in refused("scaled.gguf")
    assert Path("params/models.yaml").read_text() == before and not Path("data/raw/tiny").exists()


def test_damaged_files_are_never_a_traceback(tmp_path: Path) -> None:
    """Bytes of header, keys and tensors' descriptions changed at random: read as they are, or refused."""
    path = write_gguf(tmp_path / "model.gguf")
    content, draw = path.read_bytes(), random.Random(2)
    refused = 0
    for _ in range(60):
        changed = bytearray(content)
        for _ in range(draw.choice((1, 4, 40))):
            changed[draw.randrange(24, 14_000)] = draw.randrange(256)
        path.write_bytes(changed)
        try:
            file = GgufFile(path)
            read_llama_config(file.config)
            file.weights(), file.tokenizer_json(), file.tokenizer_config(), file.starts_with
        except (GgufError, NotLlamaError):
            refused += 1
    assert refused > 20


def test_a_link_and_a_name_that_is_no_utf8(project: Path, capsys) -> None:
    write_gguf(Path("store/blob"))
    Path("linked").symlink_to("store/blob")
    assert main(["import", "linked", "tiny", *SAID]) == 0
    assert load_models()["tiny"].sources[0].files == {"model.gguf": "linked"}
    assert main(["import", "\udcff.gguf", "other", *SAID]) == 2
    assert "this name is not UTF-8" in capsys.readouterr().err


def test_the_token_that_llama_cpp_adds_must_be_the_prefix(exported: Path, capsys) -> None:
    assert GgufFile(exported).starts_with == "<|endoftext|>"
    assert main(["import", str(exported), "back", "--prefix", "the"]) == 2
    assert "prefix: 'the'" in capsys.readouterr().err


def test_a_token_at_the_end_of_each_text_is_not_supported(exported: Path) -> None:
    content = exported.read_bytes()
    key = b"tokenizer.ggml.add_eos_token\x07\0\0\0"
    assert content.count(key + b"\0") == 1
    exported.write_bytes(content.replace(key + b"\0", key + b"\1"))
    with pytest.raises(GgufError, match="add_eos_token: a token added to the end of a text"):
        GgufFile(exported).tokenizer_json()
