"""A summary of tokenizing for people: what was kept, how it was split, and warnings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from stlm.tokens.near_duplicates import CONTAINMENT
from stlm.tokens.shards import SPLITS

MOST_DUPLICATES = 0.05  # share of the documents above which there is a warning
FEWEST_DOCUMENTS = 20  # of val and test each
FEWEST_BYTES = 20_000
# Share of the 13-grams of val or test; generated text repeats 6% by construction.
MOST_LEAKED = 0.1


def summary(meta: Mapping[str, Any]) -> Iterator[str]:
    """Lines about meta.json; those that begin with "warning" need attention."""
    n = meta["documents"]
    yield (
        f"{meta['corpus']}: {n['read']:,} documents read, {n['kept']:,} kept; dropped: {n['duplicates']:,} "
        f"exact duplicates, {n['empty']:,} empty, {n['invalid_utf8']:,} not UTF-8; {n['nul']:,} have NUL"
    )
    for name, component in meta["components"].items():
        tokens = ", ".join(f"{split} {component['splits'][split]['tokens']:,}" for split in SPLITS)
        yield f"{name}: {tokens} tokens ({meta['tokenizer']}); {_how(meta['splitting']['components'][name])}"
    yield _leaks(meta["leaks"])
    yield from _warnings(meta)


def _how(split: Mapping[str, Any]) -> str:
    """A phrase that says how a component was split."""
    missing = " and ".join(name for name in SPLITS if name not in split["declared"])
    declared = " and ".join(split["declared"])
    if split["by"] == "declared":
        return "train, val and test as the source declares them"
    kept = f"{declared} as declared, {missing}" if split["declared"] != ["train"] else missing
    if split["by"] == "contiguous":
        texts = "the text, which is" if split["units"] == 1 else f"each of {split['units']} texts, which are"
        return f"{kept} are the last parts of {texts} read in passages"
    how = f"{kept} made from train by hash of {split['unit']}"
    if split["joined"]:
        how += f"; {split['joined']:,} of {split['units']:,} joined with near-duplicates"
    if split["kept_in_train"]:
        how += f", {split['kept_in_train']:,} kept in train, as their cluster would grow too large"
    return how


def _leaks(leaks: Mapping[str, Any]) -> str:
    parts = [
        f"{split} {leaks[split]['share']:.2%}" for split in SPLITS[1:] if leaks[split]["share"] is not None
    ]
    above = sum(leaks[split]["above_half"] for split in SPLITS[1:])
    if not parts:
        return f"held-out text in train: not measured, no document has {leaks['words']} words"
    return (
        f"held-out text in train: {', '.join(parts)} of {leaks['words']}-word sequences; "
        f"{above:,} documents above a half"
    )


def _warnings(meta: Mapping[str, Any]) -> Iterator[str]:
    for name, component in meta["splitting"]["components"].items():
        share = component["duplicates"] / max(component["documents"], 1)
        if share > MOST_DUPLICATES:
            yield (
                f"warning: {name}: {share:.0%} of the documents are exact duplicates and were dropped; are "
                "its documents cut too small?"
            )
        for split in SPLITS[1:]:
            counts = component["splits"][split]
            reasons = [f"fewer than {FEWEST_DOCUMENTS}"] if counts["documents"] < FEWEST_DOCUMENTS else []
            reasons += [f"fewer than {FEWEST_BYTES:,} bytes"] if counts["bytes"] < FEWEST_BYTES else []
            reasons += ["from one text"] if counts["units"] == 1 else []
            if reasons:
                of = (
                    ""
                    if component["unit"] == "document"
                    else f" of {_count(counts['units'], component['unit'])}"
                )
                yield (
                    f"warning: {name}: {split} has {_count(counts['documents'], 'document')}{of}, "
                    f"{counts['bytes']:,} bytes: {', '.join(reasons)}; what is measured on it says little"
                )
    least = meta["splitting"]["least_containment"]
    if least != CONTAINMENT:
        what = (
            "no near-duplicates" if least is None else f"only documents that share {least:.0%} of their text"
        )
        yield (
            f"warning: {meta['corpus']}: {what} are joined, as others would keep most of it in train; does a "
            "text (a licence, a form) stand in many documents?"
        )
    for split in SPLITS[1:]:
        leak = meta["leaks"][split]
        if leak["above_half"] or (leak["share"] or 0) > MOST_LEAKED:
            yield (
                f"warning: {meta['corpus']}: {leak['share']:.1%} of {split}'s {meta['leaks']['words']}-word "
                f"sequences stand in train, {leak['above_half']:,} of {leak['documents']:,} documents by "
                "more than a half"
            )


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
