"""Settings of the long jobs: one declaration for validation, documentation, CLI options and the plugin's form."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from fractions import Fraction
from typing import Any, Literal, TypeVar

from distillfss_core.errors import SettingsError

Auto = Literal["auto"]

ZOOMS = tuple(Fraction(text) for text in ("1/4", "1/3", "1/2", "2/3", "1", "3/2", "2", "3", "4"))
"""Zoom factors on offer: small fractions, so that tiles start on whole pixels before and after zooming."""

Settings = TypeVar("Settings")


def _setting(default: Any, label: str, help: str, **limits: Any) -> Any:
    """A dataclass field with a label, a sentence of help and its limits.

    Limits are ``low`` and ``high``, or ``choices``, or ``parse``: a function that returns the value for a text or a
    value, and raises `SettingsError`. ``alone`` is the value of the option without a value.
    """
    return field(default=default, metadata={"label": label, "help": help, **limits})


def _seed(same: str) -> Any:
    return _setting(0, "Seed", f"Same seed, same {same} on one machine's CPU.", low=0, high=2**31 - 1)


def _device() -> Any:
    return _setting("auto", "Device", "auto, cpu, cuda, cuda:N or mps.")


def _precision() -> Any:
    return _setting("auto", "Precision", "Arithmetic of heavy layers.", choices=("auto", "float32", "bfloat16"))


def _documented(settings: type[Settings]) -> type[Settings]:
    """Append a section "Parameters", made from the declaration, to the docstring."""
    lines = [settings.__doc__ or "", "", "    Parameters", "    ----------"]
    for setting in fields(settings):  # type: ignore[arg-type]
        lines += [
            f"    {setting.name} : {setting.type}, default {setting.default!r}",
            f"        {setting.metadata['help']}",
        ]
    settings.__doc__ = "\n".join(lines)
    return settings


def parse_zoom(zoom: Fraction | str | float) -> Fraction:
    """The zoom on offer that equals ``zoom``.

    Raises
    ------
    SettingsError
        If it is none of `ZOOMS`.

    Examples
    --------
    >>> parse_zoom("1/2")
    Fraction(1, 2)
    """
    try:
        wanted = Fraction(zoom).limit_denominator(16)
    except (ValueError, TypeError, OverflowError, ZeroDivisionError) as error:
        raise SettingsError(f"zoom {zoom!r} is no number; choose one of {', '.join(map(str, ZOOMS))}") from error
    if wanted not in ZOOMS:
        raise SettingsError(f"zoom {zoom} is not on offer; choose one of {', '.join(map(str, ZOOMS))}")
    return wanted


def _zoom(value: Any) -> Fraction | Auto:
    return "auto" if value == "auto" else parse_zoom(value)


def _probability(value: Any) -> float | Auto:
    if value == "auto":
        return "auto"
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0.0 <= number <= 1.0:
        raise SettingsError(f"invert_prob is {value!r}; give auto or a probability from 0 to 1")
    return number


def _slice_number(value: Any) -> int | Auto | None:
    if value == "auto":
        return "auto"
    if value in (None, "none"):
        return None
    if isinstance(value, bool) or not str(value).isdecimal():
        raise SettingsError(f"validation_slice is {value!r}; give auto, none or the number of a slice")
    return int(value)


def _temperature(value: Any) -> float | str:
    if value == "sqrt":
        return "sqrt"
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0.0 < number < math.inf:
        raise SettingsError(f"temperature is {value!r}; give sqrt or a positive number")
    return number


def _sizes(value: Any) -> str:
    """Sides of images in ascending order, divided by commas."""
    parts = [part.strip() for part in str(value).split(",")]
    sides = [int(part) if part.isdecimal() else 0 for part in parts]
    if sides != sorted(set(sides)) or any(side % 32 or not 64 <= side <= 1024 for side in sides):
        raise SettingsError(f"sizes is {value!r}; give multiples of 32 from 64 to 1024, ascending, such as 128,256,512")
    return ",".join(map(str, sides))


def format_setting(value: Any) -> str:
    """Text of a value, as the command line and the plugin's form take it.

    Examples
    --------
    >>> format_setting(Fraction(1, 2)), format_setting(None)
    ('1/2', 'none')
    """
    return "none" if value is None else str(value)


SAMPLES = ("nuclei", "mitochondria", "nodules")
"""Kinds of generated stacks, see `distillfss_core.samples`."""

FORMS = ("default", "published")
"""Of student, decoder, teacher and loss: that of this package, or that of the papers."""

SIZES = {"balanced": "efficientnet_lite0", "fast": "lite0_compact"}
"""Sizes of a student, and the backbone of each."""

TEACHERS = {"dcama": "default", "uino": "uino", "prototype": "prototype"}
"""Teachers that are meta-trained, and the form of each in a head."""

READERS = ("pool", "attention", "cp4d", "scan")
"""What folds the correlation of teacher uino into a prompt."""

_READER = (
    "Reader of teacher uino",
    "pool: strongest and mean correlations; attention: softmax with values of +1 and -1; cp4d: 4-D convolutions; "
    "scan: a selective scan, slow.",
)

_UINO_WIDTH = (
    "Width of teacher uino",
    "Channels of adapter and prompts of teacher uino; 256 with an adapter from SAM.",
)

UINO_DECODERS = ("default", "sam")
"""What the prompts of teacher uino go to."""

_UINO_DECODER = (
    "Decoder of teacher uino",
    "default: prompts move the coarse maps, which the student's decoder reads; sam: SAM's mask decoder, of width 256.",
)

_OLDER_NAMES = {
    "start": "init_from",
    "synthetic": "synthetic_fraction",
    "backbone_rate": "backbone_lr_scale",
    "average": "ema_decay",
    "judge_every": "eval_every",
    "judged": "eval_tasks",
}


def upgrade_settings(record: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a meta-training as a file holds them, under the names that they have now."""
    return {_OLDER_NAMES.get(name, name): value for name, value in record.items()}


