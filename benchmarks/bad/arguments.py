"""Arguments and options out of range, of every verb."""

from __future__ import annotations

from bad.case import Case


def cases() -> list[Case]:
    """The cases of this topic."""
    return [
        Case("no verb", (), expects="required: VERB"),
        Case("an unknown verb", ("frobnicate",), expects="invalid choice"),
        Case("study: nothing wrong", ("study", "tiny"), status=0, expects="study tiny"),
        Case("train: nothing wrong", ("train", "tiny", "baseline", "--set", "seeds=[3]"), status=0),
        Case("evaluate: a published model, nothing wrong", ("evaluate", "tiny", "other"), status=0),
        Case("sizes: a size beyond floating point", ("sizes", "1e400")),
    ]
