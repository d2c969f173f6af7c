"""One rank of tests/train_ranks.py on the fake npu; RANK, WORLD_SIZE, MASTER_PORT and MEETING_POINT are set."""

import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).resolve().parents[2] / "train_ranks.py"), run_name="__main__")
