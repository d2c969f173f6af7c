"""Environment variables of Ascend's software that `cluster.env` may set, and what their values may be.

From the documentation of CANN 8 and 9 and of torch_npu 2.13. A name of theirs that is not listed is taken for a
misspelt one; `cluster.setup` can export any.
"""

from __future__ import annotations

import difflib
import re

PREFIXES = ("HCCL_", "ASCEND_", "PYTORCH_NPU_", "TORCH_HCCL_", "TORCH_NPU_", "P2P_HCCL_")

_INT32 = 2**31 - 1
RANGES: dict[str, tuple[int, int]] = {
    "ASCEND_GLOBAL_LOG_LEVEL": (0, 4),
    "ASCEND_LAUNCH_BLOCKING": (0, 1),
    "HCCL_BUFFSIZE": (1, _INT32),
    "HCCL_CONNECT_TIMEOUT": (120, 7200),
    "HCCL_EXEC_TIMEOUT": (0, _INT32),
    "HCCL_IF_BASE_PORT": (1024, 65520),
    "HCCL_INTRA_PCIE_ENABLE": (0, 1),
    "HCCL_INTRA_ROCE_ENABLE": (0, 1),
    "HCCL_LOGIC_SUPERPOD_ID": (0, _INT32),
    "HCCL_RDMA_RETRY_CNT": (1, 7),
    "HCCL_RDMA_SL": (0, 7),
    "HCCL_RDMA_TC": (0, 255),
    "HCCL_RDMA_TIMEOUT": (5, 24),
    "HCCL_WHITELIST_DISABLE": (0, 1),
    "MULTI_STREAM_MEMORY_REUSE": (0, 3),
    "P2P_HCCL_BUFFSIZE": (0, _INT32),
    "TASK_QUEUE_ENABLE": (0, 2),
    "TORCH_HCCL_ASYNC_ERROR_HANDLING": (0, 1),
    "TORCH_HCCL_DESYNC_DEBUG": (0, 1),
    "TORCH_HCCL_TRACE_BUFFER_SIZE": (0, _INT32),
    "TORCH_HCCL_ZERO_COPY": (0, 1),
    "TORCH_NPU_FALLBACK_CPU_DISABLE": (0, 1),
}
OTHERS = {
    "ASCEND_CUSTOM_OPP_PATH",
    "ASCEND_GLOBAL_EVENT_ENABLE",
    "ASCEND_HOME_PATH",
    "ASCEND_HOST_LOG_FILE_NUM",
    "ASCEND_MODULE_LOG_LEVEL",
    "ASCEND_OPP_PATH",
    "ASCEND_PROCESS_LOG_PATH",
    "ASCEND_RT_VISIBLE_DEVICES",
    "ASCEND_SLOG_PRINT_TO_STDOUT",
    "ASCEND_VISIBLE_DEVICES",
    "ASCEND_WORK_PATH",
    "HCCL_ALGO",
    "HCCL_ASYNC_ERROR_HANDLING",
    "HCCL_DEBUG_CONFIG",
    "HCCL_DETERMINISTIC",
    "HCCL_DFS_CONFIG",
    "HCCL_DIAGNOSE_ENABLE",
    "HCCL_ENTRY_LOG_ENABLE",
    "HCCL_HOST_SOCKET_PORT_RANGE",
    "HCCL_IF_IP",
    "HCCL_INTER_HCCS_DISABLE",
    "HCCL_NPU_SOCKET_PORT_RANGE",
    "HCCL_OP_EXPANSION_MODE",
    "HCCL_OP_RETRY_ENABLE",
    "HCCL_OP_RETRY_PARAMS",
    "HCCL_RDMA_QPS_PER_CONNECTION",
    "HCCL_SOCKET_FAMILY",
    "HCCL_SOCKET_IFNAME",
    "HCCL_WHITELIST_FILE",
    "PYTORCH_NPU_ALLOC_CONF",
    "TORCH_HCCL_DUMP_ON_TIMEOUT",
}
# Another part of a launch says these; two places that disagree would hang the ranks.
SET_ELSEWHERE = {
    **dict.fromkeys(
        ("ASCEND_RT_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"),
        "the scheduler, or the shell that starts torchrun, chooses the cards",
    ),
    **dict.fromkeys(("ASCEND_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES"), "the scheduler chooses the cards"),
    "RANK_TABLE_FILE": "set cluster.rank_table",
    **dict.fromkeys(("MASTER_ADDR", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"), "torchrun sets it"),
    "MASTER_PORT": "set cluster.master_port",
    "PATH": "its value is taken as it stands; export it in cluster.setup, where $PATH is the PATH before",
    **dict.fromkeys(
        ("VC_TASK_INDEX", "VC_WORKER_HOSTS", "MA_NUM_HOSTS", "MA_NUM_GPUS", "XDL_IP", "POD_IP"), "the scheduler sets it"
    ),
}
# Likewise every name that begins so: variables of a job of Slurm, those of torchrun, and its options (PET_).
SET_ELSEWHERE_PREFIXES = ("SLURM_", "TORCHELASTIC_", "PET_")


def is_one_line(text: str) -> bool:
    """Nothing in it ends a line of a shell script or of YAML, or may not stand there at all."""
    return re.search(r"[\x00-\x08\n-\x1f\x7f-\x9f\u2028\u2029]", text) is None


def wrong_variable(name: str, value: str) -> str | None:
    """Why `cluster.env` cannot set this variable to this value; None when it can."""
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        return f"{name!r} is no name of an environment variable"
    if name in SET_ELSEWHERE:
        return f"{name} is not set here: {SET_ELSEWHERE[name]}"
    if name.startswith(SET_ELSEWHERE_PREFIXES):
        return f"{name} is not set here: the scheduler or torchrun sets it"
    if name not in RANGES and name not in OTHERS and name.startswith(PREFIXES):
        near = difflib.get_close_matches(name, [*RANGES, *OTHERS], n=1, cutoff=0.7)
        hint = f"did you mean {near[0]}? " if near else ""
        return f"unknown variable {name}; {hint}(if it is right all the same, export it in cluster.setup)"
    if name in RANGES:
        low, high = RANGES[name]
        if not re.fullmatch(r"\d{1,10}", value) or not low <= int(value) <= high:
            return f"{name} must be a whole number from {low} to {high}, not {value!r}"
    if not is_one_line(value):
        return f"the value of {name} has more than one line, or control characters"
    return None
