"""Engines for the network of a student: torch, compiled or not, ONNX Runtime and OpenVINO."""

from __future__ import annotations

import copy
import importlib
import io
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import jaxtyping
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from distillfss_core.errors import SettingsError
from distillfss_core.models.quantization import quantized
from distillfss_core.nn.backbones import Backbone
from distillfss_core.nn.decoder import resize_like
from distillfss_core.nn.device import Device, multiplies_bfloat16, out_of_memory, sums_bytes_exactly
from distillfss_core.nn.head import FewShotHead
from distillfss_core.nn.probe import Probe
from distillfss_core.types import Array

ENGINES = ("auto", "torch", "torch-compiled", "onnxruntime", "openvino")
TOLERANCE = 1e-3
"""By how much margins of two engines in float32 differ at most (they reach from about -20 to 20; measured: 1e-5)."""

_EXTRAS = {"onnxruntime": "onnx", "openvino": "openvino"}  # the fastest first in float32, otherwise the last
_QUANTIZER = ("onnx", "onnxruntime")
_OPSET = 18
_EXPORT = threading.RLock()  # torch exports one network at a time
_GRAPH_INPUT, _GRAPH_OUTPUT = "image", "margins"


class StudentNetwork(nn.Module):
    """The part of a student that an engine runs: from the preprocessed, zoomed image to margins.

    Forward takes "b 3 h w" in [0, 1], sides multiples of the backbone's, and gives "b k hg wg": by how much the logit
    of each class exceeds the background's, on the decoder's own grid (for the default one, that of the finest
    features). The margins of a probe are added, or they alone are the answer, on the grid of the finest features.

    Parameters
    ----------
    inputs : {1, 3}
        Channels that other engines than torch read; 1 where all three are alike.
    """

    def __init__(self, backbone: Backbone, head: FewShotHead, probe: Probe | None = None, inputs: int = 3) -> None:
        super().__init__()
        self.backbone: Backbone = backbone
        self.head: FewShotHead = head
        self.probe: Probe | None = probe
        self.inputs: int = inputs
        self._graph = b""

    def graph(self) -> bytes:
        """`network_graph` of it, written once: for all engines and precisions, with the weights of the first call."""
        with _EXPORT:
            if not self._graph:
                self._graph = network_graph(self)
            return self._graph

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_graph": b""}  # written again in another process

    def forward(self, image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b k hg wg"]:
        """Margins of a batch of images, as the class describes."""
        features = self.backbone(image)
        if self.probe is None:
            return self.head.student_margins(features)
        evidence: Tensor = self.probe(features, image)
        if self.probe.alone:
            return evidence
        margins = self.head.student_margins(features)
        return margins + resize_like(evidence, margins)

    @property
    def local(self) -> bool:
        """Whether the output at a pixel depends on a bounded neighborhood only."""
        return self.backbone.spec.local and (self.head.decoder.local or (self.probe is not None and self.probe.alone))


def choose_engine(name: str, device: Device, network: StudentNetwork) -> str:
    """Turn "auto" into the fastest engine that is installed and can run this network on this device.

    On a CPU that is ONNX Runtime in float32 and OpenVINO in bfloat16 and int8, then the other of them (ONNX Runtime has
    no bfloat16), then torch (not in int8); elsewhere torch. Engines other than torch run networks whose outputs depend
    on a bounded neighborhood. "torch-compiled" is torch with ``torch.compile``, which takes up to a minute at the first
    window; "auto" never means it.

    Parameters
    ----------
    name : {"auto", "torch", "torch-compiled", "onnxruntime", "openvino"}

    Raises
    ------
    SettingsError
        If there is no such engine, it is not installed, or it cannot run this.
    """
    if name not in ENGINES:
        raise SettingsError(f"engine {name!r} is unknown; choose one of: {', '.join(ENGINES)}")
    if name == "auto":
        order = _EXTRAS if device.precision == "float32" else reversed(_EXTRAS)
        able = (e for e in order if find_spec(e) and _unable(e, device, network) is None)
        name = next(able, "onnxruntime" if device.precision == "int8" else "torch")
    if name in _EXTRAS and find_spec(name) is None:
        raise SettingsError(f"engine {name} is not installed; pip install 'napari-distillfss[{_EXTRAS[name]}]'")
    if reason := _unable(name, device, network):
        remedies = {"int8": "precision float32", "bfloat16": "engine torch or auto, or precision float32"}
        remedy = remedies.get(device.precision, "engine torch or auto")
        raise SettingsError(f"engine {name} {reason}; choose {remedy}")
    if device.precision == "int8" and (missing := [m for m in _QUANTIZER if find_spec(m) is None]):
        raise SettingsError(
            f"precision int8 needs {' and '.join(missing)}, which is not installed; "
            "pip install 'napari-distillfss[int8]'"
        )
    return name


def choose_precision(device: Device, engine: str, network: StudentNetwork) -> str:
    """What "auto" is for this network: bfloat16 where OpenVINO may run it on a processor that multiplies that itself,
    otherwise what it is for the device (`choose_device`).

    Parameters
    ----------
    engine : {"auto", "torch", "onnxruntime", "openvino"}
    """
    rounded = replace(device, precision="bfloat16")
    if (
        device.kind == "cpu"
        and engine in ("auto", "openvino")
        and find_spec("openvino") is not None
        and _unable("openvino", rounded, network) is None
        and multiplies_bfloat16()
    ):
        return rounded.precision
    return device.precision


def auto_forms(precision: str, device: Device, network: StudentNetwork) -> list[tuple[str, str]]:
    """Engines and precisions from which "auto" may choose by their speed, the exacter ones first.

    Those that are installed, can run the network, and are traced copies of it: none on a GPU. "auto" for the precision
    never means int8.
    """
    precisions = ("float32", "bfloat16") if precision == "auto" else (device.precision,)
    return [
        (engine, rounded)
        for rounded in precisions
        for engine in _EXTRAS
        if find_spec(engine) and _unable(engine, replace(device, precision=rounded), network) is None
    ]


def describe_engine(name: str) -> str:
    """Its name and the version of its library, as "onnxruntime 1.20.0"."""
    return f"{name} {version(name.removesuffix('-compiled'))}"


def _unable(name: str, device: Device, network: StudentNetwork) -> str | None:
    """Why an engine cannot run a network, if so."""
    if name in ("torch", "torch-compiled"):
        return "does not compute in int8, onnxruntime and openvino do" if device.precision == "int8" else None
    if device.kind != "cpu":
        return f"computes on the CPU, not on {device.name}"
    if name == "onnxruntime" and device.precision == "bfloat16":
        return "computes in float32 or int8 on the CPU, not in bfloat16"
    if not network.local:
        return f"does not run students of {network.backbone.spec.name} that look at a whole tile"
    return None


Engine = Callable[[Tensor], Tensor]
"""Runs a `StudentNetwork`: the same input gives the same output, bit for bit."""


class Runner:
    """A network and the engine that runs it; the engine is prepared at the first call.

    The engine's copy of the weights is that of the first call. Other engines than torch compute with as many threads as
    torch has at the time of a call, and are made ready again when that changes.

    Parameters
    ----------
    network : StudentNetwork
    engine : str
        One that `choose_engine` gave.
    device : Device
    samples : uint8 array "n 3 h w", optional
        Inputs as they occur, 255 for 1.0; needed in int8.
    """

    def __init__(
        self, network: StudentNetwork, engine: str, device: Device, samples: UInt8[Array, "n 3 h w"] | None = None
    ) -> None:
        self.network: StudentNetwork = network
        self.engine: str = engine
        self.device: Device = device
        self.samples: UInt8[Array, "n 3 h w"] | None = samples
        self._lock = threading.Lock()
        self._graph = b""
        self._ready: Engine | None = None
        self._threads = 0

    def __call__(self, image: Float[Tensor, "b 3 h w"], *, repeats: bool = False) -> Float[Tensor, "b k hg wg"]:
        """Margins of each class against the background, on the grid of the decoder, for images that are zoomed.

        Parameters
        ----------
        image : tensor
        repeats : bool
            Whether many images of this size follow one another. OpenVINO is made ready for the size then, in a third
            of a second, and needs less than half of the memory.
        """
        if self.engine == "torch" and self.device.kind == "cpu":
            with self.device.autocast():
                result: Float[Tensor, "b k hg wg"] = self.network(image)
                return result
        with self._lock:
            threads = torch.get_num_threads() if self.engine in _EXTRAS else 0
            if self._ready is None or threads != self._threads:
                self._ready, self._threads = self._make(threads), threads
            if repeats and isinstance(self._ready, _OpenVino):
                return self._ready.repeated(image[:, : self.network.inputs])
            return self._ready(image[:, : self.network.inputs] if self.engine in _EXTRAS else image)

    def _write(self) -> bytes:
        graph = self.network.graph()
        if self.device.precision != "int8":
            return graph
        assert self.samples is not None
        return quantized(graph, _GRAPH_INPUT, self.samples[:, : self.network.inputs], narrow=not sums_bytes_exactly())

    def _make(self, threads: int) -> Engine:
        if self.engine in ("torch", "torch-compiled"):
            return _Torch(self.network, self.device, compiled=self.engine == "torch-compiled")
        self._graph = self._graph or self._write()
        if self.engine == "onnxruntime":
            return _OnnxRuntime(self._graph, threads)
        return _OpenVino(self._graph, threads, self.device.precision)

    def __getstate__(self) -> dict[str, Any]:
        return {"network": self.network, "engine": self.engine, "device": self.device, "samples": self.samples}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


class _Torch:
    """The network in torch, with weights in the precision of the computation: no window rounds them again."""

    def __init__(self, network: StudentNetwork, device: Device, *, compiled: bool) -> None:
        self._dtype = device.dtype
        self._network = network if device.dtype == torch.float32 else copy.deepcopy(network).to(device.dtype)
        # One graph for all sizes of windows: those at the border of a plane are smaller.
        self._run: Engine = torch.compile(self._network, dynamic=True) if compiled else self._network

    def __call__(self, image: Tensor) -> Tensor:
        try:
            output: Tensor = self._run(image.to(self._dtype, memory_format=torch.channels_last))
        except RuntimeError as error:
            if self._run is self._network or out_of_memory(error):
                raise
            reason = str(error).strip().partition("\n")[0][:160]
            raise SettingsError(f"torch cannot compile this network here ({reason}); choose engine torch") from error
        return output


class _OnnxRuntime:
    def __init__(self, graph: bytes, threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # readers and writer need the cores
        options.log_severity_level = 3
        options.enable_mem_pattern = False  # it keeps a plan of memory for every size of window
        self._session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])

    def __call__(self, image: Tensor) -> Tensor:
        return torch.from_numpy(self._session.run(None, {_GRAPH_INPUT: image.contiguous().numpy()})[0])


