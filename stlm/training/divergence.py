"""Finds where a run diverged: the layer, by repeating the step, and the documents of the batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stlm.files import write_json
from stlm.model.rows import Rows
from stlm.model.transformer import Transformer
from stlm.study.runs import Run
from stlm.tokens.batches import Batches
from stlm.tokens.shards import read_meta
from stlm.tokens.tokenizer import load_tokenizer
from stlm.training.watch import HEAD, outputs, users

RECORD = "divergence.json"
_PARTS = {
    "attention": "the attention output of {}",
    "ffn": "the feed-forward output of {}",
    "residual": "the residual stream after {}",
}
# Limits of what the message shows; the record is complete.
_ROWS, _DOCUMENTS, _CHARACTERS = 3, 2, 70


class Part(NamedTuple):
    """The rows of a micro-batch that one process read in the step; the first is number `first` of it."""

    micro: int
    first: int
    rows: Rows

    def place(self, sentence: str, layer: str, rows: Sequence[int]) -> Place:
        """A place in some of its rows, which are counted from its first one."""
        return Place(sentence, layer, self.micro, [self.first + row for row in rows])


@dataclass(frozen=True)
class Place:
    """The first value that is not finite: a sentence, the layer, and rows of a micro-batch, worst first."""

    sentence: str
    layer: str
    micro: int
    rows: list[int]


def locate(
    model: Transformer,
    loss_of: Callable[[Rows], Tensor],
    parts: Iterable[Part],
    watched: Sequence[dict[str, Any]] = (),
) -> Place:
    """Repeat the forward and backward passes of a step and find the first value that is not finite.

    `loss_of`: the mean loss of rows as techniques have drawn them, as in training but without torch.compile.
    So a row is judged by the draw with which the step diverged.
    `parts`: those of the step, read once; the iterator sets the random numbers.
    `watched`: the rows of watch.csv so far; they give the largest growth if the step shows nothing.
    """
    layers_of = {name: layers for name, layers in users(model).values()}
    broken = [name for name, p in model.named_parameters() if not p.isfinite().all()]
    if broken:
        layers = list(dict.fromkeys(layer for name in broken for layer in layers_of[name]))
        which = "of all layers" if len(layers) == len(model.blocks) + 2 else f"of {', '.join(layers)}"
        sentence = (
            f"the weights {which} were no longer finite when it was noticed, after the step's update, so "
            f"that the step cannot be repeated{_growth(watched)}"
        )
        part = next(iter(parts))
        return part.place(sentence, layers[0], range(len(part.rows.tokens_BL)))
    model.zero_grad(set_to_none=True)
    worst: tuple[float, Part] | None = None
    for part in parts:
        first: list[tuple[str, str, Tensor]] = []

        def visit(layer: str, name: str, output: Tensor, first=first) -> None:
            finite_B = output.isfinite().flatten(1).all(dim=1)
            if not first and not finite_B.all():
                first.append((layer, name, finite_B))

        with outputs(model, visit):
            loss = loss_of(part.rows)
        if first:
            layer, name, finite_B = first[0]
            what = "the final norm's output" if layer == HEAD else _PARTS[name].format(layer)
            rows = _false(finite_B)
            if len(finite_B) != len(part.rows.tokens_BL):  # a technique handed the layer other rows
                losses_B = _row_losses(model, loss_of, part.rows)
                rows = _false(losses_B.isfinite()) or _worst(losses_B)
            return part.place(f"{what} is the first that is not finite", layer, rows)
        if not loss.isfinite():
            losses_B = _row_losses(model, loss_of, part.rows)
            rows = _false(losses_B.isfinite()) or _worst(losses_B)
            return part.place("all activations are finite, the loss of the head is not", HEAD, rows)
        loss.backward()
        if worst is None or loss.item() > worst[0]:
            worst = loss.item(), part
        # The backward pass starts at the head, so it reached the last parameter in the model's order first.
        for name, parameter in reversed(list(model.named_parameters())):
            if parameter.grad is not None and not parameter.grad.isfinite().all():
                layers = layers_of[name]
                sentence = f"the gradient of {name} ({', '.join(layers)}) is the first that is not finite"
                return part.place(sentence, layers[0], _worst(_row_losses(model, loss_of, part.rows)))
    assert worst is not None, "a step has micro-batches"
    part = worst[1]
    largest = {n: p.grad.abs().max().item() for n, p in model.named_parameters() if p.grad is not None}
    name = max(largest, key=largest.__getitem__)
    sentence = (
        "repeated, and without torch.compile, the step has no value that is not finite; the largest "
        f"gradient, {largest[name]:.3g}, is that of {name} ({', '.join(layers_of[name])}){_growth(watched)}"
    )
    return part.place(sentence, layers_of[name][0], _worst(_row_losses(model, loss_of, part.rows)))


@torch.no_grad()
def _row_losses(model: Transformer, loss_of: Callable[[Rows], Tensor], rows: Rows) -> Tensor:
    """The loss [B] of each row alone, without dropout."""
    training = model.training
    model.eval()
    losses = [loss_of(rows.alone(row)) for row in range(len(rows.tokens_BL))]
    model.train(training)
    return torch.stack(losses)


def _false(flags_B: Tensor) -> list[int]:
    return (~flags_B).nonzero().flatten().tolist()


def _worst(losses_B: Tensor) -> list[int]:
    return losses_B.argsort(descending=True).tolist()


def _growth(watched: Sequence[dict[str, Any]]) -> str:
    """The layer whose activations grew most since the first row, as the ending of a sentence."""
    first: dict[str, float] = {}
    last: dict[str, tuple[float, int]] = {}
    for row in watched:
        value = row.get("residual_rms", math.nan)
        if math.isfinite(value) and value > 0:
            first.setdefault(row["layer"], value)
            last[row["layer"]] = value, row["step"]
    if not first:
        return ""
    layer = max(first, key=lambda name: last[name][0] / first[name])
    value, step = last[layer]
    return f"; by step {step} the activations of {layer} had grown most, {value / first[layer]:.3g} times"


def documents(run: Run, batches: Batches, step: int, place: Place) -> list[dict[str, Any]]:
    """The documents in each of the place's rows, with the first words of each document's part.

    Documents are numbered from 0 in their shard of the train split. A row's first document may begin in the
    row before.
    """
    meta = read_meta(run.tokens_folder)
    tokenizer = load_tokenizer(run.tokens_folder / "tokenizer")
    sources = batches.sources(step - 1, place.micro, run.training.accumulation)
    described = []
    for row in place.rows:
        component, start = sources[row]
        parts = []
        for shard, document, tokens in component.documents(start, start + batches.context + 1):
            text = " ".join(tokenizer.decode(tokens.tolist()).split())
            path = meta.components[component.name].splits.train.shards[shard].path
            parts.append({"corpus": component.name, "shard": path, "document": document, "text": text})
        described.append({"micro_batch": place.micro, "row": row, "documents": parts})
    return described


def explain(
    run: Run,
    model: Transformer,
    batches: Batches,
    step: int,
    loss_of: Callable[[Rows], Tensor],
    parts: Iterable[Part],
    watched: Sequence[dict[str, Any]],
) -> str:
    """Lines that say where step `step` diverged, for the error; divergence.json in the state has everything.

    `loss_of`, `parts` and `watched` are those of `locate`.
    """
    place = locate(model, loss_of, parts, watched)
    rows = documents(run, batches, step, place)
    path = run.state_folder / RECORD
    write_json(path, {"step": step, "layer": place.layer, "found": place.sentence, "rows": rows})
    lines = [
        f"Where: {place.sentence}.",
        f"Text, of {len(rows)} of the {run.training.batch_size} rows of micro-batch {place.micro + 1} of "
        f"{run.training.accumulation} (all of it in {path}):",
    ]
    for row in rows[:_ROWS]:
        for part in row["documents"][:_DOCUMENTS]:
            text = part["text"][:_CHARACTERS] + ("…" if len(part["text"]) > _CHARACTERS else "")
            place_in_corpus = f"{part['corpus']}, {part['shard']}, document {part['document']}"
            lines.append(f"  row {row['row']}: {place_in_corpus}: “{text}”")
        if len(row["documents"]) > _DOCUMENTS:
            lines.append(f"  row {row['row']}: and {len(row['documents']) - _DOCUMENTS} more documents")
    if len(rows) > _ROWS:
        lines.append(f"  and {len(rows) - _ROWS} more rows")
    return "\n".join(lines)
