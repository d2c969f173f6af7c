#!/usr/bin/env bash
# shop-cpu: 2 x 2 processes. Node 0, node-a.
# After a fault torchrun starts the processes anew, and they go on from the newest checkpoint in the run directory.
set -eo pipefail
cd /shared/npu-rec
exec python3 -m torch.distributed.run \
  --nnodes=2 \
  --node-rank=0 \
  --nproc-per-node=2 \
  --master-addr=node-a \
  --master-port=29500 \
  --max-restarts=3 \
  -m npu_rec train tests/golden/launch/cpu.config.yaml \
  --run-dir '/shared/runs/a folder' --resume auto

# would run   mkdir -p '/shared/runs/a folder/launch'
# would write /shared/runs/a folder/launch/torchrun-0.sh
# would run   bash '/shared/runs/a folder/launch/torchrun-0.sh'
