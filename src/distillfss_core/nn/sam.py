"""Image encoders of Segment Anything (SAM) [1]_ and MobileSAM [2]_, from checkpoints on the user's disk.

Nothing is guessed and nothing is run: each tensor of the encoder has one place, and each place gets one tensor. The
networks are those of timm.

References
----------
.. [1] Kirillov et al., "Segment Anything", ICCV 2023, arXiv:2304.02643.
.. [2] Zhang et al., "Faster Segment Anything: Towards Lightweight SAM for Mobile Applications", arXiv:2306.14289.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from distillfss_core.errors import ModelFileError, WeightsUnavailableError
from distillfss_core.nn.backbones.spec import IMAGENET_MEAN, IMAGENET_STD
from distillfss_core.nn.checkpoint import digest_tensors
from distillfss_core.nn.tensor_files import match_tensors, read_tensors

WIDTH = 256
"""Channels of SAM's embedding."""
SIDE = 1024
"""Pixels of the square image that the published encoders take."""
PATCH = 16

DOWNLOADS = {
    "vit_h": "https://dl.fbaipublicfiles.com/segment_anything/sam_vit_h_4b8939.pth",
    "vit_l": "https://dl.fbaipublicfiles.com/segment_anything/sam_vit_l_0b3195.pth",
    "vit_b": "https://dl.fbaipublicfiles.com/segment_anything/sam_vit_b_01ec64.pth",
    "vit_t": "https://github.com/ChaoningZhang/MobileSAM/raw/master/weights/mobile_sam.pt",
}
"""Where the published checkpoints are, by the names that they have in segment-anything and MobileSAM."""

ENCODER, PROMPTS, DECODER = "image_encoder.", "prompt_encoder.", "mask_decoder."
"""How the names of tensors begin in each part of a checkpoint."""

_UNUSED = ("image_encoder.norm_head.", "image_encoder.head.")  # MobileSAM's classifier, which is never run
_WIDTHS = {1280: "vit_h", 1024: "vit_l", 768: "vit_b"}


class SamEncoder(nn.Module):
    """The frozen image encoder of a SAM.

    Parameters
    ----------
    net : nn.Module
        Of timm; its ``forward_features`` is run.
    neck : nn.Module
        What follows.
    name : str
        "vit_b", "vit_l", "vit_h", or "vit_t" (MobileSAM); else "vit_" and its width.
    side : int
        Pixels of the square that it was made for.
    """

    def __init__(self, net: nn.Module, neck: nn.Module, name: str, side: int) -> None:
        super().__init__()
        self.net: nn.Module = net
        self.neck: nn.Module = neck
        self.name: str = name
        self.side: int = side
        self.file: str = ""
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD)[:, None, None], persistent=False)

    @torch.no_grad()
    def forward(self, image: Float[Tensor, "b 3 s s"]) -> Float[Tensor, "b 256 g g"]:
        """The embedding of square RGB images in [0, 1]; they are brought to ``side``, and g is a 16th of it."""
        x = F.interpolate(image, (self.side, self.side), mode="bilinear", align_corners=False, antialias=True)
        features: Any = self.net.forward_features
        embedding: Float[Tensor, "b 256 g g"] = self.neck(
            features((x - self.get_buffer("mean")) / self.get_buffer("std"))
        )
        return embedding

    def origin(self) -> dict[str, str]:
        """Name, file, and SHA-256 of the encoder's tensors, as a card holds them."""
        state = {name: value.cpu() for name, value in self.state_dict().items()}
        return {"name": self.name, "file": self.file, "digest": digest_tensors(state)}


def read_sam(path: str | Path) -> SamEncoder:
    """The image encoder of a checkpoint, on the CPU, in float32.

    Parameters
    ----------
    path : path
        A checkpoint with the names of segment-anything (ViT-B, ViT-L, ViT-H and those of this form) or of MobileSAM:
        safetensors, or a state dict of ``torch.save``. Nothing in it is run.

    Raises
    ------
    WeightsUnavailableError
        If there is no such file; it tells where the published ones are.
    ModelFileError
        If the file is damaged, of another kind, or a tensor does not fit; one line with the name of the first one.
    """
    encoder = map_sam(open_sam(path), str(path))
    encoder.file = Path(path).name
    return encoder