def import_openvino() -> Any:
    """OpenVINO without openvino-telemetry, which writes an identity and sends an event as soon as it is imported.

    Whoever imported openvino before decided otherwise.
    """
    telemetry = "openvino_telemetry"
    if "openvino" in sys.modules or telemetry in sys.modules:
        return importlib.import_module("openvino")
    sys.modules[telemetry] = None  # type: ignore[assignment]  # an ImportError, for which openvino has a stub
    try:
        return importlib.import_module("openvino")
    finally:
        del sys.modules[telemetry]


class _OpenVino:
    """The network for images of any size, and for those of the size that was repeated last; each once it is needed."""

    def __init__(self, graph: bytes, threads: int, precision: str) -> None:
        self._core = import_openvino().Core()
        self._hints = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16", "int8": "f32"}[precision],
        }
        self._model = self._core.read_model(io.BytesIO(graph))
        self._any: Any = None
        self._repeated: Any = None
        self._size: tuple[int, ...] = ()

    def __call__(self, image: Tensor) -> Tensor:
        if self._any is None:
            self._any = self._compile(self._model)
        return _infer(self._any, image)

    def repeated(self, image: Tensor) -> Tensor:
        """The same by a graph for this size alone: its memory is planned before, so that more of it is shared."""
        if self._size != image.shape:
            self._repeated, self._size = None, ()  # its memory first
            model = self._model.clone()
            model.reshape(list(image.shape))
            self._repeated, self._size = self._compile(model), tuple(image.shape)
        return _infer(self._repeated, image)

    def _compile(self, model: Any) -> Any:
        return self._core.compile_model(model, "CPU", self._hints).create_infer_request()


