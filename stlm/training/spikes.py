"""Loss spikes: steps whose training loss rises far above the previous steps."""

from __future__ import annotations

import math
from itertools import pairwise
from statistics import median
from typing import Any

WINDOW = 50  # Steps that the noise of the losses is estimated from.
LEVEL = 10  # Steps whose median is the level: few, because the loss falls fast early in training.
_LEAST = 12
DEVIATIONS = 7.0
LEAST_RISE = 0.2  # Nats. On a smooth curve, the noise alone would turn ripples into spikes.
_NEW_LEVEL = 200  # Steps after which a loss that stays high counts as a new level.


class Spikes:
    """Finds spikes in a series of losses, one at a time; its state is plain values that can be saved.

    A spike begins if the loss (nats per token) exceeds its level, the median of the last 10 steps, by more
    than 7 standard deviations of the noise and by 0.2 nats. It ends at the first step whose loss is back at
    that level; the losses in between do not enter later levels. The noise is estimated from the changes
    between steps, by their median absolute deviation (Hampel 1974) over 50 steps, which neither a spike nor
    the falling loss distorts. The seven deviations follow the spike score of OLMo 2 (Team OLMo 2024), which
    takes mean and deviation over 1,000 steps: more than many runs here have.
    """

    def __init__(self, state: dict[str, Any]) -> None:
        self.recent: list[float] = state.setdefault("recent", [])
        self.found: list[dict[str, Any]] = state.setdefault("found", [])
        self._state = state
        state.setdefault("open", False)

    def add(self, step: int, loss: float, grad_norm: float) -> None:
        """Add the loss of the next step. A loss that is not finite is a divergence, and skipped here."""
        if not math.isfinite(loss):
            return
        if self._state["open"]:
            self._go_on(step, loss)
            return
        if len(self.recent) >= _LEAST:
            level = median(self.recent[-LEVEL:])
            if loss - level > max(DEVIATIONS * self._noise(), LEAST_RISE):
                self._state["open"] = True
                self.found.append(
                    {
                        "step": step,
                        "loss": round(loss, 6),
                        "level": round(level, 6),
                        "rise": round(loss - level, 6),
                        "grad_norm": round(grad_norm, 6),
                        "recovered_after": None,
                    }
                )
                return
        self.recent.append(loss)
        del self.recent[: -WINDOW - 1]

    def _noise(self) -> float:
        """The standard deviation of the loss about its trend; changes have sqrt(2) times as much."""
        changes = [after - before for before, after in pairwise(self.recent)]
        middle = median(changes)
        return 1.4826 * median(abs(change - middle) for change in changes) / math.sqrt(2)

    def _go_on(self, step: int, loss: float) -> None:
        spike = self.found[-1]
        spike["rise"] = max(spike["rise"], round(loss - spike["level"], 6))
        if loss <= spike["level"]:
            spike["recovered_after"] = step - spike["step"]
            self._state["open"] = False
            self.recent.append(loss)
        elif step - spike["step"] >= _NEW_LEVEL:
            self._state["open"] = False
            self.recent.clear()
