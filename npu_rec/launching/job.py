"""What is launched: a configuration with what the command line adds to it, and the files and commands it becomes."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from npu_rec.config import Config, located
from npu_rec.errors import ConfigError

DeviceName = Literal["ascend", "cuda", "cpu"]

CONFIG_MOUNT = PurePosixPath("/etc/npu-rec")  # where pods find the configuration and their start script


@dataclass(frozen=True)
class Launch:
    """What a launch does.

    Attributes:
        files: path on this machine -> text, written first.
        commands: run then, in this order.
        workdir: must be a folder of this machine.
        replaces: the last command takes the place of this process (torchrun), instead of being waited for.
    """

    files: dict[Path, str]
    commands: list[list[str]]
    workdir: Path | None = None
    replaces: bool = False

    def shown(self) -> str:
        """The files, then the commands as comments; a single file can be piped to where it belongs."""
        parts = [text.rstrip("\n") for text in self.files.values()]
        if len(parts) > 1:
            parts = [f"# ---- {path}\n{text}" for path, text in zip(self.files, parts, strict=True)]
        folders = dict.fromkeys(f"# would run   mkdir -p {shlex.quote(str(path.parent))}" for path in self.files)
        written = [f"# would write {path}" for path in self.files]
        run = [f"# would run   {shlex.join(command)}" for command in self.commands]
        return "\n\n".join([*parts, "\n".join([*folders, *written, *run])])


@dataclass(frozen=True)
class Job:
    """What is launched.

    Attributes:
        config: the whole configuration, overrides applied.
        config_path: the file as the user named it.
        overrides: `--set` of the command line.
        run_dir: of the run; a relative one starts at the working directory.
        node_rank: which of `cluster.hosts` this machine is; None: found out (torchrun only).
        as_json: `train` prints its document, not a table (torchrun only).
    """

    config: Config
    config_path: str
    overrides: Sequence[str] = ()
    run_dir: Path | None = None
    node_rank: int | None = None
    as_json: bool = False

    @property
    def device(self) -> DeviceName:
        """Where it runs. `auto` counts as ascend: a machine that submits jobs cannot see what the nodes have."""
        backend = self.config.device.backend
        return "ascend" if backend == "auto" else backend

    @property
    def ranks(self) -> int:
        """Processes of the whole job."""
        return self.config.cluster.nodes * self.config.cluster.cards_per_node

    @property
    def where(self) -> Path:
        """The run directory as `train` is told it."""
        return self.run_dir or Path("runs") / self.config.name

    @property
    def workdir(self) -> Path:
        """Where torchrun and Slurm start."""
        return self.config.cluster.workdir or Path.cwd()

    @property
    def label(self) -> str:
        """The name as Kubernetes and ModelArts want it: small letters, digits and hyphens.

        Raises:
            ConfigError: it is too long for the names that are made of it.
        """
        label = re.sub(r"[^a-z0-9]+", "-", self.config.name.lower()).strip("-")
        if len(label) > 40 or not label[:1].isalpha():
            raise self.error("name", f"{label!r} is no name of a job there: a letter first, at most 40 characters")
        return label

    def train_arguments(self, config: str | None = None, run_dir: str | None = None) -> list[list[str]]:
        """Arguments of torchrun behind its own, in groups that stand on a line each.

        Args:
            config, run_dir: instead of the paths on this machine; such a configuration has its overrides in it.
        """
        overrides = [["--set", override] for override in self.overrides] if config is None else []
        return [
            ["-m", "npu_rec", "train", config or self.config_path],
            *overrides,
            ["--run-dir", run_dir or str(self.where), "--resume", "auto"],
            *([["--json"]] if self.as_json else []),
        ]

    def error(self, key: str, message: str) -> ConfigError:
        """A ConfigError that names file and key."""
        return located(self.config, key, message)
