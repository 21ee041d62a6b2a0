"""The texts that `stlm new` writes: an entry of params/corpora.yaml, and a study with its reasons."""

from __future__ import annotations

import json
import re
import textwrap
from dataclasses import dataclass

from stlm.corpora.language import Language
from stlm.corpora.text_files import Cut
from stlm.new.fit import (
    EPOCHS,
    FEW_BYTES,
    TOKENS_A_PARAMETER,
    TOKENS_OF_TEXT,
    Fit,
)

_WIDTH = 100


@dataclass(frozen=True)
class Corpus:
    """The content of the entry. `path` is absolute, or relative to the project's root."""

    name: str
    path: str
    files: dict[str, tuple[str, ...]]
    column: str
    cut: Cut
    language: Language
    about: str  # sizes in a line


@dataclass(frozen=True)
class Chosen:
    """The content of the study; `last_word`: expected number of questions, `minutes`: an estimate."""

    corpus: Corpus
    fit: Fit
    last_word: int
    train_bytes: int
    documents: int
    minutes: float
    speed: str


def scalar(value: str) -> str:
    """A text as YAML: plain if that is safe, otherwise in double quotes."""
    plain = re.fullmatch(r"[A-Za-z_/~][\w/.~-]*( [\w/.,()~-]+)*", value)
    return value if plain and value.lower() not in _NOT_TEXT else json.dumps(value, ensure_ascii=False)


_NOT_TEXT = {"true", "false", "yes", "no", "on", "off", "null", "y", "n", "~"}


def _comment(text: str, indent: int = 0) -> list[str]:
    prefix = " " * indent + "# "
    return [prefix + line for line in textwrap.wrap(text, _WIDTH - indent, break_on_hyphens=False)]


def corpus_entry(corpus: Corpus) -> str:
    """The entry for params/corpora.yaml; its comments are inside the entry."""
    lines = [
        f"{scalar(corpus.name)}:",
        "  # Written by `stlm new`; a copy of `sources` under another name makes another corpus.",
        f"  description: {scalar(corpus.about)}",
    ]
    if corpus.language.tag:
        lines.append(f"  language: {scalar(corpus.language.tag)} # a guess: {corpus.language.name}")
    lines.append('  licence: "not stated" # who may use the text, for the model card')
    if corpus.column != "text":
        lines.append(f"  text: {scalar(corpus.column)} # the column that holds the text")
    lines += ["  sources:", "    - kind: folder", f"      path: {scalar(corpus.path)}", "      files:"]
    for output, patterns in corpus.files.items():
        if len(patterns) == 1:
            lines.append(f"        {output}: {json.dumps(patterns[0], ensure_ascii=False)}")
        else:
            lines.append(f"        {output}:")
            lines += [f"          - {json.dumps(pattern, ensure_ascii=False)}" for pattern in patterns]
    if corpus.cut.separator:
        lines.append(f"      separator: {json.dumps(corpus.cut.separator, ensure_ascii=False)}")
    elif corpus.cut.documents:
        lines.append(f"      documents: {corpus.cut.documents}")
    return "\n".join(lines) + "\n"


