"""What the models of a study are made of: a diagram of each, and bars of where the parameters are.

Diagrams are drawn from the modules of the built model, so that a new kind of module needs nothing here: it is
drawn with its class name, the shapes of its parameters and its integer settings.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch, Patch, Rectangle
from torch import nn

from stlm.model.config import ModelConfig
from stlm.model.counts import build_on_meta, grouped_parameters, is_training_only, parameter_groups
from stlm.report.names import count, some
from stlm.report.results import Results
from stlm.report.style import GREY, count_axis, figure, group_colours, legend, tint, variant_rows, write_data

# Settings in which models of one architecture may differ.
_UNDRAWN = {"dropout", "attention_dropout", "norm_eps", "rope_theta", "zero_init"}
# All sizes in inches.
_WIDTH, _TEXT, _LINE, _GAP, _INDENT, _SQUARE = 8.0, 2.3, 0.27, 0.07, 0.14, 0.17
_MOST_SQUARES = 32
_SETS = ("#56B4E9", "#F0E442", "#CC79A7", "#D55E00", "#0072B2", "#8c8c8c")


class Part(NamedTuple):
    """A module of a model, or several of the same structure at the same place of repeated blocks."""

    name: str
    kind: str
    detail: str  # shapes and settings
    groups: frozenset[str]  # of its parameters
    number: int  # of parameters, without those of earlier parts, which `tied` names
    tied: str
    sets: tuple[int, ...]  # the set of weights of each of the repeated modules; empty where none share
    parts: tuple[Part, ...]

    @property
    def text(self) -> list[str]:
        """Its kind, detail and earlier weights, in the lines that they take in the diagram."""
        detail = ", ".join(filter(None, [self.detail, f"weights of {self.tied}" if self.tied else ""]))
        return textwrap.wrap(f"{self.kind}: {detail}".removesuffix(": "), 75)

    @property
    def height(self) -> float:
        """Of its box with its parts within, in inches."""
        inner = sum(part.height + _GAP for part in self.parts)
        return _LINE * (len(self.text) + bool(self.sets)) + (inner + _GAP if self.parts else 0.0)


def module_tree(model: nn.Module) -> Part:
    """The model as a part, and within it its modules in their order."""
    groups = {id(parameter): group for parameter, group in reversed(list(grouped_parameters(model)))}
    return _part("model", "", [model], groups, {})


def _part(
    name: str, path: str, modules: Sequence[nn.Module], groups: Mapping[int, str], seen: dict[int, str]
) -> Part:
    """The part that `modules` of one structure are. `seen`: id of earlier parts' parameters -> path."""
    parameters = {id(p): p.numel() for module in modules for p in module.parameters() if id(p) in groups}
    weights = [tuple(map(id, module.parameters(recurse=False))) for module in modules]
    sets = list(dict.fromkeys(weights))
    number = sum(numel for key, numel in parameters.items() if key not in seen)
    tied = ", ".join(sorted({seen[key] for key in sets[0] if key in seen}))
    seen.update((key, path) for keys in sets for key in keys if key not in seen)
    shared = tuple(map(sets.index, weights)) if sets[0] and len(sets) < len(modules) else ()
    children = _children(modules)
    parts = [_part(child, f"{path} {child}".strip(), inner, groups, seen) for child, inner in children]
    bases = [base.__name__ for base in type(modules[0]).__mro__]
    kind = next(base for base in bases if base[0] != "_")
    used = frozenset(groups[key] for key in parameters)
    return Part(name, kind, _detail(modules[0]), used, number, tied, shared, tuple(parts))


