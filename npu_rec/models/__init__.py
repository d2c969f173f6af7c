"""Sequence models: backbones that are interchangeable by configuration."""

from npu_rec.models import hstu
from npu_rec.models.backbone import Backbone, Layout
from npu_rec.models.encoder import SequenceEncoder

__all__ = ["Backbone", "Layout", "SequenceEncoder", "hstu"]
