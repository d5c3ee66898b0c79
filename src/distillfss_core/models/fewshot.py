"""A teacher with its support, as a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from jaxtyping import Float
from torch import Tensor

from distillfss_core.errors import SettingsError
from distillfss_core.models.preprocess import Preprocess
from distillfss_core.models.segmenter import HALO, Segmenter
from distillfss_core.nn.backbones import Backbone
from distillfss_core.nn.device import Device
from distillfss_core.nn.features import margins
from distillfss_core.nn.teachers import SupportKeys, Teacher


class FewShotModel(Segmenter):
    """A teacher and its support; it exists in memory only."""

    def __init__(
        self,
        backbone: Backbone,
        teacher: Teacher,
        keys: SupportKeys,
        preprocess: Preprocess,
        class_names: Sequence[str],
        *,
        device: Device,
        halo: int = HALO,
    ) -> None:
        super().__init__(backbone, preprocess, class_names, device=device, halo=halo)
        self.teacher: Teacher = teacher
        self.keys: SupportKeys = keys

    @property
    def local(self) -> bool:
        """Whether tiles agree: neither teacher nor backbone depends on the whole tile."""
        return self.teacher.local and self.backbone.spec.local

    def _margins(self, image: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b k hg wg"]:
        with self.device.autocast():
            return margins(self.teacher(self.backbone(image), self.keys).logits)

    def _own_tensors(self) -> Iterator[tuple[str, Tensor]]:
        raise SettingsError("a teacher with its support has no digest; distill a student from it")
