#!/usr/bin/env bash
#SBATCH --job-name=shop-cpu
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --output=/shared/npu-rec/runs/shop-cpu/launch/slurm-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#
# shop-cpu: 2 x 2 processes.
# One task a node starts torchrun, which starts a process a card. After a fault torchrun starts them anew; after a lost
# node Slurm queues the job anew. Both go on from the newest checkpoint in the run directory.
set -euo pipefail

start_node() {
  set -eo pipefail
  cd /shared/npu-rec
  exec python3 -m torch.distributed.run \
    --nnodes=2 \
    --node-rank="$SLURM_NODEID" \
    --nproc-per-node=2 \
    --master-addr="$MASTER_ADDR" \
    --master-port="$MASTER_PORT" \
    --max-restarts=3 \
    -m npu_rec train tests/golden/launch/cpu.config.yaml \
    --run-dir runs/shop-cpu --resume auto
}

# Where rank 0 is: the address that Slurm itself uses for the first node, since node names need not resolve.
read -r first_node < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_ADDR=$(scontrol show node "$first_node" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000)) # another one for each job on a shared node
export MASTER_ADDR MASTER_PORT

# Each node gets the functions as text: the script itself lies on the first node alone.
srun --export=ALL --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=1 \
  bash -c "$(declare -f start_node); start_node"

# would run   mkdir -p /shared/npu-rec/runs/shop-cpu/launch
# would write /shared/npu-rec/runs/shop-cpu/launch/slurm.sh
# would run   sbatch /shared/npu-rec/runs/shop-cpu/launch/slurm.sh
