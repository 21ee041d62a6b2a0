"""The tables of docs/bytes.md: what byte-level models save in parameters, and what it costs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean

from stlm.docs_pages.committed import committed_documents, read_committed
from stlm.errors import UserError
from stlm.evaluation.statistics import SeedNoise, seed_noise
from stlm.files import write_text
from stlm.model.config import ModelConfig
from stlm.model.counts import parameter_counts
from stlm.report.curves import machine
from stlm.report.documents import FEW_NOTE, Documents, amount_note, compare_seeds, interval_text
from stlm.report.names import difference_text
from stlm.report.noise import noise_note
from stlm.report.results import TextRecord, TrainRecord
from stlm.study.load import load_study
from stlm.tokens.chunks import SYMBOLS
from stlm.tokens.names import vocabulary_size

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
            # Untied, as in the studies: an output of their own costs bytes little and is worth it.
            bytes_ = ModelConfig(**{**plain, "vocab_size": SYMBOLS, "tied": False, "bytes": own})
            count = parameter_counts(bytes_).embedding
            lines.append(
                f"| `{study}`: {core.layers} x {core.width}, {tokenizer} | {_millions(untied)} | "
                f"{_millions(tied)} | {width} | {_millions(count)} | {1 - count / tied:.1%} | "
                f"{1 - count / untied:.1%} |"
            )
    return "\n".join(lines) + "\n"


def cost_table(root: Path = Path()) -> str:
    """What the study's variants cost, and their bits per byte beside the baseline's, means over the seeds.

    Raises UserError naming a file of a run that is missing or broken.
    """
    folder = root / "results" / STUDY
    if not (folder / "metrics.json").is_file():
        return f"The study has not run yet: `make all STUDY={STUDY}`.\n"
    variants: dict[str, _Variant] = {}
    for run, train, last, _ in read_committed(folder):  # the baseline's first
        own = variants.setdefault(train.variant, _Variant(last.perplexity))
        own.trains.append(train)
        own.chunk_bytes.append(last.perplexity.bytes / last.perplexity.tokens)
        own.bits[train.seed] = last.perplexity.bits_per_byte
        own.documents[train.seed] = committed_documents(folder, run, last)
    base = next(iter(variants.values()))
    noise = seed_noise({name: own.bits for name, own in variants.items()})
    kept = any(own is not None for own in base.documents.values())
    lines = [
        "| variant | parameters | in the place of embedding and head | text read (MB) | training FLOPs | "
        f"training time | bits per byte (test) | difference | by seed |{' over documents |' if kept else ''}",
        f"| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |{' ---: |' if kept else ''}",
        *(f"| {' | '.join(_cost_cells(own, base, noise, kept))} |" for own in variants.values()),
    ]
    labels = {name: own.trains[0].label for name, own in variants.items()}
    text = amount_note((own.trains[0].label, own.measured) for own in variants.values())
    return "\n".join([*lines, "", text, *_cost_notes(base, noise, labels)]) + "\n"


@dataclass
class _Variant:
    """A variant's records and mean bytes of a chunk, a seed each, and its bits per byte by seed, of how much
    text, and of each document."""

    measured: TextRecord
    trains: list[TrainRecord] = field(default_factory=list)
    chunk_bytes: list[float] = field(default_factory=list)
    bits: dict[int, float] = field(default_factory=dict)
    documents: dict[int, Documents | None] = field(default_factory=dict)

    @property
    def text(self) -> float:
        """Bytes of text read."""
        return mean(
            train.tokens * length for train, length in zip(self.trains, self.chunk_bytes, strict=True)
        )

    @property
    def seconds(self) -> float:
        """Of training."""
        return mean(train.seconds for train in self.trains)


def _cost_cells(own: _Variant, base: _Variant, noise: SeedNoise | None, kept: bool) -> list[str]:
    train = own.trains[0]
    comparable = len({machine(one) for one in (*base.trains, *own.trains)}) == 1
    models = [one.trains[0].variant for one in (own, base)]
    differences = [value - base.bits[seed] for seed, value in own.bits.items() if seed in base.bits]
    half = "" if noise is None else f" ±{noise.half_width(differences, models):.3f}"
    return [
        train.label,
        _millions(train.parameters.total),
        _millions(train.parameters.embedding),
        f"{own.text / 1e6:.2f}",
        f"{mean(train.flops for train in own.trains):.2e}",
        f"{own.seconds / base.seconds:.2f} ×" if comparable else "–",
        f"{mean(own.bits.values()):.3f}",
        "" if own is base else f"{difference_text(mean(differences))}{half}",
        "" if own is base else ", ".join(map(difference_text, differences)),
        *([("" if own is base else _over_documents(own, base))] if kept else []),
    ]


def _over_documents(own: _Variant, base: _Variant) -> str:
    found = compare_seeds(own.documents, base.documents)
    return "–" if found is None else interval_text(found.interval, found.few, signed=True)


def _cost_notes(base: _Variant, noise: SeedNoise | None, labels: dict[str, str]) -> list[str]:
    notes = [
        "Text read: the tokens or chunks of training times the mean length of those of the test text.",
        f"Training time: a ratio to that of {base.trains[0].label}.",
    ]
    if noise is not None:
        notes += [
            "±: 95% interval of the mean difference over seeds, from the noise of the seeds of all variants",
            f"together (standard deviation {noise.sd:.4f}, {noise.dof} degrees of freedom), not adjusted for",
            "the number of differences.",
            noise_note(noise, labels),
        ]
    if any(own is not None for own in base.documents.values()):
        notes.append("Over documents: the difference's 95% interval over documents, paired.")
        notes += [FEW_NOTE] if any(own is not None and own.few for own in base.documents.values()) else []
    return [
        *notes,
        "",
        "At equal steps, kinds of chunks read different amounts of text and see contexts of different length",
        "in bytes: judge where chunks are cut with that in mind.",
    ]


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
