"""Generated documentation: params/README.md from the schema, README.md's results from their files."""

from __future__ import annotations

import json
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from stlm.corpora.config import (
    BenchmarkEntry,
    CorpusEntry,
    FolderSource,
    HubSource,
    LlamaShape,
    MirrorSource,
    ModelEntry,
    SyntheticSource,
    VocabularyEntry,
    WheelSource,
)
from stlm.docs_pages.blocks import block, fill
from stlm.docs_pages.committed import read_committed
from stlm.docs_pages.findings import findings_table
from stlm.docs_pages.inherited import inherited_block
from stlm.errors import UserError
from stlm.evaluation.config import BenchmarkConfig, EvaluationConfig, PerplexityConfig
from stlm.files import write_text
from stlm.model.byte_config import ByteConfig
from stlm.model.config import ModelConfig
from stlm.model.inherit_config import InheritConfig
from stlm.model.reduction import LoraConfig, LowRankConfig, SharingConfig
from stlm.report.table import Table, markdown
from stlm.study.catalogues import PARAMS
from stlm.study.schema import Published, StudyFile, Variant
from stlm.techniques.registry import technique_class, technique_names
from stlm.tokens.config import DataConfig, SelectConfig
from stlm.training.config import TrainingConfig

PARAMS_README = PARAMS / "README.md"
README = Path("README.md")
# The study that README.md shows.
SHOWN = Path("results/desk")
# The first words of the headers of the columns that README.md takes from the table of docs/findings.md.
_COLUMNS = ("", "bits per byte", "difference from", "BLiMP")
_MOST_ROWS = 5
# Variants whose number of parameters is within this share of the baseline's count as equally large.
_EQUAL_SIZE = 0.01

_HEAD = """\
# Parameters

All parameters of the pipeline are in this folder, in plain YAML. `stlm document` writes this page from the
schema that checks the files (a test fails when they differ): do not edit it.

- A **study** is a file: `smoke.yaml`, `desk.yaml`, `paper.yaml`, or one you add; `stlm new` writes one for
  your own text (docs/own-text.md). It has a baseline, and variants as differences from the baseline.
- `corpora.yaml`, `benchmarks.yaml`, `vocabularies.yaml` and `models.yaml` say where data and published models
  come from; all studies share them.
- Before any work starts, an error names each key that is misspelt, of the wrong type or impossible, with the
  nearest valid choice. `stlm study NAME` checks a study and lists its runs.
- Files are read as YAML 1.2: `off`, `yes`, `1:30` and dates are texts, `010` is ten, `0o10` eight. A key that
  is not a text (`true`, `~`, `12`) must be in quotes. Names of studies, variants and published models are
  lower-case letters, digits, `_` and `-`, at most 100 characters.
- To override keys for one run of the pipeline: `snakemake --cores 1 all --config study=desk
  'set=training.learning_rate=1e-3 model.layers=2'`; a single stage takes `--set model.layers=2`.

To add a variant, add an entry under `variants`, for example one with half of the learning rate:

```yaml
variants:
  half-rate:
    label: Half the learning rate
    training: {learning_rate: 1.5e-3, min_learning_rate: 1.5e-4}
```

"Default" is the value of a key that a study leaves out. The defaults of `model` and `training` are those of
Table 1 of the paper, except for dropout.
"""

