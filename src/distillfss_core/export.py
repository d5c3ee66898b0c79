"""A student for other programs: an ONNX file, or a BioImage.IO model package."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from distillfss_core import __version__
from distillfss_core.batches import NEVER
from distillfss_core.errors import OutputError, SettingsError
from distillfss_core.inference import onnx_graph
from distillfss_core.io import atomic_path
from distillfss_core.model import StudentModel
from distillfss_core.preprocess import PERCENTILES, resize
from distillfss_core.sample import generate_sample
from distillfss_core.types import Array

GIVEN, FOUND = "image", "probabilities"
TOLERANCE = 1e-4
"""By how much probabilities of the file and of torch may differ."""

LICENSE = "CC-BY-4.0"
PAPER = "DistillFSS: few-shot segmentation distilled into a light network", "10.48550/arXiv.2512.05613"
_REMEDIES = {
    "license": "give an SPDX identifier, e.g. MIT or CC-BY-4.0",
    "name": "give 5 to 128 letters, digits, spaces and _+-()",
    "authors": "give names",
}
_EXAMPLE = 64  # pixels that an example has more than its halo on both sides


class ExportedStudent(nn.Module):
    """All of a student but finding which intensities are dark and bright.

    Forward takes "b c y x", scaled so that the image's `Limits` are 0 and 1 (what lies outside is cut off), sides
    multiples of ``model.step``, and gives probabilities "b k+1 y x".
    """

    def __init__(self, model: StudentModel) -> None:
        super().__init__()
        self.network = model.network
        self.zoom = model.preprocess.zoom_factor
        mix = torch.tensor(model.preprocess.mix, dtype=torch.float32)
        self.register_buffer("mix", mix[:, :, None, None])
        self.register_buffer("lowest", mix.clamp_max(0).sum(1)[:, None, None])

    def forward(self, image: Float[Tensor, "b c y x"]) -> Float[Tensor, "b k1 y x"]:
        mixed = nn.functional.conv2d(image.clamp(0, 1), self.get_buffer("mix"))
        x = (mixed - self.get_buffer("lowest")).clamp(0, 1)
        height, width = image.shape[2], image.shape[3]
        if self.zoom != 1:
            up, down = self.zoom.numerator, self.zoom.denominator
            x = _resize(x, (height // down * up, width // down * up)).clamp(0, 1)
        found = _resize(self.network(x).clamp_min(NEVER), (height, width))
        return torch.cat([torch.zeros_like(found[:, :1]), found], 1).softmax(1)


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
        If it cannot be written, or what was written does not say what torch says.
    """
    _check(model, "onnx", "onnxruntime")
    module = _module(model)
    graph = _onnx_of(model, module)
    _compare(module, graph, model)
    with atomic_path(Path(path)) as temporary:
        temporary.write_bytes(graph)


def export_bioimageio(
    model: StudentModel,
    path: str | Path,
    *,
    authors: Sequence[str],
    name: str | None = None,
    description: str | None = None,
    license: str = LICENSE,
) -> None:
    """Write a student as a BioImage.IO model package (format 0.5, ONNX weights), which `bioimageio.core` tests.

    Scaling of intensities is stated as preprocessing of the package, so its input is the image as it is ("b c y x").

    Parameters
    ----------
    authors : names, at least one
    name : str, optional
        5 to 128 letters, digits, spaces and _+-(); by default made of the classes.
    license : str
        Of the student: an SPDX identifier.

    Raises
    ------
    SettingsError
        As `export_onnx`; if a library is not installed, or the format does not take a name, an author or a licence.
    OutputError
        If it cannot be written, or does not pass the test.
    """
    _check(model, "onnx", "onnxruntime", "bioimageio.core")
    if not authors:
        raise SettingsError("a BioImage.IO package names its authors; give at least one with --author")
    from bioimageio.core import test_description
    from bioimageio.spec import save_bioimageio_package
    from pydantic import ValidationError

    module = _module(model)
    graph = _onnx_of(model, module)
    _compare(module, graph, model)
    with tempfile.TemporaryDirectory() as name_of_folder, atomic_path(Path(path)) as temporary:
        folder = Path(name_of_folder)
        (folder / "student.onnx").write_bytes(graph)
        raw = _example(model)
        with torch.no_grad():
            answer = module(torch.from_numpy(_scaled(model, raw))).numpy()
        np.save(folder / "test_input.npy", raw)
        np.save(folder / "test_output.npy", answer)
        _cover(raw, answer).save(folder / "cover.png")
        name = name or f"{' '.join(model.class_names)} student (DistillFSS)"
        (folder / "README.md").write_text(_readme(model, name), encoding="utf-8")
        try:
            described = _describe(model, folder, authors, name, description, license)
        except ValidationError as fault:
            first = fault.errors()[0]
            where = str(first["loc"][0])
            remedy = _REMEDIES.get(where, first["msg"][:120])
            raise SettingsError(f"BioImage.IO does not take {where} {first['input']!r}; {remedy}") from fault
        package = folder / "package.zip"
        save_bioimageio_package(described, output_path=package)
        summary = test_description(package)
        if summary.status == "failed":
            faults = [error.msg for detail in summary.details for error in detail.errors]
            raise OutputError(f"{path}: does not pass the test of bioimageio.core ({'; '.join(faults)[:300]})")
        temporary.write_bytes(package.read_bytes())


