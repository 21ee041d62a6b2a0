"""`stlm generate --prompts`: a model continues many prompts, several at once, and prints JSON lines."""

from __future__ import annotations

import itertools
import json
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

from stlm.errors import Interrupted, UserError
from stlm.files import unreadable
from stlm.generation.batch import Batch
from stlm.generation.generate import Draft, Opened, check_seeds, continuation, open_model
from stlm.generation.sampling import Sampling
from stlm.generation.speculation import Statistics
from stlm.generation.tokens import TokenGenerator

# Files with a JSON text, or an object with the key `prompt`, a line.
_JSON = (".jsonl", ".ndjson")


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file: its lines, or for .jsonl and .ndjson the texts in them; blank lines are skipped.

    Raises UserError, with the number of the line, for a file that is missing, empty or not of this format.
    """
    try:
        # Line feeds alone end lines: JSON texts may contain other characters that end lines elsewhere.
        lines = [line.removesuffix("\r") for line in path.read_bytes().decode().split("\n")]
    except OSError as error:
        raise unreadable(path, error) from None
    except UnicodeDecodeError as error:
        raise UserError(f"--prompts: {path} is not UTF-8: {error}") from None
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise UserError(f"--prompts: {path} has no prompts; expected one a line")
    if path.suffix not in _JSON:
        return [line for _, line in numbered]
    return [_prompt(line, f"--prompts: {path}, line {number}") for number, line in numbered]


def _prompt(line: str, place: str) -> str:
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: not valid JSON ({error})") from None
    prompt = content.get("prompt") if isinstance(content, dict) else content
    if not isinstance(prompt, str):
        raise UserError(f"{place}: expected a text, or an object with a text under the key prompt")
    return prompt


def generate_all(
    run: str,
    path: Path,
    sampling: Sampling,
    length: int,
    seed: int,
    samples: int,
    cached: bool,
    device: str | None,
    draft: Draft,
    readout: str | None,
    batch: int,
) -> None:
    """Print a line of JSON for each sample of each prompt in the file `path`, in order.

    Its keys: `prompt`, `text`, which follows the prompt, `seed` and, where the prompt is longer than the
    context, `dropped`, the number of its first tokens (or bytes) that are not read. The text is the one that
    `generate` prints for the prompt and the seed. Errors as `read_prompts` and `generate`.
    """
    check_seeds(seed, samples)
    prompts, statistics = read_prompts(path), Statistics()
    try:
        opened = open_model(run, cached, device, draft, readout)
        asked = ((prompt, seed + number) for prompt in prompts for number in range(samples))
        while some := list(itertools.islice(asked, batch)):
            texts = _texts(opened, some, length, sampling, cached, statistics)
            for (prompt, own), (text, dropped) in zip(some, texts, strict=True):
                line = {"prompt": prompt, "text": text, "seed": own}
                if dropped:
                    line["dropped"] = dropped
                print(json.dumps(line, ensure_ascii=False), flush=True)
        opened.report(statistics)
    except KeyboardInterrupt:
        raise Interrupted("\ninterrupted", signal.SIGINT) from None


def _texts(
    opened: Opened,
    asked: Sequence[tuple[str, int]],
    length: int,
    sampling: Sampling,
    cached: bool,
    statistics: Statistics,
) -> Iterator[tuple[str, int]]:
    """The text for each prompt and seed, and how much of the prompt is not read; at once where possible."""
    generator = opened.generator
    if cached and opened.drafting is None and _in_batches(generator):
        prompts, seeds = zip(*asked, strict=True)
        for row in Batch(generator, sampling).write(prompts, seeds, length):
            yield generator.tokenizer.decode(row.drawn), row.dropped
        return
    for prompt, seed in asked:
        pieces = continuation(generator, prompt, length, sampling, seed, opened.drafting, statistics)
        dropped = generator.dropped
        yield "".join(pieces), dropped


def _in_batches(generator: object) -> bool:
    """Whether the model can write several texts at once: a run's, whose techniques support it."""
    return type(generator) is TokenGenerator and all(
        "batches" in technique.supported for technique in generator.transformer.techniques
    )
