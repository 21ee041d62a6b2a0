"""Bits per byte right after cuts of a published model, by what is cut, how much, and how it is chosen.

    python benchmarks/cuts.py  # some twenty minutes of one core
    python benchmarks/cuts.py --only layers heads --test-tokens 512

Reads data/raw/smollm2_135m and the tokens of params/inherit_ways.yaml's whole vocabulary (`stlm fetch
smollm2_135m`, `stlm tokenize healing_mix hf:smollm2_135m`). The model is cut as `training.inherit` does, on
the training text, and read on the validation text, in float32; nothing is trained. Half of the time goes to
the way `loss`, in proportion to --loss-tokens.

Writes results/benchmarks/cuts.json after each measurement. The same command goes on where it was killed;
`stlm document` makes the tables of docs/inheriting.md from the file.

Shapes: N rows, M tokens of a row and its last target.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from command import command

from stlm.cpu_runtime import tune_process

tune_process()  # before torch is imported

import numpy as np  # noqa: E402
import torch  # noqa: E402
from machine import machine  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from stlm.errors import UserError  # noqa: E402
from stlm.files import read_json, sha256, write_json  # noqa: E402
from stlm.model.cut import RIDGE, choose, choose_heads, cut_ffn, mask_heads  # noqa: E402
from stlm.model.cutting import cut, short, spread  # noqa: E402
from stlm.model.importance import first_order, influence, removals, second_moments, subset, unit_scores  # noqa: E402
from stlm.model.inherit_config import InheritConfig  # noqa: E402
from stlm.model.transformer import Transformer  # noqa: E402
from stlm.tokens.batches import Batches, ValidationSet  # noqa: E402
from stlm.tokens.tokenizer import load_tokenizer  # noqa: E402
from stlm.training.importance_tables import MEASURES, bits_per_byte  # noqa: E402
from stlm.training.published import load_published  # noqa: E402

OUTPUT = Path("results/benchmarks/cuts.json")
# SmolLM2-135M has 30 layers of 9 heads in 3 groups, 1,536 hidden units and a width of 576.
LAYERS = (20, 12, 8, 6)
UNITS = (1024, 768)
WIDTHS = {"384, 6 heads of 3 groups": (384, 6, 3)}
HEADS = {
    "7, with a copy of keys and values for each": (7, 7),
    "6, two of each group": (6, 3),
    "6, with a copy for each": (6, 6),
    "6, two whole groups": (6, 2),
}
RIDGES = (1e-4, 10.0)
# Layers and hidden units of about as many parameters.
BOTH = ((11, 1536), (15, 1024), (18, 768), (22, 512))
TABLES = ("layers", "units", "heads", "width", "both")
_VALIDATION_BYTES_PER_TOKEN = 5


class TestText:
    """Some windows of the validation text, at even distances, as `bits_per_byte` reads a `ValidationSet`."""

    def __init__(self, folder: Path, context: int, tokens: int) -> None:
        text = ValidationSet(folder, context, _VALIDATION_BYTES_PER_TOKEN * tokens)
        whole = next(text.batches(sys.maxsize))
        rows = tokens // context
        if not 1 <= rows <= len(whole[0]):
            raise UserError(f"--test-tokens {tokens}: expected {context} to {len(whole[0]) * context}")
        places = np.linspace(0, len(whole[0]) - 1, rows).round().astype(int)
        self.windows = tuple(array[places] for array in whole)
        _, targets_BL, mask_BL = self.windows
        self.n_tokens = int(mask_BL.sum())
        self.n_bytes = len(load_tokenizer(folder / "tokenizer").decode_bytes(targets_BL[mask_BL].tolist()))

    def batches(self, batch_size: int) -> Iterator[tuple[np.ndarray, ...]]:
        for begin in range(0, len(self.windows[0]), batch_size):
            yield tuple(array[begin : begin + batch_size] for array in self.windows)


# A cell of a table: its row and column, and the smaller model that it is the bits per byte of.
Cell = tuple[str, str, Callable[[], Transformer]]


class Cuts:
    """The cuts of one model. `content` is that of the file, which `save` writes."""

    def __init__(
        self,
        model: Transformer,
        rows_NM: Tensor,
        loss_tokens: int,
        content: dict[str, Any],
        save: Callable[[], None],
    ) -> None:
        self.model, self.rows_NM, self.content, self.save = model, rows_NM, content, save
        length = short(rows_NM).shape[1] - 1
        self.short_NM = short(rows_NM)[: max(1, loss_tokens // length)]

    def tables(self) -> dict[str, Iterator[Cell]]:
        """Name -> cells, the costly tables last."""
        return {
            "heads": self._heads(),
            "units": self._units(),
            "width": self._width(),
            "layers": self._layers(),
            "both": self._both(),
        }

    def _heads(self) -> Iterator[Cell]:
        columns = {"as they are": None, "refitted": RIDGE}
        columns |= {f"with a ridge of {ridge:g}": ridge for ridge in RIDGES}
        for row, counts in HEADS.items():
            for column, ridge in columns.items():
                yield row, column, partial(self.of_heads, *counts, ridge)

    def _units(self) -> Iterator[Cell]:
        columns = {f"`{measure}`": (measure, None) for measure in MEASURES} | {
            "`wanda`, refitted": ("wanda", RIDGE),
            **{f"with a ridge of {ridge:g}": ("wanda", ridge) for ridge in RIDGES},
        }
        for count in UNITS:
            for column, (measure, ridge) in columns.items():
                yield f"{count:,}", column, partial(self.of_units, count, measure, ridge)

    def _width(self) -> Iterator[Cell]:
        for row, (width, heads, kv_heads) in WIDTHS.items():
            for way in ("importance", "components"):
                for tied in (True, False):
                    sizes = {"width": width, "heads": heads, "kv_heads": kv_heads, "tied": tied}
                    column = f"`{way}`, {'tied' if tied else 'untied'}"
                    yield row, column, partial(self.smaller, InheritConfig(width=way), **sizes)

    def _layers(self) -> Iterator[Cell]:
        for count in LAYERS:
            for way in ("first", "spread", "influence", "loss"):
                yield f"{count}", f"`{way}`", partial(self.of_layers, way, count)

    def _both(self) -> Iterator[Cell]:
        for layers, units in BOTH:
            row = f"{layers} x {units:,}"
            yield row, "these layers, whole", partial(self.of_layers, "loss", layers)
            yield row, "both cut, refitted", partial(self.of_both, layers, units)

    def smaller(self, how: InheritConfig, **sizes: Any) -> Transformer:
        """The model cut as a run would."""
        return cut(self.model, self.model.config.model_copy(update=sizes), how, self.rows_NM).model

    def of_layers(self, way: str, count: int) -> Transformer:
        """The model of `count` layers; it shares their weights with the whole."""
        return subset(self.model, self.layers(way, count))

    def of_both(self, layers: int, units: int) -> Transformer:
        """The model of layers chosen by `loss` with fewer hidden units."""
        how = InheritConfig(layers=tuple(self.layers("loss", layers)))
        return self.smaller(how, layers=layers, ffn_width=units)

    def layers(self, way: str, count: int) -> list[int]:
        """`count` of the layers, chosen in a way of `inherit.layers`."""
        total = len(self.model.blocks)
        if way == "first":
            return list(range(count))
        if way == "spread":
            return spread(total, count)
        if way == "influence":
            return choose(torch.tensor(self._influence), count)
        self._leave_out(total - min(LAYERS))
        gone = [layer for layer, _ in self.content["left_out"][: total - count]]
        return sorted(set(range(total)) - set(gone))

    @cached_property
    def _influence(self) -> list[float]:
        return influence(self.model, self.rows_NM)

    def _leave_out(self, count: int) -> None:
        """Continue the search for `count` layers to leave out, one at a time, each of which is saved."""
        found = self.content.setdefault("left_out", [])
        while len(found) < count:
            kept = [n for n in range(len(self.model.blocks)) if n not in {layer for layer, _ in found}]
            ((place, loss),) = removals(subset(self.model, kept), self.short_NM, 1)
            found.append([kept[place], round(loss, 4)])
            print(f"left out: {found[-1]}", flush=True)
            self.save()

    def of_units(self, count: int, measure: str, ridge: float | None) -> Transformer:
        """The model of so many hidden units, refitted with a ridge or not at all."""
        downs, moments = self._downs, self._unit_moments
        first = self._first_order if measure == "taylor" else {}
        chosen = []
        for (name, down), moment_XX in zip(downs.items(), moments, strict=True):
            scores_X = unit_scores(measure, down.weight.detach(), moment_XX, 1, first.get(name))
            chosen.append(choose(scores_X, count))
        return cut_ffn(self.model, chosen, *(() if ridge is None else (moments, ridge)))

    def of_heads(self, heads: int, kv_heads: int, ridge: float | None) -> Transformer:
        """The model in which so many heads write into the stream, refitted with a ridge or not at all."""
        config, moments = self.model.config, self._head_moments
        chosen = []
        for block, moment_XX in zip(self.model.blocks, moments, strict=True):
            weight_YX = block.attention.out.weight.detach()
            scores_H = unit_scores("wanda", weight_YX, moment_XX, config.head_width, None)
            chosen.append(choose_heads(scores_H, config.kv_heads, heads, kv_heads)[0])
        return mask_heads(self.model, chosen, *(() if ridge is None else (moments, ridge)))

    @cached_property
    def _head_moments(self) -> list[Tensor]:
        outs = {f"{number}": block.attention.out for number, block in enumerate(self.model.blocks)}
        return list(second_moments(self.model, self.rows_NM, outs).values())

    @property
    def _downs(self) -> dict[str, nn.Module]:
        return {f"{number}": block.ffn.down for number, block in enumerate(self.model.blocks)}

    @cached_property
    def _unit_moments(self) -> list[Tensor]:
        return list(second_moments(self.model, self.rows_NM, self._downs).values())

    @cached_property
    def _first_order(self) -> dict[str, Tensor]:
        return first_order(self.model, self.rows_NM, self._downs, dict.fromkeys(self._downs, 1))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("data/raw/smollm2_135m"))
    parser.add_argument("--tokens", type=Path, default=Path("data/tokens/healing_mix/hf:smollm2_135m"))
    parser.add_argument("--only", nargs="+", choices=TABLES, default=TABLES, help="of the tables")
    parser.add_argument("--context", type=int, default=256, help="tokens of a row; default: 256")
    parser.add_argument("--measure-tokens", type=int, default=4096, help="that importance is measured on")
    parser.add_argument(
        "--loss-tokens", type=int, default=512, help="the same for layers by `loss`, at most 1,024"
    )
    parser.add_argument("--test-tokens", type=int, default=2048, help="that bits per byte are of")
    parser.add_argument("--output", type=Path, default=OUTPUT, help=f"default: {OUTPUT}")
    return command(parser, run)


def run(options: argparse.Namespace) -> int:
    """Measure what the file lacks."""
    for folder, how in (
        (options.model, "stlm fetch smollm2_135m"),
        (options.tokens, "stlm tokenize healing_mix hf:smollm2_135m"),
    ):
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; run: {how}")
    test = TestText(options.tokens, options.context, options.test_tokens)
    rows = max(1, options.measure_tokens // options.context)
    rows_NM = torch.from_numpy(Batches(options.tokens, options.context, rows, seed=0).batch(0))
    settings = {
        "model": options.model.name,
        "tokens_sha256": sha256(options.tokens / "meta.json"),
        "context": options.context,
        "measured_on_tokens": rows * options.context,
        "loss_on_tokens": options.loss_tokens,
        "test_tokens": test.n_tokens,
        "test_bytes": test.n_bytes,
    }
    content = _begun(options.output, settings) | {"machine": machine()}

    def save() -> None:
        write_json(options.output, content)

    model = load_published(options.model)
    config = model.config
    content["whole"] = {
        "layers": config.layers,
        "width": config.width,
        "heads": config.heads,
        "ffn_width": config.ffn_width,
        "bits_per_byte": content.get("whole", {}).get("bits_per_byte") or _bits(model, test),
    }
    cuts = Cuts(model, rows_NM, options.loss_tokens, content, save)
    for table, cells in cuts.tables().items():
        for row, column, measure in cells if table in options.only else ():
            found = content["tables"].setdefault(table, {}).setdefault(row, {})
            if column in found:
                continue
            begin = time.process_time()
            found[column] = _bits(measure(), test)
            content["cpu_seconds"] = round(content["cpu_seconds"] + time.process_time() - begin, 1)
            print(f"{table}: {row}, {column}: {found[column]}", flush=True)
            save()
    return 0


def _bits(model: Transformer, test: TestText) -> float:
    return round(bits_per_byte(model, test), 4)


def _begun(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The file's content, which must have been measured with the same settings; else a new one."""
    if not path.exists():
        return {
            "command": " ".join(["benchmarks/cuts.py", *sys.argv[1:]]),
            "settings": settings,
            "cpu_seconds": 0.0,
            "tables": {},
        }
    content = read_json(path)
    for key, value in settings.items():
        if (found := content.get("settings", {}).get(key)) != value:
            raise UserError(
                f"{path}: settings.{key}: found {found}, expected {value}; name another "
                "--output, or remove the file"
            )
    return content


if __name__ == "__main__":
    raise SystemExit(main())