def study_text(chosen: Chosen) -> str:
    """The study file."""
    fit, corpus = chosen.fit, chosen.corpus
    model, batch = fit.model, _rows(fit)
    seeds = list(range(fit.seeds))
    steps, warmup = fit.steps, max(1, min(fit.steps // 10, 1000))
    every = max(1, steps // 10)
    rate, matrices = (3e-3, 6e-3) if model.width <= 256 else (1e-3, 4e-3)
    lines = [
        *_head(chosen),
        f"description: {scalar(f'Five techniques compared on {corpus.about}.')}",
        f"corpus: {scalar(corpus.name)}",
        *_comment(_about_vocabulary(fit, chosen.train_bytes)),
        f"tokenizer: bpe-{fit.vocabulary}",
        *_comment(_about_seeds(fit)),
        f"seeds: {seeds}",
        "baseline: baseline",
        "",
        *_comment(_about_model(fit)),
        "model:",
        f"  layers: {model.layers}",
        f"  width: {model.width}",
        f"  heads: {model.heads}",
        f"  kv_heads: {model.kv_heads}",
        "  ffn: swiglu",
        f"  ffn_width: {model.ffn_width}",
        "  positions: rope",
        "  norm: rmsnorm",
        *_comment(_about_context(), 2),
        f"  context: {model.context}",
        "  dropout: 0.1",
        "  attention_dropout: 0.0 # slow on a CPU",
        "  tied: true",
        "",
        *_comment(_about_length(fit)),
        "training:",
        f"  steps: {steps}",
        f"  batch_size: {batch[0]} # x {model.context} tokens of context",
        f"  accumulation: {batch[1]}",
        f"  learning_rate: {_number(rate)}",
        f"  min_learning_rate: {_number(rate / 20)}",
        f"  warmup_steps: {warmup}",
        f"  checkpoints: {sorted({max(1, steps // 4), max(1, steps // 2)} - {steps})}",
        f"  validate_every: {every}",
        "  validation_bytes: 175000",
        f"  log_every: {max(1, steps // 100)}",
        f"  save_every: {every}",
        "",
        *_benchmarks(chosen),
        "",
        *_variants(fit, rate, matrices),
    ]
    return "\n".join(lines) + "\n"


def _head(chosen: Chosen) -> list[str]:
    name = chosen.corpus.name
    return [
        *_comment(
            f"Which technique suits {name}? Written by `stlm new`; every number may be changed, and "
            "params/README.md describes each key."
        ),
        *_comment(
            f"About {_minutes(chosen.minutes)} in all, for a machine as busy as when this was written "
            f"({chosen.speed}). Run it: make all STUDY={name}"
        ),
        *_warning(chosen),
    ]


def _number(value: float) -> str:
    """A rate in the notation of the other studies: 3.0e-3."""
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def _minutes(minutes: float) -> str:
    if minutes >= 90:
        return f"{minutes / 60:.1f} hours"
    return f"{minutes:.0f} minutes" if minutes >= 1.5 else "a minute"


def _rows(fit: Fit) -> tuple[int, int]:
    """(rows of a micro-batch, micro-batches of a step)."""
    rows = max(1, fit.tokens_a_step // fit.context)
    most = max(1, 8192 // fit.context)
    return (rows, 1) if rows <= most else (most, rows // most)


def _warning(chosen: Chosen) -> list[str]:
    lines = []
    if chosen.train_bytes < FEW_BYTES:
        lines += _comment(
            f"CAUTION: {chosen.train_bytes / 1000:,.0f} kB of training text is little. The held-out parts "
            "are "
            "a few pages, and differences between rows are mostly chance: more text would help more than any "
            "technique."
        )
    if chosen.fit.limit == "least":
        lines += _comment(
            f"CAUTION: text or time is too short for more than {chosen.fit.steps} steps, in which no model "
            "learns much."
        )
    return lines


def _about_vocabulary(fit: Fit, train_bytes: int) -> str:
    return (
        f"{fit.vocabulary:,} tokens, so that each is seen often enough to be learned: at most one for 1,000 "
        f"bytes of the {train_bytes / 1e6:,.2f} MB of training text, no more than there are distinct "
        "words, and "
        f"the embedding no larger than the rest of the model. A token has {fit.bytes_a_token:.1f} bytes of "
        "this text."
    )


def _about_context() -> str:
    return (
        "A power of two that three documents in four fit in, at most about the model's width: small models "
        "make little of longer rows, which cost more. Longer documents are read in parts."
    )


def _about_seeds(fit: Fit) -> str:
    if fit.seeds > 1:
        return "There is time for several seeds: they show how much of a difference is chance."
    return "One seed fits the time; add others, [0, 1, 2], before you believe a small difference."


def _about_model(fit: Fit) -> str:
    why = {
        "text": f"the largest for which the text, read {EPOCHS} times, has {TOKENS_OF_TEXT} tokens a "
        "parameter",
        "time": f"the largest that gets {TOKENS_A_PARAMETER} training tokens a parameter in the time",
        "least": "the smallest there is",
    }[fit.limit]
    return (
        f"{fit.parameters / 1e6:.2f}M parameters: {why}. Proportions as in the paper's models; `stlm sizes` "
        "proposes others."
    )


def _about_length(fit: Fit) -> str:
    why = {
        "text": f"more than {EPOCHS} passes over one text teach little (Muennighoff et al. 2023)",
        "time": "as many as fit the time",
        "least": "the least that is worth looking at",
    }[fit.limit]
    return (
        f"{fit.tokens / 1e6:,.2f}M tokens, {fit.epochs:.1f} passes over the training text: {why}. The "
        "recipe is "
        "that of the study `desk`."
    )


def _about_benchmarks(chosen: Chosen) -> str:
    language = chosen.corpus.language
    if language.tag == "en":
        others = "Others need a mirror or the network; add them by name: `blimp: {}`, `hellaswag: {}`."
    else:
        others = "The others (blimp, hellaswag, ...) are in English and would say nothing of this text."
    if chosen.last_word:
        return f"last_word makes its questions of the test text. {others}"
    if language.spaced:
        why = "this text would give fewer than 100 passages that end in a word used before"
    else:
        why = "it asks for words, and this text has no spaces between them"
    return (
        f"No benchmark: last_word is left out, as {why}. {others} Models are compared by bits per byte of "
        "the "
        "test text."
    )


def _benchmarks(chosen: Chosen) -> list[str]:
    lines = _comment(_about_benchmarks(chosen))
    lines += ["evaluation:"]
    if chosen.last_word:
        lines += ["  benchmarks:", f"    last_word: {{}} # about {min(chosen.last_word, 2000):,} questions"]
    else:
        lines += ["  benchmarks: {}"]
    return [
        *lines,
        "  modes: [harness]",
        "  intermediate_limit: 200 # questions at all checkpoints but the last",
        "  precision: auto",
        "  perplexity:",
        "    max_bytes: 350000",
    ]


def _variants(fit: Fit, rate: float, matrices: float) -> list[str]:
    model = fit.model
    # Equal size: positions have context x width weights, a unit of SwiGLU has 3 x width.
    learned = max(1, model.ffn_width - round(model.context / (3 * model.layers)))
    return [
        *_comment("Each row changes one thing, at equal size and tokens; the last is a whole recipe."),
        "variants:",
        "  baseline:",
        "    label: Baseline",
        *_comment("A table of positions instead of rotary ones; the FFN is narrower by as many weights.", 2),
        "  learned:",
        "    label: Learned positions",
        f"    model: {{positions: learned, ffn_width: {learned}}}",
        *_comment("Two matrices of 1.5 times the width instead of SwiGLU's three.", 2),
        "  simple-ffn:",
        "    label: Simple FFN",
        f"    model: {{ffn: gelu, ffn_width: {model.ffn_width * 3 // 2}}}",
        *_comment("Dropout helps where text is repeated often, and costs where it is not.", 2),
        "  dropout-free:",
        "    label: Dropout-free",
        "    model: {dropout: 0.0}",
        *_comment("The recipe of params/desk_fast.yaml: Muon, two learning rates, squared ReLU, a shift.", 2),
        "  fast:",
        "    label: Fast recipe",
        "    model:",
        "      {dropout: 0.0, qkv_shift: true, qk_norm: true, zero_init: true, ffn: relu2, ffn_width: "
        f"{model.ffn_width * 3 // 2}}}",
        "    training:",
        "      optimizer: muon",
        f"      learning_rate: {_number(2e-2 if rate == 3e-3 else 1e-2)} # of embeddings, gains and the "
        "shift",
        f"      matrix_learning_rate: {_number(matrices)}",
        "      schedule: linear",
        "      min_learning_rate: 0.0",
    ]
