"""benchmarks/llama_cpp.py finds what differs; in llama.cpp's place transformers answers from one file."""

from __future__ import annotations

import stat
import sys
from pathlib import Path

import llama_cpp
import pytest
import torch
from test_llama import HARD, checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

from stlm.errors import UserError
from stlm.export.gguf_export import export_gguf
from stlm.tokens.bpe import train_bpe
from stlm.tokens.interface import EOT
from stlm.tokens.tokenizer import load_tokenizer

SERVER = """#!{python}
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
    def do_POST(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.rfile.read(int(self.headers["Content-Length"])))
if "bad" in sys.argv[sys.argv.index("-m") + 1]:
    sys.exit("no model")
HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


class Answers:
    """The requests that the benchmark makes, answered by transformers' reading of a GGUF file."""

    def __init__(self, path: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32
        )
        self.tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)

    def __call__(self, address: str, what: str, **body) -> dict:
        if what == "tokenize":
            assert body["add_special"] is False and body["parse_special"] is False
            text = body["content"]
            ids = self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
            return {"tokens": ids}
        said: list[int] = []
        with torch.inference_mode():
            while len(said) < body["n_predict"]:
                logits_V = self.model(torch.tensor([body["prompt"] + said])).logits[0, -1]
                said.append(int(logits_V.argmax()))
                if said[-1] == self.tokenizer.eos_token_id:
                    break
        logs = logits_V.log_softmax(-1).tolist()
        top = [{"id": id_, "logprob": value} for id_, value in enumerate(logs)]
        return {"tokens": said, "completion_probabilities": [{"top_logprobs": top}]}


def test_it_compares_and_finds_what_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = checkpoint(tmp_path / "checkpoints", train_bpe("bpe-300", HARD * 3))
    path = tmp_path / "model.gguf"
    export_gguf(ours, path, "F32")
    tokenizer, answers = load_tokenizer(ours.parent / "tokenizer"), Answers(path)

    def row(change) -> dict:
        monkeypatch.setattr(llama_cpp, "ask", lambda *place, **body: change(answers(*place, **body)))
        return llama_cpp.compare("", path, tokenizer, texts=20, tokens=5)

    found = row(lambda answer: answer)
    assert llama_cpp.agrees(found, exact=True), found
    assert (found["texts"], found["prompts"], found["equal_texts"]) == (26, 4, 4)
    assert 0 < found["largest_difference"] < 1e-3

    def shifted(answer: dict) -> dict:
        for each in answer.get("completion_probabilities", []):
            each["top_logprobs"][7]["logprob"] += 0.01
        return answer

    found = row(shifted)
    assert found["largest_difference"] == pytest.approx(0.01, abs=1e-3)
    assert not llama_cpp.agrees(found, exact=True) and llama_cpp.agrees(found, exact=False)
    found = row(lambda answer: {**answer, "tokens": [*answer["tokens"][:-1], 5]})
    assert found["texts_with_other_ids"] > 20 and EOT in "".join(found["examples"])
    assert found["equal_texts"] == 0 and not llama_cpp.agrees(found, exact=False)


def test_the_server_is_started_and_ended(tmp_path: Path) -> None:
    server = tmp_path / "llama-server"
    server.write_text(SERVER.format(python=sys.executable))
    server.chmod(server.stat().st_mode | stat.S_IXUSR)
    with llama_cpp.serving(server, Path("model.gguf")) as address:
        assert llama_cpp.ask(address, "tokenize", content="a") == {"content": "a"}
    assert not llama_cpp._is_ready(address)
    with (
        pytest.raises(UserError, match=r"llama-server: cannot serve bad\.gguf: no model"),
        llama_cpp.serving(server, Path("bad.gguf")),
    ):
        pass


def test_a_folder_without_binaries_is_refused(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["llama_cpp.py", str(tmp_path)])
    assert llama_cpp.main() == 2
    assert "llama-server: no such file; give the folder with llama.cpp's binaries" in capsys.readouterr().err