def _infer(request: Any, image: Tensor) -> Tensor:
    return torch.from_numpy(request.infer([image.contiguous().numpy()], share_inputs=True)[0])


def network_graph(network: StudentNetwork) -> bytes:
    """The network in ONNX, for any batch and any sides that are multiples of the backbone's.

    Raises
    ------
    SettingsError
        If this version of torch cannot write it.
    """
    side = 2 * network.backbone.spec.multiple
    try:
        return onnx_graph(network, torch.rand(1, network.inputs, side, 2 * side), _GRAPH_INPUT, _GRAPH_OUTPUT)
    except (RuntimeError, TypeError, ValueError) as error:
        reason = str(error).partition("\n")[0][:120]
        name = network.backbone.spec.name
        raise SettingsError(
            f"{describe_engine('torch')} cannot write {name} as ONNX ({reason}); choose engine torch"
        ) from error


def onnx_graph(module: nn.Module, example: Float[Tensor, "b c h w"], input_name: str, output_name: str) -> bytes:
    """A module from one "b c h w" to another in ONNX; batch, height and width stay open.

    It is traced, so which way it goes must not depend on the size or the values of what it is given.
    """
    file = io.BytesIO()  # no disk, which may be full
    axes = {0: "batch", 2: "y", 3: "x"}
    with _EXPORT, _tracing(), torch.inference_mode(False), torch.no_grad():
        torch.onnx.export(
            module,
            (example.clone(),),
            file,  # type: ignore[arg-type]
            input_names=[input_name],
            output_names=[output_name],
            dynamic_axes={input_name: axes, output_name: axes},
            opset_version=_OPSET,
            # torch.export takes half a minute for what tracing does in half a second.
            dynamo=False,
        )
    return file.getvalue()


@contextmanager
def _tracing() -> Iterator[None]:
    """Inside, sizes are tensors: jaxtyping's checks, where they are switched on, do not accept them."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", torch.jit.TracerWarning)
            warnings.simplefilter("ignore", DeprecationWarning)  # of tracing, for which there is no equal yet
            warnings.filterwarnings("ignore", "Constant folding")  # of paddings, which need none
            yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)
