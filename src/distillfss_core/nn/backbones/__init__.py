"""Backbones: their table (``SPECS``), the sources of their weights, and the features of each block.

Importing this package imports torch, but timm only when a backbone is built that is no EfficientNet-Lite.
"""

from distillfss_core.nn.backbones.backbone import (
    IMPORTED,
    TRAINED,
    Backbone,
    DistillingBackbone,
    Encoder,
    LearningBackbone,
    backbone_from_state,
    backbone_from_tensors,
    load_backbone,
)
from distillfss_core.nn.backbones.spec import SPECS, BackboneSpec, backbone_spec

__all__ = [
    "IMPORTED",
    "SPECS",
    "TRAINED",
    "Backbone",
    "BackboneSpec",
    "DistillingBackbone",
    "Encoder",
    "LearningBackbone",
    "backbone_from_state",
    "backbone_from_tensors",
    "backbone_spec",
    "load_backbone",
]
