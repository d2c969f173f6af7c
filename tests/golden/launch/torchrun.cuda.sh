#!/usr/bin/env bash
# shop-cuda: 1 x 2 processes. Node 0, this machine.
# After a fault torchrun starts the processes anew, and they go on from the newest checkpoint in the run directory.
set -eo pipefail
cd /shared/npu-rec
# A machine without the interface says so in one line; each process would end with a traceback.
interfaces=$(sed -n 's/^ *\([^:]*\):.*/\1/p' /proc/net/dev | paste -sd ' ')
if [[ " $interfaces " != *" ib0 "* ]]; then
  echo "error: cluster.interface: $HOSTNAME has no ib0, it has $interfaces" >&2
  exit 2
fi
# The interface for ids and small values on the host (gloo).
export GLOO_SOCKET_IFNAME=ib0
# The interface by which NCCL finds the other hosts; = takes exactly that name.
export NCCL_SOCKET_IFNAME='=ib0'
exec python3 -m torch.distributed.run \
  --nnodes=1 \
  --node-rank=0 \
  --nproc-per-node=2 \
  --master-addr=127.0.0.1 \
  --master-port=29500 \
  --max-restarts=3 \
  -m npu_rec train tests/golden/launch/cuda.config.yaml \
  --run-dir runs/shop-cuda --resume auto

# would run   mkdir -p /shared/npu-rec/runs/shop-cuda/launch
# would write /shared/npu-rec/runs/shop-cuda/launch/torchrun-0.sh
# would run   bash /shared/npu-rec/runs/shop-cuda/launch/torchrun-0.sh
