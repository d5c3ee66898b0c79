"""The head: teacher, student and decoder on top of a backbone, built from settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from distillfss_core.errors import SettingsError
from distillfss_core.nn.backbones import BackboneSpec
from distillfss_core.nn.decoder import Decoder, PublishedDecoder, SlimDecoder
from distillfss_core.nn.features import FeaturePyramid
from distillfss_core.nn.sam import WIDTH as SAM_WIDTH
from distillfss_core.nn.students import ConvDist, LightConvDist, Student
from distillfss_core.nn.teachers import (
    PUBLISHED,
    AlignmentSettings,
    AlignmentTeacher,
    DcamaSettings,
    DcamaTeacher,
    LearnedTeacher,
    UinoSettings,
    UinoTeacher,
    uino_heads,
)

_OLDER_DEFAULTS = ("light", "slim", "ours")


@dataclass(frozen=True)
class HeadForm:
    """The parts of a head, as a file names them; they suffice to build it again."""

    student: str
    decoder: str
    teacher: str
    width: int
    uino_reader: str = "pool"
    uino_width: int = 64
    uino_decoder: str = "default"

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> HeadForm:
        """From the card of a file; older ones have other words for the default."""
        parts = {name: str(values[name]) for name in ("student", "decoder", "teacher")}
        default = {name: "default" for name, value in parts.items() if value in _OLDER_DEFAULTS}
        reader, decoder = (str(values.get(name, getattr(cls, name))) for name in ("uino_reader", "uino_decoder"))
        uino_width = int(values.get("uino_width", cls.uino_width))
        return cls(
            **(parts | default),
            width=int(values["width"]),
            uino_reader=reader,
            uino_width=uino_width,
            uino_decoder=decoder,
        )

    def to_json(self) -> dict[str, Any]:
        """Fields by name, as the card of a model stores them; those of teacher uino for it only."""
        fields = asdict(self)
        return {n: value for n, value in fields.items() if self.teacher == "uino" or not n.startswith("uino_")}


class FewShotHead(nn.Module):
    """Teacher and student with the decoder they share.

    Parameters
    ----------
    spec : BackboneSpec
    classes : int
        K, without background.
    form : HeadForm
    """

    def __init__(self, spec: BackboneSpec, classes: int, form: HeadForm) -> None:
        super().__init__()
        self.form: HeadForm = form
        self.classes: int = classes
        coarse, blocks, skips = _three(spec.coarse_channels), _three(spec.coarse_blocks), spec.skip_channels
        if form.decoder == "published":
            decoder: Decoder = PublishedDecoder(blocks, (skips[-2], skips[-1]))
        else:
            decoder = SlimDecoder(blocks, skips, width=form.width)
        self.teacher: LearnedTeacher = _new_teacher(spec, form, decoder)
        self.student: Student = (
            ConvDist(coarse, classes) if form.student == "published" else LightConvDist(coarse, blocks, classes)
        )

    @property
    def decoder(self) -> Decoder:
        """The decoder that teacher and student share."""
        return self.teacher.decoder

    def student_logits(self, query: FeaturePyramid) -> Float[Tensor, "b k 2 h w"]:
        """Logits (background, foreground) of each class from the student, at ``query.size``."""
        result: Float[Tensor, "b k 2 h w"] = self.decoder(self.student(query), query)
        return result

    def student_margins(self, query: FeaturePyramid) -> Float[Tensor, "b k hg wg"]:
        """`margins` of the student's logits, on the decoder's own grid."""
        return self.decoder.margins(self.student(query), query)


def _new_teacher(spec: BackboneSpec, form: HeadForm, decoder: Decoder) -> LearnedTeacher:
    """The teacher of a form."""
    if form.teacher == "uino":
        width = form.uino_width
        if form.uino_decoder == "sam" and width != SAM_WIDTH:
            raise SettingsError(f"uino_width is {width}, but SAM's mask decoder has {SAM_WIDTH}; give uino_width 256")
        settings = UinoSettings(form.uino_reader, width=width, heads=uino_heads(width), decoder=form.uino_decoder)
        return UinoTeacher(spec, decoder, settings)
    if form.teacher == "prototype":
        return AlignmentTeacher(spec, decoder, AlignmentSettings())
    coarse, dcama = _three(spec.coarse_channels), PUBLISHED if form.teacher == "published" else DcamaSettings()
    if any(c % dcama.heads for c in coarse):
        raise SettingsError(
            f"backbone {spec.name} has {coarse} channels, which {dcama.heads} attention heads do not divide; "
            "choose another backbone or teacher=default"
        )
    return DcamaTeacher(coarse, decoder, dcama)


def _three(values: tuple[int, ...]) -> tuple[int, int, int]:
    fine, mid, deep = values
    return fine, mid, deep
