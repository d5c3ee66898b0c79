"""Backbones: their table (``SPECS``), the sources of their weights, and the features of each block.

Importing this package imports torch, but timm only when a backbone is built.
"""

from distillfss_core.nn.backbones.backbone import (
    TRAINED,
    Backbone,
    Encoder,
    LearningBackbone,
    backbone_from_state,
    load_backbone,
)
from distillfss_core.nn.backbones.spec import SPECS, BackboneSpec, backbone_spec

__all__ = [
    "SPECS",
    "TRAINED",
    "Backbone",
    "BackboneSpec",
    "Encoder",
    "LearningBackbone",
    "backbone_from_state",
    "backbone_spec",
    "load_backbone",
]