@_documented
@dataclass(frozen=True)
class DistillSettings:
    """How a student is made from a support set.

    Raises
    ------
    SettingsError
        If a value lies outside its limits; the message names the setting, the value and the limits.
    """

    backbone: str = _setting("efficientnet_lite0", "Backbone", "Frozen feature extractor; see `distillfss backbones`.")
    weights: str = _setting("auto", "Backbone weights", "auto, packaged, hub, random, or the path of a file.")
    head: str = _setting(
        "auto",
        "Few-shot head",
        "What attention and decoder start from: auto: the meta-trained weights of this package where they fit; "
        "none: nothing; or the path of a head file, whose backbone is taken too, and of an imported head the published "
        "forms.",
    )
    method: str = _setting(
        "joint",
        "Method",
        "joint: teacher and student learn together (DistillFSS); two-stage: refine the teacher, then distill it; "
        "direct: the student alone, without a teacher; probe: a linear classifier of pixels, in seconds.",
        choices=("joint", "two-stage", "direct", "probe"),
    )
    student: str = _setting(
        "default",
        "Student",
        "default: classes share a trunk; published: one ConvDist for each class.",
        choices=FORMS,
    )
    decoder: str = _setting(
        "default",
        "Decoder",
        "default: light, tiles without seams; published: DCAMA's mixer.",
        choices=FORMS,
    )
    teacher: str = _setting(
        "default",
        "Teacher attention",
        "default: normalized tokens, balanced keys, no positional encoding; published: DCAMA as published; uino: "
        "prompts from signed correlations, meta-trained by `distillfss pretrain --teacher uino`; prototype: learned "
        "prototypes.",
        choices=(*FORMS, "uino", "prototype"),
    )
    uino_reader: str = _setting("pool", *_READER, choices=READERS)
    uino_width: int = _setting(64, *_UINO_WIDTH, low=32, high=512)
    uino_decoder: str = _setting("default", *_UINO_DECODER, choices=UINO_DECODERS)
    loss: str = _setting(
        "default",
        "Loss",
        "default: cross-entropy and Dice, rare classes keep their weight; published: focal.",
        choices=FORMS,
    )
    steps: int = _setting(
        0,
        "Steps",
        "Optimizer steps of each stage; 0 chooses by the slices: more for many, fewer for separate pictures.",
        low=0,
        high=1_000_000,
    )
    crop_size: int = _setting(256, "Crop size", "Side of a training crop in pixels after zooming.", low=32, high=4096)
    queries: int = _setting(4, "Queries", "Crops segmented in a step.", low=1, high=256)
    shots: int = _setting(4, "Shots", "Crops that serve as support in a step, at most.", low=1, high=256)
    width: int = _setting(32, "Decoder width", "Channels of the default decoder.", low=4, high=512)
    learning_rate: float = _setting(2e-3, "Learning rate", "AdamW's largest rate.", low=1e-7, high=1.0)
    weight_decay: float = _setting(1e-2, "Weight decay", "AdamW's weight decay.", low=0.0, high=1.0)
    zoom: Fraction | Auto = _setting(
        "auto",
        "Zoom",
        "Enlargement before the backbone; auto chooses by cross-validation over the slices. E.g. 1/2, 1, 2.",
        parse=_zoom,
    )
    normalization: str = _setting(
        "auto",
        "Normalization",
        "per-image: percentiles of each image; per-volume: those of the support; auto: per-volume for planes of one "
        "stack.",
        choices=("auto", "per-image", "per-volume"),
    )
    orientation: str = _setting(
        "auto",
        "Orientation",
        "any: training crops are turned and mirrored; fixed: they are not, for classes that differ by direction, such "
        "as left and right; auto: fixed where a classifier confuses several classes in turned crops.",
        choices=("auto", "any", "fixed"),
    )
    probe: str = _setting(
        "auto",
        "Probe as evidence",
        "auto: the margins of a probe are added to those of the student, as far as it predicts held-out slices; none: "
        "the student has its head alone.",
        choices=("auto", "none"),
    )
    foundation: str = _setting(
        "none",
        "Foundation model",
        "Backbone of a probe that helps to segment images without labels, from which the student then learns as well: "
        "none, or a name such as dinov2_small.",
    )
    specialize: int = _setting(
        0,
        "Specialization steps",
        "Steps in which the backbone first learns a teacher's features, on the slices and on images without labels. It "
        "is kept where held-out slices are segmented better by it. 0: none. The option alone: 150, some two minutes.",
        low=0,
        high=1_000_000,
        alone=150,
    )
    specialize_teacher: str = _setting(
        "auto",
        "Specialization teacher",
        "Backbone whose features are learned: a name, or a file as for distill-backbone; auto: for size fast the "
        "default backbone, else dinov2_small, where its package is installed.",
    )
    invert_prob: float | Auto = _setting(
        "auto",
        "Inversion probability",
        "Probability of inverting a crop; auto: 0.3, but 0 for planes of one stack or several classes.",
        parse=_probability,
    )
    crops: int = _setting(192, "Crops", "Augmented crops whose features are cached, at most.", low=2, high=1_000_000)
    cache_mb: int = _setting(600, "Cache", "Megabytes of cached features, at most.", low=1, high=1_000_000)
    validation_slice: int | Auto | None = _setting(
        "auto",
        "Validation slice",
        "Slice that is not trained on and chooses the best step: its number, none, or auto (of 8 and more the one "
        "nearest the middle that is not the only one of a class).",
        parse=_slice_number,
    )
    seed: int = _seed("result")
    device: str = _device()
    precision: str = _precision()

    @classmethod
    def preset(cls, name: str, **changes: Any) -> DistillSettings:
        """Student, decoder, teacher and loss in one form, "default" or "published" (which has no probe).

        Other settings are as given.

        Raises
        ------
        SettingsError
            If there is no such form, or a value lies outside its limits.

        Examples
        --------
        >>> DistillSettings.preset("published", steps=500).decoder
        'published'
        """
        if name not in FORMS:
            raise SettingsError(f"preset is {name!r}; choose {', '.join(FORMS)}")
        form = dict.fromkeys(("student", "decoder", "teacher", "loss"), name)
        return cls(**form | {"probe": "none" if name == "published" else "auto"} | changes)

    @property
    def uses_unlabeled(self) -> bool:
        """Whether images without labels are learned from of their own accord, where there are any."""
        return self.specialize > 0 or (self.foundation != "none" and self.method != "probe")

    def to_json(self) -> dict[str, Any]:
        """The values, as model cards hold them; a zoom is a text such as "1/2"."""
        values = {setting.name: getattr(self, setting.name) for setting in fields(self)}
        return {name: str(value) if isinstance(value, Fraction) else value for name, value in values.items()}

    def changed(self) -> dict[str, Any]:
        """Those of `to_json` that are not the defaults."""
        defaults = DistillSettings().to_json()
        return {name: value for name, value in self.to_json().items() if value != defaults[name]}

    def to_text(self) -> dict[str, str]:
        """The values as text, as the command line takes them."""
        return {setting.name: format_setting(getattr(self, setting.name)) for setting in fields(self)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> DistillSettings:
        """Settings from the values that `to_json` or a form gives.

        Raises
        ------
        SettingsError
            If a value lies outside its limits.
        """
        parsers = {setting.name: setting.metadata["parse"] for setting in fields(cls) if "parse" in setting.metadata}
        return cls(**{name: parsers[name](value) if name in parsers else value for name, value in values.items()})

    def __post_init__(self) -> None:
        _check_all(self)
        if self.crop_size % 32:
            raise SettingsError(f"crop_size is {self.crop_size}; give a multiple of 32")
        _check_uino_width(self.uino_width)


@_documented
@dataclass(frozen=True)
class PretrainSettings:
    """How a few-shot head, and its backbone if wanted, is meta-trained over episodes of many tasks.

    Raises
    ------
    SettingsError
        If a value lies outside its limits; the message names the setting, the value and the limits.
    """

    backbone: str = _setting("efficientnet_lite0", "Backbone", "Feature extractor; see `distillfss backbones`.")
    weights: str = _setting("auto", "Backbone weights", "auto, packaged, hub, random, or the path of a file.")
    init_from: str = _setting(
        "none",
        "Initial weights",
        "What the head starts from: none: nothing; packaged: the meta-trained head of this package; or the path of a "
        "head file, whose backbone is taken too where it was trained. A head of another teacher gives its decoder.",
    )
    teacher: str = _setting(
        "dcama",
        "Teacher",
        "dcama: attention; uino: prompts from signed correlations with the support; prototype: learned prototypes.",
        choices=tuple(TEACHERS),
    )
    uino_reader: str = _setting("pool", *_READER, choices=READERS)
    uino_width: int = _setting(64, *_UINO_WIDTH, low=32, high=512)
    uino_decoder: str = _setting("default", *_UINO_DECODER, choices=UINO_DECODERS)
    adapter: str = _setting(
        "none",
        "Adapter",
        "Of teacher uino. none: it learns with the episodes; or the path of an adapter that was distilled from SAM, "
        "which stays as it is and has width 256.",
    )
    sam: str = _setting(
        "none",
        "SAM checkpoint",
        "What SAM's mask decoder in teacher uino starts from: none: random weights, or the head to start from; or the "
        "path of a checkpoint of SAM or MobileSAM.",
    )
    learn: str = _setting(
        "all",
        "What learns",
        "all: teacher and decoder; but-sam: all but SAM's mask decoder; prompts: of the teacher only what reads the "
        "support, from a head that is given to start from.",
        choices=("all", "but-sam", "prompts"),
    )
    width: int = _setting(32, "Decoder width", "Channels of the default decoder.", low=4, high=512)
    steps: int = _setting(20_000, "Steps", "Optimizer steps.", low=1, high=100_000_000)
    tasks: int = _setting(1, "Tasks", "Tasks in a step, each asked several times.", low=1, high=1024)
    size: int = _setting(192, "Size", "Side of a view in pixels.", low=64, high=1024)
    shots: int = _setting(10, "Shots", "Views that answer as support, at most.", low=1, high=30)
    synthetic_fraction: float = _setting(
        0.5, "Synthetic fraction", "Share of generated tasks, where real ones are given too.", low=0.0, high=1.0
    )
    learning_rate: float = _setting(1e-3, "Learning rate", "AdamW's largest rate.", low=1e-7, high=1.0)
    backbone_lr_scale: float = _setting(
        0.0,
        "Backbone learning-rate scale",
        "Factor on the learning rate at which the backbone learns too (light ones only); 0 keeps it frozen.",
        low=0.0,
        high=1.0,
    )
    weight_decay: float = _setting(1e-2, "Weight decay", "AdamW's weight decay.", low=0.0, high=1.0)
    ema_decay: float = _setting(
        0.998,
        "EMA decay",
        "Decay of the exponential moving average of the weights for each step; the average is what is kept.",
        low=0.0,
        high=0.99999,
    )
    eval_every: int = _setting(
        1000, "Evaluate every", "Steps between two evaluations on held-out tasks.", low=1, high=10**9
    )
    eval_tasks: int = _setting(
        60, "Evaluation tasks", "Held-out tasks of each source in an evaluation.", low=1, high=10_000
    )
    workers: int = _setting(1, "Workers", "Processes that make episodes; 0: the main one.", low=0, high=256)
    seed: int = _seed("weights")
    device: str = _device()
    precision: str = _precision()

    def __post_init__(self) -> None:
        _check_all(self)
        if self.size % 32:
            raise SettingsError(f"size is {self.size}; give a multiple of 32")
        _check_uino_width(self.uino_width)


@_documented
@dataclass(frozen=True)
class BackboneSettings:
    """How a backbone is distilled from another one on images without labels.

    Raises
    ------
    SettingsError
        If a value lies outside its limits; the message names the setting, the value and the limits.
    """

    teacher: str = _setting(
        "efficientnet_lite0",
        "Teacher",
        "Backbone to learn from: its name (see `distillfss backbones`), or the file of a distilled backbone or of a "
        "head with its own backbone.",
    )
    teacher_weights: str = _setting(
        "auto",
        "Teacher weights",
        "Of a teacher given by name. auto: the backbone of the packaged head where there is one, else packaged or hub; "
        "packaged, hub, random, or the path of a file.",
    )
    student: str = _setting("mobilenetv4_conv_small_050", "Student", "Backbone that learns: its name.")
    student_weights: str = _setting(
        "auto",
        "Student weights",
        "What the student starts from. auto: packaged where there is a package, else random; packaged, hub, random, or "
        "the path of a file.",
    )
    loss: str = _setting(
        "qsd",
        "Loss",
        "qsd: query-based soft distillation (GKD); mse: projected features; cwd: channels as distributions; direct: "
        "features as they are, of a student with the teacher's channels.",
        choices=("qsd", "mse", "cwd", "direct"),
    )
    mask_weight: float = _setting(
        1.0,
        "Mask weight",
        "Weight of the same loss on masked images; 0: no masked pass.",
        low=0.0,
        high=100.0,
    )
    mask_fraction: float = _setting(
        0.5, "Mask fraction", "Share of blocks masked in the first half of a batch.", low=0.0, high=1.0
    )
    strides: str = _setting(
        "8,16,32",
        "Strides",
        "Feature maps that are distilled, each with a loss of its own; 16 alone as published.",
        choices=("16", "16,32", "8,16,32", "2,4,8,16,32"),
    )
    temperature: float | str = _setting(
        1.0,
        "Temperature",
        "Of the attention of qsd, or of the distributions of cwd: a number, or sqrt, the root of the teacher's "
        "channels.",
        parse=_temperature,
    )
    steps: int = _setting(2000, "Steps", "Optimizer steps.", low=1, high=100_000_000)
    batch: int = _setting(16, "Batch", "Views in a step.", low=2, high=4096)
    size: int = _setting(256, "Size", "Side of a view in pixels.", low=64, high=1024)
    views: int = _setting(4, "Views", "Fixed augmented views of each image.", low=1, high=10_000)
    learning_rate: float = _setting(
        1e-3, "Learning rate", "AdamW's first rate, which falls to 1e-5 along a cosine.", low=1e-7, high=1.0
    )
    weight_decay: float = _setting(5e-2, "Weight decay", "AdamW's weight decay.", low=0.0, high=1.0)
    cache_mb: int = _setting(
        600, "Cache", "Megabytes of views with their teacher features that are kept, at most.", low=0, high=1_000_000
    )
    seed: int = _seed("weights")
    device: str = _device()
    precision: str = _precision()

    def __post_init__(self) -> None:
        _check_all(self)
        if self.size % 32:
            raise SettingsError(f"size is {self.size}; give a multiple of 32")


@_documented
@dataclass(frozen=True)
class AdapterSettings:
    """How the adapter of teacher uino is distilled from SAM on images without labels.

    Raises
    ------
    SettingsError
        If a value lies outside its limits; the message names the setting, the value and the limits.
    """

    backbone: str = _setting(
        "efficientnet_lite0",
        "Backbone",
        "Frozen backbone whose early features the adapter reads: its name, or the file of a head with its backbone.",
    )
    weights: str = _setting("auto", "Backbone weights", "auto, packaged, hub, random, or the path of a file.")
    sizes: str = _setting(
        "128,256,512",
        "Sizes",
        "Sides in pixels at which the backbone sees a view, from coarse to fine; each for an equal share of the steps.",
        parse=_sizes,
    )
    steps: int = _setting(3000, "Steps", "Optimizer steps of all sizes together.", low=1, high=100_000_000)
    batch: int = _setting(16, "Batch", "Views in a step.", low=1, high=4096)
    views: int = _setting(4, "Views", "Fixed augmented views of each image.", low=1, high=10_000)
    learning_rate: float = _setting(
        1e-3, "Learning rate", "AdamW's first rate, which falls to 1e-5 along a cosine.", low=1e-7, high=1.0
    )
    weight_decay: float = _setting(5e-2, "Weight decay", "AdamW's weight decay.", low=0.0, high=1.0)
    cache_mb: int = _setting(
        4000, "Cache", "Megabytes of SAM's embeddings on disk, at most; a view has 2.1.", low=0, high=100_000_000
    )
    seed: int = _seed("weights")
    device: str = _device()
    precision: str = _precision()

    def __post_init__(self) -> None:
        _check_all(self)


def _check_uino_width(width: int) -> None:
    if width % 16:
        raise SettingsError(f"uino_width is {width}; give a multiple of 16")


def _check_all(settings: DistillSettings | PretrainSettings | BackboneSettings | AdapterSettings) -> None:
    """Give each setting its type, and raise SettingsError for a value outside its limits."""
    for setting in fields(settings):
        value = getattr(settings, setting.name)
        if "parse" in setting.metadata:
            object.__setattr__(settings, setting.name, setting.metadata["parse"](value))
        else:
            _check(setting.name, value, setting.type, setting.metadata)


def _check(name: str, value: Any, kind: Any, metadata: Any) -> None:
    if kind == "str" and not isinstance(value, str):
        raise SettingsError(f"{name} is {value!r}; give a text")
    if kind in ("int", "float"):
        good = isinstance(value, int if kind == "int" else (int, float)) and not isinstance(value, bool)
        if not good or not math.isfinite(value) or not metadata["low"] <= value <= metadata["high"]:
            what = "a whole number" if kind == "int" else "a number"
            raise SettingsError(f"{name} is {value!r}; give {what} from {metadata['low']} to {metadata['high']}")
    if "choices" in metadata and value not in metadata["choices"]:
        raise SettingsError(f"{name} is {value!r}; choose {', '.join(metadata['choices'])}")
