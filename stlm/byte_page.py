"""The tables of docs/bytes.md: what byte-level models save in parameters, and what it costs."""

from __future__ import annotations

from pathlib import Path
from statistics import mean

from stlm.errors import UserError
from stlm.files import read_json, write_text
from stlm.model.config import ModelConfig, parameter_counts
from stlm.study import Study, load_study, vocabulary_size
from stlm.tokens.chunks import SYMBOLS

PAGE = Path("docs/bytes.md")
# The study whose results the page shows; its baseline is a model of tokens.
STUDY = "bytes"
_MARKS = {
    name: (f"<!-- {name}: written by `stlm document` -->\n", f"<!-- /{name} -->\n")
    for name in ("parameters", "cost")
}
# Cores, by the study that has them, and their tokenizers; byte dimensions with hidden units in proportion.
_CORES = (("paper", "gpt2"), ("desk", "bpe-4096"), ("bytes", "bpe-4096"))
_DIMENSIONS = ((32, 2), (64, 4), (128, 4))


def _millions(count: int) -> str:
    return f"{count / 1e6:.2f}M"


def parameters_table(root: Path = Path()) -> str:
    """Parameters in the place of embedding and head, for some cores and byte dimensions."""
    lines = [
        "| core | tokens: embedding and head | tied | bytes: dimension | in their place | fewer than tied | "
        "fewer than untied |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for study, tokenizer in _CORES:
        loaded = load_study(study, root=root)
        core = loaded.runs[loaded.baseline].model
        vocabulary = vocabulary_size(tokenizer)
        # Learned positions, if any, are no part of the comparison.
        plain = {**core.model_dump(), "positions": "rope", "vocab_size": vocabulary}
        untied = parameter_counts(ModelConfig(**{**plain, "tied": False})).embedding
        tied = parameter_counts(ModelConfig(**{**plain, "tied": True})).embedding
        for width, heads in _DIMENSIONS:
            own = {"width": width, "heads": heads, "ffn_width": 3 * width}
            count = parameter_counts(ModelConfig(**{**plain, "vocab_size": SYMBOLS, "bytes": own})).embedding
            lines.append(
                f"| `{study}`: {core.layers} x {core.width}, {tokenizer} | {_millions(untied)} | "
                f"{_millions(tied)} | {width} | {_millions(count)} | {1 - count / tied:.1%} | "
                f"{1 - count / untied:.1%} |"
            )
    return "\n".join(lines) + "\n"


def cost_table(root: Path = Path()) -> str:
    """Bits per byte of the study's variants beside its baseline, means over the seeds."""
    study, path = load_study(STUDY, root=root), root / "results" / STUDY / "metrics.json"
    if not path.is_file():
        return f"The study has not run yet: `make all STUDY={STUDY}`.\n"
    metrics = read_json(path)
    lines = [
        "| variant | parameters | in the place of embedding and head | bits per byte (test) | difference | "
        "by seed |",
        "| --- | ---: | ---: | ---: | ---: | --- |",
    ]
    base = _bits(study, study.runs[study.baseline].variant, metrics)
    for variant in dict.fromkeys(run.variant for run in study.runs.values()):
        run = next(run for run in study.runs.values() if run.variant == variant)
        own = _bits(study, variant, metrics)
        differences = [own[seed] - base[seed] for seed in own if seed in base]
        if not differences:
            continue  # not among the runs that there are
        by_seed = ", ".join(f"{difference:+.3f}" for difference in differences)
        lines.append(
            f"| {run.label} | {_millions(run.parameters.total)} | {_millions(run.parameters.embedding)} | "
            f"{mean(own.values()):.3f} | {mean(differences):+.3f} | {by_seed} |"
        )
    return "\n".join(lines) + "\n"


def _bits(study: Study, variant: str, metrics: dict[str, dict[str, float]]) -> dict[int, float]:
    """Test bits per byte of a variant by seed."""
    runs = [run for run in study.runs.values() if run.variant == variant]
    return {run.seed: metrics[run.name]["test_bits_per_byte"] for run in runs if run.name in metrics}


def bytes_page(root: Path = Path()) -> str:
    """The text of docs/bytes.md with its tables anew."""
    text = (root / PAGE).read_text(encoding="utf-8")
    for name, table in (("parameters", parameters_table(root)), ("cost", cost_table(root))):
        begin, end = _MARKS[name]
        if text.count(begin) != 1 or text.count(end) != 1:
            raise UserError(f"{PAGE}: expected once each: {begin.strip()} and {end.strip()}")
        before, rest = text.split(begin)
        text = before + begin + "\n" + table + "\n" + end + rest.split(end)[1]
    return text


def write_bytes_page(root: Path = Path()) -> Path:
    """Write the tables into docs/bytes.md; its path."""
    write_text(root / PAGE, bytes_page(root))
    return PAGE
