"""The family of sizes as a table: parameters, cost and memory, by ways of sharing them."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from pydantic import ValidationError

from stlm.errors import UserError, shortened
from stlm.files import write_text
from stlm.model.config import ModelConfig
from stlm.model.counts import parameter_counts, training_flops_per_token
from stlm.model.family import FAMILY, TRAINING_BYTES, propose
from stlm.text_table import text_table as text_lines
from stlm.tokens.chunks import SYMBOLS

_MOST = 1e15
SIZES_PAGE = Path("docs") / "sizes.md"

# What the table shows of each size: label -> keys of `model` beside the size's own.
VARIANTS: dict[str, dict[str, object]] = {
    "baseline": {},
    "head untied": {"tied": False},
    "FFN shared (MobiLlama)": {"sharing": {"what": "ffn"}},
    "all shared (ALBERT)": {"sharing": {"what": "all"}},
    "all shared, LoRA 16": {"sharing": {"what": "all"}, "lora": {"rank": 16}},
    "all shared in pairs": {"sharing": {"what": "all", "order": "groups", "group": 2}},
    "embedding factorized, 128": {"embedding_rank": 128},
    "FFN of rank 64": {"low_rank": {"ffn": 64}},
}
HEADER = (
    "model",
    "layers x width",
    "parameters",
    "embedding",
    "share",
    "rest",
    "rest, each use",
    "FLOPs a token",
    "weights",
    "in bfloat16",
    "training",
)

_HEAD = """\
# The 10M, 50M and 100M models

`stlm document` writes this page (a test fails if it is out of date). `stlm sizes` prints the table;
`stlm sizes 20M --tokenizer bpe-4096` prints it for other sizes.

The rule:

- **Parts**: the paper's Modern Transformer with heads of width 32, four query heads to a key/value head
  (three if four do not divide them), a SwiGLU of three times the width, and a tied embedding.
- **Shape**: of all widths (in steps of 64) and depths within 10% of the size, the one whose width is nearest
  to 64 times its layers. The paper's 50M model has width 512 and 8 layers, GPT-2 small 768 and 12. For 50M
  the rule gives the paper's baseline.
"""
_FOOT = """\
- *parameters*: trained ones; shared ones count once, as in a checkpoint. *Embedding*: the table of tokens,
  and the head if it is untied. *Rest, each use*: the rest if no layer shared weights.
- *FLOPs a token*: forward and backward, context 512; a shared matrix counts each time it is used.
- *weights*: float32; *training*: weights, gradients and AdamW's two moments in float32, without activations.
"""


def parse_sizes(texts: Sequence[str]) -> dict[str, float]:
    """Sizes as people write them, 20M or 1.5e6, by that text. Raises ``UserError`` for anything else."""
    found = {}
    for text in texts:
        match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?(?:e[0-9]+)?)([kMB]?)", text)
        number = float(match[1]) * {"": 1, "k": 1e3, "M": 1e6, "B": 1e9}[match[2]] if match else math.nan
        if not 0 < number <= _MOST:
            raise UserError(
                f"{shortened(text)!r} is no number of parameters up to {_MOST:.0e}; expected for example "
                "20M, 500k or 1.5e6"
            )
        found[text] = number
    return found


def family(sizes: Mapping[str, float], vocab_size: int, context: int = 512) -> dict[str, ModelConfig]:
    """The baseline of each size, by name. Raises ``UserError`` for a size that the rule cannot give."""
    if context < 2:
        raise UserError(f"--context: {context} tokens leave nothing to predict from; expected 2 or more")
    try:
        return {name: propose(parameters, vocab_size, context) for name, parameters in sizes.items()}
    except ValueError as error:
        raise UserError(str(error)) from None


def rows(models: Mapping[str, ModelConfig]) -> list[tuple[str, ...]]:
    """A row for each size and each variant that it can have, cells as in `HEADER`."""
    found = []
    for name, model in models.items():
        for label, keys in VARIANTS.items():
            with suppress(ValidationError):  # ranks and groups that are too large for the size
                own = ModelConfig.model_validate({**model.model_dump(), **keys})
                found.append((f"{name} {label}", *_cells(own)))
    return found


def _cells(config: ModelConfig) -> tuple[str, ...]:
    counts = parameter_counts(config)
    each = parameter_counts(config.model_copy(update={"sharing": None})).non_embedding
    return (
        f"{config.layers} x {config.width}",
        f"{counts.total:,}",
        f"{counts.embedding:,}",
        f"{counts.embedding / counts.total:.0%}",
        f"{counts.non_embedding:,}",
        f"{each:,}",
        f"{training_flops_per_token(config) / 1e6:,.1f}M",
        *(_memory(size * counts.total) for size in (4, 2, TRAINING_BYTES)),
    )


def _memory(size: int) -> str:
    """Bytes in units of a million."""
    return f"{size / 1e6:,.0f} MB"


def text_table(models: Mapping[str, ModelConfig]) -> str:
    """The table for the terminal."""
    return "\n".join(text_lines([HEADER, *rows(models)]))


def _markdown(table: Sequence[Sequence[str]]) -> str:
    ruler = ["---", *("---:" for _ in HEADER[1:])]
    return "\n".join("| " + " | ".join(row) + " |" for row in (HEADER, ruler, *table))


def sizes_page() -> str:
    """The text of docs/sizes.md."""
    models = family(FAMILY, vocab_size=50257)
    parts = [_HEAD]
    for name, model in models.items():
        parts.append(
            f"- **{name}**: `{{layers: {model.layers}, width: {model.width}, heads: {model.heads}, kv_heads: "
            f"{model.kv_heads}, ffn_width: {model.ffn_width}}}`"
        )
    parts += ["", f"With GPT-2's vocabulary of 50,257 tokens:\n\n{_markdown(rows(models))}\n", _FOOT]
    return "\n".join([*parts, _share(models)])


def _share(models: Mapping[str, ModelConfig]) -> str:
    """What the embedding takes, as the paper discusses it (sections 2.1 and 5.2)."""
    shares = []
    for name, model in models.items():
        counts = parameter_counts(model)
        shares.append(f"{counts.embedding / counts.total:.0%} of {name}")
    small = next(iter(models.values()))
    table = parameter_counts(small).embedding
    factorized = parameter_counts(small.model_copy(update={"embedding_rank": 64})).embedding
    byte_level = {**small.model_dump(), "vocab_size": SYMBOLS, "bytes": {}, "tied": False}
    in_its_place = parameter_counts(ModelConfig.model_validate(byte_level)).embedding
    text = (
        "The embedding grows with the width, the layers with their number and the square of the width. The "
        f"embedding is {', '.join(shares)}, so sharing layers saves little in the smallest models. There the "
        f"table itself must shrink: in the smallest model, factorizing it to 64 reduces it from "
        f"{table / 1e6:.1f}M parameters to {factorized / 1e6:.1f}M. A [byte-level model](bytes.md) replaces "
        f"embedding and head by {in_its_place / 1e6:.2f}M parameters."
    )
    return textwrap.fill(text, width=110, break_on_hyphens=False) + "\n"


def write_sizes_page(root: Path = Path()) -> Path:
    """Write docs/sizes.md; its path."""
    write_text(root / SIZES_PAGE, sizes_page())
    return SIZES_PAGE
