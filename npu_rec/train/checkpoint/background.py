"""Saving while training goes on."""

from __future__ import annotations

import threading
from pathlib import Path
from types import TracebackType

from npu_rec.distributed.world import World
from npu_rec.train.checkpoint.contents import Snapshot
from npu_rec.train.checkpoint.save import Prepared, finish, prepare


class AsyncSaver:
    """Writes checkpoints in a thread, one at a time. All ranks make one and call it at the same places.

    The thread has process groups of its own, so its collectives never mix with those of training. A program that
    ends without `wait` waits for the save under way.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self._own_world = world.twin()
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def save(self, path: Path, snapshot: Snapshot) -> None:
        """Copy everything to host memory and return; the checkpoint is at `path` some time later.

        Waits for the save before it and raises its error. Rows that come as an Iterable are written before it returns.
        """
        self.wait()
        prepared = prepare(path, snapshot, self.world, copy=True)
        self._thread = threading.Thread(target=self._finish, args=(prepared,), name=f"save {path.name}")
        self._thread.start()

    def wait(self) -> None:
        """Return when the save under way, if any, is in its place.

        Raises:
            CheckpointError: it could not be written, the same line on all ranks.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _finish(self, prepared: Prepared) -> None:
        try:
            finish(prepared, self._own_world)
        except Exception as error:
            self._error = error

    def __enter__(self) -> AsyncSaver:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is None:
            self.wait()
        elif self._thread is not None:
            self._thread.join()  # training has failed: that error matters more than one of the save
