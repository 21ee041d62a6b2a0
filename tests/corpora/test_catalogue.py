"""params/corpora.yaml, benchmarks.yaml, vocabularies.yaml and models.yaml, and their schemas."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from stlm.corpora.config import CorpusEntry, HubSource, SyntheticSource
from stlm.study.catalogues import load_benchmarks, load_corpora, load_models, load_vocabularies

ROOT = Path(__file__).parents[2]
ASKED_FOR = {
    "simple_wiki", "en_wiki", "openwebtext", "babylm", "tinystories", "paper_mix", "gutenberg_children",
    "childes", "wikitext2", "synthetic",
}  # fmt: skip


def test_everything_that_the_studies_may_name_is_there() -> None:
    corpora, benchmarks = load_corpora(ROOT), load_benchmarks(ROOT)
    assert set(corpora) >= ASKED_FOR
    assert set(benchmarks) == {
        "blimp", "hellaswag", "arc_easy", "arc_challenge", "winogrande", "mmlu", "synthetic_pairs",
        "synthetic_choice", "steps_arithmetic", "steps_entities",
    }  # fmt: skip
    assert set(load_vocabularies(ROOT)) == {"gpt2"}
    assert set(load_models(ROOT)) == {"smollm2_135m"}
    catalogues = (corpora, benchmarks, load_vocabularies(ROOT), load_models(ROOT))
    names = [name for catalogue in catalogues for name in catalogue]
    assert len(names) == len(set(names)), "each names a folder of data/raw"
    assert sum(corpora["paper_mix"].mix.values()) == pytest.approx(1.0)


def test_what_is_on_the_hub_is_pinned_except_where_the_readme_says_so() -> None:
    entries = {
        **load_corpora(ROOT),
        **load_benchmarks(ROOT),
        **load_vocabularies(ROOT),
        **load_models(ROOT),
    }
    unpinned = {
        name
        for name, entry in entries.items()
        for source in entry.sources
        if isinstance(source, HubSource) and not source.pinned
    }
    assert unpinned == {"openhermes"}
    assert "`openhermes`" in (ROOT / "data" / "README.md").read_text(encoding="utf-8")


def test_every_entry_is_in_the_readme() -> None:
    readme = (ROOT / "data" / "README.md").read_text(encoding="utf-8")
    entries = {
        **load_corpora(ROOT),
        **load_benchmarks(ROOT),
        **load_vocabularies(ROOT),
        **load_models(ROOT),
    }
    assert [name for name in entries if f"`{name}`" not in readme] == []


def test_the_synthetic_parts_differ_in_their_seeds_but_for_equal_questions() -> None:
    entries = {**load_corpora(ROOT), **load_benchmarks(ROOT)}
    synthetic = [
        source
        for entry in entries.values()
        for source in entry.sources
        if isinstance(source, SyntheticSource)
    ]
    parts = {source.part: source for source in synthetic}
    assert parts.keys() == {
        "corpus", "pairs", "choice", "steps_plain", "steps_written", "steps_arithmetic", "steps_entities",
    }  # fmt: skip
    assert len({source.seed for source in synthetic}) == 6
    # The same questions, with and without their steps.
    plain, written = parts["steps_plain"], parts["steps_written"]
    assert (plain.seed, plain.size) == (written.seed, written.size)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sources": []}, "either `sources` or `mix`"),
        ({"mix": {"a": 0}, "sources": []}, "greater than 0"),
        (
            {"sources": [{"kind": "hub", "repo": "a/b", "revision": "v1.0", "files": {"train": "x"}}]},
            "not a commit",
        ),
        ({"sources": [{"kind": "ftp"}]}, "kind"),
        ({"sources": [{"kind": "mirror", "path": "a", "files": {}}]}, "at least 1 item"),
        (
            {"sources": [{"kind": "mirror", "path": "a", "files": {"a": "b"}, "starts": "("}]},
            "not a regular expr",
        ),
        ({"sources": [{"kind": "mirror", "path": "a", "file": {"a": "b"}}]}, "file"),
    ],
)
def test_a_mistaken_entry_is_refused(change: dict, message: str) -> None:
    entry = {
        "name": "a",
        "description": "",
        "licence": "",
        "sources": [{"kind": "mirror", "path": "a", "files": {"train": "a"}}],
    }
    CorpusEntry.model_validate(entry)
    with pytest.raises(ValidationError, match=message):
        CorpusEntry.model_validate({**entry, **change})
