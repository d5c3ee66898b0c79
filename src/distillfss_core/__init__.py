"""Few-shot segmentation for microscopy: label a few slices, distill a small model from them, segment the rest.

The public names stand in ``__init__.pyi``. They are fetched from their modules when first used, so that importing this
package loads neither torch nor a GUI.
"""

import os
from importlib.metadata import PackageNotFoundError, version

import lazy_loader

# ONNX Runtime and huggingface_hub read these when they are imported; a user who wants their telemetry sets "0".
for _switch in ("ORT_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY"):
    os.environ.setdefault(_switch, "1")

try:
    __version__ = version("napari-distillfss")
except PackageNotFoundError:  # a source tree that was not installed
    __version__ = "0+unknown"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