def _children(modules: Sequence[nn.Module]) -> Iterator[tuple[str, list[nn.Module]]]:
    """The name and the modules of each part within `modules`; modules alike in a list are one part."""
    for attribute, child in modules[0].named_children():
        if is_training_only(child):
            continue
        name, children = attribute.replace("_", " "), [m.get_submodule(attribute) for m in modules]
        if isinstance(child, nn.ModuleList):
            alike: dict[str, list[int]] = {}
            for place, element in enumerate(child):
                shapes = [(name, parameter.shape) for name, parameter in element.named_parameters()]
                alike.setdefault(f"{element!r} {shapes}", []).append(place)
            for places in alike.values():
                yield f"{name} {_numbers(places)}", [one[place] for one in children for place in places]
        elif type(child).__name__ != "Dropout":
            yield name, children


def _detail(module: nn.Module) -> str:
    """Inputs and outputs of a linear map; else a module's integer settings and its parameters' shapes."""
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return f"{module.in_features:,} → {module.out_features:,}"
    parameters = dict(module.named_parameters(recurse=False))
    shapes = {name: " × ".join(f"{size:,}" for size in one.shape) for name, one in parameters.items()}
    integers = {name: value for name, value in vars(module).items() if type(value) is int and name[0] != "_"}
    listed = [f"{name} {value:,}" for name, value in integers.items() if "weight" not in shapes]
    listed += [shape if name == "weight" else f"{name} {shape}" for name, shape in shapes.items()]
    return ", ".join(listed).replace("_", " ")


def _numbers(places: Sequence[int]) -> str:
    """The places 0, 1, 2, 4 as the numbers 1–3, 5."""
    spans: list[list[int]] = []
    for place in places:
        if spans and place == spans[-1][-1]:
            spans[-1][1:] = [place + 1]
        else:
            spans.append([place + 1])
    return ", ".join("–".join(map(str, span)) for span in spans)


def settings(config: ModelConfig) -> str:
    """What the modules do not show: settings that are words, and switches and fractions set by the user."""
    defaults = type(config)().model_dump()
    shown = [f"from the top down; context {config.context:,}"]
    for name, value in config.model_dump(exclude=_UNDRAWN).items():
        words = name.replace("_", " ")
        if isinstance(value, bool) and value != defaults[name]:
            shown.append(words if value else f"not {words}")
        elif isinstance(value, str) or (isinstance(value, float) and value != defaults[name]):
            shown.append(f"{words} {value}")
    return ", ".join(shown)


def _models(results: Results) -> Iterator[tuple[str, str, ModelConfig, nn.Module]]:
    """Each variant's name, label, config, and model with its techniques, without the values of weights."""
    for variant, runs in results.variants.items():
        run = results.study.runs[runs[-1].name]
        model = build_on_meta(run.model, tuple(run.techniques.values()))
        yield variant, runs[-1].train.label, run.model, model


def write_architectures(folder: Path, results: Results) -> None:
    """Write `folder`/architecture-<variant>.svg, one for all variants of the same architecture."""
    labels: dict[tuple[Part, str], dict[str, str]] = {}
    for variant, label, config, model in _models(results):
        labels.setdefault((module_tree(model), settings(config)), {})[variant] = label
    for (tree, note), named in labels.items():
        draw_architecture(folder, f"architecture-{next(iter(named))}", some(list(named.values())), tree, note)


def draw_architecture(folder: Path, name: str, label: str, tree: Part, note: str) -> None:
    """Write `folder`/`name`.svg: the diagram of a model, with its settings as a note."""
    title, note = f"{label}: {count(tree.number)} parameters", textwrap.fill(note, 100)
    height = tree.height + 0.75 + 0.2 * note.count("\n")
    with figure(folder, name, f"Architecture of {title}", _WIDTH, height, heading=title) as drawing:
        axes = drawing.subplots()
        axes.set(xlim=(0, _WIDTH), ylim=(tree.height + 0.02, -0.02))
        axes.set_axis_off()
        _draw(axes, tree, 0.02, 0.0, group_colours(_groups(tree), 0.3))
        drawing.supxlabel(note, x=0.01, ha="left", fontsize=9, color=GREY)


