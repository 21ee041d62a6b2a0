"""The tables of docs/bytes.md: what byte-level models save in parameters, and what it costs."""

from __future__ import annotations

from pathlib import Path
from statistics import mean

from stlm.docs_pages.blocks import block, fill
from stlm.docs_pages.committed import CommittedVariant, differences, read_variants
from stlm.evaluation.statistics import SeedNoise, seed_noise
from stlm.files import write_text
from stlm.model.config import ModelConfig
from stlm.model.counts import parameter_counts
from stlm.report.curves import machine
from stlm.report.documents import FEW_NOTE, amount_note, interval_text
from stlm.report.names import difference_text
from stlm.report.notes import noise_note
from stlm.study.load import load_study
from stlm.tokens.chunks import SYMBOLS
from stlm.tokens.names import vocabulary_size

PAGE = Path("docs/bytes.md")
# The study whose results the page shows; its baseline is a model of tokens.
STUDY = "bytes"
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
            byte_model = {"width": width, "heads": heads, "ffn_width": 3 * width}
            # Untied, as in the studies: a separate output layer costs little for bytes and is worth it.
            bytes_ = ModelConfig(**{**plain, "vocab_size": SYMBOLS, "tied": False, "bytes": byte_model})
            count = parameter_counts(bytes_).embedding
            lines.append(
                f"| `{study}`: {core.layers} x {core.width}, {tokenizer} | {_millions(untied)} | "
                f"{_millions(tied)} | {width} | {_millions(count)} | {1 - count / tied:.1%} | "
                f"{1 - count / untied:.1%} |"
            )
    return "\n".join(lines) + "\n"


def cost_table(root: Path = Path()) -> str:
    """What the study's variants cost, and their bits per byte next to the baseline's, means over the seeds.

    Raises UserError naming a file of a run that is missing or broken.
    """
    folder = root / "results" / STUDY
    if not (folder / "metrics.json").is_file():
        return f"The study has not run yet: `make all STUDY={STUDY}`.\n"
    variants = read_variants(folder)  # the baseline's first
    base = next(iter(variants.values()))
    noise = seed_noise({name: variant.bits for name, variant in variants.items()})
    with_documents = any(documents is not None for documents in base.documents.values())
    header, ruler = (" over documents |", " ---: |") if with_documents else ("", "")
    lines = [
        "| variant | parameters | in the place of embedding and head | text read (MB) | training FLOPs | "
        f"training time | bits per byte (test) | difference | by seed |{header}",
        f"| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |{ruler}",
        *(
            f"| {' | '.join(_cost_cells(variant, base, noise, with_documents))} |"
            for variant in variants.values()
        ),
    ]
    labels = {name: variant.label for name, variant in variants.items()}
    text = amount_note((variant.label, variant.text) for variant in variants.values())
    return "\n".join([*lines, "", text, *_cost_notes(base, noise, labels)]) + "\n"


def _text_read(variant: CommittedVariant) -> float:
    """Bytes of text read in training, by the mean length of a chunk of the test text."""
    texts = {seed: last.perplexity for seed, last in variant.last.items()}
    return mean(
        train.tokens * texts[seed].bytes / texts[seed].tokens for seed, train in variant.trains.items()
    )


def _cost_cells(
    variant: CommittedVariant, base: CommittedVariant, noise: SeedNoise | None, with_documents: bool
) -> list[str]:
    counts = variant.train.parameters
    trains, base_trains = list(variant.trains.values()), list(base.trains.values())
    comparable = len({machine(train) for train in (*base_trains, *trains)}) == 1
    seconds = mean(train.seconds for train in trains) / mean(train.seconds for train in base_trains)
    cells = [
        variant.label,
        _millions(counts.total),
        _millions(counts.embedding),
        f"{_text_read(variant) / 1e6:.2f}",
        f"{mean(train.flops for train in trains):.2e}",
        f"{seconds:.2f} ×" if comparable else "–",
        f"{mean(variant.bits.values()):.3f}",
    ]
    if variant is base:
        return [*cells, "", "", *([""] if with_documents else [])]
    shared, models = differences(variant.bits, base.bits), [one.train.variant for one in (variant, base)]
    half = "" if noise is None else f" ±{noise.half_width(shared, models):.3f}"
    cells += [f"{difference_text(mean(shared))}{half}", ", ".join(map(difference_text, shared))]
    if with_documents:
        over = variant.compare(base)
        cells.append("–" if over is None else interval_text(over.interval, over.few, signed=True))
    return cells


def _cost_notes(base: CommittedVariant, noise: SeedNoise | None, labels: dict[str, str]) -> list[str]:
    notes = [
        "Text read: the tokens or chunks of training times the mean length of those of the test text.",
        f"Training time: a ratio to that of {base.label}.",
    ]
    if noise is not None:
        notes += [
            "±: 95% interval of the mean difference over seeds, from the noise of the seeds of all variants",
            f"together (standard deviation {noise.sd:.4f}, {noise.dof} degrees of freedom), not adjusted for",
            "the number of differences.",
            noise_note(noise, labels),
        ]
    if any(documents is not None for documents in base.documents.values()):
        notes.append("Over documents: the difference's 95% interval over documents, paired.")
        notes += [FEW_NOTE] if base.few else []
    return [
        *notes,
        "",
        "At equal steps, kinds of chunks read different amounts of text and see contexts of different length",
        "in bytes: judge where chunks are cut with that in mind.",
    ]


def bytes_page(root: Path = Path()) -> str:
    """The text of docs/bytes.md with its tables written anew."""
    tables = {"parameters": parameters_table, "cost": cost_table}
    text = (root / PAGE).read_text(encoding="utf-8")
    return fill(PAGE, text, lambda name, _: block(name, f"\n{tables[name](root)}\n"), needed=tables)


def write_bytes_page(root: Path = Path()) -> Path:
    """Write the tables into docs/bytes.md; its path."""
    write_text(root / PAGE, bytes_page(root))
    return PAGE