_SECTIONS: tuple[tuple[str, str, type[BaseModel]], ...] = (
    ("Study", "The top level of `params/<study>.yaml`.", StudyFile),
    ("`model`", "The transformer.", ModelConfig),
    ("`model.sharing`", "Norms, gains, shifts and adapters are not shared.", SharingConfig),
    ("`model.lora`", "A layer adds (alpha / rank) x A B to its matrices; B starts at zero.", LoraConfig),
    (
        "`model.low_rank`",
        "U V replaces a matrix: it starts with the same variance, and must have fewer weights. A rank for "
        "one matrix takes precedence over that of its network.",
        LowRankConfig,
    ),
    ("`model.bytes`", "What replaces embedding and head; see docs/bytes.md.", ByteConfig),
    ("`training`", "The recipe.", TrainingConfig),
    (
        "`training.inherit`",
        "What a model keeps of a larger one that it starts from; the sizes are those of `model`. See "
        "docs/inheriting.md.",
        InheritConfig,
    ),
    ("`data`", "What is read, in which order, and how often; see docs/data.md.", DataConfig),
    (
        "`data.select`",
        "Which chunks are trained on, chosen by a model; see docs/data.md.",
        SelectConfig,
    ),
    ("`evaluation`", "What is scored, and how.", EvaluationConfig),
    ("`evaluation.perplexity`", "", PerplexityConfig),
    ("`evaluation.benchmarks.<name>`", "", BenchmarkConfig),
    ("`variants.<name>`", "One run for each seed; `{}` is the baseline itself.", Variant),
    ("`published.<name>`", "`stlm evaluate STUDY NAME` scores it.", Published),
    ("`corpora.yaml`", "One entry for each corpus or mix.", CorpusEntry),
    ("`benchmarks.yaml`", "One entry for each benchmark.", BenchmarkEntry),
    ("`vocabularies.yaml`", "One entry for each published vocabulary.", VocabularyEntry),
    ("`models.yaml`", "One entry for each published model; see docs/published_models.md.", ModelEntry),
    ("`model` of `models.yaml`", "Each key is as in `model` of a study, and required.", LlamaShape),
    ("`hub` source", "A repository on the Hugging Face hub.", HubSource),
    ("`mirror` source", "A folder of the local mirror.", MirrorSource),
    ("`folder` source", "Any local folder, such as your own text.", FolderSource),
    ("`wheel` source", "A package of the Python package index, read as data.", WheelSource),
    ("`synthetic` source", "Text that this program generates from a seed.", SyntheticSource),
)


def _type_name(annotation: Any) -> str:
    origin, members = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in members)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_type_name(member) for member in members))
    if origin in (list, tuple):
        return f"list of {_type_name(members[0])}"
    if origin is dict:
        return "keys and values"
    if hasattr(annotation, "__value__") or origin is not None:
        return _type_name(members[0]) if members else "value"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        kind = annotation.model_fields.get("kind")
        return f"`{get_args(kind.annotation)[0]}` source" if kind else "keys and values"
    names = {int: "integer", float: "number", str: "text", bool: "true or false", type(None): "null"}
    return names.get(annotation, "value")


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "required"
    if isinstance(value, BaseModel) or value in ({}, [], ()):
        return "empty"
    if isinstance(value, tuple | list):
        return f"`[{', '.join(str(item) for item in value)}]`"
    return f"`{json.dumps(value).strip(chr(34))}`"


def _bounds(field: FieldInfo) -> str:
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    bounds = [
        f"{sign} {getattr(rule, name)}"
        for rule in field.metadata
        for name, sign in signs.items()
        if getattr(rule, name, None) is not None
    ]
    return f", {' and '.join(bounds)}" if bounds else ""


def _table(model: type[BaseModel]) -> list[str]:
    lines = ["| key | value | default | meaning |", "| --- | --- | --- | --- |"]
    for name, field in model.model_fields.items():
        if name == "name":
            continue  # the entry's own key
        meaning = " ".join((field.description or "").split())
        if not meaning.startswith("torch."):
            meaning = meaning[:1].upper() + meaning[1:]
        cells = (f"`{name}`", _type_name(field.annotation) + _bounds(field), _default(field), meaning)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return lines


def check_repository(root: Path = Path()) -> None:
    """Raise `UserError` unless `root` is the repository, which contains all pages."""
    for path in (PARAMS_README, README, Path("docs") / "sizes.md"):
        if not (root / path).is_file():
            raise UserError(
                f"{path}: no such file in {root.resolve()}; run this in the top folder of STLM's repository"
            )


