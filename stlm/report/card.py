"""The model card of a run (Mitchell et al. 2019): data, model, training, results and limits.

Markdown under YAML front matter, as the Hugging Face hub reads it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from pydantic import BaseModel

from stlm.corpora.language import NAMES
from stlm.errors import UserError
from stlm.files import read_record, write_text
from stlm.integrity import check_listed
from stlm.model.config import ModelConfig
from stlm.model.counts import build_on_meta, parameter_groups
from stlm.report.comparison import Accuracy, Comparisons, accuracy, by_mode
from stlm.report.contamination import Contamination, contamination_note
from stlm.report.documents import amount
from stlm.report.hyperparameters import settings_of
from stlm.report.names import benchmark_label, bounds, percent
from stlm.report.results import Results
from stlm.report.run_files import read_outcomes
from stlm.report.schema import CheckpointResult, EvaluationRecord, Score, TrainRecord, published_in
from stlm.report.sources import Text, read_texts
from stlm.report.table import Table, markdown
from stlm.study.catalogues import load_models
from stlm.techniques.registry import load_techniques
from stlm.tokens.names import hf_name

_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
_TEMPLATES.filters |= {"thousands": "{:,}".format, "scientific": "{:.2e}".format}


@dataclass(frozen=True)
class Card:
    """What is known of a checkpoint; None or empty where no file says."""

    title: str
    train: TrainRecord
    step: int
    tokens: int
    result: CheckpointResult | None
    accuracies: Mapping[Score, Accuracy]
    chance: Mapping[str, float]  # benchmark -> the expected accuracy of a random choice, a fraction
    contamination: Contamination | None
    texts: Sequence[Text]

    @property
    def bytes_on_disk(self) -> int | None:
        """The size of the file of weights; None where an earlier version did not record it."""
        return next((kept.bytes for kept in self.train.checkpoints if kept.step == self.step), None)

    def metadata(self, **more: Any) -> ModelCardData:
        """The metadata of the Hugging Face hub, `more` among it; accuracies are fractions."""
        languages = list(dict.fromkeys(text.language for text in self.texts if text.language))
        return ModelCardData(
            language=(languages[0] if len(languages) == 1 else languages) or None,
            license="unknown",
            pipeline_tag="text-generation",
            tags=["stlm", "super-tiny-language-models"],
            datasets=[text.repository for text in self.texts if text.repository] or None,
            **({"model_name": self.title, "eval_results": self._evaluated()} if self.result else {}),
            **more,
        )

    def _evaluated(self) -> list[EvalResult]:
        def entry(kind: str, label: str, metric: str, name: str, value: float) -> EvalResult:
            return EvalResult("text-generation", kind, label, metric, round(value, 4), metric_name=name)

        corpus, bits = self.train.corpus, self.result.perplexity.bits_per_byte
        return [
            entry(corpus, corpus, "bits_per_byte", "bits per byte", bits),
            *(
                entry(name, benchmark_label(name), "accuracy", f"{metric}, {mode} mode", accuracy.value)
                for (name, mode, metric), accuracy in self.accuracies.items()
            ),
        ]

    def markdown(self, use: str = "", **more: Any) -> str:
        """The whole card, with the section `use` second; `more` goes to the metadata at its top."""
        train = self.train
        return _TEMPLATES.get_template("card.md.jinja").render(
            card=self,
            train=train,
            use=use.strip(),
            metadata=self.metadata(**more).to_yaml(),
            unit=self._unit,
            languages={text.name: _language(text.language) for text in self.texts},
            data=markdown(self._data()).strip(),
            settings=self._settings,
            groups=markdown(self._groups()).strip(),
            sparsity=markdown(self._sparsity()).strip() if train.sparsity else "",
            parents=published_in(train.depends),
            lender=self._lender(),
            percent=percent,
            program=", ".join(f"{name} {version}" for name, version in train.code.items() if version),
            amount=amount,
            measured=self.result and self.result.perplexity,
            accuracies=markdown(self._results()).strip() if self.result else "",
            contamination=self._contamination(),
        )

    @property
    def _unit(self) -> str:
        """What a position of the model's input is: for byte-level models, a chunk of bytes."""
        return "chunks" if self.train.model.get("bytes") else "tokens"

    def _data(self) -> Table:
        rows = []
        for text in self.texts:
            share = "" if text.share is None else f"\nshare {percent(text.share)}%"
            sizes = [(text.splits or {}).get(split) for split in ("train", "val", "test")]
            shown = [
                f"{size.tokens:,} {self._unit}\n{size.documents:,} documents\n{size.bytes / 1e6:,.1f} MB"
                if size
                else "–"
                for size in sizes
            ]
            unknown = "not known here"
            rows.append([text.name + share, text.licence or unknown, text.origin or unknown, *shown])
        return Table(
            "data",
            f"Text, tokenized by {self.train.tokenizer}",
            ["corpus", "licence", "from", "train split", "validation split", "test split"],
            rows,
            [
                "Sizes are of the whole splits, whatever part a run reads. Documents are in one split by the "
                "hash of their text, or of their group (a book's title)."
            ],
            texts=3,
        )

    def _groups(self) -> Table:
        techniques = load_techniques(self.train.techniques, "train.json", "techniques")
        config = ModelConfig.model_validate(self.train.model)
        groups = parameter_groups(build_on_meta(config, tuple(techniques.values())))
        rows = [(name, f"{number:,}") for name, number in groups.items()]
        notes = ["What layers share is counted once, where it is first used."]
        return Table("groups", "Where the parameters are", ["", "parameters"], rows, notes)

    def _sparsity(self) -> Table:
        found = self.train.sparsity
        names = list(dict.fromkeys(name for own in found.by_layer.values() for name in own))
        rows = [
            [layer, *(percent(own[name]) if name in own else "–" for name in names)]
            for layer, own in found.by_layer.items()
        ]
        notes = [
            f"Percent of the weights. Of all matrices named here {percent(found.matrices)}% are zero, of all "
            f"parameters {percent(found.model)}%. As the file stores them, zeros save no bytes."
        ]
        return Table("sparsity", "Weights that are zero", ["", *names], rows, notes)

    def _lender(self) -> tuple[str, str | None] | None:
        """The published model whose tokenizer alone the run uses, and its licence, if params/ says it."""
        name = hf_name(self.train.tokenizer)
        if name is None or name.model in published_in(self.train.depends):
            return None
        entry = load_models().get(name.model)
        return name.model, entry and entry.licence

    def _settings(self, *sections: str) -> str:
        by_section = settings_of({"": [self.train]})[""]
        rows = [row for section in sections for row in by_section.get(section, {}).items()]
        return markdown(Table("settings", " and ".join(sections), ["", ""], rows)).strip()

    def _results(self) -> Table:
        rows = []
        for (benchmark, mode, metric), scored in self.accuracies.items():
            chance = self.chance.get(benchmark)
            rows.append(
                [
                    f"{benchmark_label(benchmark)} (version {self.result.benchmarks[benchmark].version})",
                    f"{mode}, {metric}",
                    f"{scored.n:,}",
                    percent(scored.value),
                    bounds(*scored.interval),
                    f"{bounds(*scored.clustered)}\n{scored.groups} groups" if scored.clustered else "–",
                    "–" if chance is None else percent(chance),
                ]
            )
        header = ["benchmark", "mode, metric", "items", "accuracy", "95% interval", "over groups", "chance"]
        notes = [
            "In percent. Intervals: Wilson's, over items; over groups: cluster-robust, for other groups of "
            "items like these. Neither says how much another seed would change the model. Modes: harness, "
            "the prompts and continuations of the reference evaluation harness; paper, the probability of "
            "the whole string."
        ]
        if guessing := self._guessing():
            notes.append(f"No better than guessing, by their widest interval: {', '.join(guessing)}.")
        return Table("results", "Zero-shot accuracy", header, rows, notes, texts=2)

    def _guessing(self) -> list[str]:
        """Benchmarks with no accuracy significantly above chance, by the wider of its intervals."""
        above: dict[str, bool] = {}
        for (benchmark, _, _), scored in self.accuracies.items():
            if benchmark in self.chance:
                low = min(scored.interval.low, (scored.clustered or scored.interval).low)
                above[benchmark] = above.get(benchmark, False) or low > self.chance[benchmark]
        return [benchmark_label(benchmark) for benchmark, is_above in above.items() if not is_above]

    def _contamination(self) -> str:
        if self.contamination is None:
            return "Not counted (`stlm contamination`)."
        counted = {name: None for counts in self.contamination.corpora.values() for name in counts.benchmarks}
        return contamination_note(self.contamination) or (
            f"No item of {', '.join(map(benchmark_label, counted))} shares {max(self.contamination.sizes)} "
            "words in sequence with the training text, or stands in it whole."
        )


