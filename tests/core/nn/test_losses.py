"""Losses against published numbers and against scikit-like hand computation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from distillfss_core.nn.features import CoarseMaps, strongest
from distillfss_core.nn.losses import coarse_loss, dice_loss, distillation_loss, focal_loss, joint_loss
from distillfss_core.types import IGNORE


def _maps(tensors: dict[str, Tensor], who: str) -> CoarseMaps:
    fine, mid, deep = (torch.stack([tensors[f"{who}_coarse/{k}/{j}"] for k in (0, 1)], 1) for j in (2, 1, 0))
    return CoarseMaps(fine, mid, deep)


def test_losses_equal_the_published_ones(root: Path) -> None:
    path = root / "tests" / "data" / "losses.safetensors"
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        expected = {name: float(json.loads(value)) for name, value in file.metadata().items()}
    teacher, student, target = tensors["teacher_logits"], tensors["student_logits"], tensors["target"]
    coarse = coarse_loss(_maps(tensors, "student"), _maps(tensors, "teacher"))
    assert float(focal_loss(teacher, target)) == pytest.approx(expected["focal_teacher"], abs=1e-6)
    assert float(joint_loss(teacher, student, coarse, target)) == pytest.approx(expected["refine_distill"], abs=1e-6)
    assert float(distillation_loss(teacher, student, coarse)) == pytest.approx(expected["distill"], abs=1e-6)


@pytest.mark.parametrize("loss", [focal_loss, dice_loss])
def test_unannotated_pixels_do_not_count(loss) -> None:
    torch.manual_seed(0)
    logits, target = torch.randn(1, 3, 8, 8), torch.randint(0, 3, (1, 8, 8))
    target[0, :4] = IGNORE
    other = logits.clone()
    other[:, :, :4] += torch.randn(1, 3, 4, 8)
    assert float(loss(logits, target)) == pytest.approx(float(loss(other, target)), abs=1e-6)
    assert float(loss(logits, target)) != pytest.approx(float(loss(logits.flip(3), target)), abs=1e-3)


def test_the_strongest_map_is_the_first_of_equal_ones() -> None:
    maps = torch.randint(0, 3, (2, 4, 8, 8), generator=torch.Generator().manual_seed(0)).float()
    assert torch.equal(strongest(maps), torch.from_numpy(maps.numpy().argmax(1)))


def test_dice_counts_a_rare_class_as_much_as_a_common_one() -> None:
    target = torch.ones(1, 32, 32, dtype=torch.long)
    target[0, 0, :8] = 2
    missed = torch.zeros(1, 3, 32, 32)
    missed[:, 1] = 20.0  # everything is called class 1
    assert float(dice_loss(missed, target)) > 0.4


def test_dice_of_a_perfect_answer_is_zero_and_of_an_empty_crop_defined() -> None:
    target = torch.randint(0, 2, (2, 8, 8), generator=torch.Generator().manual_seed(0))
    perfect = torch.nn.functional.one_hot(target, 2).movedim(-1, 1).float() * 40
    assert float(dice_loss(perfect, target)) < 1e-3
    empty = torch.zeros(2, 8, 8, dtype=torch.long)
    assert float(dice_loss(perfect, empty)) == pytest.approx(float((target == 1).float().mean()), abs=1e-3)
