"""The student: a segmenter that is stored in one file."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from distillfss_core.errors import ModelFileError, SettingsError
from distillfss_core.models.batches import NEVER, PIXELS
from distillfss_core.models.calibration import Form, iter_fastest_form, timed_forms
from distillfss_core.models.card import STUDENT_FILE, Thumbnails, upgrade_card
from distillfss_core.models.engines import Runner, StudentNetwork, auto_forms, choose_engine, choose_precision
from distillfss_core.models.preprocess import Preprocess
from distillfss_core.models.segmenter import HALO, Segmenter
from distillfss_core.nn.backbones import Backbone, backbone_from_state
from distillfss_core.nn.checkpoint import read_card_file, write_card_file
from distillfss_core.nn.device import Device, choose_device
from distillfss_core.nn.head import FewShotHead, HeadForm
from distillfss_core.nn.pretrained import can_be_found_again, find_backbone
from distillfss_core.nn.probe import Probe
from distillfss_core.settings import ZOOMS
from distillfss_core.types import Array, GeneratorRun, finish

_OF_PROBE = ("inputs", "alone", "bound")
_REPEATED = {"float32": 1.8, "bfloat16": 2.6, "int8": 4.0}
"""So many times the pixels need the same memory in OpenVINO, made ready for one size, as in ONNX Runtime (float32)."""
KEEP_BACKBONE = (
    "the backbone's weights were trained with a head of your own and are in no package; keep them in the student's file"
)


class StudentModel(Segmenter):
    """A segmenter in one file: backbone, ConvDist, decoder, preprocessing and a card.

    A student of method "probe" answers by its probe, and keeps the head for a training that goes on from it. That of
    another student adds to what the head answers.

    It is made by `distillfss_core.distill` or `StudentModel.load`. ``engine`` runs its network, as for `load`. It has
    test-time augmentation where ``tta`` is true, see `with_tta`.
    """

    def __init__(
        self,
        backbone: Backbone,
        head: FewShotHead,
        preprocess: Preprocess,
        class_names: Sequence[str],
        *,
        device: Device,
        probe: Probe | None = None,
        engine: str = "auto",
        halo: int = HALO,
        pixel_size: tuple[float, float] | None = None,
        training: dict[str, Any] | None = None,
        thumbnails: Thumbnails | None = None,
        samples: UInt8[Array, "n 3 s s"] | None = None,
        created: str | None = None,
    ) -> None:
        super().__init__(backbone, preprocess, class_names, device=device, halo=halo)
        head = head.eval().requires_grad_(False)
        self.head: FewShotHead = head.to(memory_format=torch.channels_last)  # as the features are
        self.probe: Probe | None = probe
        self.pixel_size: tuple[float, float] | None = pixel_size
        self.training: dict[str, Any] = training or {}
        self.thumbnails: Thumbnails | None = thumbnails
        self.samples: UInt8[Array, "n 3 s s"] | None = samples
        self.created: str = created or datetime.now(UTC).isoformat(timespec="seconds")
        self.tta: bool = False
        self.network: StudentNetwork = StudentNetwork(self.backbone, self.head, probe, preprocess.inputs)
        self._run = self._runner(engine, device)
        self._asked = device.precision, engine  # either may be "auto"

    @property
    def local(self) -> bool:
        """Whether tiles agree: neither decoder nor backbone depends on the whole tile."""
        return self.network.local

    def __dask_tokenize__(self) -> tuple[str, ...]:
        return *super().__dask_tokenize__(), self.engine, str(self.tta)

    @property
    def engine(self) -> str:
        """What runs the network: "torch", "torch-compiled", "onnxruntime" or "openvino"."""
        return self._run.engine

    def _runner(self, engine: str, device: Device) -> Runner:
        if device.precision == "int8" and self.samples is None:
            raise SettingsError(
                "this student was made before students kept samples of their support, which precision int8 needs; "
                "distill it again, or use precision float32"
            )
        return Runner(self.network, choose_engine(engine, device, self.network), device, self.samples)

    def _margins(self, image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b k hg wg"]:
        return _mean_over_turns(self._run, image) if self.tta else self._run(image, repeats=self._repeats)

    @property
    def repeated_pixels(self) -> float:
        """So many times the pixels of a window need the same memory where windows of one size follow one another."""
        return _REPEATED[self.device.precision] if self.engine == "openvino" and not self.tta else 1

    def _own_tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from sorted(self.head.state_dict().items())
        yield from sorted(self._probe_tensors().items())

    def _probe_tensors(self) -> dict[str, Tensor]:
        return {} if self.probe is None else {f"probe.{n}": value for n, value in self.probe.state_dict().items()}

    def to(self, device: str, precision: str = "auto", engine: str = "auto") -> StudentModel:
        """Move to another device, precision or engine, as for `load`; returns self."""
        chosen = choose_device(device, precision)
        if precision == "auto":
            chosen = replace(chosen, precision=choose_precision(chosen, engine, self.network))
        self._run = self._runner(engine, chosen)
        self._asked = precision, engine
        self.device: Device = chosen
        self._room, self._batch = math.inf, PIXELS
        self.backbone.to(chosen.torch)
        self.head.to(chosen.torch)
        if self.probe is not None:
            self.probe.to(chosen.torch)
        return self

    def with_tta(self, tta: bool = True) -> StudentModel:
        """The same student with test-time augmentation, or without; this one stays as it is.

        Its probabilities are the mean of those of eight turned and mirrored copies of a window [1]_. That takes eight
        times as long. The file of the student does not hold it.

        Raises
        ------
        SettingsError
            If the student distinguishes directions, so that it must not see an image turned.

        References
        ----------
        .. [1] Wang, Li, Aertsen, Deprest, Ourselin, Vercauteren, "Aleatoric Uncertainty Estimation with Test-Time
           Augmentation for Medical Image Segmentation with Convolutional Neural Networks", Neurocomputing 2019.
        """
        if tta and self.training.get("orientation") == "fixed":
            raise SettingsError(
                "test-time augmentation turns images, but this student distinguishes directions (orientation fixed); "
                "leave it out"
            )
        other = copy.copy(self)
        other.tta = tta
        return other

    def with_engine(self, engine: str) -> StudentModel:
        """The same student, run by another engine (as for `load`) in the same precision; this one stays as it is."""
        other = copy.copy(self)
        other._run = other._runner(engine, other.device)
        other._asked = other.device.precision, engine
        return other

    def in_precision(self, precision: str) -> StudentModel:
        """The same student in the precision with which labels were begun, if it was free to choose on a CPU."""
        if self._asked[0] != "auto" or self.device.kind != "cpu" or precision == self.device.precision:
            return self
        return self._as_form(self._asked[1], precision)

    def calibrated(self, window: tuple[int, int], *, measure: bool = True) -> StudentModel:
        """The same student by the engine, and in the precision, that are the fastest here.

        Nothing changes where the engine was chosen by name, or where there is no choice: on a GPU, and with one engine.
        If the precision was "auto", float32 and bfloat16 are compared, else the engines in that precision.

        Parameters
        ----------
        window : (int, int)
            Height and width in zoomed pixels for which they are compared, multiples of those of the backbone.
        measure : bool
            Whether to time them, some seconds in all, where no times are in the user's cache.
        """
        return finish(GeneratorRun(self.iter_calibrated(window, measure=measure)))

    def iter_calibrated(self, window: tuple[int, int], *, measure: bool = True) -> Generator[None, None, StudentModel]:
        """`calibrated`, which pauses after each window that is timed."""
        forms = self._forms()
        if len(forms) < 2:
            return self

        def make(engine: str, precision: str) -> Runner:
            return self._runner(engine, replace(self.device, precision=precision))

        fastest = yield from iter_fastest_form(forms, self.network, make, window, measure=measure)
        if fastest is None or fastest == (self.engine, self.device.precision):
            return self
        return self._as_form(*fastest)

    def _forms(self) -> list[Form]:
        """Engines and precisions from which the fastest may be chosen; one or none where there is no choice."""
        precision, engine = self._asked
        return auto_forms(precision, self.device, self.network) if engine == "auto" else []

    def explain_engine(self) -> list[str]:
        """What runs this student here, and why: a line, or one for each size of window that was timed here before.

        Nothing is timed.

        Examples
        --------
        "onnxruntime float32 on cpu: the fastest, as a window of 640 x 640 takes: onnxruntime float32 300 ms, ..."
        """
        place = f"on {self.device.name}"
        chosen = f"{self.engine} {self.device.precision} {place}"
        forms = self._forms()
        if self._asked[1] != "auto":
            return [f"{chosen}: the engine was given"]
        if len(forms) < 2:
            return [f"{chosen}: the only engine that is installed and runs this model here"]
        if timed := timed_forms(forms, self.network):
            return [f"{' '.join(one.best)} {place}: the fastest, as {one}" for one in timed]
        return [f"{chosen}: the usual choice, as engines were not timed here yet; a long run on a volume times them"]

    def _as_form(self, engine: str, precision: str) -> StudentModel:
        other = copy.copy(self)
        other.device = replace(self.device, precision=precision)
        other._run = other._runner(engine, other.device)
        return other

    def at_pixel_size(self, pixel_size: tuple[float, float]) -> StudentModel:
        """The same student for images of another pixel size: objects come to the size it was trained on.

        Parameters
        ----------
        pixel_size : (float, float)
            Micrometers (y, x) of the images to come; their geometric mean counts, and the nearest zoom on offer is
            taken.

        Raises
        ------
        SettingsError
            If the student has no pixel size, or a pixel size is not positive.
        """
        if self.pixel_size is None:
            raise SettingsError(
                "this student was made without a pixel size, so it cannot be scaled; give --pixel-size when distilling"
            )
        if not all(0 < p < math.inf for p in pixel_size):
            raise SettingsError(f"pixel size {pixel_size} is not possible; give two positive numbers in micrometers")
        wanted = float(self.preprocess.zoom_factor) * math.sqrt(math.prod(pixel_size) / math.prod(self.pixel_size))
        zoom = min(ZOOMS, key=lambda z: abs(math.log(float(z) / wanted)))
        scaled = copy.copy(self)
        scaled.preprocess = replace(self.preprocess, zoom=str(zoom))
        scaled.pixel_size = pixel_size  # zoom and pixel size belong together
        return scaled

    @property
    def card(self) -> dict[str, Any]:
        """What the model is: JSON-able, the same before saving and after loading."""
        return {
            "format": STUDENT_FILE.name,
            "format_version": STUDENT_FILE.version,
            "created": self.created,
            "classes": list(self.class_names),
            "pixel_size_um": list(self.pixel_size) if self.pixel_size else None,
            "backbone": {
                "name": self.backbone.spec.name,
                "weights": self.backbone.weights,
                "license": self.backbone.license,
                "digest": self.backbone.digest(),
            },
            "head": self.head.form.to_json(),
            "probe": None if self.probe is None else {name: getattr(self.probe, name) for name in _OF_PROBE},
            "preprocess": self.preprocess.to_json(),
            "halo": self.halo,
            "training": self.training,
        }

    def save(self, path: str | Path, *, with_backbone: bool = True) -> None:
        """Write one safetensors file, whole or not at all.

        Parameters
        ----------
        with_backbone : bool
            False leaves the backbone's weights out; loading then needs them packaged, on the hub or in a file, and
            checks their digest.

        Raises
        ------
        SettingsError
            If weights are to be left out that could not be found again: they were trained with a head of one's own.
        OutputError
            If it cannot be written; a file that was there before stays as it was.
        """
        tensors = {f"head.{name}": value for name, value in self.head.state_dict().items()} | self._probe_tensors()
        if not with_backbone and not can_be_found_again(self.backbone):
            raise SettingsError(KEEP_BACKBONE)
        if with_backbone:
            tensors |= {f"backbone.{name}": value for name, value in self.backbone.state().items()}
        if self.thumbnails is not None:
            tensors["thumbnails.images"] = torch.from_numpy(self.thumbnails.images)
            tensors["thumbnails.labels"] = torch.from_numpy(self.thumbnails.labels)
        if self.samples is not None:
            tensors["samples"] = torch.from_numpy(self.samples)
        write_card_file(path, STUDENT_FILE, self.card, tensors, backbone=str(with_backbone).lower())

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        device: str = "auto",
        precision: str = "auto",
        weights: str = "auto",
        engine: str = "auto",
    ) -> StudentModel:
        """Read a student.

        Parameters
        ----------
        path : path
        device : str
            Any device, whatever the model was made on.
        precision : str
            "float32", "bfloat16", "float16" (GPUs only), "int8" (the fastest on a CPU; from one label in a thousand to
            one in a hundred differs), or "auto": bfloat16 on CUDA devices that have it, and by OpenVINO on processors
            that have it (two labels in ten thousand to two in a thousand differ); float32 elsewhere.
        weights : str
            Where the backbone's weights are, for a file that was saved without them.
        engine : {"auto", "torch", "torch-compiled", "onnxruntime", "openvino"}
            What runs the network; "auto" is one that is usually fast, see `choose_engine`, until a volume is segmented
            (`calibrated`). In float32 their logits differ by rounding alone, and labels where two classes are equally
            likely to within that.

        Raises
        ------
        SettingsError
            If the device, the precision or the engine is not to be had.
        ModelFileError
            If the file is missing, damaged, truncated, newer than this program or of another kind.
        """
        path = Path(path)
        card, tensors, _ = read_card_file(path, STUDENT_FILE)
        try:
            card = upgrade_card(card, path)
            chosen = choose_device(device, precision)
            own = _part(tensors, "backbone")
            backbone_card = card["backbone"]
            backbone = (
                backbone_from_state(backbone_card["name"], own, backbone_card["weights"])
                if own
                else find_backbone(backbone_card["name"], backbone_card["digest"], weights, str(path))
            )
            head = FewShotHead(backbone.spec, len(card["classes"]), HeadForm(**card["head"]))
            head.load_state_dict(_part(tensors, "head"))
            probe = None
            if card["probe"]:
                probe = Probe(backbone.spec, len(card["classes"]), **card["probe"]).eval()
                probe.requires_grad_(False).load_state_dict(_part(tensors, "probe"))
            thumbs = (
                Thumbnails(tensors["thumbnails.images"].numpy(), tensors["thumbnails.labels"].numpy())
                if "thumbnails.images" in tensors
                else None
            )
            pixel = card["pixel_size_um"]
            model = cls(
                backbone,
                head,
                Preprocess.from_json(card["preprocess"]),
                tuple(card["classes"]),
                device=chosen,
                probe=probe,
                halo=int(card["halo"]),
                pixel_size=(float(pixel[0]), float(pixel[1])) if pixel else None,
                training=card["training"],
                thumbnails=thumbs,
                samples=tensors["samples"].numpy() if "samples" in tensors else None,
                created=card["created"],
            )
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            if isinstance(error, SettingsError):
                raise
            reason = str(error).splitlines()[0]
            raise ModelFileError(f"{path}: its card and its tensors do not fit together ({reason})") from error
        return model.to(chosen.name, precision, engine)


def _mean_over_turns(network: Runner, image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b k hg wg"]:
    """Margins of the mean probabilities of the eight turned and mirrored copies of images, turned back."""
    views = []
    for mirrored, quarters in itertools.product((False, True), range(4)):
        turned = torch.rot90(image.flip(3) if mirrored else image, quarters, (2, 3))
        margins = network(turned.contiguous()).float().clamp_min(NEVER)
        logs = torch.cat([torch.zeros_like(margins[:, :1]), margins], 1).log_softmax(1)
        back = torch.rot90(logs, -quarters, (2, 3))
        views.append(back.flip(3) if mirrored else back)
    mean = torch.stack(views).logsumexp(0)
    return mean[:, 1:] - mean[:, :1]


def _part(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Of the tensors in a file, those of one part by the names that they have in it."""
    return {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