def _language(tag: str | None) -> str:
    """The name of a language with its tag: English (en)."""
    if tag is None:
        return "not stated (`language` in params/corpora.yaml)"
    name = NAMES.get(tag.partition("-")[0].lower())
    return f"{name} ({tag})" if name else tag


def write_cards(
    folder: Path, results: Results, comparisons: Comparisons, contamination: Contamination
) -> None:
    """Write `folder`/<run>.md for each run, of its last checkpoint."""
    for name, run in results.items():
        card = Card(
            f"{run.label} ({results.study.name}/{name})",
            run.train,
            run.last.step,
            run.last.tokens,
            run.last,
            {score: point.accuracy for score, point in list(comparisons.points[name].values())[-1].items()},
            comparisons.chance,
            _of_corpus(contamination, run.train.corpus),
            read_texts(run.train.corpus, run.train.tokenizer),
        )
        write_text(folder / f"{name}.md", card.markdown(library_name="stlm"))


def read_card(checkpoint: Path) -> Card | None:
    """The card of a checkpoint's folder, from the files of its run; None where there is no train.json.

    Raises UserError for a file that is damaged.
    """
    run = checkpoint.parent.parent
    if not (run / "train.json").is_file():
        return None
    train = read_record(run / "train.json", TrainRecord)
    described = read_record(checkpoint / "config.json", _Description)
    listed = {trained.step: trained.weights_sha256 for trained in train.checkpoints}
    if listed.get(described.step) != described.weights_sha256:  # trained again, or files of two runs
        raise UserError(
            f"{run / 'train.json'} does not list the weights in {checkpoint}, and so is not their record: "
            f"run `stlm train {described.study} {train.run}`"
        )
    result = None
    if (run / "evaluation.json").is_file():
        result = read_record(run / "evaluation.json", EvaluationRecord).checkpoints.get(checkpoint.name)
    if result is not None and result.weights_sha256 != described.weights_sha256:
        result = None  # of weights that are no longer there
    accuracies: dict[Score, Accuracy] = {}
    chance: dict[str, float] = {}
    if result is not None and (run / "items.parquet").is_file():
        check_listed(run / "evaluation.json", "items.parquet")
        items = by_mode(read_outcomes(run / "items.parquet", checkpoint.name))
        accuracies = {key: accuracy(items[key[:2]], key[2]) for key in result.scores if key[:2] in items}
        chance = {benchmark: float(outcomes["chance"].mean()) for (benchmark, _), outcomes in items.items()}
    elif result is not None:
        recorded = {score: result.accuracy(*score) for score in result.scores}
        accuracies = {k: Accuracy(one.value, one.n, one.interval, 0, None) for k, one in recorded.items()}
    contamination = run.parent.parent / "contamination.json"
    counted = read_record(contamination, Contamination) if contamination.is_file() else None
    return Card(
        f"{train.label} ({described.study}/{train.run})",
        train,
        described.step,
        described.tokens,
        result,
        accuracies,
        chance,
        counted and _of_corpus(counted, train.corpus),
        read_texts(train.corpus, train.tokenizer),
    )


class _Description(BaseModel):
    """The keys of a checkpoint's config.json that identify its run."""

    study: str
    step: int
    tokens: int
    weights_sha256: str


def _of_corpus(contamination: Contamination, corpus: str) -> Contamination | None:
    counts = contamination.corpora.get(corpus)
    return counts and contamination.model_copy(update={"corpora": {corpus: counts}})
