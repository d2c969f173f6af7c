"""Trains CONFIG with many options on the fake npu and on the CPU, and compares every loss and metric.

Arguments: the configuration file, a folder for the runs.
"""

import json
import sys
from pathlib import Path

from npu_rec.train import load_run_config, train

SAME_BACKENDS = [
    "ops.hstu_attention=tiled", "ops.sampled_softmax_loss=chunked", "ops.norm_gate=reference",
    "ops.embedding_lookup=reference", "ops.softmax_attention=tiled",
]  # fmt: skip
VARIANTS = {
    "plain references": ["ops.hstu_attention=reference", "ops.sampled_softmax_loss=reference"],
    "production, accumulated, recomputed": [
        "model.options.variant=production", "model.dropout=0.2", "model.input_dropout=0.1",
        "train.accumulate=2", "train.recompute=true", "train.clip_norm=0.5",
    ],
    "rows update themselves, in-batch negatives": [
        "embedding.optimizer=rowwise_adam", "train.clip=row", "train.clip_norm=0.5",
        "task.options.negatives=in_batch", "train.batch_tokens=128",
    ],
    "popular negatives, binary cross entropy": [
        "embedding.optimizer=rowwise_adagrad", "task.options.loss=bce",
        "task.options.negatives=popularity", "task.options.log_q=true",
    ],
    "llama, recomputed": ["model.backbone=llama", "train.recompute=true"],
    "gpt": ["model.backbone=gpt", "model.options.bias=position_time"],
    "sasrec": ["model.backbone=sasrec", "model.options.variant=original"],
    "every ablation of hstu": [
        "model.options.bias=rope", "model.options.scores=softmax", "model.options.gate=false",
        "model.options.norm=rms", "model.options.residual=post",
    ],
}  # fmt: skip


def losses(folder: Path) -> list[float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "lr" in line]


config, runs = sys.argv[1], Path(sys.argv[2])
for number, (name, options) in enumerate(VARIANTS.items()):
    results = {}
    for backend in ("cpu", "ascend"):
        overrides = [*SAME_BACKENDS, "train.epochs=1", *options, f"device.backend={backend}"]
        results[backend] = train(load_run_config(config, overrides), run_dir=runs / f"{backend}-{number}")
    pairs = list(zip(losses(runs / f"cpu-{number}"), losses(runs / f"ascend-{number}"), strict=True))
    assert pairs
    error = max(abs(ascend - cpu) / abs(cpu) for cpu, ascend in pairs)
    assert error <= 1e-5, f"{name}: losses differ by {error:.1e}: {pairs}"
    metrics = {backend: result.metrics["test"] for backend, result in results.items()}
    assert metrics["cpu"] == metrics["ascend"], f"{name}: {metrics}"
    print(f"{name}: {len(pairs)} steps, relative error {error:.1e}")
