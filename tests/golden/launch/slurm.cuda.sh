#!/usr/bin/env bash
#SBATCH --job-name=shop-cuda
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:2
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --output=/shared/npu-rec/runs/shop-cuda/launch/slurm-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#
# shop-cuda: 1 x 2 processes.
# One task a node starts torchrun, which starts a process a card. After a fault torchrun starts them anew; after a lost
# node Slurm queues the job anew. Both go on from the newest checkpoint in the run directory.
set -euo pipefail

start_node() {
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
    --node-rank="$SLURM_NODEID" \
    --nproc-per-node=2 \
    --master-addr="$MASTER_ADDR" \
    --master-port="$MASTER_PORT" \
    --max-restarts=3 \
    -m npu_rec train tests/golden/launch/cuda.config.yaml \
    --run-dir runs/shop-cuda --resume auto
}

# Where rank 0 is: the address that Slurm itself uses for the first node, since node names need not resolve.
read -r first_node < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_ADDR=$(scontrol show node "$first_node" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000)) # another one for each job on a shared node
export MASTER_ADDR MASTER_PORT

# Each node gets the functions as text: the script itself lies on the first node alone.
srun --export=ALL --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=1 \
  bash -c "$(declare -f start_node); start_node"

# would run   mkdir -p /shared/npu-rec/runs/shop-cuda/launch
# would write /shared/npu-rec/runs/shop-cuda/launch/slurm.sh
# would run   sbatch /shared/npu-rec/runs/shop-cuda/launch/slurm.sh
