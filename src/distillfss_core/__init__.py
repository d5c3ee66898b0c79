"""Few-shot segmentation for microscopy: label a few slices, distil a small model from them, segment the rest.

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
    "LabelledSlice": "types",
    "Segmentation": "types",
    "TrainStep": "types",
    "DistillSettings": "config",
    "PretrainSettings": "config",
    "read_image": "io",
    "read_labels": "io",
    "write_labels": "io",
    "Scores": "metrics",
    "evaluate": "metrics",
    "generate_sample": "sample",
    "Volume": "volume",
    "count_choices": "volume",
    "open_volume": "volume",
    "SupportSet": "support",
    "load_support": "support",
    "iter_diverse_planes": "suggest",
    "suggest_diverse_planes": "suggest",
    "suggest_planes": "suggest",
    "SPECS": "backbones",
    "load_backbone": "backbones",
    "choose_device": "device",
    "leave_a_core_free": "device",
    "StudentModel": "model",
    "read_card": "model",
    "read_thumbnails": "model",
    "export_bioimageio": "export",
    "export_onnx": "export",
    "segment_lazy": "lazy",
    "iter_segment": "engine",
    "segment_to_zarr": "engine",
    "iter_instances": "instances",
    "label_instances": "instances",
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
