"""The public names of the package, for type checkers, editors and documentation; fetched at first use."""

from .errors import (
    ConsensusWarning,
    DistillFSSError,
    ImageError,
    InputFileError,
    IntensityWarning,
    ModelFileError,
    NoStudentYetError,
    NotFiniteError,
    OutOfMemoryError,
    OutputError,
    SettingsError,
    SupportSetError,
    UnfinishedError,
    WeightsUnavailableError,
)
from .export.bioimageio import export_bioimageio
from .export.onnx import export_onnx
from .importing import import_checkpoint
from .io.images import read_image, read_stack
from .io.labels import labels_from_image, read_labels
from .io.writing import write_label_stack, write_labels
from .labelstore.store import check_finished
from .metrics import Measures, Scores, evaluate
from .models.card import Thumbnails, describe_expectation, read_card, read_thumbnails
from .models.fewshot import FewShotModel
from .models.segmenter import Segmenter
from .models.student import StudentModel
from .nn.backbones import SPECS, Backbone, BackboneSpec, load_backbone
from .nn.device import Device, choose_device, leave_a_core_free
from .objects.instances import InstanceReport, InstanceStep, iter_instances, label_instances
from .objects.outline import Proposal, propose_object
from .process import may_change_process, return_freed_memory
from .samples import Sample, SampleStep, generate_sample, iter_generate_sample
from .segmentation.batch import BatchJob, BatchStep, iter_batch, plan_batch
from .segmentation.cluster import Connection, connect
from .segmentation.lazy import compare_intensities, sample_volume, segment_lazy
from .segmentation.to_zarr import ShardDone, VolumeReport, iter_segment, segment_to_zarr
from .settings import SIZES, AdapterSettings, BackboneSettings, DistillSettings, PretrainSettings
from .support.slice_selection import iter_diverse_planes, suggest_diverse_planes, suggest_planes
from .support.support_set import SupportSet, load_support
from .support.unlabeled import load_unlabeled
from .training.adapter import DistilledAdapter, distill_adapter, iter_distill_adapter
from .training.backbone import DistilledBackbone, distill_backbone, iter_distill_backbone
from .training.disagreement import iter_disputed_planes
from .training.distillation import (
    DistillRun,
    distill,
    iter_distill,
    iter_refine,
    iter_unrefined_teacher,
    refine,
    unrefined_teacher,
)
from .training.instant import InstantModel
from .training.volumes import VolumeSlices, join_volumes, match_volumes
from .types import (
    CLASS_COLORS,
    IGNORE,
    AnnotatedSlice,
    Run,
    Segmentation,
    TrainStep,
    UnlabeledImage,
    describe_step,
    finish,
)
from .volumes.source import Channel
from .volumes.volume import Volume, axis_sizes, count_choices, open_volume, read_channels

__version__: str

__all__ = [
    "CLASS_COLORS",
    "IGNORE",
    "SIZES",
    "SPECS",
    "AdapterSettings",
    "AnnotatedSlice",
    "Backbone",
    "BackboneSettings",
    "BackboneSpec",
    "BatchJob",
    "BatchStep",
    "Channel",
    "Connection",
    "ConsensusWarning",
    "Device",
    "DistillFSSError",
    "DistillRun",
    "DistillSettings",
    "DistilledAdapter",
    "DistilledBackbone",
    "FewShotModel",
    "ImageError",
    "InputFileError",
    "InstanceReport",
    "InstanceStep",
    "InstantModel",
    "IntensityWarning",
    "Measures",
    "ModelFileError",
    "NoStudentYetError",
    "NotFiniteError",
    "OutOfMemoryError",
    "OutputError",
    "PretrainSettings",
    "Proposal",
    "Run",
    "Sample",
    "SampleStep",
    "Scores",
    "Segmentation",
    "Segmenter",
    "SettingsError",
    "ShardDone",
    "StudentModel",
    "SupportSet",
    "SupportSetError",
    "Thumbnails",
    "TrainStep",
    "UnfinishedError",
    "UnlabeledImage",
    "Volume",
    "VolumeReport",
    "VolumeSlices",
    "WeightsUnavailableError",
    "axis_sizes",
    "check_finished",
    "choose_device",
    "compare_intensities",
    "connect",
    "count_choices",
    "describe_expectation",
    "describe_step",
    "distill",
    "distill_adapter",
    "distill_backbone",
    "evaluate",
    "export_bioimageio",
    "export_onnx",
    "finish",
    "generate_sample",
    "import_checkpoint",
    "iter_batch",
    "iter_disputed_planes",
    "iter_distill",
    "iter_distill_adapter",
    "iter_distill_backbone",
    "iter_diverse_planes",
    "iter_generate_sample",
    "iter_instances",
    "iter_refine",
    "iter_segment",
    "iter_unrefined_teacher",
    "join_volumes",
    "label_instances",
    "labels_from_image",
    "leave_a_core_free",
    "load_backbone",
    "load_support",
    "load_unlabeled",
    "match_volumes",
    "may_change_process",
    "open_volume",
    "plan_batch",
    "propose_object",
    "read_card",
    "read_channels",
    "read_image",
    "read_labels",
    "read_stack",
    "read_thumbnails",
    "refine",
    "return_freed_memory",
    "sample_volume",
    "segment_lazy",
    "segment_to_zarr",
    "suggest_diverse_planes",
    "suggest_planes",
    "unrefined_teacher",
    "write_label_stack",
    "write_labels",
]
