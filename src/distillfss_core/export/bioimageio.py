"""Export of a student as a BioImage.IO package."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from distillfss_core import __version__
from distillfss_core.errors import OutputError, SettingsError
from distillfss_core.export.onnx import (
    INPUT,
    OUTPUT,
    REMEDIES,
    check_exportable,
    compare_with_student,
    example_image,
    export_halo,
    linear_intensity,
    network_module,
    onnx_bytes,
    scale_intensity,
    smallest_side,
)
from distillfss_core.io.writing import atomic_path
from distillfss_core.models.intensities import PERCENTILES
from distillfss_core.models.student import StudentModel
from distillfss_core.types import Array

LICENSE = "CC-BY-4.0"
PAPER = (
    "De Marinis, Blok, Kaymak, Brussee, Vessio, Castellano: DistillFSS: Synthesizing Few-Shot Knowledge into a "
    "Lightweight Segmentation Model, 2025",
    "10.48550/arXiv.2512.05613",
)


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
        As `export_onnx`; if a library is not installed, or the format does not take a name, an author or a license.
    OutputError
        If it cannot be written, or does not pass the test.
    """
    check_exportable(model, "onnx", "onnxruntime", "bioimageio.core")
    if not authors:
        raise SettingsError("a BioImage.IO package names its authors; give at least one with --author")
    from bioimageio.core import test_description
    from bioimageio.spec import save_bioimageio_package
    from pydantic import ValidationError

    module = network_module(model)
    graph = onnx_bytes(model, module)
    compare_with_student(module, graph, model)
    with tempfile.TemporaryDirectory() as name_of_folder, atomic_path(Path(path)) as temporary:
        folder = Path(name_of_folder)
        (folder / "student.onnx").write_bytes(graph)
        raw = example_image(model)
        with torch.no_grad():
            expected = module(torch.from_numpy(scale_intensity(model, raw))).numpy()
        np.save(folder / "test_input.npy", raw)
        np.save(folder / "test_output.npy", expected)
        _cover(raw, expected).save(folder / "cover.png")
        name = name or f"{' '.join(model.class_names)} student (DistillFSS)"
        (folder / "README.md").write_text(_readme(model, name), encoding="utf-8")
        try:
            described = _describe(model, folder, authors, name, description, license)
        except ValidationError as error:
            first = error.errors()[0]
            where = str(first["loc"][0])
            remedy = REMEDIES.get(where, first["msg"][:120])
            raise SettingsError(f"BioImage.IO does not take {where} {first['input']!r}; {remedy}") from error
        package = folder / "package.zip"
        save_bioimageio_package(described, output_path=package)
        summary = test_description(package)
        if summary.status == "failed":
            errors = [error.msg for detail in summary.details for error in detail.errors]
            raise OutputError(f"{path}: does not pass the test of bioimageio.core ({'; '.join(errors)[:300]})")
        temporary.write_bytes(package.read_bytes())


def _cover(image: Array, probabilities: Array) -> Image.Image:
    """The image beside where it finds something, 2 to 1."""
    plane = image[0].mean(0)
    plane = (plane - plane.min()) / max(float(np.ptp(plane)), 1e-6)
    both = np.concatenate([plane, 1 - probabilities[0, 0]], 1)
    return Image.fromarray((255 * both).round().astype(np.uint8))


def _readme(model: StudentModel, name: str) -> str:
    backbone, scope = model.card["backbone"], model.preprocess.scope
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
    size = f"{model.pixel_size[0]:g} x {model.pixel_size[1]:g} micrometers" if model.pixel_size else "not recorded"
    slices = model.training.get("support", [])
    return f"""# {name}

A student of DistillFSS, made by napari-distillfss {__version__} from {len(slices)} annotated slices.

- Classes: background, {", ".join(model.class_names)}
- Input: {model.preprocess.channels} channel(s), 2-D; intensities scaled by {intensity}
- Pixel size: {size}; zoomed {model.preprocess.zoom} times inside
- Sides: multiples of {model.step}; tiles should overlap by {export_halo(model)} pixels on each side
- Output: probabilities of background and of each class
- Backbone: {backbone["name"]} ({backbone["weights"]}), license {backbone["license"]}

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
    size = spec.ParameterizedSize(min=smallest_side(model), step=model.step)
    input_id, output_id = spec.TensorId(INPUT), spec.TensorId(OUTPUT)
    axes = [(spec.AxisId(axis), scale) for axis, scale in zip("yx", pixel, strict=True)]
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
                id=input_id,
                axes=[
                    spec.BatchAxis(),
                    spec.ChannelAxis(channel_names=[spec.Identifier(f"channel{i}") for i in range(channels)]),
                    *(spec.SpaceInputAxis(id=axis, size=size, scale=scale, **unit) for axis, scale in axes),
                ],
                data=spec.IntervalOrRatioDataDescr(type="float32"),
                preprocessing=[_scaling(model)],
                test_tensor=spec.FileDescr(source=folder / "test_input.npy"),
            )
        ],
        outputs=[
            spec.OutputTensorDescr(
                id=output_id,
                axes=[
                    spec.BatchAxis(),
                    spec.ChannelAxis(channel_names=[spec.Identifier(n) for n in _identifiers(["background", *names])]),
                    *(
                        spec.SpaceOutputAxisWithHalo(
                            id=axis,
                            size=spec.SizeReference(tensor_id=input_id, axis_id=axis),
                            scale=scale,
                            halo=export_halo(model),
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


def _scaling(model: StudentModel) -> Any:
    """How intensities are scaled, in the words of the format."""
    from bioimageio.spec.model import v0_5 as spec

    if model.preprocess.scope == "volume":
        gain, offset = linear_intensity(model)
        kwargs: Any = (
            spec.ScaleLinearKwargs(gain=gain[0], offset=offset[0])
            if model.preprocess.channels == 1
            else spec.ScaleLinearAlongAxisKwargs(axis=spec.AxisId("channel"), gain=gain, offset=offset)
        )
        return spec.ScaleLinearDescr(kwargs=kwargs)
    jointly = [spec.AxisId(a) for a in (("channel", "y", "x") if model.preprocess.together else ("y", "x"))]
    low, high = PERCENTILES
    return spec.ScaleRangeDescr(kwargs=spec.ScaleRangeKwargs(axes=jointly, min_percentile=low, max_percentile=high))


def _identifiers(names: Sequence[str]) -> list[str]:
    """Names of classes as the format takes them: letters, digits and _, each once."""
    identifiers: list[str] = []
    for index, name in enumerate(names):
        plain = "".join(c if c.isascii() and c.isalnum() else "_" for c in name)
        plain = plain if plain.isidentifier() else f"class_{index}"
        identifiers.append(f"{plain}_{index}" if plain in identifiers else plain)
    return identifiers


def _opset(path: Path) -> int:
    import onnx

    result: int = next(entry.version for entry in onnx.load(path).opset_import if entry.domain == "")
    return result
