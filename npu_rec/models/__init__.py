"""Sequence models: backbones that are interchangeable by configuration."""

from npu_rec.models import din, gpt, hstu, llama, sasrec
from npu_rec.models.backbone import Backbone, Layout
from npu_rec.models.encoder import SequenceEncoder
from npu_rec.models.stack import Stack

__all__ = ["Backbone", "Layout", "SequenceEncoder", "Stack", "din", "gpt", "hstu", "llama", "sasrec"]
