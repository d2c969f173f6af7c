#!/usr/bin/env bash
# shop-ascend: 2 x 8 processes. Node 1, 10.0.0.12.
# After a fault torchrun starts the processes anew, and they go on from the newest checkpoint in the run directory.
set -eo pipefail
cd /shared/npu-rec
source /usr/local/Ascend/ascend-toolkit/set_env.sh
# A machine without the interface says so in one line; each process would end with a traceback.
interfaces=$(sed -n 's/^ *\([^:]*\):.*/\1/p' /proc/net/dev | paste -sd ' ')
if [[ " $interfaces " != *" eth0 "* ]]; then
  echo "error: cluster.interface: $HOSTNAME has no eth0, it has $interfaces" >&2
  exit 2
fi
# The interface for ids and small values on the host (gloo).
export GLOO_SOCKET_IFNAME=eth0
# The interface by which HCCL finds the other hosts; = takes exactly that name.
export HCCL_SOCKET_IFNAME='=eth0'
# Seconds, 120 to 7200, that ranks wait for each other's first connection; HCCL's default is 120.
# Longer than parallel.timeout (600 s), whose message says more.
export HCCL_CONNECT_TIMEOUT=740
# Seconds that a collective may take; HCCL's default is 1836. Longer than both.
export HCCL_EXEC_TIMEOUT=940
# No list of the hosts that may connect; the cluster's network is trusted.
export HCCL_WHITELIST_DISABLE=1
# Batches differ in length; segments that grow keep the memory from being cut up.
export PYTORCH_NPU_ALLOC_CONF=expandable_segments:True
# From cluster.env.
export HCCL_BUFFSIZE=400
# From cluster.env.
export NAME_WITH_SPACES='it'"'"'s quoted'
exec python3 -m torch.distributed.run \
  --nnodes=2 \
  --node-rank=1 \
  --nproc-per-node=8 \
  --master-addr=10.0.0.11 \
  --master-port=29500 \
  --max-restarts=2 \
  -m npu_rec train tests/golden/launch/ascend.config.yaml \
  --set 'train.betas=[0.9, 0.95]' \
  --set task.options.negatives=popularity \
  --run-dir runs/shop-ascend --resume auto

# would run   mkdir -p /shared/npu-rec/runs/shop-ascend/launch
# would write /shared/npu-rec/runs/shop-ascend/launch/torchrun-1.sh
# would run   bash /shared/npu-rec/runs/shop-ascend/launch/torchrun-1.sh