def open_sam(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint, unchecked.

    Raises
    ------
    WeightsUnavailableError, ModelFileError
        As `read_sam` does.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsUnavailableError(_missing(path))
    return read_tensors(path)


def map_sam(tensors: Mapping[str, Tensor], source: str) -> SamEncoder:
    """The image encoder of the tensors of a checkpoint.

    Parameters
    ----------
    tensors : mapping of str to Tensor
        ``image_encoder.*``, beside ``prompt_encoder.*`` and ``mask_decoder.*``, which are not read.
    source : str
        For messages.

    Raises
    ------
    ModelFileError
        As `read_sam` does.
    """
    for key in tensors:
        if not key.startswith((ENCODER, PROMPTS, DECODER)):
            wanted = ", ".join(f"{part}*" for part in (ENCODER, PROMPTS, DECODER))
            raise ModelFileError(f"{source}: tensor {key!r} has no place in a checkpoint of {wanted}; give one of SAM")
    is_mobile = f"{ENCODER}patch_embed.seq.0.c.weight" in tensors
    own = {key: value for key, value in tensors.items() if key.startswith(ENCODER)}
    if is_mobile:
        own = {k: v for k, v in own.items() if not k.startswith(_UNUSED) and not k.endswith("num_batches_tracked")}
    encoder = _new_mobile() if is_mobile else _new_vit(own, source)
    places = {n: v for n, v in encoder.state_dict().items() if not n.endswith("num_batches_tracked")}
    rename = _mobile_name if is_mobile else _vit_name
    matched = match_tensors(own, {name: rename(name) for name in places}, places, "", source)
    encoder.load_state_dict(matched, strict=False, assign=True)
    return encoder.requires_grad_(False).eval()


def _missing(path: Path) -> str:
    named = [name for name in DOWNLOADS if name in path.name] or (["vit_t"] if "mobile" in path.name.lower() else [])
    wanted = [DOWNLOADS[name] for name in named or DOWNLOADS]
    return f"no file is called {str(path)!r}; download {', or '.join(wanted)} and give the path of the file"


def _new_vit(tensors: Mapping[str, Tensor], source: str) -> SamEncoder:
    """An encoder without values, of the size that the tensors have."""
    import timm

    def shape(name: str, length: int) -> tuple[int, ...]:
        key = f"{ENCODER}{name}"
        if key not in tensors or tensors[key].ndim != length or 0 in tensors[key].shape:
            what = f"has shape {tuple(tensors[key].shape)}" if key in tensors else "is missing"
            raise ModelFileError(f"{source}: tensor {key!r} {what}; give a checkpoint of SAM or MobileSAM")
        return tuple(tensors[key].shape)

    _, grid, _, width = shape("pos_embed", 4)
    depth = len({key.split(".")[2] for key in tensors if key.startswith(f"{ENCODER}blocks.")})
    rows = [shape(f"blocks.{number}.attn.rel_pos_h", 2) for number in range(depth)]
    windowed = [(length + 1) // 2 for length, _ in rows if length != 2 * grid - 1]
    with torch.device("meta"):
        net = timm.create_model(
            "samvit_base_patch16",
            num_classes=0,
            img_size=PATCH * grid,
            embed_dim=width,
            depth=depth,
            num_heads=max(1, width // rows[0][1]) if rows else 1,
            window_size=windowed[0] if windowed else 0,
            global_attn_indexes=[number for number, (length, _) in enumerate(rows) if length == 2 * grid - 1],
            norm_layer=partial(nn.LayerNorm, eps=1e-6),  # as published; that of timm's model is 1e-5
        )
    return SamEncoder(net, nn.Identity(), _WIDTHS.get(width, f"vit_{width}"), PATCH * grid)


def _vit_name(name: str) -> str:
    """Name in a published checkpoint of a tensor of `SamEncoder`."""
    return ENCODER + name.removeprefix("net.").replace(".mlp.fc", ".mlp.lin")


def _new_mobile() -> SamEncoder:
    """MobileSAM's encoder: TinyViT-5M whose last stage has stride 16, and SAM's neck."""
    import timm
    from timm.layers import LayerNorm2d

    net: Any = timm.create_model("tiny_vit_5m_224")
    net.head = nn.Identity()
    net.stages[-1].downsample.conv2.conv.stride = (1, 1)  # MobileSAM keeps the grid where TinyViT halves it
    neck = nn.Sequential(
        nn.Conv2d(net.num_features, WIDTH, 1, bias=False),
        LayerNorm2d(WIDTH),
        nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False),
        LayerNorm2d(WIDTH),
    )
    return SamEncoder(net, neck, "vit_t", SIDE)


def _mobile_name(name: str) -> str:
    """Name in MobileSAM's checkpoint of a tensor of `SamEncoder`; timm has the downsampling one stage later."""
    name = name.removeprefix("net.").replace(".conv.weight", ".c.weight")
    name = name.replace("patch_embed.conv1.", "patch_embed.seq.0.").replace("patch_embed.conv2.", "patch_embed.seq.2.")
    stages, _, rest = name.partition(".")
    if stages == "stages":
        number, _, part = rest.partition(".")
        name = f"layers.{int(number) - part.startswith('downsample.')}.{part}"
    return ENCODER + name
