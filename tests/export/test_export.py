"""`stlm export`: a run as a folder that transformers loads, with its model card."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer

from stlm.cli import main
from stlm.files import read_json, write_json
from stlm.generation.find import load_generator
from stlm.generation.sampling import Sampling
from stlm.model.config import ModelConfig
from stlm.model.counts import parameter_counts
from stlm.model.transformer import Transformer
from stlm.tokens.bpe import train_bpe
from stlm.training.checkpoints import checkpoint_name, save_checkpoint
from stlm.training.config import TrainingConfig

CONFIG = ModelConfig(layers=2, width=32, heads=4, kv_heads=2, ffn_width=48, context=32, vocab_size=270)
STORY = "Once upon a time a hen sat on a mat. "


def write_run(folder: Path, config: ModelConfig = CONFIG) -> None:
    """A run's folder as `stlm train` and `stlm evaluate` leave it, at steps 5 and 10, without items."""
    tokenizer = train_bpe("bpe-270", [STORY * 9])
    tokenizer.save(folder / "checkpoints" / "tokenizer")
    about = {"study": "toy", "run": folder.name, "corpus": "tiny", "tokenizer": "bpe-270"}
    kept, evaluated = [], {}
    for step in (5, 10):
        torch.manual_seed(step)
        model = Transformer(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.4)
        name = checkpoint_name(step)
        own = {"step": step, "tokens": 320 * step}
        digest = save_checkpoint(folder / "checkpoints" / name, model, {**about, **own})
        kept.append({**own, "folder": name, "weights_sha256": digest})
        share = {"value": 0.6, "low": 0.5, "high": 0.7, "n": 120}
        evaluated[name] = {
            **{**own, "weights_sha256": digest},
            "perplexity": {"bits_per_byte": step / 4, "char_perplexity": 3.5},
            "benchmarks": {
                "blimp": {
                    "version": "1.0",
                    "items": 120,
                    "items_total": 120,
                    "modes": {"paper": {"acc": share}},
                }
            },
        }
    write_json(
        folder / "train.json",
        {
            **about,
            "variant": "first",
            "label": "The first",
            "seed": 3,
            "parameters": parameter_counts(config)._asdict(),
            "steps": 10,
            "tokens": 3200,
            "seconds": 9.0,
            "flops": 1e9,
            "device": "cpu",
            "precision": "float32",
            "model": config.model_dump(mode="json"),
            "training": TrainingConfig(steps=10, warmup_steps=2).model_dump(mode="json"),
            "checkpoints": kept,
            "code": {"stlm": "0.1.0", "torch": "2", "git": "abc123"},
        },
    )
    write_json(folder / "evaluation.json", {"checkpoints": evaluated})


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    folder = Path("results/toy/runs/first")
    write_run(folder)
    return folder


def test_the_folder_speaks_as_the_run_does(run: Path) -> None:
    assert main(["export", "toy/first", "out/model"]) == 0
    theirs, tokenizer = (
        AutoModelForCausalLM.from_pretrained("out/model"),
        AutoTokenizer.from_pretrained("out/model"),
    )
    generator = load_generator(run / "checkpoints" / "step-0000010", torch.device("cpu"))
    said, logits_V = [], generator.start(STORY)
    inputs = torch.tensor([[tokenizer.bos_token_id, *tokenizer.encode(STORY)]])
    torch.testing.assert_close(theirs(inputs).logits[0, -1], logits_V, atol=1e-4, rtol=0)
    while inputs.shape[1] + len(said) < 32:
        said.append(int(Sampling(temperature=0).choose(logits_V)))
        logits_V = generator.next(said[-1])
    own = {"attention_mask": torch.ones_like(inputs), "eos_token_id": None}
    expected = theirs.generate(inputs, max_new_tokens=len(said), do_sample=False, **own)
    assert said == expected[0, inputs.shape[1] :].tolist()
    eot = generator.eot
    assert read_json(Path("out/model/generation_config.json")) == {
        **{"bos_token_id": eot, "eos_token_id": eot, "pad_token_id": eot}
    }