def _check(model: StudentModel, *needed: str) -> None:
    for library in needed:
        if find_spec(library.partition(".")[0]) is None:
            raise SettingsError(f"export needs {library}; pip install 'napari-distillfss[export]'")
    if not model.local:
        raise SettingsError(
            f"students of {model.backbone.spec.name} with this decoder look at a whole tile, and are not exported; "
            "distil with another backbone or --decoder slim"
        )


def _module(model: StudentModel) -> ExportedStudent:
    """Copied to the CPU in float32, wherever the model is, which stays there."""
    return copy.deepcopy(ExportedStudent(model)).cpu().float().eval()


def _onnx_of(model: StudentModel, module: ExportedStudent) -> bytes:
    """The module's graph, with the smoothing that tracing left out, and what is to be known of it."""
    import onnx

    example = torch.rand(1, model.preprocess.channels, 2 * model.step, 3 * model.step)
    graph = onnx.load_model_from_string(onnx_graph(module, example, GIVEN, FOUND))
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
    about = {"card": model.card, "intensity": _intensity(model), "multiple": model.step, "halo": _halo(model)}
    onnx.helper.set_model_props(graph, {"distillfss": json.dumps(about)})
    onnx.checker.check_model(graph, full_check=True)
    result: bytes = graph.SerializeToString()
    return result


def _intensity(model: StudentModel) -> dict[str, Any]:
    """Which intensities become 0 and 1."""
    if model.preprocess.scope == "volume":
        return {"low": model.preprocess.fitted.low, "high": model.preprocess.fitted.high}
    return {"percentiles": PERCENTILES, "channels_together": model.preprocess.together}


def _halo(model: StudentModel) -> int:
    """Pixels at the border of a tile that are better not used, in the image's own pixels."""
    return round(model.halo / model.preprocess.zoom_factor)


