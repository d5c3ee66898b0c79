"""Students and decoders: the published numbers, and what our light forms promise."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from distillfss_core.nn.decoder import (
    RATIOS,
    Decoder,
    PublishedDecoder,
    SlimDecoder,
    enlarge_by_convolution,
    sum_on_finest,
)
from distillfss_core.nn.features import CoarseMaps, FeaturePyramid, margins, merge_classes
from distillfss_core.nn.students import ConvDist, LightConvDist, Student
from distillfss_core.nn.students.convdist import ChannelNorm
from published import PublishedCase
from pyramids import random_pyramid

CHANNELS, BLOCKS, SKIPS = (8, 12, 16), (2, 3, 2), (4, 6, 8)


@pytest.mark.parametrize("support_skip", [False, True])
def test_convdist_gives_the_published_maps_and_logits(shared: Path, support_skip: bool) -> None:
    case = PublishedCase(shared / "parity", support_skip=support_skip)
    student = ConvDist((16, 24, 32), 1).eval()
    student.classes[0].load_state_dict(case.weights("student/weights/"))
    query = case.pyramid("query")
    with torch.no_grad():
        coarse = student(query)
    for name, maps in zip(("1_8", "1_16", "1_32"), coarse, strict=True):
        torch.testing.assert_close(maps[:, 0], case.tensors[f"student/coarse/{name}"], atol=1e-4, rtol=0)
    if not support_skip:  # published with the skip connection off
        decoder = PublishedDecoder((2, 3, 2), (8, 16), grid=96).eval()
        decoder.load_state_dict({k: v for k, v in case.weights().items() if not k.startswith("DCAMA")})
        with torch.no_grad():
            logits = decoder(coarse, query)[:, 0, :, ::8, ::8]
        torch.testing.assert_close(logits, case.tensors["student/logits_every_8th_pixel"], atol=1e-4, rtol=0)


def _pyramid(side: int = 96, batch: int = 1, seed: int = 0) -> FeaturePyramid:
    return random_pyramid(side, batch, seed, channels=(4, 6, 8, 12, 16))


def _coarse(classes: int, side: int = 96, batch: int = 1) -> CoarseMaps:
    generator = torch.Generator().manual_seed(7)
    return CoarseMaps(
        *(
            torch.rand(batch, classes, n, side // s, side // s, generator=generator)
            for n, s in zip(BLOCKS, (8, 16, 32), strict=True)
        )
    )


@pytest.mark.parametrize("form", [ConvDist(CHANNELS, 3), LightConvDist(CHANNELS, BLOCKS, 3)])
def test_students_give_one_map_a_block_and_class(form: Student) -> None:
    maps = form(_pyramid(batch=2))
    assert [tuple(m.shape) for m in maps] == [(2, 3, 2, 12, 12), (2, 3, 3, 6, 6), (2, 3, 2, 3, 3)]


def test_a_class_more_costs_the_light_student_a_filter_a_block() -> None:
    def size(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    one, five = size(LightConvDist(CHANNELS, BLOCKS, 1)), size(LightConvDist(CHANNELS, BLOCKS, 5))
    assert five - one == 4 * sum(BLOCKS) * (48 + 1)
    assert size(ConvDist(CHANNELS, 5)) == 5 * size(ConvDist(CHANNELS, 1))


def _randomized(decoder: SlimDecoder) -> SlimDecoder:
    nn.init.normal_(decoder.out.weight)
    return decoder


@pytest.mark.parametrize(
    "decoder",
    [PublishedDecoder(BLOCKS, SKIPS[1:]), _randomized(SlimDecoder(BLOCKS, SKIPS, width=8))],
    ids=["published", "slim"],
)
def test_classes_are_decoded_as_each_would_be_alone(decoder: Decoder) -> None:
    query, coarse = _pyramid(batch=2), _coarse(3, batch=2)
    with torch.no_grad():
        together = decoder(coarse, query)
        assert together.shape == (2, 3, 2, 96, 96)
        for k in range(3):
            alone = decoder(CoarseMaps(*(m[:, k : k + 1] for m in coarse)), query)
            torch.testing.assert_close(together[:, k : k + 1], alone, atol=1e-4, rtol=1e-4)


def test_before_training_the_slim_decoder_says_what_the_maps_say() -> None:
    decoder = SlimDecoder(BLOCKS, SKIPS, width=8)
    low, high = (CoarseMaps(*(torch.full_like(m, v) for m in _coarse(1))) for v in (0.2, 0.9))
    with torch.no_grad():
        assert bool((decoder(low, _pyramid())[:, 0].argmax(1) == 0).all())
        assert bool((decoder(high, _pyramid())[:, 0].argmax(1) == 1).all())


def test_no_pixel_of_the_slim_decoder_looks_at_the_whole_tile() -> None:
    decoder = _randomized(SlimDecoder(BLOCKS, SKIPS, width=8))
    side = 512
    query, coarse = _pyramid(side), _coarse(1, side)
    changed = query.map(torch.clone)
    for block in (b for stage in changed.stages for b in stage):
        block[:, :, :, block.shape[3] * 3 // 4 :] += 3
    with torch.no_grad():
        difference = (decoder(coarse, query) - decoder(coarse, changed)).abs().amax((0, 1, 2, 3))
    assert float(difference[-side // 8 :].min()) > 0
    assert float(difference[: side // 2].max()) == 0


def test_merged_classes_keep_the_background_of_the_strongest_class() -> None:
    logits = torch.tensor([[[1.0, 2.0], [3.0, 0.5]]])[..., None, None]  # b k 2 h w
    assert merge_classes(logits)[0, :, 0, 0].tolist() == [1.0, 2.0, 0.5]
    one = torch.tensor([[[1.0, 2.0]]])[..., None, None]
    assert merge_classes(one)[0, :, 0, 0].tolist() == [1.0, 2.0]


@pytest.mark.parametrize("classes", [1, 3])
def test_margins_say_what_the_merged_logits_say(classes: int) -> None:
    logits = torch.randn(2, classes, 2, 5, 7, generator=torch.Generator().manual_seed(0))
    found = margins(logits)
    assert found.shape == (2, classes, 5, 7)
    with_background = torch.cat([torch.zeros(2, 1, 5, 7), found], 1)
    torch.testing.assert_close(with_background.softmax(1), merge_classes(logits).softmax(1))


def test_logits_on_the_decoders_grid_need_only_be_enlarged() -> None:
    decoder = _randomized(SlimDecoder(BLOCKS, SKIPS, width=8))
    query, coarse = _pyramid(64), _coarse(2, 64)
    with torch.no_grad():
        whole, grid = decoder(coarse, query), decoder.on_grid(coarse, query)
    assert grid.shape[-2:] == query.skips[0].shape[-2:]
    enlarged = F.interpolate(grid.flatten(0, 1), query.size, mode="bilinear", align_corners=False)
    torch.testing.assert_close(enlarged.unflatten(0, (-1, 2)), whole)
    published = PublishedDecoder(BLOCKS, (SKIPS[-2], SKIPS[-1])).eval()
    with torch.no_grad():
        torch.testing.assert_close(published.on_grid(coarse, query), published(coarse, query))


@pytest.mark.parametrize("classes", [1, 3])
def test_a_decoder_gives_the_margins_of_its_logits(classes: int) -> None:
    decoder = _randomized(SlimDecoder(BLOCKS, SKIPS, width=8))
    query, coarse = _pyramid(64, batch=2), _coarse(classes, 64, batch=2)
    with torch.no_grad():
        found, expected = decoder.margins(coarse, query), margins(decoder.on_grid(coarse, query))
    assert float(expected.std()) > 0.01
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_channels_are_normalized_as_by_a_layer_norm(dtype: torch.dtype) -> None:
    block = (30 * torch.randn(2, 192, 5, 7, generator=torch.Generator().manual_seed(0)) + 100).to(dtype)
    expected = F.layer_norm(block.float().movedim(1, -1), (192,)).movedim(-1, 1)
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(ChannelNorm(192).to(dtype)(block).float(), expected, atol=tolerance, rtol=tolerance)


def test_maps_are_summed_as_if_each_were_enlarged_by_itself() -> None:
    noise = torch.Generator().manual_seed(0)
    maps = [torch.randn(2, 3, 32 // n, 48 // n, generator=noise) for n in (1, 2, 1, 8, 2)]
    expected = sum(F.interpolate(m, (32, 48), mode="bilinear", align_corners=False) for m in maps)
    torch.testing.assert_close(sum_on_finest(maps), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("ratio", RATIOS)
def test_a_map_is_enlarged_by_a_convolution_as_by_torch(ratio: int) -> None:
    x = torch.randn(2, 1, 5, 3, generator=torch.Generator().manual_seed(0))
    expected = F.interpolate(x, scale_factor=float(ratio), mode="bilinear", align_corners=False)
    torch.testing.assert_close(enlarge_by_convolution(x, ratio), expected)
