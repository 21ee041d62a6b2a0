"""Does llama.cpp run what `stlm export RUN FILE.gguf` writes as we do?

    python benchmarks/llama_cpp.py llama.cpp/build/bin --model CHECKPOINT

Exports the checkpoint in each type, and starts llama.cpp's `llama-server` on it, on this machine's own
address, with one thread and keys and values in float32. Compared are the token ids of awkward texts, the
log-probabilities of the next token after beginnings of texts, and greedy continuations. Ours are those of the
weights as the file holds them, in float32; llama.cpp also rounds activations where weights are quantized.

Writes results/benchmarks/llama_cpp.json; the exit status is 1 where ids differ, or where in float32 a
log-probability differs by more than 1e-3 or a continuation by a token.
"""

from __future__ import annotations

import argparse
import json
import random
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from command import command, default_checkpoints, label
from machine import machine

from stlm.corpora.gguf_file import GgufFile
from stlm.errors import UserError
from stlm.export.gguf_export import export_gguf
from stlm.files import write_json
from stlm.model.llama import from_llama, read_llama_config
from stlm.model.transformer import Transformer
from stlm.options import GGUF_TYPES
from stlm.tokens.tokenizer import Tokenizer, load_tokenizer

OUTPUT = Path("results/benchmarks/llama_cpp.json")
TOLERANCE = 1e-3
# Below this, llama.cpp's probabilities, in float32, have lost digits that their logarithm would show.
LEAST = -20.0
AWKWARD = (
    "The end <|endoftext|> is text, <|endoftext|><|endoftext|> twice <|endoftext",
    "don't  stop\t\n\n  it's 2024, I'LL we've\r\n ",
    "naïve café 水は水 🙂\u200d👩 \U0010ffff e\u0301 \u0661\u0662\u0663",
    " " * 300 + "x" + "\n" * 200 + "  \n  y  ",
    "\xa0\u3000\x85\x1c\u2028 1234567890 12 345,678.90  7 x3 3x",
    "\x01a\x7f [title] ## ?!;; 'S 's",
)
PROMPTS = ("", "Once upon a time", "The old man went to the house of", "She said that it was not")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("binaries", type=Path, help="the folder with llama.cpp's llama-server")
    parser.add_argument("--model", action="append", type=Path, help="a checkpoint's folder (repeatable)")
    parser.add_argument(
        "--type", action="append", choices=GGUF_TYPES, help="default: those that fit (repeatable)"
    )
    parser.add_argument("--texts", type=int, default=300, help="mixtures of awkward texts; default: 300")
    parser.add_argument("--tokens", type=int, default=40, help="of a continuation; default: 40")
    parser.add_argument("--output", type=Path, default=OUTPUT, help=f"default: {OUTPUT}")
    return command(parser, run)


def run(options: argparse.Namespace) -> int:
    """Compare every model in every type, writing after each; 1 where something differs that must not."""
    server = options.binaries / "llama-server"
    if not server.is_file():
        raise UserError(f"{server}: no such file; give the folder with llama.cpp's binaries")
    report: dict[str, Any] = {"machine": machine(), "models": {}}
    failed = False
    for checkpoint in options.model or default_checkpoints():
        rows = report["models"].setdefault(label(checkpoint), {})
        for kind in options.type or GGUF_TYPES:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "model.gguf"
                try:
                    export_gguf(checkpoint, path, kind)
                except UserError as error:
                    if options.type or "rows must divide" not in str(error):
                        raise
                    rows[kind] = {"skipped": str(error)}
                    continue
                with serving(server, path) as address:
                    tokenizer = load_tokenizer(checkpoint.parent / "tokenizer")
                    rows[kind] = compare(address, path, tokenizer, options.texts, options.tokens)
            exact = kind == "F32"
            rows[kind]["agrees"] = agrees(rows[kind], exact)
            failed |= not rows[kind]["agrees"]
            print(f"{label(checkpoint)} {kind}: {json.dumps(rows[kind])}", flush=True)
            write_json(options.output, report)
    return int(failed)


def agrees(row: dict[str, Any], exact: bool) -> bool:
    """Whether nothing differs that must not; `exact`: in float32, also log-probabilities and texts."""
    same = not row["texts_with_other_ids"]
    return same and (
        not exact or (row["largest_difference"] <= TOLERANCE and row["equal_texts"] == row["prompts"])
    )