def test_the_card_says_how_to_use_it_and_is_read_by_the_hub(run: Path, capsys) -> None:
    Path("data/raw/tiny").mkdir(parents=True)
    source = {"kind": "hub", "repo": "someone/tiny", "revision": "f" * 40, "files": {"a.parquet": "0" * 64}}
    write_json(Path("data/raw/tiny/source.json"), {"licence": "CC BY 4.0", "source": source})
    assert main(["export", "toy/first@5", "model"]) == 0
    text = Path("model/README.md").read_text()
    card = ModelCard(text)
    assert card.data.library_name == "transformers" and card.data.datasets == ["someone/tiny"]
    results = {(r.dataset_name, r.metric_type): r.metric_value for r in card.data.eval_results}
    assert results == {("tiny", "bits_per_byte"): 1.25, ("BLiMP", "accuracy"): 0.6}
    for said in (
        *("# The first (toy/first)", "1,600 tokens of tiny; step 5 of 10", "CC BY 4.0"),
        *(f"someone/tiny at revision {'f' * 40}", "Seed 3", "git abc123", "**1.2500 bits per byte**"),
        *(r"| BLiMP (version 1.0) | paper, acc | 120 | 60.0 | \[50.0, 70.0\] |", "reads 32 tokens at most"),
        *("Not counted (`stlm contamination`)", "arXiv:2405.14159"),
    ):
        assert said in text, said
    program = re.search(r"```python\n(.*?)```", text, re.S)[1].replace("50", "5")
    capsys.readouterr()
    exec(program, {})
    assert capsys.readouterr().out.startswith("<|endoftext|>Once upon a time")


def test_weights_that_were_trained_again_have_no_results(run: Path) -> None:
    record = read_json(run / "evaluation.json")
    record["checkpoints"]["step-0000010"]["weights_sha256"] = "another"
    write_json(run / "evaluation.json", record)
    assert main(["export", str(run), "model"]) == 0
    assert "This checkpoint was not evaluated" in Path("model/README.md").read_text()


def test_a_checkpoint_alone_is_exported_without_a_card(run: Path, capsys) -> None:
    (run / "train.json").unlink()
    assert main(["export", str(run / "checkpoints" / "step-0000005"), "model"]) == 0
    assert not Path("model/README.md").exists()
    assert "no model card" in capsys.readouterr().out


def test_what_is_there_is_not_overwritten(run: Path, capsys) -> None:
    def refused(folder: str, *flags: str) -> str:
        assert main(["export", "toy/first", folder, *flags]) == 2
        return capsys.readouterr().err

    Path("model").mkdir()
    assert main(["export", "toy/first@5", "model"]) == 0
    first = Path("model/model.safetensors").read_bytes()
    assert "model: holds an exported model already; --force replaces it" in refused("model")
    assert Path("model/model.safetensors").read_bytes() == first
    assert main(["export", "toy/first", "model", "--force"]) == 0
    assert Path("model/model.safetensors").read_bytes() != first
    # Never what is no export, the run's own folders among it.
    for folder in ("results", str(run), str(run / "checkpoints" / "step-0000005")):
        assert "holds other files than an exported model" in refused(folder, "--force")
    Path("model/notes.txt").write_text("mine")
    assert "holds other files than an exported model" in refused("model", "--force")
    Path("file").write_text("")
    assert "file: is a file; name a folder" in refused("file", "--force")
    assert (run / "checkpoints" / "step-0000005" / "config.json").is_file()


def test_another_architecture_is_refused_and_nothing_written(run: Path, capsys) -> None:
    write_run(run.with_name("other"), CONFIG.model_copy(update={"positions": "learned"}))
    assert main(["export", "toy/other", "model"]) == 2
    assert "model.positions: learned is not what a Llama has (rope)" in capsys.readouterr().err
    assert not Path("model").exists()
