"""docs/schedules.md shows every schedule there is."""

from __future__ import annotations

from pathlib import Path

from stlm.docs_pages.schedules import SCHEDULES, write_schedule_plots
from stlm.training.schedules import DROPOUTS, LEARNING_RATES

ROOT = Path(__file__).parents[2]


def test_the_page_and_its_plots_have_every_schedule(tmp_path):
    write_schedule_plots(tmp_path)
    page = (ROOT / "docs" / "schedules.md").read_text(encoding="utf-8")
    for name, schedules in (("learning-rate", LEARNING_RATES), ("dropout", DROPOUTS)):
        drawn = (tmp_path / SCHEDULES / f"{name}.svg").read_text(encoding="utf-8")
        assert f"(schedules/{name}.svg)" in page
        for schedule in schedules:
            assert f"| `{schedule}` |" in page
            assert f">{schedule}<" in drawn
        # What is committed is what the functions draw: `stlm document` otherwise.
        assert (ROOT / SCHEDULES / f"{name}.svg").read_text(encoding="utf-8") == drawn
