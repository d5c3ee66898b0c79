"""Image encoders of SAM and MobileSAM: names, shapes and values as published, and files that do not fit."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from distillfss_core.errors import ModelFileError, WeightsUnavailableError
from distillfss_core.nn.backbones.spec import IMAGENET_MEAN, IMAGENET_STD
from distillfss_core.nn.sam import _mobile_name, _new_mobile, _new_vit, _vit_name, map_sam, read_sam
from distillfss_core.nn.sam_decoder import SamMaskDecoder, load_sam_decoder
from sam_files import (
    SMALL_VIT,
    decoder_shapes,
    filled,
    mobile_shapes,
    reference_mask,
    reference_mobile,
    reference_vit,
    small_sam,
    vit_shapes,
)

PUBLISHED = {
    "vit_b": ((768, 12, 12, (2, 5, 8, 11)), 93_735_472),
    "vit_l": ((1024, 24, 16, (5, 11, 17, 23)), 312_342_832),
    "vit_h": ((1280, 32, 16, (7, 15, 23, 31)), 641_090_608),
}
"""Width, depth, heads and global blocks; parameters of the whole model."""


def image(side: int, seed: int = 3) -> torch.Tensor:
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(seed))


def normalized(x: torch.Tensor) -> torch.Tensor:
    return (x - torch.tensor(IMAGENET_MEAN)[:, None, None]) / torch.tensor(IMAGENET_STD)[:, None, None]


def parameters(shapes) -> int:
    buffers = ("running_mean", "running_var", "num_batches_tracked", "gaussian_matrix")
    return sum(torch.Size(shape).numel() for name, shape in shapes.items() if not name.endswith(buffers))


@pytest.fixture(scope="module")
def mobile():
    return filled(mobile_shapes() | decoder_shapes())


@pytest.mark.parametrize("name", PUBLISHED)
def test_each_published_vit_has_a_place_for_every_tensor(name: str) -> None:
    form, count = PUBLISHED[name]
    shapes = vit_shapes(*form)
    assert parameters(shapes | decoder_shapes()) == count
    with torch.device("meta"):
        encoder = _new_vit({key: torch.empty(shape) for key, shape in shapes.items()}, "here")
    assert {_vit_name(key): tuple(value.shape) for key, value in encoder.state_dict().items()} == shapes
    assert (encoder.name, encoder.side) == (name, 1024)
    assert encoder.get_submodule("net.blocks.0.attn").get_parameter("rel_pos_h").shape[0] == 27
    windows = [block.window_size for block in encoder.get_submodule("net.blocks")]
    assert [number for number, window in enumerate(windows) if not window] == list(form[3])
    assert set(windows) == {0, 14}


def test_mobile_sam_has_a_place_for_every_tensor_of_its_encoder_but_the_classifier() -> None:
    shapes = mobile_shapes()
    assert parameters(shapes | decoder_shapes()) == 10_130_092
    own = {key: shape for key, shape in shapes.items() if "head" not in key}
    assert {_mobile_name(key): tuple(value.shape) for key, value in _new_mobile().state_dict().items()} == own


def test_a_vit_gives_the_embedding_of_the_published_formulas() -> None:
    tensors = small_sam()
    encoder = map_sam(tensors, "here")
    assert (encoder.name, encoder.side) == ("vit_32", 80)
    found = encoder(image(80))
    expected = torch.stack([reference_vit(tensors, x, heads=2) for x in normalized(image(80))])
    assert found.shape == (2, 256, 5, 5)
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-4)


def test_the_normalization_layers_of_a_vit_have_the_published_epsilon() -> None:
    tensors = small_sam()
    for name in ("patch_embed.proj.weight", "patch_embed.proj.bias", "pos_embed"):
        tensors[f"image_encoder.{name}"] *= 1e-3  # values whose variance is near epsilon
    expected = reference_vit(tensors, normalized(image(80))[0], heads=2)
    torch.testing.assert_close(map_sam(tensors, "here")(image(80))[0].double(), expected, atol=1e-3, rtol=1e-3)


def test_mobile_sam_gives_the_embedding_of_the_published_formulas(mobile) -> None:
    encoder = map_sam(mobile, "here")
    assert (encoder.name, encoder.side) == ("vit_t", 1024)
    encoder.side = 128  # windows of 14 and 7 cells on grids of 16 and 8
    expected = torch.stack([reference_mobile(mobile, x) for x in normalized(image(128))])
    found = encoder(image(128))
    assert found.shape == (2, 256, 8, 8)
    torch.testing.assert_close(found.double(), expected, atol=1e-3, rtol=1e-3)


@pytest.mark.slow
def test_mobile_sam_gives_64_cells_for_images_of_any_size(mobile) -> None:
    assert map_sam(mobile, "here")(image(96)[:1]).shape == (1, 256, 64, 64)


def test_an_encoder_is_frozen_and_another_file_has_another_digest() -> None:
    encoder, other = map_sam(small_sam(), "here"), map_sam(small_sam(1), "here")
    assert not encoder.training
    assert not any(p.requires_grad for p in encoder.parameters())
    assert encoder.origin()["digest"] != other.origin()["digest"]
    assert encoder.origin() == map_sam(filled(SMALL_VIT), "here").origin()  # whatever decoder is beside it


# files


@pytest.mark.parametrize("name", ["small.pth", "small.safetensors", "wrapped.pt", "half.pt"])
def test_files_of_torch_and_safetensors_are_read(tmp_path: Path, name: str) -> None:
    tensors = small_sam()
    if name == "half.pt":
        tensors = {key: value.half() for key, value in tensors.items()}
    if name.endswith(".safetensors"):
        save_file(tensors, tmp_path / name)
    else:
        torch.save({"model": tensors} if name == "wrapped.pt" else tensors, tmp_path / name)
    encoder = read_sam(tmp_path / name)
    assert encoder.file == name
    expected = map_sam({key: value.float() for key, value in tensors.items()}, "here")
    assert torch.equal(encoder(image(80)), expected(image(80)))


def _without(key: str):
    return lambda tensors: {name: value for name, value in tensors.items() if name != key}


def _with(key: str, value: torch.Tensor):
    return lambda tensors: tensors | {key: value}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_with("image_encoder.blocks.0.extra", torch.ones(2)), "'image_encoder.blocks.0.extra' has no place"),
        (_with("adapter.weight", torch.ones(2)), "'adapter.weight' has no place in a checkpoint of image_encoder"),
        (_without("image_encoder.neck.3.bias"), r"'image_encoder.neck.3.bias' of shape \(256,\) is missing"),
        (_without("image_encoder.pos_embed"), "'image_encoder.pos_embed' is missing; give a checkpoint of SAM"),
        (_without("image_encoder.blocks.2.attn.rel_pos_h"), "'image_encoder.blocks.2.attn.rel_pos_h' is missing"),
        (_with("image_encoder.pos_embed", torch.ones(5, 32)), r"pos_embed' has shape \(5, 32\)"),
        (_with("image_encoder.neck.0.weight", torch.ones(128, 32, 1, 1)), r"expected \(256, 32, 1, 1\)"),
        (_with("image_encoder.blocks.1.attn.rel_pos_w", torch.ones(5, 16)), r"rel_pos_w' has shape \(5, 16\)"),
        (_with("image_encoder.neck.1.weight", torch.full((256,), torch.nan)), "no finite floating numbers"),
    ],
)
def test_a_file_with_a_tensor_that_does_not_fit_is_refused_with_its_name(change, message: str) -> None:
    with pytest.raises(ModelFileError, match=message):
        map_sam(change(small_sam()), "here")


def test_the_first_tensor_that_mobile_sam_has_no_place_for_is_named(mobile) -> None:
    with pytest.raises(ModelFileError, match=r"'image_encoder.layers.3.downsample.conv1.c.weight' has no place"):
        map_sam(mobile | {"image_encoder.layers.3.downsample.conv1.c.weight": torch.ones(2)}, "here")


@pytest.mark.parametrize(
    ("name", "download"),
    [
        ("vit_b", "sam_vit_b_01ec64.pth and"),
        ("sam_vit_h_4b8939.pth", "sam_vit_h_4b8939.pth and"),
        ("MobileSAM", "mobile_sam.pt and"),
        ("sam", "sam_vit_h_4b8939.pth, or .*sam_vit_l_0b3195.pth, or .*sam_vit_b_01ec64.pth, or .*mobile_sam.pt and"),
    ],
)
def test_a_name_instead_of_a_path_is_answered_with_the_download(name: str, download: str) -> None:
    with pytest.raises(
        WeightsUnavailableError, match=rf"no file is called '{name}'; download https://[^ ]*/{download}"
    ):
        read_sam(name)


def test_objects_in_a_file_are_not_run(tmp_path: Path) -> None:
    class Loud:
        def __reduce__(self):
            return print, ("run",)

    path = tmp_path / "sam_vit_b.pth"
    path.write_bytes(pickle.dumps({"image_encoder.pos_embed": Loud()}))
    with pytest.raises(ModelFileError, match=r"sam_vit_b\.pth"):
        read_sam(path)
    torch.save({"model": small_sam(), "config": Loud()}, path)
    with pytest.raises(ModelFileError, match="objects other than tensors"):
        read_sam(path)


# the mask decoder


@pytest.fixture(scope="module")
def decoder_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("sam") / "small_sam.pth"
    torch.save(small_sam(), path)
    return path


def test_the_mask_decoder_gives_the_mask_of_the_published_formulas(decoder_file: Path) -> None:
    decoder = SamMaskDecoder()
    load_sam_decoder(decoder_file, decoder)
    generator = torch.Generator().manual_seed(0)
    embedding = torch.randn(2, 256, 5, 7, generator=generator)
    prompts = torch.randn(2, 3, 256, generator=generator)
    with torch.no_grad():
        found = decoder(embedding, prompts)
    assert found.shape == (2, 1, 20, 28)
    expected = torch.stack([reference_mask(small_sam(), e, p) for e, p in zip(embedding, prompts, strict=True)])
    torch.testing.assert_close(found[:, 0].double(), expected, atol=1e-3, rtol=1e-3)


def test_the_mask_decoder_has_the_published_parameters_that_one_mask_depends_on() -> None:
    unused = ("iou_prediction_head", "mlps.1", "mlps.2", "mlps.3", "point", "mask_downscaling", "gaussian")
    wanted = {name: shape for name, shape in decoder_shapes().items() if not any(part in name for part in unused)}
    assert sum(p.numel() for p in SamMaskDecoder().parameters()) == parameters(wanted)
    assert parameters({n: s for n, s in decoder_shapes().items() if n.startswith("mask_decoder.")}) == 4_058_340


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_with("mask_decoder.hf_token.weight", torch.ones(1, 256)), "'mask_decoder.hf_token.weight' has no place"),
        (_without("mask_decoder.iou_token.weight"), r"'mask_decoder.iou_token.weight' of shape \(1, 256\) is missing"),
        (_without("prompt_encoder.no_mask_embed.weight"), "'prompt_encoder.no_mask_embed.weight' .* is missing"),
        (lambda tensors: {k: v for k, v in tensors.items() if k.startswith("image_encoder")}, "holds no mask decoder"),
    ],
)
def test_a_mask_decoder_that_does_not_fit_is_refused_with_its_tensor(change, message: str, tmp_path: Path) -> None:
    torch.save(change(small_sam()), tmp_path / "sam.pth")
    with pytest.raises(ModelFileError, match=message):
        load_sam_decoder(tmp_path / "sam.pth", SamMaskDecoder())
