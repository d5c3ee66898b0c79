"""The teachers: DCAMA as published, its fused attention, and the protocol that both teachers keep."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distillfss_core.nn.decoder import PublishedDecoder, SlimDecoder
from distillfss_core.nn.features import EncodedSupport, FeaturePyramid
from distillfss_core.nn.teachers import (
    PUBLISHED,
    AlignmentSettings,
    AlignmentTeacher,
    DcamaSettings,
    DcamaTeacher,
    PrototypeTeacher,
    UinoSettings,
    UinoTeacher,
    VotingTeacher,
    vote,
)
from distillfss_core.nn.teachers.dcama import attend, mask_tokens, weigh_keys
from distillfss_core.nn.teachers.readers import READERS
from published import PublishedCase
from pyramids import SMALL_SPEC, random_pyramid

CHANNELS, BLOCKS, SKIPS = (32, 48, 64), (2, 3, 2), (4, 6, 32)


@pytest.mark.parametrize("support_skip", [False, True])
@pytest.mark.parametrize("shots", [1, 5])
def test_the_published_form_gives_the_published_numbers(shared: Path, shots: int, support_skip: bool) -> None:
    case = PublishedCase(shared / "parity", support_skip=support_skip)
    decoder = PublishedDecoder((2, 3, 2), (8, 16), support_skip=support_skip, grid=96)
    teacher = DcamaTeacher((16, 24, 32), decoder, PUBLISHED).eval()
    weights = case.weights()
    teacher.load_state_dict({k if k.startswith("DCAMA") else f"decoder.{k}": v for k, v in weights.items()})
    with torch.no_grad():
        found = teacher(case.pyramid("query"), teacher.encode(case.support(shots)))
    for name, maps in zip(("1_8", "1_16", "1_32"), found.coarse, strict=True):
        torch.testing.assert_close(maps[:, 0], case.tensors[f"{shots}shot/coarse/{name}"], atol=1e-4, rtol=0)
    expected = case.tensors[f"{shots}shot/logits_every_8th_pixel"]
    torch.testing.assert_close(found.logits[:, 0, :, ::8, ::8], expected, atol=1e-4, rtol=0)


def _pyramid(batch: int, seed: int, side: int = 64) -> FeaturePyramid:
    return random_pyramid(side, batch, seed)


def _support(shots: int, classes: int = 1, seed: int = 1) -> EncodedSupport:
    generator = torch.Generator().manual_seed(seed + 100)
    labels = torch.randint(0, classes + 1, (shots, 8, 8), generator=generator)
    labels = labels.repeat_interleave(8, 1).repeat_interleave(8, 2)
    masks = torch.stack([(labels == c).float() for c in range(1, classes + 1)], 1)

    def marked(block: Tensor) -> Tensor:  # objects look alike, as they do in images
        share = F.adaptive_avg_pool2d(masks[:, :1], block.shape[-2:])
        return 0.3 * block + share * torch.sin(torch.arange(block.shape[1]))[:, None, None]

    return EncodedSupport(_pyramid(shots, seed).map(marked), masks, torch.ones(shots, 64, 64))


def _dcama(settings: DcamaSettings | None = None) -> DcamaTeacher:
    torch.manual_seed(0)
    return DcamaTeacher(CHANNELS, SlimDecoder(BLOCKS, SKIPS, width=8), settings or DcamaSettings()).eval()


def _uino(reader: str) -> UinoTeacher:
    torch.manual_seed(0)
    settings = UinoSettings(reader=reader, width=16, heads=2)
    return UinoTeacher(SMALL_SPEC, SlimDecoder(BLOCKS, SKIPS, width=8), settings).eval()


def _aligned() -> AlignmentTeacher:
    torch.manual_seed(0)
    return AlignmentTeacher(SMALL_SPEC, SlimDecoder(BLOCKS, SKIPS, width=8), AlignmentSettings()).eval()


TEACHERS = [
    pytest.param(_dcama, id="dcama"),
    pytest.param(lambda: _dcama(DcamaSettings(max_keys=64)), id="dcama-thinned"),
    *(pytest.param(partial(_uino, reader), id=f"uino-{reader}") for reader in READERS),
    pytest.param(PrototypeTeacher, id="prototype"),
    pytest.param(_aligned, id="prototype-learned"),
    pytest.param(lambda: VotingTeacher(_dcama(), 1), id="voting"),
]


@pytest.mark.parametrize("make", TEACHERS)
class TestTeacherContract:
    """What holds for every teacher, whatever it is made of."""

    @pytest.mark.parametrize(("shots", "classes"), [(1, 1), (5, 1), (2, 3)])
    def test_shapes_and_ranges(self, make, shots: int, classes: int) -> None:
        teacher = make()
        with torch.no_grad():
            found = teacher(_pyramid(2, 0), teacher.encode(_support(shots, classes)))
        assert found.logits.shape == (2, classes, 2, 64, 64)
        for maps, blocks, side in zip(found.coarse, BLOCKS, (8, 4, 2), strict=True):
            assert maps.shape == (2, classes, blocks, side, side)
            assert 0 <= float(maps.min()) <= float(maps.max()) <= 1 + 1e-6

    def test_the_order_of_shots_does_not_matter(self, make) -> None:
        teacher, query, support = make(), _pyramid(1, 0), _support(5)
        with torch.no_grad():
            straight = teacher(query, teacher.encode(support)).logits
            shuffled = teacher(query, teacher.encode(support[torch.tensor([3, 0, 4, 2, 1])])).logits
        torch.testing.assert_close(straight, shuffled, atol=1e-4, rtol=1e-4)

    def test_a_support_that_says_nothing_new_changes_little(self, make) -> None:
        teacher, query, support = make(), _pyramid(1, 0), _support(1)
        twice = support[torch.tensor([0, 0])]
        with torch.no_grad():
            once, again = (teacher(query, teacher.encode(s)).coarse for s in (support, twice))
        for a, b in zip(once, again, strict=True):
            assert float((a - b).abs().mean()) < 0.1

    def test_unannotated_pixels_teach_nothing(self, make) -> None:
        teacher, query, support = make(), _pyramid(1, 0), _support(2)
        valid = torch.ones(2, 64, 64)
        valid[:, :32] = 0
        masks = support.masks.clone()
        masks[:, :, :32] = 1 - masks[:, :, :32]
        features = support.features.map(_scramble_top)
        with torch.no_grad():
            kept = teacher(query, teacher.encode(EncodedSupport(support.features, support.masks, valid))).logits
            other = teacher(query, teacher.encode(EncodedSupport(features, masks, valid))).logits
        torch.testing.assert_close(kept, other, atol=1e-5, rtol=1e-5)

    def test_a_class_without_example_is_never_foreground(self, make) -> None:
        teacher, support = make(), _support(1, classes=2)
        masks = support.masks.clone()
        masks[:, 1] = 0
        with torch.no_grad():
            keys = teacher.encode(EncodedSupport(support.features, masks, support.valid))
            logits = teacher(_pyramid(1, 0), keys).logits
        assert bool((logits[:, 1, 1] == -torch.inf).all())
        assert bool(torch.isfinite(logits[:, 0]).all())

    def test_the_other_shot_count_of_a_copy_finds_itself(self, make) -> None:
        teacher, support = make(), _support(1)
        with torch.no_grad():
            found = teacher(support.features, teacher.encode(support)).coarse.fine[0, 0].mean(0)
        truth = support.masks[0, 0, ::8, ::8] > 0.5
        assert float(found[truth].mean()) > float(found[~truth].mean()) + 0.2


@pytest.mark.parametrize("make", [_dcama, _aligned, *(partial(_uino, reader) for reader in READERS)])
def test_teachers_that_learn_give_nearly_the_same_maps_in_bfloat16(make) -> None:
    teacher, query, support = make(), _pyramid(2, 0), _support(3, 2)
    with torch.no_grad():
        exact = teacher(query, teacher.encode(support)).coarse
        with torch.autocast("cpu", torch.bfloat16):
            rough = teacher(query, teacher.encode(support)).coarse
    for a, b in zip(exact, rough, strict=True):
        assert float((a - b.float()).abs().mean()) < 0.02


def _scramble_top(block: Tensor) -> Tensor:
    changed = block.clone()
    changed[:, :, : block.shape[2] // 2] += 5
    return changed


@pytest.mark.parametrize("largest", [0, 1 << 23], ids=["fused", "built"])
def test_attention_and_its_gradients_equal_the_explicit_form(monkeypatch, largest) -> None:
    monkeypatch.setattr("distillfss_core.nn.teachers.dcama.SMALL_WITH_GRADIENTS", largest)
    torch.manual_seed(0)
    q, k = torch.randn(2, 4, 9, 6, requires_grad=True), torch.randn(4, 11, 6, requires_grad=True)
    values, bias = torch.rand(11, 7), torch.randn(11)
    bias[3] = -torch.inf
    scores = q @ k.transpose(1, 2) / 6**0.5 + bias
    expected = (scores.softmax(-1) @ values).mean(1)
    found = attend(q, k, values, bias)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    weights = torch.rand_like(expected)
    gradients = (torch.autograd.grad((out * weights).sum(), (q, k)) for out in (found, expected))
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-5)


def test_classes_share_one_attention_and_get_what_each_would_alone() -> None:
    teacher, query, support = _dcama(DcamaSettings(balance=0.0)), _pyramid(1, 0), _support(2, classes=3)
    with torch.no_grad():
        together = teacher.coarse(query, teacher.encode(support))
        for k in range(3):
            alone = EncodedSupport(support.features, support.masks[:, k : k + 1], support.valid)
            single = teacher.coarse(query, teacher.encode(alone))
            for a, b in zip(together, single, strict=True):
                torch.testing.assert_close(a[:, k], b[:, 0], atol=1e-5, rtol=1e-5)


def test_balanced_keys_weigh_a_rare_object_as_much_as_the_background() -> None:
    values = torch.zeros(100, 1)
    values[:4] = 1
    index, bias = weigh_keys(values, torch.ones(100), shots=1, balance=1.0, max_keys=None)
    assert bias is not None
    weights = bias.exp()
    torch.testing.assert_close(weights[values[index, 0] == 1].sum(), weights[values[index, 0] == 0].sum())


@pytest.mark.parametrize("balance", [0.0, 1.0])
def test_thinning_keeps_to_the_budget_and_every_class_keeps_its_weight(balance: float) -> None:
    torch.manual_seed(0)
    values = (torch.rand(400, 2) < torch.tensor([0.05, 0.4])).float()
    values[:, 1] *= 1 - values[:, 0]
    _, full = weigh_keys(values, torch.ones(400), shots=4, balance=balance, max_keys=None)
    index, thin = weigh_keys(values, torch.ones(400), shots=4, balance=balance, max_keys=90)
    assert thin is not None
    assert 60 <= len(index) <= 90
    everything = torch.ones(400) if full is None else full.exp()
    for c in range(2):
        torch.testing.assert_close(
            thin.exp()[values[index, c] == 1].sum(), everything[values[:, c] == 1].sum(), rtol=1e-3, atol=1e-4
        )


def test_a_thin_scribble_stays_a_key() -> None:
    support = _support(1)
    valid = torch.zeros(1, 64, 64)
    valid[0, 20, 10:50] = 1
    _, weights = mask_tokens(EncodedSupport(support.features, support.masks, valid), (2, 2), area=True)
    assert (weights > 0).sum() == 2


def test_a_support_without_annotation_is_refused() -> None:
    support = _support(1)
    with pytest.raises(ValueError, match="annotated"):
        _dcama().encode(EncodedSupport(support.features, support.masks, torch.zeros(1, 64, 64)))


def test_voting_takes_both_logits_from_the_surest_group() -> None:
    a = torch.tensor([[1.0, 5.0], [0.0, 2.0]]).T.reshape(1, 1, 2, 1, 2)
    b = torch.tensor([[7.0, 4.0], [3.0, 9.0]]).T.reshape(1, 1, 2, 1, 2)
    assert vote([a, b])[0, 0, :, 0].tolist() == [[1.0, 3.0], [5.0, 9.0]]


def test_memory_of_the_fused_path_does_not_grow_with_the_square_of_tokens() -> None:
    resource = pytest.importorskip("resource", reason="Windows does not tell a process its memory this way")
    code = """
