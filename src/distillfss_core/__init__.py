"""Few-shot segmentation for microscopy: label a few slices, distill a small model from them, segment the rest.

Names are fetched from their modules when first used, so that importing this package loads neither torch nor a GUI.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

try:
    __version__ = version("napari-distillfss")
except PackageNotFoundError:  # a source tree that was not installed
    __version__ = "0+unknown"

_HOME = {
    "DistillFSSError": "errors",
    "ImageError": "errors",
    "InputFileError": "errors",
    "ModelFileError": "errors",
    "OutOfMemoryError": "errors",
    "OutputError": "errors",
    "SettingsError": "errors",
    "SupportSetError": "errors",
    "WeightsUnavailableError": "errors",
    "IGNORE": "types",
    "AnnotatedSlice": "types",
    "Segmentation": "types",
    "TrainStep": "types",
    "DistillSettings": "settings",
    "PretrainSettings": "settings",
    "read_image": "io.images",
    "read_labels": "io.labels",
    "write_labels": "io.writing",
    "Scores": "metrics",
    "evaluate": "metrics",
    "generate_sample": "samples",
    "Volume": "volumes.volume",
    "count_choices": "volumes.volume",
    "open_volume": "volumes.volume",
    "SupportSet": "support.support_set",
    "load_support": "support.support_set",
    "iter_diverse_planes": "support.slice_selection",
    "suggest_diverse_planes": "support.slice_selection",
    "suggest_planes": "support.slice_selection",
    "SPECS": "nn.backbones",
    "load_backbone": "nn.backbones",
    "choose_device": "nn.device",
    "leave_a_core_free": "nn.device",
    "StudentModel": "models.student",
    "read_card": "models.card",
    "read_thumbnails": "models.card",
    "export_bioimageio": "export.bioimageio",
    "export_onnx": "export.onnx",
    "segment_lazy": "segmentation.lazy",
    "iter_segment": "segmentation.to_zarr",
    "segment_to_zarr": "segmentation.to_zarr",
    "iter_instances": "objects.instances",
    "label_instances": "objects.instances",
    "distill": "training",
    "iter_distill": "training",
    "unrefined_teacher": "training",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
