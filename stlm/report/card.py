"""The model card of a run (Mitchell et al. 2019): data, model, training, results and limits.

Markdown under YAML front matter, as the Hugging Face hub reads it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from pydantic import BaseModel

from stlm.corpora.language import NAMES
from stlm.errors import UserError
from stlm.evaluation.statistics import Interval
from stlm.files import read_record, write_text
from stlm.integrity import check_listed
from stlm.model.config import ModelConfig
from stlm.model.counts import build_on_meta, parameter_groups
from stlm.report.comparison import Accuracy, Comparisons, Score, accuracy, by_mode, scores
from stlm.report.contamination import Contamination, contamination_note
from stlm.report.documents import amount
from stlm.report.hyperparameters import settings
from stlm.report.names import benchmark_label, bounds, percent
from stlm.report.results import (
    CheckpointResult,
    EvaluationRecord,
    Perplexity,
    RunResult,
    TrainRecord,
    run_label,
)
from stlm.report.run_files import read_outcomes
from stlm.report.sources import Text, read_texts
from stlm.report.table import Cell, Table, markdown
from stlm.study.runs import Study
from stlm.techniques.registry import load_techniques

_CITATION = """\
```bibtex
@article{hillier2024super,
  title   = {Super Tiny Language Models},
  author  = {Hillier, Dylan and Guertler, Leon and Tan, Cheston and Agrawal, Palaash and Chen, Ruirui and
             Cheng, Bobby},
  journal = {arXiv preprint arXiv:2405.14159},
  year    = {2024}
}
```"""
_LIMITS = """\
Made for research on very small language models: to compare techniques under equal conditions. Not for
deployment, and not for advice, facts or decisions about people.

- It continues text. It was not tuned to follow instructions or anyone's preferences, and nothing was done to
  keep harmful text out.