def _compare(module: ExportedStudent, graph: bytes, model: StudentModel) -> None:
    """See that the graph says what torch says, at two sizes and two batches.

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
        found = session.run(None, {GIVEN: x.numpy()})[0]
        worst = float(np.abs(found - expected).max())
        if not worst <= TOLERANCE:
            raise OutputError(
                f"the ONNX graph differs from torch by {worst:.2g} (at most {TOLERANCE:g}); nothing was written"
            )


def _example(model: StudentModel) -> Array:
    """An image "1 c y x" float32 to test with: the support's thumbnails side by side, or generated nuclei."""
    side = _least(model) + -(-_EXAMPLE // model.step) * model.step
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


def _least(model: StudentModel) -> int:
    """The smallest side that leaves something within the halo."""
    return (2 * _halo(model) // model.step + 1) * model.step


def _scaled(model: StudentModel, image: Array) -> Array:
    """An image "1 c y x" as the package's preprocessing scales it."""
    scaled: Array
    if model.preprocess.scope == "volume":
        gain, offset = _linear(model)
        scaled = image * np.array(gain)[:, None, None] + np.array(offset)[:, None, None]
        return scaled.astype(np.float32)
    axes = (1, 2, 3) if model.preprocess.together else (2, 3)
    low, high = np.percentile(image, PERCENTILES, axis=axes, keepdims=True)
    scaled = (image - low) / (high - low + 1e-6)
    return scaled.astype(np.float32)


def _linear(model: StudentModel) -> tuple[list[float], list[float]]:
    """Fixed limits as gain and offset of each channel."""
    limits = model.preprocess.fitted
    gain = [1 / (high - low) for low, high in zip(limits.low, limits.high, strict=True)]
    return gain, [-low * g for low, g in zip(limits.low, gain, strict=True)]


def _cover(image: Array, probabilities: Array) -> Image.Image:
    """The image beside where it finds something, 2 to 1."""
    plane = image[0].mean(0)
    plane = (plane - plane.min()) / max(float(np.ptp(plane)), 1e-6)
    both = np.concatenate([plane, 1 - probabilities[0, 0]], 1)
    return Image.fromarray((255 * both).round().astype(np.uint8))


def _readme(model: StudentModel, name: str) -> str:
    about, scope = model.card["backbone"], model.preprocess.scope
    intensity = (
        "fixed limits, those of the images it was trained on"
        if scope == "volume"
        else "percentiles 0.5 and 99.5 of each image"
    )
    advice = (
        "Fixed limits suit images of that acquisition only."
        if scope == "volume"
        else "Percentiles are those of what is given: where tiles differ in brightness, give whole planes."
    )
    size = f"{model.pixel_size[0]:g} x {model.pixel_size[1]:g} micrometres" if model.pixel_size else "not recorded"
    slices = model.training.get("support", [])
    return f"""# {name}

A student of DistillFSS, made by napari-distillfss {__version__} from {len(slices)} annotated slices.

- Classes: background, {", ".join(model.class_names)}
- Input: {model.preprocess.channels} channel(s), 2-D; intensities scaled by {intensity}
- Pixel size: {size}; zoomed {model.preprocess.zoom} times inside
- Sides: multiples of {model.step}; tiles should overlap by {_halo(model)} pixels on each side
- Output: probabilities of background and of each class
- Backbone: {about["name"]} ({about["weights"]}), licence {about["license"]}

{advice}

## Validation

Compare with annotated images that it was not trained on: `distillfss segment` and `distillfss evaluate` give IoU, Dice,
precision and recall of each class.
"""


def _describe(
    model: StudentModel, folder: Path, authors: Sequence[str], name: str, description: str | None, license: str
) -> Any:
    """The package's description; raises what pydantic raises."""
    from bioimageio.spec.model import v0_5 as spec

    channels, names = model.preprocess.channels, list(model.class_names)
    pixel = model.pixel_size or (1.0, 1.0)
    unit: dict[str, Any] = {"unit": "micrometer"} if model.pixel_size else {}
    size = spec.ParameterizedSize(min=_least(model), step=model.step)
    given, found = spec.TensorId(GIVEN), spec.TensorId(FOUND)
    axes = [(spec.AxisId(axis), scale) for axis, scale in zip("yx", pixel, strict=True)]
    if model.preprocess.scope == "volume":
        gain, offset = _linear(model)
        one = channels == 1
        kwargs: Any = (
            spec.ScaleLinearKwargs(gain=gain[0], offset=offset[0])
            if one
            else spec.ScaleLinearAlongAxisKwargs(axis=spec.AxisId("channel"), gain=gain, offset=offset)
        )
        scaling: Any = spec.ScaleLinearDescr(kwargs=kwargs)
    else:
        jointly = [spec.AxisId(a) for a in (("channel", "y", "x") if model.preprocess.together else ("y", "x"))]
        low, high = PERCENTILES
        scaling = spec.ScaleRangeDescr(
            kwargs=spec.ScaleRangeKwargs(axes=jointly, min_percentile=low, max_percentile=high)
        )
    return spec.ModelDescr(
        name=name,
        description=description
        or f"Segments {', '.join(names)}: a light student, distilled from a few annotated slices by napari-distillfss.",
        authors=[spec.Author(name=author) for author in authors],
        cite=[spec.CiteEntry(text=PAPER[0], doi=spec.Doi(PAPER[1]))],
        license=license,  # type: ignore[arg-type]
        documentation=spec.FileDescr(source=folder / "README.md"),
        covers=[spec.FileDescr(source=folder / "cover.png")],
        tags=["segmentation", "few-shot", "2d", "distillfss", model.backbone.spec.name, *names],
        inputs=[
            spec.InputTensorDescr(
                id=given,
                axes=[
                    spec.BatchAxis(),
                    spec.ChannelAxis(channel_names=[spec.Identifier(f"channel{i}") for i in range(channels)]),
                    *(spec.SpaceInputAxis(id=axis, size=size, scale=scale, **unit) for axis, scale in axes),
                ],
                data=spec.IntervalOrRatioDataDescr(type="float32"),
                preprocessing=[scaling],
                test_tensor=spec.FileDescr(source=folder / "test_input.npy"),
            )
        ],
        outputs=[
            spec.OutputTensorDescr(
                id=found,
                axes=[
                    spec.BatchAxis(),
                    spec.ChannelAxis(channel_names=[spec.Identifier(n) for n in _identifiers(["background", *names])]),
                    *(
                        spec.SpaceOutputAxisWithHalo(
                            id=axis,
                            size=spec.SizeReference(tensor_id=given, axis_id=axis),
                            scale=scale,
                            halo=_halo(model),
                            **unit,
                        )
                        for axis, scale in axes
                    ),
                ],
                data=spec.IntervalOrRatioDataDescr(type="float32", range=(0.0, 1.0)),
                test_tensor=spec.FileDescr(source=folder / "test_output.npy"),
            )
        ],
        weights=spec.WeightsDescr(
            onnx=spec.OnnxWeightsDescr(source=folder / "student.onnx", opset_version=_opset(folder / "student.onnx"))
        ),
        config=spec.Config.model_validate({"distillfss": json.loads(json.dumps(model.card))}),
    )


def _identifiers(names: Sequence[str]) -> list[str]:
    """Names of classes as the format takes them: letters, digits and _, each once."""
    found: list[str] = []
    for index, name in enumerate(names):
        plain = "".join(c if c.isascii() and c.isalnum() else "_" for c in name)
        plain = plain if plain.isidentifier() else f"class_{index}"
        found.append(f"{plain}_{index}" if plain in found else plain)
    return found


def _opset(path: Path) -> int:
    import onnx

    result: int = next(entry.version for entry in onnx.load(path).opset_import if entry.domain == "")
    return result
