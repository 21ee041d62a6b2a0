"""What intervals over seeds assume of the noise of seeds, in words."""

from __future__ import annotations

from collections.abc import Mapping

from stlm.evaluation.statistics import SeedNoise
from stlm.report.names import some

_LARGEST = 2


def noise_note(noise: SeedNoise, labels: Mapping[str, str], of: str = "") -> str:
    """One sentence: that the variants' noise is taken to be equal, how likely that is, and who carries most.

    `labels` are the variants' names in tables; `of` names the figure where a table has several.
    """
    of = f" {of}" if of else ""
    if len(noise.shares) <= _LARGEST:
        return f"The noise{of} is assumed to be equal in both variants."
    shares = [f"{labels[name]} {share:.0%}" for name, share in list(noise.shares.items())[:_LARGEST]]
    p = "p < 0.001" if noise.p < 0.001 else f"p = {noise.p:.3f}"
    test = f"{p}; largest shares of the variance, of {len(noise.shares)} variants: {'; '.join(shares)}"
    if not noise.unequal:
        return f"The noise{of} is assumed to be equal in all variants (test: {test})."
    return (
        f"A test rejects that the noise{of} is equal in all variants ({test}). Differences with "
        f"{some([labels[name] for name in noise.unequal])} have the wider of the pooled interval and the "
        "paired t interval of their own seeds; all others assume equal noise."
    )
