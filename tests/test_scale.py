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
from npu_rec.embedding import SlotTable
from npu_rec.train import load_run_config, train

def resident():  # KiB: the most this process had in memory, pages of mapped files included
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

def run(name, *more):
    config = load_run_config("configs/scale/ten-billion.yaml", [*sys.argv[2:], *more])
    return train(config, run_dir=f"{sys.argv[1]}/{name}")

def close(table):  # the file goes with it
    files.append([(f.stat().st_size, 512 * f.stat().st_blocks) for f in table._folder.glob("*.rows")])
    really_close(table)

files, really_close = [], SlotTable.close
SlotTable.close = close
run("small", "data.options.items=2000", "embedding.rows=1500")  # what training takes whatever the table
before = resident()
result = run("large")
print(json.dumps({"grown": resident() - before, "files": files[-1], "metrics": result.metrics["test"]}))
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
    table, found = 4 * ROWS * WIDTH, json.loads(done.stdout)
    assert found["grown"] * 1024 < table // 2
    ((size, on_disk),) = found["files"]
    assert size >= table
    assert 0 < on_disk < table // 5  # only rows that were touched take disk
    assert not list((tmp_path / "large" / "tables").rglob("*.rows"))  # a checkpoint has the rows
    lines = [json.loads(line) for line in (tmp_path / "large" / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if "items/evicted" in line][-1]
    assert last["items/evicted"] > 0
    assert last["items/bytes_written"] > 0
    assert last["step"] == 12
