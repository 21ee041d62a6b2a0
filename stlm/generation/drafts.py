"""`stlm drafts`: measures which draft makes a model write fastest; `stlm generate --draft auto` takes it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import BaseModel

from stlm.errors import UserError
from stlm.files import read_record, write_record
from stlm.generation.find import (
    choose_device,
    find_generator,
    find_speculator,
    find_weights,
    own_drafts,
    without_drafts,
)
from stlm.generation.interface import TextGenerator
from stlm.generation.sampling import Sampling, one_by_one
from stlm.generation.speculation import Drafting, Speculation, Speculator, Statistics
from stlm.provenance import processor_name
from stlm.text_table import text_table

# The draft that the measured table chooses.
AUTO = "auto"
# The tables are of this machine: they are neither committed nor DVC's.
FOLDER = Path(".state/drafts")
LENGTHS = (2, 4, 8)


class Row(BaseModel):
    """One way to write: the model alone (`draft` None), or with a draft. No rates where none drafted."""

    draft: str | None
    length: int | None
    tokens_per_second: float
    acceptance: float | None
    tokens_per_pass: float | None
    weights_sha256: str | None  # of a draft that is another run


class Table(BaseModel):
    """The measured drafts of one model."""

    model: str
    weights_sha256: str
    device: str
    sampling: str
    rows: list[Row]


@dataclass(frozen=True)
class Way:
    """A model that writes, alone (`drafting` None) or with a draft."""

    generator: TextGenerator | Speculator
    drafting: Drafting | None = None

    def symbols(
        self, prompt: str, most: int, sampling: Sampling, seed: int, statistics: Statistics
    ) -> Iterator[int]:
        """The tokens of one text, up to its end; `most` of them are wanted, more may come."""
        logits_V, numbers = self.generator.start(prompt), torch.Generator().manual_seed(seed)
        if self.drafting is None:
            return one_by_one(self.generator, logits_V, sampling, numbers)
        speculation = Speculation(self.generator, self.drafting, sampling, numbers, statistics)
        return speculation.symbols(logits_V, most)

    def write(self, prompts: Sequence[str], tokens: int, sampling: Sampling) -> Statistics:
        """Draw so many tokens after each prompt, or after several, one text after the other, where texts end.

        The n-th text has the seed n, from 0.
        """
        statistics, seeds = Statistics(), itertools.count()
        for prompt in prompts:
            left = tokens
            while left:
                symbols = self.symbols(prompt, left, sampling, next(seeds), statistics)
                left -= sum(1 for _ in itertools.islice(symbols, left))
        return statistics


def measure(
    ways: Mapping[str, Way], prompts: Sequence[str], tokens: int, sampling: Sampling, rounds: int
) -> dict[str, tuple[list[float], Statistics]]:
    """Seconds of each way in each round, in turns, and what became of its drafts; one round more warms up."""
    statistics = {name: way.write(prompts, tokens, sampling) for name, way in ways.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            begin = time.perf_counter()
            way.write(prompts, tokens, sampling)
            seconds[name].append(time.perf_counter() - begin)
    return {name: (seconds[name], statistics[name]) for name in ways}


def drafts(
    run: str,
    names: Sequence[str],
    lengths: Sequence[int],
    prompt: str,
    tokens: int,
    rounds: int,
    sampling: Sampling,
    device: str | None = None,
) -> str:
    """Measure drafts of `run` (all that it makes itself, if none are named), write its table, return it as
    text.

    Raises UserError for a model or draft that cannot be used so, and where there is none to measure.
    """
    weights, where = find_weights(run), choose_device(device)
    if weights is None:
        raise UserError(f"{run}: a published model; expected a run, whose table is found by its weights")
    own = own_drafts(run)
    names = list(names) or own
    if not names:
        raise UserError(f"{without_drafts(run)}; expected other models as drafts, by STUDY/RUN or folder")
    ways = {"alone": Way(find_generator(run, where))}
    keys: dict[str, tuple[str, int]] = {}
    for name in names:
        speculator = find_speculator(run, name, where)
        for length in sorted(set(lengths)):
            way = f"{name}, {length} tokens"
            ways[way], keys[way] = Way(speculator, Drafting(length)), (name, length)
    rows = []
    for way, (seconds, statistics) in measure(ways, [prompt], tokens, sampling, rounds).items():
        name, length = keys.get(way, (None, None))
        other = name is not None and name not in own
        rows.append(
            Row(
                draft=name,
                length=length,
                tokens_per_second=round(tokens / min(seconds), 2),
                acceptance=round(statistics.acceptance, 4) if statistics.drafted else None,
                tokens_per_pass=round(statistics.tokens_per_pass, 3) if statistics.passes else None,
                weights_sha256=find_weights(name) if other else None,
            )
        )
    machine = processor_name() if where.type == "cpu" else torch.cuda.get_device_name(where)
    table = Table(model=run, weights_sha256=weights, device=machine, sampling=str(sampling), rows=rows)
    write_record(_path(weights), table.model_dump())
    return _as_text(table)


def best_draft(run: str) -> Row:
    """The fastest row of a run's measured table. Raises UserError if there is none or a draft has changed."""
    weights = find_weights(run)
    again = f"run: stlm drafts {run}"
    if weights is None:
        raise UserError(
            f"--draft {AUTO}: {run} is a published model, for which nothing is measured; name a draft"
        )
    if not _path(weights).exists():
        raise UserError(f"--draft {AUTO}: the drafts of these weights of {run} are not measured; {again}")
    table = read_record(_path(weights), Table)
    best = max(table.rows, key=lambda row: row.tokens_per_second)
    if best.weights_sha256 is not None and find_weights(best.draft) != best.weights_sha256:
        raise UserError(
            f"--draft {AUTO}: the weights of {best.draft} have changed since it was measured; {again}"
        )
    return best


def _path(weights: str) -> Path:
    return FOLDER / f"{weights[:16]}.json"


def _as_text(table: Table) -> str:
    """The table for the terminal."""
    alone = table.rows[0].tokens_per_second
    best = max(table.rows, key=lambda row: row.tokens_per_second)
    header = ("draft", "length", "tokens/s", "times", "accepted", "tokens/pass", "")
    rows = [
        (
            row.draft or "none",
            "" if row.length is None else str(row.length),
            f"{row.tokens_per_second:,.1f}",
            f"{row.tokens_per_second / alone:.2f}",
            "" if row.acceptance is None else f"{row.acceptance:.1%}",
            "" if row.tokens_per_pass is None else f"{row.tokens_per_pass:.2f}",
            AUTO if row is best else "",
        )
        for row in table.rows
    ]
    return "\n".join(text_table([header, *rows], left=(0, 6)))
