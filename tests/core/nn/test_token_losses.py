"""Losses between tokens: the equations by hand in numpy, and their limits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from distillfss_core.errors import SettingsError
from distillfss_core.nn.token_losses import (
    LOSSES,
    TokenLoss,
    attend,
    cwd_loss,
    mask_images,
    mse_loss,
    qsd_loss,
    tokens,
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def softmax(x: np.ndarray, axis: int) -> np.ndarray:
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def projected(x: np.ndarray, layers: torch.nn.Sequential) -> np.ndarray:
    """LayerNorm and Linear by hand."""
    norm, linear = layers
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + norm.eps)
    x = x * norm.weight.detach().numpy() + norm.bias.detach().numpy()
    return x @ linear.weight.detach().numpy().T + linear.bias.detach().numpy()


@pytest.mark.parametrize("tau", [1.0, 2.5])
def test_attention_is_the_softmax_over_teacher_tokens_without_a_root(tau):
    q, t, v = (normal(2, 7, 5, seed=seed) for seed in range(3))
    weights = softmax(np.einsum("bnc,bmc->bnm", q.numpy(), t.numpy()) / tau, 2)
    expected = np.einsum("bnm,bmc->bnc", weights, v.numpy())
    np.testing.assert_allclose(attend(q, t, v, tau).numpy(), expected, atol=1e-12)


def test_each_loss_is_its_equation():
    student, teacher = normal(2, 6, 3, 4), normal(2, 5, 3, 4, seed=1)
    s, t = (x.numpy().reshape(2, -1, 12).transpose(0, 2, 1) for x in (student, teacher))
    for loss in LOSSES:
        torch.manual_seed(3)
        module = TokenLoss(loss, 6, 5, 2.0).double()
        v = projected(s, module.psi)
        if loss == "cwd":
            p, q = softmax(t / 2.0, 1), softmax(v / 2.0, 1)
            expected = 4.0 * (p * np.log(p / q)).sum(1).mean()
        else:
            if loss == "qsd":
                logits = np.einsum("bnc,bmc->bnm", projected(s, module.phi), t) / 2.0
                v = np.einsum("bnm,bmc->bnc", softmax(logits, 2), v)
            expected = ((v - t) ** 2).mean()
        assert float(module(student, teacher)) == pytest.approx(expected, rel=1e-5), loss


def test_losses_are_zero_where_the_student_gives_the_teacher():
    teacher = normal(2, 9, 16)
    assert float(mse_loss(teacher, teacher)) == 0.0
    assert abs(float(cwd_loss(teacher, teacher))) < 1e-6
    assert float(cwd_loss(teacher + 3.0, teacher)) == pytest.approx(0.0, abs=1e-6)  # distributions have no offset
    assert float(cwd_loss(2 * teacher, teacher)) > 0.01
    keys = 100 * torch.eye(9, 16, dtype=torch.float64)[None].expand(2, -1, -1)
    assert float(qsd_loss(keys, keys, keys)) == 0.0


def test_qsd_whose_attention_is_the_identity_is_mse():
    teacher = 100 * torch.eye(9, 16, dtype=torch.float64)[None].expand(2, -1, -1)  # tokens that find only themselves
    values = normal(2, 9, 16)
    assert float(qsd_loss(teacher, values, teacher)) == float(mse_loss(values, teacher))
    assert float(qsd_loss(normal(2, 9, 16, seed=4), values, teacher)) != float(mse_loss(values, teacher))


def test_one_token_gives_its_projection():
    q, t, v = (normal(3, 1, 8, seed=seed) for seed in range(3))
    assert torch.equal(attend(q, t, v), v)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_order_of_the_tokens_makes_no_difference(loss):
    module = TokenLoss(loss, 6, 5).double()
    student, teacher = normal(2, 6, 1, 12), normal(2, 5, 1, 12, seed=1)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    permuted = module(student[..., order], teacher[..., order])
    assert float(permuted) == pytest.approx(float(module(student, teacher)), rel=1e-6)
    assert float(module(student[..., order], teacher)) != pytest.approx(float(permuted), rel=1e-4)


def test_assembled_values_lie_within_the_range_of_the_students():
    q, t, v = (normal(2, 20, 8, seed=seed) for seed in range(3))
    result = attend(q, t, v)
    assert (result <= v.amax(1, keepdim=True) + 1e-12).all()
    assert (result >= v.amin(1, keepdim=True) - 1e-12).all()


def test_a_higher_temperature_spreads_the_attention():
    assert TokenLoss("qsd", 6, 16, "sqrt").temperature == 4.0
    q, t, v = (normal(1, 20, 16, seed=seed) for seed in range(3))
    narrow, wide = ((attend(q, t, v, tau) - v.mean(1, keepdim=True)).abs().mean() for tau in (1.0, 1e3))
    assert wide < 0.1 * narrow


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_reach_the_student_and_every_projection_but_not_the_teacher(loss):
    module = TokenLoss(loss, 6, 5).double()
    student, teacher = normal(2, 6, 3, 3).requires_grad_(), normal(2, 5, 3, 3, seed=1).requires_grad_()
    module(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad.abs().max() > 0
    gradients = {name: p.grad for name, p in module.named_parameters()}
    if loss == "cwd":  # a softmax over positions does not see what is added to a channel
        assert gradients.pop("psi.1.bias").abs().max() < 1e-6
    assert {name for name, g in gradients.items() if g is None or not g.abs().max() > 0} == set()


def test_maps_of_different_grids_are_refused():
    with pytest.raises(SettingsError, match=r"grids of 4 x 4 and 4 x 6 tokens"):
        TokenLoss("qsd", 6, 5)(torch.zeros(1, 6, 4, 4), torch.zeros(1, 5, 4, 6))


def test_tokens_run_row_by_row():
    grid = torch.arange(12.0).reshape(1, 1, 3, 4)
    assert tokens(grid)[0, :, 0].tolist() == list(range(12))


def test_masked_blocks_have_the_fill_and_others_stay():
    images = torch.rand(2, 3, 32, 64, generator=torch.Generator().manual_seed(0))
    masked = torch.zeros(2, 2, 4, dtype=torch.bool)
    masked[0, 1, 2] = True
    fill = torch.tensor([0.1, 0.2, 0.3])[:, None, None]
    result = mask_images(images, masked, fill)
    assert torch.equal(result[0, :, 16:, 32:48], fill.expand(3, 16, 16))
    expected = images.clone()
    expected[0, :, 16:, 32:48] = fill
    assert torch.equal(result, expected)