def _technique_sections() -> list[tuple[str, str, type[BaseModel]]]:
    """A section for each technique, as the files of stlm/techniques/ describe theirs, and for nested keys."""
    sections = []
    for name in technique_names():
        sections += _with_nested(f"techniques.{name}", technique_class(name))
    return sections


def _with_nested(key: str, kind: type[BaseModel]) -> Iterator[tuple[str, str, type[BaseModel]]]:
    yield f"`{key}`", " ".join((kind.__doc__ or "").split("\n\n")[0].split()), kind
    for name, field in kind.model_fields.items():
        for member in get_args(field.annotation):
            if isinstance(member, type) and issubclass(member, BaseModel):
                yield from _with_nested(f"{key}.{name}", member)


def params_readme() -> str:
    """The text of params/README.md."""
    sections = [_HEAD]
    for title, lead, model in (*_SECTIONS, *_technique_sections()):
        sections.append("\n".join([f"## {title}", "", *([lead, ""] if lead else []), *_table(model), ""]))
    return "\n".join(sections)


def write_params_readme(root: Path = Path()) -> Path:
    """Write params/README.md; its path."""
    write_text(root / PARAMS_README, params_readme())
    return PARAMS_README


def readme_with_results(root: Path = Path()) -> str:
    """README.md with the headline table and the figure of results/desk/, and what inheriting came to.

    Raises UserError where README.md lacks the comments between which they stand, or has others.
    """
    text = (root / README).read_text(encoding="utf-8")
    return fill(README, text, lambda name, study: _block(root, name, study), needed=["results"])


def _block(root: Path, name: str, study: str | None) -> str:
    if name == "results":
        return block(name, f"{_results(root / SHOWN)}\n", study)
    if name == "inherited" and study:
        return block(name, inherited_block(root / "results" / study), study)
    raise UserError(f"{README}: a block {name!r}: expected 'results', or 'inherited' from results/STUDY/")


def headline_table(folder: Path) -> Table:
    """At most five rows and four columns of the findings' table of a study's results.

    Rows: the baseline, then the variants that have its number of parameters within 1%.
    """
    sizes = {train.label: train.parameters.total for train, _, _ in read_committed(folder)}
    table = findings_table(folder.name, folder)
    baseline = table.rows[0][0].text
    equal = [row for row in table.rows if abs(sizes[row[0].text] / sizes[baseline] - 1) <= _EQUAL_SIZE]
    columns = [_column(table.header, start) for start in _COLUMNS]
    return Table(
        name="headline",
        title=f"Study {folder.name}: one change at a time, at equal parameters",
        header=[table.header[column] for column in columns],
        rows=[[row[column] for column in columns] for row in equal[:_MOST_ROWS]],
    )


def _column(header: Sequence[str], start: str) -> int:
    """The number of the first column whose header begins with `start` (is empty, if `start` is)."""
    return next(n for n, name in enumerate(header) if (name.startswith(start) if start else not name))


def _results(folder: Path) -> str:
    """The part of README.md between its two comments."""
    trains = [train for train, _, _ in read_committed(folder)]
    train, seeds = trains[0], {train.seed for train in trains}
    millions = train.parameters.total / 1e6
    return (
        f"The study `{folder.name}`: models of {millions:.1f}M parameters, trained on "
        f"{train.tokens / 1e6:.1f}M tokens of children's books, {len(seeds)} seeds. Lower bits "
        "per byte and a higher BLiMP accuracy are better. ±: standard deviation over seeds; in brackets: 95% "
        f"intervals over seeds.\n\n{markdown(headline_table(folder)).strip()}\n\n"
        f"![Validation perplexity during training, all runs of the study]({SHOWN}/plots/figure1.svg)\n\n"
        f"All rows, with every benchmark and test: [{SHOWN}/tables/table2.md]({SHOWN}/tables/table2.md). "
        "What each study found, and how sure it is: [docs/findings.md](docs/findings.md).\n"
    )


def write_readme_results(root: Path = Path()) -> Path:
    """Put the headline table and figure of results/desk/ into README.md; its path."""
    write_text(root / README, readme_with_results(root))
    return README
