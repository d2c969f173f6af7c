#!/usr/bin/env bash
#SBATCH --job-name=shop-ascend
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gres=npu:8
#SBATCH --cpus-per-task=96
#SBATCH --partition=npu
#SBATCH --time=1-00:00:00
#SBATCH --output=/shared/npu-rec/runs/shop-ascend/launch/slurm-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#
# shop-ascend: 2 x 8 processes.
# One task a node starts torchrun, which starts a process a card. After a fault torchrun starts them anew; after a lost
# node Slurm queues the job anew. Both go on from the newest checkpoint in the run directory.
set -euo pipefail

# Prints the indices of the devices that this job was given on one node, as `0,1,4`.
#   $1: node, $2: name of the GRES; stdin: the answer of `scontrol show job -d`
granted_devices() {
  local line nodes part found=""
  while read -r line; do
    [[ $line =~ (^|[[:space:]])Nodes=([^[:space:]]+) ]] || continue
    nodes=${BASH_REMATCH[2]}
    [[ $line =~ [=,]"$2"(:[^,:\(]+)?:[0-9]+\(IDX:([0-9,-]+)\) ]] || continue
    part=${BASH_REMATCH[2]}
    nodes=$(scontrol show hostnames "$nodes")
    [[ $'\n'$nodes$'\n' == *$'\n'"$1"$'\n'* ]] && found+=" ${part//,/ }"
  done
  for part in $found; do
    seq "${part%-*}" "${part#*-}"
  done | paste --serial --delimiters=,
  [[ -n $found ]]
}

start_node() {
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
  # Slurm sets no variable for devices of this kind; torch_npu sees those that are named here.
  if ! ASCEND_RT_VISIBLE_DEVICES=$(scontrol show job -d "$SLURM_JOB_ID" | granted_devices "$SLURMD_NODENAME" npu); then
    echo "error: 'scontrol show job -d $SLURM_JOB_ID' names no npu of $SLURMD_NODENAME; gres.conf needs File= for it" >&2
    exit 2
  fi
  export ASCEND_RT_VISIBLE_DEVICES
  echo "node $SLURM_NODEID: $SLURMD_NODENAME, devices $ASCEND_RT_VISIBLE_DEVICES"
  exec python3 -m torch.distributed.run \
    --nnodes=2 \
    --node-rank="$SLURM_NODEID" \
    --nproc-per-node=8 \
    --master-addr="$MASTER_ADDR" \
    --master-port="$MASTER_PORT" \
    --max-restarts=2 \
    -m npu_rec train tests/golden/launch/ascend.config.yaml \
    --set 'train.betas=[0.9, 0.95]' \
    --set task.options.negatives=popularity \
    --run-dir runs/shop-ascend --resume auto
}

# Where rank 0 is: the address that Slurm itself uses for the first node, since node names need not resolve.
read -r first_node < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_ADDR=$(scontrol show node "$first_node" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000)) # another one for each job on a shared node
export MASTER_ADDR MASTER_PORT

# Each node gets the functions as text: the script itself lies on the first node alone.
srun --export=ALL --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=1 \
  bash -c "$(declare -f granted_devices start_node); start_node"

# would run   mkdir -p /shared/npu-rec/runs/shop-ascend/launch
# would write /shared/npu-rec/runs/shop-ascend/launch/slurm.sh
# would run   sbatch /shared/npu-rec/runs/shop-ascend/launch/slurm.sh