- What it says is often false, and repeats the views and prejudices of its training text.
- It knows the languages and subjects of that text alone, and reads {context} at most."""


@dataclass(frozen=True)
class Card:
    """What is known of a checkpoint; None or empty where no file says.

    `chance[benchmark]`: the expected accuracy of a random choice, a fraction.
    """

    title: str
    train: TrainRecord
    step: int
    tokens: int
    result: CheckpointResult | None
    accuracies: Mapping[Score, Accuracy]
    chance: Mapping[str, float]
    contamination: Contamination | None
    texts: Sequence[Text]

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
                entry(name, benchmark_label(name), "accuracy", f"{metric}, {mode} mode", found.value)
                for (name, mode, metric), found in self.accuracies.items()
            ),
        ]

    def markdown(self, use: str = "", **more: Any) -> str:
        """The whole card, with the section `use` second; `more` goes to the metadata at its top."""
        sections = {
            **({"Use": use} if use else {}),
            "Data": self._data(),
            "Model": self._model(),
            "Training": self._training(),
            "Results": self._results(),
            "Contamination": self._contamination(),
            "Intended use and limits": _LIMITS.format(
                context=f"{self.train.model['context']:,} {self._unit}"
            ),
            "Licences": self._licences(),
            "Citation": _CITATION,
        }
        body = "\n\n".join(f"## {title}\n\n{text.strip()}" for title, text in sections.items())
        head = self.metadata(**more).to_yaml()
        return f"---\n{head}\n---\n\n# {self.title}\n\n{self._summary()}\n\n{body}\n"

    @property
    def _unit(self) -> str:
        """What a position of the model's input is: for byte-level models, a chunk of bytes."""
        return "chunks" if self.train.model.get("bytes") else "tokens"

    def _summary(self) -> str:
        counts = self.train.parameters
        return (
            f"A language model of {counts.total:,} parameters ({counts.embedding:,} of them in embeddings"
            + (f"; a token uses {counts.active:,}" if counts.active else "")
            + f"), trained on {self.tokens:,} {self._unit} of {self.train.corpus}"
            + (f" after those of {self.train.start.run}" if self.train.start else "")
            + f"; step {self.step:,} of {self.train.steps:,}. "
            "Made with STLM, reference software for research on super tiny language models."
        )

    def _data(self) -> str:
        rows = []
        for text in self.texts:
            share = "" if text.share is None else f"\nshare {percent(text.share)}%"
            cells = [text.name + share, text.licence or "not known here", text.origin or "not known here"]
            for split in ("train", "val", "test"):
                size = (text.splits or {}).get(split)
                cells.append(
                    f"{size.tokens:,} {self._unit}\n{size.documents:,} documents\n{size.bytes / 1e6:,.1f} MB"
                    if size
                    else "–"
                )
            rows.append([Cell(cell) for cell in cells])
        table = Table(
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
        return f"{self._languages()}\n\n{markdown(table)}"

    def _languages(self) -> str:
        """The languages of the text in words; of each component where a mix has several."""
        named = {text.name: _language(text.language) for text in self.texts}
        if len(set(named.values())) == 1:
            return f"Language: {next(iter(named.values()))}."
        return "Languages: " + "; ".join(f"{name}: {language}" for name, language in named.items()) + "."

    def _model(self) -> str:
        techniques = load_techniques(self.train.techniques, "train.json", "techniques")
        config = ModelConfig.model_validate(self.train.model)
        groups = parameter_groups(build_on_meta(config, tuple(techniques.values())))
        rows = [[Cell(name), Cell(f"{number:,}")] for name, number in groups.items()]
        notes = ["What layers share is counted once, where it is first used."]
        table = Table("groups", "Where the parameters are", ["", "parameters"], rows, notes)
        kinds = ("Size", "Model", "Techniques") if techniques else ("Size", "Model")
        remarks = "".join(f"\n\nAt the end of training: {remark}." for remark in self.train.remarks)
        return f"{self._settings(*kinds)}\n{markdown(table)}{remarks}"

    def _settings(self, *sections: str) -> str:
        found = settings(self.train)
        rows = [
            [Cell(key), Cell(value)] for section in sections for key, value in found.get(section, {}).items()
        ]
        return markdown(Table("settings", " and ".join(sections), ["", ""], rows))

    def _training(self) -> str:
        train = self.train
        where = [
            train.device,
            train.precision,
            *(["compiled"] if train.compiled else []),
            *(["kernels in C"] if train.kernels else []),
            *([f"{train.processes} processes"] if train.processes > 1 else []),
        ]
        code = ", ".join(f"{name} {version}" for name, version in train.code.items() if version)
        return (
            f"{train.tokens:,} {self._unit} in {train.steps:,} steps, about {train.flops:.2e} floating-point "
            f"operations, {train.seconds:,.0f} s on {', '.join(where)}. Seed {train.seed}."
            + self._origin()
            + (f" Program: {code}." if code else "")
            + "\n\n"
            + self._settings("Data", "Recipe")
        )

    def _origin(self) -> str:
        """The trainings of other runs that this one depended on."""
        sentences = []
        for role, other in self.train.depends.items():
            cost = f"{other.tokens:,} {self._unit} and about {other.flops:.2e} floating-point operations"
            if role == "start":
                cut = ""
                if other.truncation:
                    lost = percent(other.truncation.relative_error)
                    cut = f", cut to lower ranks ({lost}% of their norm lost)"
                begun = f" It began with the last weights of the run {other.run}, which {cost} had gone into"
                sentences.append(f"{begun}{cut}.")
            else:
                sentences.append(f" Its {role} was the run {other.run}, trained with {cost}.")
        return "".join(sentences)

    def _results(self) -> str:
        if self.result is None:
            return "This checkpoint was not evaluated (`stlm evaluate`)."
        measured = self.result.perplexity
        rows = []
        for (benchmark, mode, metric), found in self.accuracies.items():
            over = "–" if found.clustered is None else f"{bounds(*found.clustered)}\n{found.groups} groups"
            chance = self.chance.get(benchmark)
            cells = [
                f"{benchmark_label(benchmark)} (version {self.result.benchmarks[benchmark].version})",
                f"{mode}, {metric}",
                f"{found.n:,}",
                percent(found.value),
                bounds(*found.interval),
                over,
                "–" if chance is None else percent(chance),
            ]
            rows.append([Cell(cell) for cell in cells])
        header = ["benchmark", "mode, metric", "items", "accuracy", "95% interval", "over groups", "chance"]
        notes = [
            "In percent. Intervals: Wilson's, over items; over groups: cluster-robust, for other groups of "
            "items like these. Neither says how much another seed would change the model. Modes: harness, "
            "the prompts and continuations of the reference evaluation harness; paper, the probability of "
            "the whole string."
        ]
        guessing = self._guessing()
        if guessing:
            notes.append(f"No better than guessing, by their widest interval: {', '.join(guessing)}.")
        table = Table("results", "Zero-shot accuracy", header, rows, notes, texts=2)
        return (
            f"Test split of {self.train.corpus}, {amount(measured)}: "
            f"**{measured.bits_per_byte:.4f} bits per byte**{_over_documents(measured)}, "
            f"character perplexity {measured.char_perplexity:.4f}."
        ) + (f"\n\n{markdown(table)}" if rows else "")

    def _guessing(self) -> list[str]:
        """Benchmarks with no accuracy significantly above chance, by the wider of its intervals."""
        above: dict[str, bool] = {}
        for (benchmark, _, _), found in self.accuracies.items():
            if benchmark in self.chance:
                low = min(found.interval.low, (found.clustered or found.interval).low)
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

    def _licences(self) -> str:
        texts = "\n".join(f"- {text.name}: {text.licence or 'not known here'}" for text in self.texts)
        return (
            "The program that made this model is under Apache-2.0. The model itself has no licence yet: "
            f"whoever publishes it chooses one that the terms of its training text allow.\n\n{texts}"
        )


def _over_documents(measured: Perplexity) -> str:
    if measured.interval is None:
        return ""
    few = ", of so few documents that it is too narrow" if measured.interval.few_documents else ""
    return f" (95% interval over documents {measured.interval.low:.3f} to {measured.interval.high:.3f}{few})"


def _language(tag: str | None) -> str:
    """The name of a language with its tag: English (en)."""
    if tag is None:
        return "not stated (`language` in params/corpora.yaml)"
    name = NAMES.get(tag.partition("-")[0].lower())
    return f"{name} ({tag})" if name else tag


def write_cards(
    folder: Path,
    study: Study,
    results: Mapping[str, RunResult],
    comparisons: Comparisons,
    contamination: Contamination,
) -> None:
    """Write `folder`/<run>.md for each run, of its last checkpoint."""
    for name, result in results.items():
        checkpoint, points = list(comparisons.points[name].items())[-1]
        card = Card(
            f"{run_label(result, results)} ({study.name}/{name})",
            result.train,
            result.last.step,
            result.last.tokens,
            result.checkpoints[checkpoint],
            {key: point.accuracy for key, point in points.items()},
            comparisons.chance,
            _of_corpus(contamination, result.train.corpus),
            read_texts(result.train.corpus, result.train.tokenizer),
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
    listed = {kept.step: kept.weights_sha256 for kept in train.checkpoints}
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
        accuracies = {key: accuracy(items[key[:2]], key[2]) for key in scores(result) if key[:2] in items}
        chance = {benchmark: float(found["chance"].mean()) for (benchmark, _), found in items.items()}
    elif result is not None:
        for benchmark, mode, metric in scores(result):
            found = getattr(result.benchmarks[benchmark].modes[mode], metric)
            interval = Interval(found.low, found.high)
            accuracies[benchmark, mode, metric] = Accuracy(found.value, found.n, interval, 0, None)
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
        _of_corpus(counted, train.corpus) if counted else None,
        read_texts(train.corpus, train.tokenizer),
    )


class _Description(BaseModel):
    """The keys of a checkpoint's config.json that identify its run."""

    study: str
    step: int
    tokens: int
    weights_sha256: str


def _of_corpus(contamination: Contamination, corpus: str) -> Contamination | None:
    corpora = {name: found for name, found in contamination.corpora.items() if name == corpus}
    return contamination.model_copy(update={"corpora": corpora}) if corpora else None
