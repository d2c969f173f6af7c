"""The schema of the YAML configuration, its defaults, and how files compose.

`load_config` reads a file, follows `base:`, expands `${NAME}`, applies `--set` overrides and
validates. Built-in and registered components add their own schema under `<section>.options`;
those are validated by `npu_rec.registry`, with the same errors.
"""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo

from npu_rec.errors import ConfigError

PACKAGED_CONFIGS = Path(__file__).resolve().parent / "configs"

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Probability = Annotated[float, Field(ge=0.0, lt=1.0)]


class Section(BaseModel):
    """A part of the configuration: unknown keys are errors, values are checked on assignment."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, protected_namespaces=(), allow_inf_nan=False)


class DeviceConfig(Section):
    """Where the model runs."""

    backend: Literal["auto", "ascend", "cuda", "cpu"] = Field(
        "auto", description="`auto` takes ascend, then cuda, then cpu. A named device that is absent is an error."
    )
    threads: Positive | None = Field(
        None,
        le=4096,  # far beyond, making the threads ends the process
        description="CPU threads of one process. Unset: PyTorch's choice. Results are bit-equal for equal threads.",
    )


class DataConfig(Section):
    """Which data set, where its files are and how strictly they are read."""

    name: str = Field("ml-100k", description="A recipe: see `npu-rec data list`.")
    source: Path | None = Field(
        None, description="File or folder with the publisher's files. Unset: the recipe obtains them."
    )
    dir: Path | None = Field(
        None, description="Where prepared data is kept. Unset: `$NPU_REC_HOME/data` or `~/.cache/npu-rec/data`."
    )
    catalogue: Literal["all", "seen"] = Field(
        "all",
        description="Items that negatives and ranking use: `all` listed by the publisher, or those `seen` in events.",
    )
    on_bad_row: Literal["error", "drop"] = Field(
        "error", description="A malformed row stops the preparation, or is dropped, counted and reported."
    )
    duplicates: Literal["keep", "drop"] = Field(
        "keep", description="Events equal in user, item, time and action: kept or dropped, and counted."
    )
    options: dict[str, Any] = Field(default_factory=dict, description="Options of the recipe.")


class ModelConfig(Section):
    """The sequence model."""

    backbone: str = Field("hstu", description="A registered backbone.")
    embedding_dim: Positive = Field(50, description="Width D of item vectors and of the residual stream.")
    num_blocks: Positive = Field(2, description="Layers.")
    num_heads: Positive = Field(1, description="Attention heads H.")
    attention_dim: Positive = Field(50, description="Width of a query or key head (d_qk).")
    linear_dim: Positive = Field(50, description="Width of a value head (d_v).")
    dropout: Probability = Field(0.2, description="Dropout inside the blocks.")
    input_dropout: Probability = Field(0.2, description="Dropout on the input of the first block.")
    max_seq_len: Positive = Field(200, description="Most recent events of a user that the model sees.")
    max_output_len: Positive = Field(
        11,
        description="Places behind the history, for candidates. N = max_seq_len + max_output_len sizes position tables "
        "and divides the attention.",
    )
    options: dict[str, Any] = Field(default_factory=dict, description="Options of the backbone.")


class EmbeddingConfig(Section):
    """Tables of item vectors: how they are trained, and where their rows are (docs/scale.md)."""

    optimizer: Literal["dense", "sgd", "rowwise_adagrad", "rowwise_adam"] = Field(
        "dense",
        description="`dense`: an ordinary parameter under AdamW, as Meta trains. The others update the rows that a "
        "batch touches during the backward pass, without a gradient of the table; `train.betas` and `train.eps` hold "
        "for them, weight decay does not.",
    )
    lr: float | None = Field(
        None, gt=0, description="Peak learning rate of the rows, on the schedule of `train.lr`; None: `train.lr`."
    )
    engine: Literal["native", "torchrec"] = Field(
        "native", description="What moves rows between ranks: plain torch.distributed, or TorchRec with FBGEMM."
    )
    placement: Literal["auto", "row_wise", "table_wise", "column_wise", "replicated"] = Field(
        "auto",
        description="What each rank holds: some rows of every table, whole tables, some columns, or (with `dense`) "
        "everything. One process always holds all. `auto`: row_wise, or what TorchRec's planner chooses.",
    )
    replicas: Positive = Field(
        1, description="2-D sharding: so many groups of ranks each hold the tables, and exchange rows within the group."
    )
    kind: Literal["static", "dynamic"] = Field(
        "static", description="`static`: a row for every id. `dynamic`: rows by 64-bit id, made when it first occurs."
    )
    rows: Positive | None = Field(
        None,
        description="Most rows in the device memory of one rank, of a table that is dynamic or has a tier; at least as "
        "many as one step reads there, negatives included. Unset: no limit. With a tier these are the hot rows.",
    )
    eviction: Literal["none", "lru", "lfu"] = Field(
        "none",
        description="Which row makes room at that limit: the longest unseen or the least often seen. Without a tier it "
        "is forgotten.",
    )
    max_age: Positive | None = Field(
        None, description="Forget rows of a dynamic table that were not seen for more than this many steps."
    )
    admission_count: Positive = Field(
        1,
        description="Times that an id of a dynamic table must occur before it gets a row; until then it is answered "
        "with its initial row and not trained.",
    )
    admission_probability: float = Field(
        1.0, gt=0, le=1, description="Of an id without a row getting one, in each step in which it occurs."
    )
    tier: Literal["device", "host", "disk"] = Field(
        "device", description="Where rows are that do not fit into `rows`: nowhere, in host memory, or on local disk."
    )
    tier_path: Path | None = Field(
        None, description="Folder for the files of the disk tier; unset: `tables/` in the run directory."
    )

    @model_validator(mode="after")
    def _consistent(self) -> EmbeddingConfig:
        dynamic, tiered = self.kind == "dynamic", self.tier != "device"
        sparse = self.optimizer != "dense"
        wrong = [
            (not sparse and self.lr is not None, "lr is for the sparse optimisers; embedding.optimizer is dense"),
            (sparse and self.placement == "replicated", "placement: replicated needs embedding.optimizer dense"),
            (self.placement == "replicated" and self.replicas > 1, "replicas are groups of ranks that share a table"),
            ((dynamic or tiered) and not sparse, "kind and tier need a sparse embedding.optimizer, as rowwise_adagrad"),
            (
                (dynamic or tiered) and self.placement not in ("auto", "row_wise"),
                "placement must be row_wise for a table that is dynamic or has a tier",
            ),
            (tiered and self.rows is None, "tier needs embedding.rows, how many are hot"),
            (
                tiered and self.eviction == "none",
                "tier needs embedding.eviction, lru or lfu: which rows leave the device",
            ),
            (not dynamic and not tiered and self.rows is not None, "rows is for dynamic tables and tiers"),
            (self.rows is None and self.eviction != "none", "eviction needs embedding.rows, the limit"),
            (not dynamic and self.max_age is not None, "max_age needs kind: dynamic"),
            (tiered and self.max_age is not None, "max_age: rows in a tier are not aged; leave one of them out"),
            (
                not dynamic and (self.admission_count > 1 or self.admission_probability < 1.0),
                "admission_count and admission_probability need kind: dynamic",
            ),
            (self.tier != "disk" and self.tier_path is not None, "tier_path needs tier: disk"),
            (
                self.engine == "torchrec" and (dynamic or tiered or not sparse or self.replicas > 1),
                "engine: torchrec is for static tables with a sparse embedding.optimizer, one replica and no tier",
            ),
        ]
        for refused, reason in wrong:
            if refused:
                raise ValueError(f"embedding.{reason}")
        return self


class ParallelConfig(Section):
    """Training on several processes (docs/scale.md)."""

    dense: Literal["ddp", "fsdp"] = Field(
        "ddp", description="Parameters outside the tables: whole on every rank, or sharded over them (FSDP2)."
    )
    reduce: Literal["fp32", "bf16"] = Field("fp32", description="Precision in which their gradients are summed.")
    context: Positive = Field(
        1,
        description="So many consecutive ranks share the tokens of each sequence in training (context parallel), for "
        "sequences beyond one card's memory.",
    )
    balance: Literal["cost", "order"] = Field(
        "cost",
        description="Which rank takes which sequences of a batch: by estimated cost, longest first, or dealt in turn.",
    )
    timeout: float = Field(
        600.0,
        gt=0,
        description="Seconds after which a collective counts as hung and ends the process (docs/faults.md).",
    )


class TaskConfig(Section):
    """What the model is trained for."""

    name: str = Field("retrieval", description="A registered task.")
    options: dict[str, Any] = Field(default_factory=dict, description="Options of the task.")


class TrainConfig(Section):
    """The training loop."""

    epochs: Positive = Field(20, description="One epoch = every training sequence once.")
    max_steps: Positive | None = Field(
        None, description="Stop after this many optimiser steps; schedules still span `epochs`."
    )
    batch_size: Positive = Field(128, description="Sequences of a global batch.")
    batch_tokens: Positive | None = Field(
        None, description="Token budget of a global batch; when set, it closes a batch before `batch_size` does."
    )
    accumulate: Positive = Field(1, description="Batches whose gradients one optimiser step adds up.")
    lr: float = Field(1e-3, gt=0, description="Peak learning rate of AdamW.")
    betas: tuple[Probability, Probability] = Field((0.9, 0.98), description="AdamW betas.")
    eps: float = Field(1e-8, gt=0, description="AdamW epsilon.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW weight decay.")
    schedule: Literal["constant", "cosine"] = Field("constant", description="Learning rate after the warm-up.")
    warmup_steps: NonNegative = Field(0, description="Optimiser steps of linear warm-up.")
    min_lr_ratio: float = Field(0.0, ge=0, le=1, description="Where cosine ends, as a share of `lr`.")
    clip_norm: float | None = Field(None, gt=0, description="Clip gradients to this norm.")
    clip: Literal["global", "dense", "row"] = Field(
        "global",
        description="The norm that `clip_norm` holds for: of all gradients, of those outside the tables, or `row`: of "
        "those outside the tables together and of each table row by itself (with `embedding.optimizer`).",
    )
    precision: Literal["fp32", "bf16"] = Field("fp32", description="`bf16` runs the model under autocast.")
    recompute: bool = Field(False, description="Recompute the blocks' activations in the backward pass.")
    nan: Literal["stop", "skip"] = Field(
        "stop", description="A loss or gradient that is not finite: stop, or skip the step."
    )
    seed: int = Field(42, ge=0, lt=2**63, description="Every random draw derives from it.")
    checkpoint_every: NonNegative = Field(0, description="Optimiser steps between checkpoints; 0: one an epoch.")
    keep_checkpoints: Positive = Field(2, description="Newest checkpoints kept, besides the best one.")
    early_stop: Positive | None = Field(
        None, description="Stop after this many validations without a better `eval.select`."
    )
    delta_every: NonNegative = Field(
        0,
        description="Optimiser steps between exports of the rows touched since the last one, to `deltas/` in the run "
        "directory (docs/checkpoints.md); 0: none.",
    )
    init_from: Path | None = Field(None, description="Checkpoint or .safetensors file whose weights start the run.")
    log_every: Positive = Field(10, description="Optimiser steps between two train lines of metrics.jsonl.")
    profile: NonNegative = Field(
        0, description="Write a torch.profiler trace of this many steps, after three warm-up steps."
    )


class EvalConfig(Section):
    """How the model is judged: full-catalogue ranking."""

    protocol: Literal["holdout", "meta"] = Field(
        "holdout",
        description="`holdout`: the event before the last is for validation, the best epoch on it is tested once on "
        "the last. `meta`: no validation, the last epoch is tested on the last event.",
    )
    metrics: list[str] = Field(
        [*(f"hr@{k}" for k in (1, 10, 50, 200, 500)), *(f"ndcg@{k}" for k in (10, 50, 200)), "mrr"],
        min_length=1,
        description="Metrics, `name` or `name@k`.",
    )
    select: str = Field(
        "ndcg@10", description="The metric that chooses the best epoch and stops early (higher is better)."
    )
    every: Positive = Field(1, description="Epochs between two evaluations.")
    batch_size: Positive = Field(256, description="Sequences of an evaluation batch.")
    remove: Literal["history", "input", "none"] = Field(
        "history",
        description="What is taken out of the ranking: every earlier event of the user, only those the model saw "
        "(Meta's code), or nothing. The true item itself always stays.",
    )


class OpsConfig(Section):
    """The backend of each operator: `auto`, or a name that must be able to run."""

    hstu_attention: str = Field("auto", description="Attention of HSTU with its relative bias.")
    sampled_softmax_loss: str = Field("auto", description="Loss of the retrieval task.")
    linear_silu: str = Field("auto", description="Projection with SiLU, the start of a research HSTU layer.")
    norm_gate: str = Field("auto", description="LayerNorm times gate, the end of an HSTU layer.")
    embedding_lookup: str = Field("auto", description="Rows of the item table.")


class Config(Section):
    """One run."""

    name: str = Field(
        "run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Name of the run and of its folder in `runs/`."
    )
    imports: list[str] = Field([], description="Python modules imported first; they register extensions.")
    device: DeviceConfig = Field(default_factory=DeviceConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    model: ModelConfig = Field(default_factory=ModelConfig)
    embedding: EmbeddingConfig = Field(default_factory=EmbeddingConfig)
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    task: TaskConfig = Field(default_factory=TaskConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    eval: EvalConfig = Field(default_factory=EvalConfig)
    ops: OpsConfig = Field(default_factory=OpsConfig)

    _origins: Origins = {}

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if self.eval.select not in self.eval.metrics:
            raise ValueError(f"eval.select: {self.eval.select!r} is not among eval.metrics {self.eval.metrics}")
        if self.eval.protocol == "meta" and self.train.early_stop:
            raise ValueError("train.early_stop needs a validation split, which eval.protocol `meta` does not have")
        if self.train.clip != "global" and self.train.clip_norm is None:
            raise ValueError(f"train.clip: {self.train.clip} says what train.clip_norm holds for, which is not set")
        if self.embedding.optimizer == "dense" and self.train.clip == "row":
            raise ValueError("train.clip: row needs a sparse embedding.optimizer, such as rowwise_adagrad")
        parted = self.embedding.placement in ("column_wise", "replicated") or self.embedding.engine != "native"
        if self.train.delta_every and parted:
            raise ValueError("train.delta_every needs embedding.engine native and placement row_wise or table_wise")
        if self.embedding.optimizer != "dense":
            self._fits_row_optimizer(self.embedding.optimizer)
        return self

    def _fits_row_optimizer(self, name: str) -> None:
        if self.train.accumulate > 1:
            raise ValueError(
                f"train.accumulate: embedding.optimizer {name} updates rows in every backward pass, so gradients of "
                f"{self.train.accumulate} batches cannot be added up first; set it to 1 or embedding.optimizer to dense"
            )
        if self.train.clip_norm is not None and self.train.clip == "global":
            raise ValueError(
                f"train.clip_norm: embedding.optimizer {name} updates rows before a global norm is known; set "
                "train.clip to dense or row"
            )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Config) and self.model_dump() == other.model_dump()  # wherever the keys came from

    @property
    def origins(self) -> Origins:
        """Which file each key came from; for error messages."""
        return self._origins


Path_ = tuple[str, ...]
Origins = dict[Path_, str]
SectionT = TypeVar("SectionT", bound=BaseModel)


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read, compose and validate a configuration.

    Args:
        path: YAML file; `configs/...` is also looked for among the configurations of the package.
        overrides: `a.b=value` strings, the value read as YAML.

    Raises:
        ConfigError: with file, key and, for an unknown key, the nearest valid one.
    """
    origins: Origins = {}
    return _finish(_read(find_config(path), origins, ()), overrides, origins)


