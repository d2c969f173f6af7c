"""The configuration: its schema (`schema.py`, `cluster.py`) and how files compose to one (`compose.py`)."""

from npu_rec.config.cluster import ClusterConfig, parse_bytes
from npu_rec.config.compose import (
    PACKAGED_CONFIGS,
    dump_config,
    find_config,
    load_config,
    load_resolved,
    located,
    read_yaml,
    validate,
)
from npu_rec.config.schema import (
    Config,
    DataConfig,
    DeviceConfig,
    EmbeddingConfig,
    EvalConfig,
    ModelConfig,
    OpsConfig,
    Origins,
    ParallelConfig,
    TaskConfig,
    TrainConfig,
)
from npu_rec.config.section import NonNegative, Positive, Probability, Section, no_doubles, refuse_idle

__all__ = [
    "PACKAGED_CONFIGS",
    "ClusterConfig",
    "Config",
    "DataConfig",
    "DeviceConfig",
    "EmbeddingConfig",
    "EvalConfig",
    "ModelConfig",
    "NonNegative",
    "OpsConfig",
    "Origins",
    "ParallelConfig",
    "Positive",
    "Probability",
    "Section",
    "TaskConfig",
    "TrainConfig",
    "dump_config",
    "find_config",
    "load_config",
    "load_resolved",
    "located",
    "no_doubles",
    "parse_bytes",
    "read_yaml",
    "refuse_idle",
    "validate",
]
