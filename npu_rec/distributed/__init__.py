"""Process groups, and what ranks tell each other."""

from npu_rec.distributed.world import World, open_world

__all__ = ["World", "open_world"]
