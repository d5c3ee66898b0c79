"""Trainings on images without labels that can be stopped at any moment and go on to the same weights."""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distillfss_core.errors import ModelFileError, SettingsError
from distillfss_core.nn.checkpoint import (
    FileKind,
    read_card_file,
    restore_training,
    training_tensors,
    write_card_file,
)
from distillfss_core.settings import AdapterSettings, BackboneSettings
from distillfss_core.types import TrainStep

KEEP_EVERY = 60.0  # seconds between two checkpoints
LAST_RATE = 1e-5
MEAN_OF = 50  # steps of which the card holds the mean loss
MAY_CHANGE = {"cache_mb", "device", "precision"}
"""Settings that a training may go on with another value of."""


class ResumableTraining:
    """The steps of a training, and its state in a checkpoint.

    A subclass tells what learns (`begin`), what a step does (`train`), and where the training came from (`provenance`).

    Parameters
    ----------
    kind : FileKind
        Of the checkpoint.
    settings : BackboneSettings or AdapterSettings
    checkpoint : Path, optional
    """

    def __init__(self, kind: FileKind, settings: BackboneSettings | AdapterSettings, checkpoint: Path | None) -> None:
        self._kind = kind
        self._settings = settings
        self.checkpoint: Path | None = checkpoint
        self.step: int = 0
        self.seconds: float = 0.0
        self.history: list[dict[str, float]] = []

    def begin(self, modules: dict[str, nn.Module]) -> None:
        """State which modules learn; the optimizer is made here."""
        self._kept = modules
        self.parameters: list[nn.Parameter] = [p for module in modules.values() for p in module.parameters()]
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(
            self.parameters, lr=self._settings.learning_rate, weight_decay=self._settings.weight_decay
        )

    def train(self) -> dict[str, float]:
        """Do one step; returns its losses."""
        raise NotImplementedError

    def provenance(self) -> dict[str, tuple[Any, str]]:
        """What a checkpoint must have been made with: JSON-able values, and what to call others of them."""
        raise NotImplementedError

    def more_tensors(self) -> dict[str, Tensor]:
        """What the checkpoint holds beside modules and optimizer."""
        return {}

    def restore_more(self, tensors: Mapping[str, Tensor]) -> None:
        """Take `more_tensors` from a checkpoint."""

    def steps(self) -> Generator[TrainStep, None, None]:
        """Train to the last step; what is interrupted within a step is not kept."""
        saved = began = time.monotonic()
        whole = True
        try:
            while self.step < self._settings.steps:
                whole = False
                for group in self.optimizer.param_groups:
                    group["lr"] = _rate(self._settings.learning_rate, self.step, self._settings.steps)
                losses = self.train()
                self.step += 1
                self.history = [*self.history[1 - MEAN_OF :], losses]
                now = time.monotonic()
                self.seconds, began = self.seconds + now - began, now
                whole = True
                if now - saved > KEEP_EVERY:
                    self.keep()
                    saved = now
                yield TrainStep(self.step, self._settings.steps, losses, stage="distill")
                began = time.monotonic()
        finally:
            if whole:
                self.keep()

    def indices(self, count: int, step: int) -> list[int]:
        """Views of a step, of ``count``: every view once in an epoch, in an order that follows from the seed."""
        batch = self._settings.batch
        places = range(step * batch, (step + 1) * batch)
        orders = {
            epoch: np.random.default_rng([self._settings.seed, 1, epoch]).permutation(count)
            for epoch in {place // count for place in places}
        }
        return [int(orders[place // count][place % count]) for place in places]

    def losses(self) -> dict[str, float]:
        """Means of the last losses, as a card holds them."""
        names = sorted({name for losses in self.history for name in losses})
        return {name: float(np.mean([losses[name] for losses in self.history])) for name in names}

    def keep(self) -> None:
        """Write the state, if there is a file for it."""
        if self.checkpoint is None:
            return
        tensors = training_tensors(self._kept, self.optimizer) | self.more_tensors()
        card = {"step": self.step, "seconds": self.seconds, "history": self.history, "settings": asdict(self._settings)}
        card |= {name: value for name, (value, _) in self.provenance().items()}
        write_card_file(self.checkpoint, self._kind, card, tensors)

    def restore(self) -> bool:
        """Go on from the checkpoint, if there is one; whether there was."""
        path = self.checkpoint
        if path is None or not path.exists():
            return False
        card, tensors, _ = read_card_file(path, self._kind)
        self._check_same(path, card)
        try:
            restore_training(self._kept, self.optimizer, tensors)
            self.restore_more(tensors)
        except (RuntimeError, ValueError, KeyError) as error:
            raise ModelFileError(f"{path}: its tensors do not fit ({str(error).splitlines()[0]})") from error
        self.step, self.seconds, self.history = card["step"], card["seconds"], card["history"]
        return True

    def _check_same(self, path: Path, card: dict[str, Any]) -> None:
        """Refuse a checkpoint of other settings, or of another provenance."""
        now = asdict(self._settings)
        for setting in fields(self._settings):
            then = card["settings"].get(setting.name, setting.default)
            if setting.name not in MAY_CHANGE and then != now[setting.name]:
                raise SettingsError(
                    f"{path} was made with {setting.name} {then!r}, now it is {now[setting.name]!r}; "
                    "give the same settings to go on, or remove the file to start anew"
                )
        for name, (value, other) in self.provenance().items():
            if card[name] != value:
                raise SettingsError(f"{path} was made with {other}; give the same, or remove the file to start anew")


def _rate(first: float, step: int, steps: int) -> float:
    """A cosine from the first rate to the last."""
    last = min(LAST_RATE, first)
    return last + (first - last) * (1 + math.cos(math.pi * step / steps)) / 2
