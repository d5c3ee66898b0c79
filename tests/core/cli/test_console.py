"""What commands print while they work."""

from __future__ import annotations

import io
import sys

from distillfss_core.cli.console import progress, show_step
from distillfss_core.types import TrainStep


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_bar_of_a_training_has_the_phrase_of_each_step(monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with progress("preparing") as bar:
        for step in (
            TrainStep(2, 3, stage="zoom"),
            TrainStep(1, 4, stage="fit"),
            TrainStep(5, 20, {"student": 0.25}, {"iou": 0.5}, stage="joint"),
        ):
            show_step(bar, step)
            bar.refresh()
    lines = terminal.getvalue().split("\r")
    for start in (
        "choosing the zoom, 2 of 3:  67%|",
        "fitting the probe, 1 of 4:  25%|",
        "training, 5 of 20, loss 0.25:  25%|",
    ):
        assert any(line.startswith(start) for line in lines)
    assert any(line.endswith(", iou=0.500") for line in lines)
    assert "2/3" not in terminal.getvalue()  # the steps are counted once