import resource, torch
from distillfss_core.nn.teachers.dcama import attend
torch.set_num_threads(1)
with torch.no_grad():
    warm = attend(torch.randn(1, 4, 64, 28), torch.randn(4, 64, 28), torch.rand(64, 1), torch.zeros(64))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    attend(torch.randn(1, 4, 8192, 28), torch.randn(4, 8192, 28), torch.rand(8192, 1), torch.zeros(8192))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    square = 4 * 8192 * 8192 * 4 / 2**20  # megabytes of one score matrix for four heads
    assert float(done.stdout) < square / 8
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss > 0


def test_no_class_loses_all_its_keys_however_thinly_it_is_spread() -> None:
    values = torch.zeros(20 * 16, 3)
    values[::16] = torch.eye(3)[torch.arange(20) % 3]  # one key a shot
    index, _ = weigh_keys(values, torch.ones(len(values)), shots=20, balance=1.0, max_keys=16)
    assert bool((values[index].sum(0) > 0).all())
    assert bool((values[index].sum(1) == 0).any())


def test_published_attention_finds_keys_in_thin_scribbles() -> None:
    support = _support(1)
    valid = torch.zeros(1, 64, 64)
    valid[0, ::12] = 1
    _, weights = mask_tokens(EncodedSupport(support.features, support.masks, valid), (2, 2), area=False)
    assert bool((weights > 0).any())
