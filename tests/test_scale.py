"""configs/scale/ten-billion.yaml at 1 % of its size: a table larger than the memory that training may take."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROWS, WIDTH = 195_313, 512  # 10^8 parameters, 400 MB

PROGRAM = """
import json, resource, sys
import torch
from npu_rec.train import load_run_config, train

def resident():  # KiB: the most this process had in memory, pages of mapped files included
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

def run(name, *more):
    config = load_run_config("configs/scale/ten-billion.yaml", [*sys.argv[2:], *more])
    return train(config, run_dir=f"{sys.argv[1]}/{name}")

run("small", "data.options.items=2000", "embedding.rows=1500")  # what training takes whatever the table
before = resident()
result = run("large")
print(json.dumps({"grown": resident() - before, "before": before, "metrics": result.metrics["test"]}))
"""


def test_a_table_on_disk_trains_in_less_memory_than_it_has(tmp_path: Path) -> None:
    settings = [
        f"data.options={{users: 300, length: 32, items: {ROWS - 1}, categories: 100}}",
        f"data.dir={tmp_path / 'data'}",
        "model.max_seq_len=30",
        "embedding.rows=6000",
        "train.batch_size=8",
        "train.max_steps=12",
        "train.log_every=1",
        "task.options.num_negatives=4",
    ]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path), *settings],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    table = 4 * ROWS * WIDTH
    assert json.loads(done.stdout)["grown"] * 1024 < table // 4, done.stdout

    (file,) = (tmp_path / "large" / "tables").rglob("*.rows")
    stat = file.stat()
    assert stat.st_size >= table
    assert 0 < stat.st_blocks * 512 < table // 5  # only rows that were touched take disk
    lines = [json.loads(line) for line in (tmp_path / "large" / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if "items/evicted" in line][-1]
    assert last["items/evicted"] > 0
    assert last["items/bytes_written"] > 0
    assert last["step"] == 12
