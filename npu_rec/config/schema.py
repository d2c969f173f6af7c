"""The schema of the YAML configuration and its defaults.

Built-in and registered components add their own schema under `<section>.options`; those are validated by
`npu_rec.registry`, with the same errors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PrivateAttr, model_validator

from npu_rec.config.cluster import ClusterConfig
from npu_rec.config.section import NonNegative, Positive, Probability, Section, refuse_idle

Origins = dict[tuple[str, ...], str]
"""Which file each key came from."""


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
    fraction: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Share of the sequences that train, chosen by a hash of sequence and `train.seed`; a smaller share "
        "is part of a larger one. All are evaluated.",
    )
    options: dict[str, Any] = Field(default_factory=dict, description="Options of the recipe.")


class ModelConfig(Section):
    """The sequence model."""

    backbone: str = Field("hstu", description="A registered backbone.")
    embedding_dim: Positive = Field(
        50, description="Width D of the residual stream, and of item vectors unless `embedding.dim` is set."
    )
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
    dim: Positive | None = Field(
        None,
        description="Width of the rows. Unset: `model.embedding_dim`. Otherwise a linear map brings them to the width "
        "of the model, and another brings its outputs back, to be compared with item vectors.",
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
    stochastic_length: float | None = Field(
        None,
        gt=1,
        le=2,
        description="Stochastic Length with this alpha (docs/data.md): of n > N^(alpha/2) events, N = "
        "`model.max_seq_len`, all are trained on with chance N^alpha/n^2, else N^(alpha/2) of them. Unset: always all.",
    )
    stochastic_selection: Literal["weighted", "random", "recent"] = Field(
        "weighted", description="Which events those are: weighted by recency (needs times), any, or the newest."
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

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        refuse_idle(self, {"stochastic_selection": self.stochastic_length is None and "stochastic_length is not set"})
        return self


class EvalConfig(Section):
    """How the model is judged: full-catalogue ranking."""

    protocol: Literal["holdout", "meta", "time"] = Field(
        "holdout",
        description="`holdout`: the event before the last is for validation, the best epoch on it is tested once on "
        "the last. `meta`: no validation, the last epoch is tested on the last event. `time`, for ranking: the latest "
        "labelled events of all users are for the test, the latest of the others for validation.",
    )
    test_share: float = Field(0.1, gt=0, lt=1, description="With `time`: share of the labelled events for the test.")
    valid_share: float = Field(0.1, gt=0, lt=1, description="With `time`: share of the others for validation.")
    metrics: list[str] = Field(
        [*(f"hr@{k}" for k in (1, 10, 50, 200, 500)), *(f"ndcg@{k}" for k in (10, 50, 200)), "mrr"],
        min_length=1,
        description="Metrics, `name` or `name@k`.",
    )
    select: str = Field(
        "ndcg@10",
        description="The metric that chooses the best epoch and stops early. `<domain>/<metric>` or "
        "`<target>/<metric>` where a task has metrics of domains or of several targets.",
    )
    every: Positive = Field(1, description="Epochs between two evaluations.")
    batch_size: Positive = Field(128, description="Sequences of an evaluation batch.")
    remove: Literal["history", "input", "none"] = Field(
        "history",
        description="What is taken out of the ranking: every earlier event of the user, only those the model saw "
        "(Meta's code), or nothing. The true item itself always stays, so `none` is for data in which users repeat "
        "items. For `retrieval`.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> EvalConfig:
        without = self.protocol != "time" and f"protocol is {self.protocol}"
        refuse_idle(self, dict.fromkeys(("test_share", "valid_share"), without))
        refuse_idle(self, {"remove": self.protocol == "time" and "protocol is time"})
        return self


class OpsConfig(Section):
    """The backend of each operator: `auto`, or a name that must be able to run."""

    hstu_attention: str = Field("auto", description="Attention of HSTU with its relative bias.")
    sampled_softmax_loss: str = Field("auto", description="Loss of the retrieval task.")
    linear_silu: str = Field("auto", description="Projection with SiLU, the start of a research HSTU layer.")
    norm_gate: str = Field("auto", description="LayerNorm times gate, the end of an HSTU layer.")
    embedding_lookup: str = Field("auto", description="Rows of the item table.")
    softmax_attention: str = Field("auto", description="Attention of Llama, GPT, SASRec and HSTU's `scores: softmax`.")
    rms_norm: str = Field("auto", description="RMSNorm, in Llama and HSTU's `norm: rms`.")
    rotary: str = Field("auto", description="Rotary positions, in Llama and HSTU's `bias: rope`.")
    swiglu: str = Field("auto", description="Gated unit of Llama's feed-forward block.")
    dropout: str = Field("auto", description="Dropout of the input and of what branches add.")


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
    cluster: ClusterConfig = Field(default_factory=ClusterConfig)

    _origins: Origins = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if self.eval.select.rpartition("/")[2] not in self.eval.metrics:
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
