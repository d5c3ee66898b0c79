"""Export of a student as ONNX, for any size and batch."""

from __future__ import annotations

import copy
import json
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from distillfss_core import __version__
from distillfss_core.errors import OutputError, SettingsError
from distillfss_core.io.writing import atomic_path
from distillfss_core.models.batches import NEVER
from distillfss_core.models.engines import StudentNetwork, onnx_graph
from distillfss_core.models.intensities import PERCENTILES
from distillfss_core.models.preprocess import resize
from distillfss_core.models.student import StudentModel
from distillfss_core.samples import generate_sample
from distillfss_core.types import Array

INPUT, OUTPUT = "image", "probabilities"
TOLERANCE = 1e-4
"""By how much probabilities of the file and of torch may differ."""
REMEDIES = {
    "license": "give an SPDX identifier, e.g. MIT or CC-BY-4.0",
    "name": "give 5 to 128 letters, digits, spaces and _+-()",
    "authors": "give names",
}
_EXAMPLE = 64  # pixels that an example has more than its halo on both sides


class ExportedStudent(nn.Module):
    """All of a student except the measurement of dark and bright intensities.

    Forward takes "b c y x", scaled so that the image's `Limits` are 0 and 1 (what lies outside is cut off), sides
    multiples of ``model.step``, and gives probabilities "b k+1 y x".
    """

    def __init__(self, model: StudentModel) -> None:
        super().__init__()
        self.network: StudentNetwork = model.network
        self.zoom: Fraction = model.preprocess.zoom_factor
        mix = torch.tensor(model.preprocess.mix, dtype=torch.float32)
        self.register_buffer("mix", mix[:, :, None, None])
        self.register_buffer("lowest", mix.clamp_max(0).sum(1)[:, None, None])

    def forward(self, image: Float[Tensor, "b c y x"]) -> Float[Tensor, "b k1 y x"]:
        """Probabilities of background and K classes for scaled images, as the class describes."""
        mixed = nn.functional.conv2d(image.clamp(0, 1), self.get_buffer("mix"))
        x = (mixed - self.get_buffer("lowest")).clamp(0, 1)
        height, width = image.shape[2], image.shape[3]
        if self.zoom != 1:
            up, down = self.zoom.numerator, self.zoom.denominator
            x = _resize(x, (height // down * up, width // down * up)).clamp(0, 1)
        probabilities = _resize(self.network(x).clamp_min(NEVER), (height, width))
        return torch.cat([torch.zeros_like(probabilities[:, :1]), probabilities], 1).softmax(1)


def _resize(x: Float[Tensor, "b c h w"], size: tuple[int, int]) -> Float[Tensor, "b c h2 w2"]:
    """As `preprocess.resize`; traced, smoothing is left out, which ONNX has but the tracer does not know of."""
    if not torch.jit.is_tracing():
        return resize(x, size)
    return nn.functional.interpolate(x, size, mode="bilinear", align_corners=False)


def export_onnx(model: StudentModel, path: str | Path) -> None:
    """Write a student as ONNX: any batch, any size that is a multiple of ``model.step``.

    Its input ``image`` is float32 "b c y x", intensities scaled so that dark is 0 and bright 1; which those are is in
    the file's metadata ("distillfss", JSON): percentiles 0.5 and 99.5 of each image, or two fixed numbers a channel.
    Channels, zoom and the backbone's own scaling are inside. Its output ``probabilities`` is float32 "b k+1 y x",
    background first.

    Raises
    ------
    SettingsError
        If the student cannot be traced for any size, or onnx or onnxruntime are not installed.
    OutputError
        If it cannot be written, or the written graph gives other probabilities than torch.
    """
    check_exportable(model, "onnx", "onnxruntime")
    module = network_module(model)
    graph = onnx_bytes(model, module)
    compare_with_student(module, graph, model)
    with atomic_path(Path(path)) as temporary:
        temporary.write_bytes(graph)


def check_exportable(model: StudentModel, *needed: str) -> None:
    """Check that a student can be exported.

    Parameters
    ----------
    model : StudentModel
    *needed : str
        Modules that the export imports.

    Raises
    ------
    SettingsError
        If a module is not installed, or predictions of the student depend on the whole tile.
    """
    for library in needed:
        if find_spec(library.partition(".")[0]) is None:
            raise SettingsError(f"export needs {library}; pip install 'napari-distillfss[export]'")
    if not model.local:
        raise SettingsError(
            f"students of {model.backbone.spec.name} with this decoder look at a whole tile, and are not exported; "
            "distill with another backbone or --decoder slim"
        )


def network_module(model: StudentModel) -> ExportedStudent:
    """Copied to the CPU in float32, wherever the model is, which stays there."""
    return copy.deepcopy(ExportedStudent(model)).cpu().float().eval()


def onnx_bytes(model: StudentModel, module: ExportedStudent) -> bytes:
    """The module's graph, with the smoothing that tracing left out, and its metadata."""
    import onnx

    example = torch.rand(1, model.preprocess.channels, 2 * model.step, 3 * model.step)
    graph = onnx.load_model_from_string(onnx_graph(module, example, INPUT, OUTPUT))
    resizes = [node for node in graph.graph.node if node.op_type == "Resize"]
    stride = model.backbone.spec.strides[0]  # of the grid that the network answers on
    for smoothed in resizes[:1] if module.zoom < 1 else resizes[-1:] if module.zoom > stride else []:
        smoothed.attribute.append(onnx.helper.make_attribute("antialias", 1))
        smoothed.attribute.append(onnx.helper.make_attribute("exclude_outside", 1))  # at the border, as torch
    graph.producer_name, graph.producer_version = "napari-distillfss", __version__
    graph.doc_string = (
        f"Probabilities of background, {', '.join(model.class_names)}. Scale intensities so that dark is 0 and bright "
        f"is 1 (see 'intensity' of the metadata); sides must be multiples of {model.step}."
    )
    metadata = {"card": model.card, "intensity": _intensity(model), "multiple": model.step, "halo": export_halo(model)}
    onnx.helper.set_model_props(graph, {"distillfss": json.dumps(metadata)})
    onnx.checker.check_model(graph, full_check=True)
    result: bytes = graph.SerializeToString()
    return result


def _intensity(model: StudentModel) -> dict[str, Any]:
    """Which intensities become 0 and 1."""
    if model.preprocess.scope == "volume":
        return {"low": model.preprocess.fitted.low, "high": model.preprocess.fitted.high}
    return {"percentiles": PERCENTILES, "channels_together": model.preprocess.together}


def export_halo(model: StudentModel) -> int:
    """Pixels at the border of a tile that are better not used, in the image's own pixels."""
    return round(model.halo / model.preprocess.zoom_factor)


def compare_with_student(module: ExportedStudent, graph: bytes, model: StudentModel) -> None:
    """Check that the graph gives the probabilities of torch, at two sizes and two batches.

    Raises
    ------
    OutputError
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    noise = torch.Generator().manual_seed(0)
    for batch, rows, columns in ((1, 3, 2), (2, 2, 5)):
        x = torch.rand(batch, model.preprocess.channels, rows * model.step, columns * model.step, generator=noise)
        with torch.no_grad():
            expected = module(x).numpy()
        exported = session.run(None, {INPUT: x.numpy()})[0]
        worst = float(np.abs(exported - expected).max())
        if not worst <= TOLERANCE:
            raise OutputError(
                f"the ONNX graph differs from torch by {worst:.2g} (at most {TOLERANCE:g}); nothing was written"
            )


def example_image(model: StudentModel) -> Array:
    """An image "1 c y x" float32 to test with: the support's thumbnails side by side, or generated nuclei."""
    side = smallest_side(model) + -(-_EXAMPLE // model.step) * model.step
    if model.thumbnails is not None:
        images = model.thumbnails.images
        count = int(np.ceil(np.sqrt(len(images))))
        chosen = images[np.arange(count * count) % len(images)]
        plane = np.concatenate(
            [np.concatenate(list(row), 1) for row in chosen.reshape(count, count, *images.shape[1:])]
        )
    else:
        plane = generate_sample(planes=1, size=side).image[0]
    plane = plane[:side, :side]
    plane = np.pad(plane, ((0, side - plane.shape[0]), (0, side - plane.shape[1])), mode="symmetric").astype(np.float32)
    if model.preprocess.scope == "volume":  # into the range that the student knows
        low, high = model.preprocess.fitted.low[0], model.preprocess.fitted.high[0]
        plane = low + (high - low) * (plane - plane.min()) / max(float(np.ptp(plane)), 1.0)
    return np.repeat(plane[None, None], model.preprocess.channels, 1).astype(np.float32)


def smallest_side(model: StudentModel) -> int:
    """The smallest side that leaves something within the halo."""
    return (2 * export_halo(model) // model.step + 1) * model.step


def scale_intensity(model: StudentModel, image: Array) -> Array:
    """An image "1 c y x" as the package's preprocessing scales it."""
    scaled: Array
    if model.preprocess.scope == "volume":
        gain, offset = linear_intensity(model)
        scaled = image * np.array(gain)[:, None, None] + np.array(offset)[:, None, None]
        return scaled.astype(np.float32)
    axes = (1, 2, 3) if model.preprocess.together else (2, 3)
    low, high = np.percentile(image, PERCENTILES, axis=axes, keepdims=True)
    scaled = (image - low) / (high - low + 1e-6)
    return scaled.astype(np.float32)


def linear_intensity(model: StudentModel) -> tuple[list[float], list[float]]:
    """Fixed limits as gain and offset of each channel."""
    limits = model.preprocess.fitted
    gain = [1 / (high - low) for low, high in zip(limits.low, limits.high, strict=True)]
    return gain, [-low * g for low, g in zip(limits.low, gain, strict=True)]