def _groups(part: Part) -> Iterator[str]:
    """The groups of boxes that are coloured, in their order."""
    if len(part.groups) == 1:
        yield from part.groups
    else:
        for inner in part.parts:
            yield from _groups(inner)


def _draw(axes: Axes, part: Part, x: float, y: float, colours: Mapping[str, str]) -> None:
    """A box with the part's name, kind, shape and number of parameters, and within it its parts."""
    box = FancyBboxPatch(
        (x, y),
        _WIDTH - 2 * x,
        part.height,
        boxstyle="round,pad=0,rounding_size=0.06",
        facecolor=colours[min(part.groups)] if len(part.groups) == 1 else "#fcfcfc",
        edgecolor="#999999",
        linewidth=0.8,
    )
    axes.add_patch(box)
    middle, style = y + _LINE / 2, {"va": "center_baseline", "fontsize": 9}
    axes.text(x + 0.1, middle, part.name, fontweight="bold", **style)
    axes.text(_WIDTH - x - 0.1, middle, f"{part.number:,}" if part.number else "–", ha="right", **style)
    for line in part.text:
        axes.text(_TEXT, y + _LINE / 2, line, **style)
        y += _LINE
    if part.sets:
        _draw_sets(axes, part.sets[:_MOST_SQUARES], y + _LINE / 2)
        y += _LINE
    for inner in part.parts:
        _draw(axes, inner, x + _INDENT, y, colours)
        y += inner.height + _GAP


def _draw_sets(axes: Axes, sets: Sequence[int], y: float) -> None:
    """A numbered square for each repeated module, in the colour of its set of weights."""
    for place, used in enumerate(sets):
        x, side = _TEXT + _SQUARE * place, 0.9 * _SQUARE
        colour = tint(_SETS[used % len(_SETS)], 0.55)
        axes.add_patch(Rectangle((x, y - side / 2), side, side, facecolor=colour, edgecolor="none"))
        axes.text(x + side / 2, y, str(used + 1), fontsize=7, ha="center", va="center")


def write_parameters(folder: Path, results: Results) -> None:
    """Write `folder`/parameters.svg and data/parameters.csv: a bar for all variants with equal groups."""
    bars: dict[tuple[tuple[str, int], ...], list[str]] = {}
    records = []
    for variant, label, _, model in _models(results):
        groups = parameter_groups(model)
        bars.setdefault(tuple(groups.items()), []).append(label)
        records += [{"variant": variant, "group": group, "value": number} for group, number in groups.items()]
    write_data(folder, "parameters", records)
    title = f"Where the parameters are, study {results.study.name}"
    colours = group_colours(group for bar in bars for group, _ in bar)
    longest = max(sum(number for _, number in bar) for bar in bars)
    with figure(folder, "parameters", title, 9, 1.7 + 0.42 * len(bars)) as drawing:
        axes = drawing.subplots()
        for place, bar in enumerate(bars):
            _draw_bar(axes, place, bar, longest, colours)
        variant_rows(axes, [textwrap.fill(some(labels, most=2), 36) for labels in bars.values()], bands=False)
        axes.set_xlim(0, 1.12 * longest)
        count_axis(axes.xaxis, 6)
        axes.set_xlabel("parameters, shared ones once")
        handles = [Patch(facecolor=colour, label=group) for group, colour in colours.items()]
        legend(drawing, handles, min(4, len(handles)))


def _draw_bar(
    axes: Axes, place: int, bar: Sequence[tuple[str, int]], longest: int, colours: Mapping[str, str]
) -> None:
    total, start = sum(number for _, number in bar), 0
    for group, number in bar:
        axes.barh(place, number, left=start, height=0.68, color=colours[group], edgecolor="white")
        if number > 0.075 * longest:  # room for its share
            text = f"{number / total:.0%}"
            axes.text(start + number / 2, place, text, ha="center", va="center", fontsize=9)
        start += number
    axes.text(total + 0.01 * longest, place, count(total), ha="left", va="center", fontsize=9.5)