def load_resolved(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read what `dump_config` wrote: whole as it is, so nothing in it is expanded again."""
    origins: Origins = {(): str(path)}
    return _finish(_parse(Path(path), str(path)), overrides, origins)


def _finish(raw: dict[str, Any], overrides: list[str] | None, origins: Origins) -> Config:
    for override in overrides or []:
        _merge(raw, _parse_override(override), origins, "--set", ())
    config = validate(Config, raw, origins)
    config._origins = origins
    return config


def find_config(path: str | Path) -> Path:
    """The file itself, or the one of that name shipped with the package."""
    path = Path(path)
    if path.is_file():
        return path
    parts = path.parts[1:] if path.parts[:1] == ("configs",) else path.parts
    packaged = PACKAGED_CONFIGS.joinpath(*parts)
    if parts and packaged.is_file():
        return packaged
    known = sorted(str(Path("configs") / p.relative_to(PACKAGED_CONFIGS)) for p in PACKAGED_CONFIGS.rglob("*.yaml"))
    raise ConfigError(f"{path}: no such configuration file; shipped with the package: {', '.join(known)}")


def validate(model: type[SectionT], raw: Any, origins: Origins, prefix: Path_ = ()) -> SectionT:
    """Validate `raw` with `model`; the first problem becomes a ConfigError naming file and key."""
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        problem = error.errors()[0]
        location = [part for part in problem["loc"] if isinstance(part, str)]
        key = (*prefix, *location)
        where = f"{_origin(origins, key)}: {'.'.join(key)}" if key else _all_origins(origins)
        if problem["type"] == "extra_forbidden":
            raise ConfigError(f"{where}: unknown key{_suggest(model, location, prefix)}") from None
        message = problem["msg"].removeprefix("Value error, ")
        given = "" if isinstance(problem["input"], dict) else f" (given: {problem['input']!r})"
        raise ConfigError(f"{where}: {message}{given}") from None


def _suggest(model: type[BaseModel], location: list[str], prefix: Path_) -> str:
    """The nearest valid key for an unknown one: of that name elsewhere, in its own section, then everywhere."""
    section: Any = model
    for part in location[:-1]:
        section = section.model_fields[part].annotation
    wrong, everywhere = location[-1], _all_keys(model)
    own = difflib.get_close_matches(wrong, list(section.model_fields), n=1, cutoff=0.5)
    other = difflib.get_close_matches(wrong, [key[-1] for key in everywhere], n=1, cutoff=0.6)
    keys = (
        [key for key in everywhere if key[-1] == wrong]
        or [(*location[:-1], name) for name in own]
        or [key for key in everywhere if key[-1] in other]
    )
    if keys:
        return f"; did you mean {' or '.join('`' + '.'.join((*prefix, *key)) + '`' for key in keys)}?"
    here = ".".join((*prefix, *location[:-1])) or "the top level"
    return f"; {here} has {', '.join(section.model_fields) or 'no keys'}"


def _all_keys(model: type[BaseModel]) -> list[Path_]:
    keys: list[Path_] = []
    for name, field in model.model_fields.items():
        keys.append((name,))
        inner = _section_of(field)
        if inner is not None:
            keys += [(name, *key) for key in _all_keys(inner)]
    return keys


def _section_of(field: FieldInfo) -> type[BaseModel] | None:
    annotation = field.annotation
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _origin(origins: Origins, key: Path_) -> str:
    while key and key not in origins:
        key = key[:-1]
    return origins.get(key, "configuration")


def _all_origins(origins: Origins) -> str:
    """The file and, where there are any, the overrides: what keys that contradict each other may come from."""
    return _origin(origins, ()) + (" with --set" if "--set" in origins.values() else "")


def _read(path: Path, origins: Origins, seen: tuple[Path, ...]) -> dict[str, Any]:
    path = path.resolve()
    shown = os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
    if path in seen:
        raise ConfigError(f"{shown}: `base:` leads back to itself: {' -> '.join(p.name for p in (*seen, path))}")
    own = _parse(path, shown)
    base = _expand(own.pop("base", None), shown)
    merged: dict[str, Any] = {}
    if base is not None:
        parent = path.parent / str(base)
        try:
            parent = parent if parent.is_file() else find_config(str(base))
        except ConfigError as error:
            raise ConfigError(f"{shown}: base: {error}") from None
        merged = _read(parent, origins, (*seen, path))
    _merge(merged, _expand(own, shown), origins, shown, ())
    origins[()] = shown
    return merged


class _Loader(yaml.SafeLoader):
    """YAML in which a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key `{key.value}` is given twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _parse(path: Path, shown: str) -> dict[str, Any]:
    try:
        own = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = " ".join(str(getattr(error, "problem", error)).split())
        raise ConfigError(f"{shown}{line}: not valid YAML: {problem}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{shown}: cannot be read: {error}") from None
    own = {} if own is None else own
    if not isinstance(own, dict):
        raise ConfigError(f"{shown}: expected a mapping of keys, found {type(own).__name__}")
    return own


def _merge(into: dict[str, Any], new: dict[Any, Any], origins: Origins, origin: str, prefix: Path_) -> None:
    for name, value in new.items():
        key = (*prefix, str(name))
        origins[key] = origin
        if isinstance(value, dict):
            below = into.get(str(name))
            into[str(name)] = below if isinstance(below, dict) else {}
            _merge(into[str(name)], value, origins, origin, key)
        else:
            into[str(name)] = value


def _expand(value: Any, shown: str) -> Any:
    if isinstance(value, dict):
        return {name: _expand(inner, shown) for name, inner in value.items()}
    if isinstance(value, list):
        return [_expand(inner, shown) for inner in value]
    if not isinstance(value, str):
        return value

    def variable(match: re.Match[str]) -> str:
        if match[1] not in os.environ:
            raise ConfigError(f"{shown}: environment variable {match[1]} is not set (used as {match[0]})")
        return os.environ[match[1]]

    return re.sub(r"\$\{(\w+)\}", variable, value)


def _parse_override(text: str) -> dict[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(f"--set {text}: expected key.subkey=value")
    try:
        parsed: Any = _expand(yaml.safe_load(value), "--set")
    except yaml.YAMLError:
        raise ConfigError(f"--set {text}: the value is not valid YAML") from None
    for part in reversed(key.split(".")):
        parsed = {part: parsed}
    return dict(parsed)


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML; `load_config` reads it back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