@contextmanager
def serving(server: Path, model: Path) -> Iterator[str]:
    """llama-server on `model`; yields its address. Raises UserError if it ends, or does not answer."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = ["--host", "127.0.0.1", "--port", str(port), "-t", "1", "-ctk", "f32", "-ctv", "f32", "-np", "1"]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen([server, "-m", model, *flags], stdout=log, stderr=subprocess.STDOUT)
        try:
            address = f"http://127.0.0.1:{port}"
            for _ in range(600):
                if process.poll() is not None or _is_ready(address):
                    break
                time.sleep(0.2)
            if process.poll() is not None or not _is_ready(address):
                log.seek(0)
                last = log.read().decode(errors="replace").splitlines()[-3:]
                raise UserError(f"{server}: cannot serve {model.name}: {' / '.join(last)}")
            yield address
        finally:
            process.terminate()
            process.wait(20)


def _is_ready(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


def ask(address: str, what: str, **body: Any) -> dict[str, Any]:
    """The server's answer to a request."""
    content = json.dumps(body).encode()
    request = urllib.request.Request(f"{address}/{what}", content, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.load(answer)


def compare(address: str, path: Path, tokenizer: Tokenizer, texts: int, tokens: int) -> dict[str, Any]:
    """What differs between the server and the weights in the file `path`, by our engine."""
    file = GgufFile(path)
    config = read_llama_config(file.config)
    model = from_llama(config, {name: torch.from_numpy(weight) for name, weight in file.weights().items()})
    other = [text for text in awkward_texts(texts) if ids_of(address, text) != tokenizer.encode(text)]
    differences, equal = [], 0
    for prompt in PROMPTS:
        ids = [tokenizer.eot, *tokenizer.encode(prompt)]
        wanted = min(tokens, config.context - len(ids))
        answer = ask(
            address,
            "completion",
            prompt=ids,
            n_predict=1,
            temperature=0,
            n_probs=config.vocab_size,
            cache_prompt=False,
        )
        differences.append(largest_difference(model, ids, answer))
        answer = ask(
            address,
            "completion",
            prompt=ids,
            n_predict=wanted,
            temperature=0,
            return_tokens=True,
            cache_prompt=False,
        )
        said = [token for token in answer["tokens"] if token != tokenizer.eot]
        equal += said == greedy(model, ids, wanted, tokenizer.eot)
    return {
        "texts": len(awkward_texts(texts)),
        "texts_with_other_ids": len(other),
        "examples": other[:3],
        "prompts": len(PROMPTS),
        "largest_difference": max(differences),
        "equal_texts": equal,
    }


def awkward_texts(number: int) -> list[str]:
    """Awkward texts, and `number` mixtures of their pieces with letters of all alphabets."""
    draw = random.Random(5)
    mixed = [
        "".join(
            draw.choice([draw.choice(AWKWARD)[:12], chr(draw.randrange(1, 0xD800)), " ", "\n", "to", "9"])
            for _ in range(15)
        )
        for _ in range(number)
    ]
    return [*AWKWARD, *mixed]


def ids_of(address: str, text: str) -> list[int]:
    """llama.cpp's ids; nothing is added, and special tokens in the text are text."""
    return ask(address, "tokenize", content=text, add_special=False, parse_special=False)["tokens"]


@torch.inference_mode()
def largest_difference(model: Transformer, ids: list[int], answer: dict[str, Any]) -> float:
    """The largest difference of a log-probability (nats) after `ids` that the server names."""
    ours_V = model(torch.tensor([ids]))[0, -1].double().log_softmax(-1)
    (first,) = answer["completion_probabilities"]
    theirs = {each["id"]: each["logprob"] for each in first["top_logprobs"]}
    return max(abs(float(ours_V[id_]) - value) for id_, value in theirs.items() if value > LEAST)


@torch.inference_mode()
def greedy(model: Transformer, ids: list[int], tokens: int, eot: int) -> list[int]:
    """The most probable continuation, token by token, until the end of text."""
    said: list[int] = []
    while len(said) < tokens:
        token = int(model(torch.tensor([ids + said]))[0, -1].argmax())
        if token == eot:
            break
        said.append(token)
    return said


if __name__ == "__main__":
    raise SystemExit(main())
