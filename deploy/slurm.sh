#!/bin/bash
# Slurm: `sbatch deploy/slurm.sh STUDY [ARGUMENTS...]`, such as `... quickstart --set gpus_per_worker=1`; STUDY is what
# `haltscale run` takes: a shipped study, a module, a file. `sbatch --array=0-2 deploy/slurm.sh one,two,three` runs one
# study in each task. One Ray head on the first node, one Ray worker on each other, the study on the first.
# Two minutes before the time limit its runs save, and the job is queued again: finished runs are not run again, begun
# ones go on. `scancel JOB` ends it; submitted again, it goes on too.
#SBATCH --job-name=haltscale
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=64
#SBATCH --gpus-per-node=8
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=48:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=haltscale-%j.log
set -euo pipefail

study=${1:?usage: sbatch deploy/slurm.sh STUDY [ARGUMENTS...]}
shift
IFS=, read -ra studies <<<"$study"
study=${studies[${SLURM_ARRAY_TASK_ID:-0}]:?the array has more tasks than there are studies}

# CHANGE: a filesystem that all nodes share, and the environment that has haltscale.
export HALTSCALE_HOME=${HALTSCALE_HOME:-/shared/$USER/haltscale}
export HALTSCALE_STORE=${HALTSCALE_STORE:-$HALTSCALE_HOME/runs}
# shellcheck disable=SC1091 # of the cluster, not of this repository
source "${HALTSCALE_VENV:-/shared/$USER/haltscale-venv}/bin/activate"
# The private network, such as ib0; by default a node's first address that is not loopback.
interface=${HALTSCALE_INTERFACE:-}

RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_TOKEN RAY_AUTH_MODE=token # other users of these nodes cannot talk to this Ray
export RAY_TRAIN_V2_ENABLED=1 RAY_USAGE_STATS_ENABLED=0
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # srun does not take it from sbatch

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]}
port=$((20000 + SLURM_JOB_ID % 4000 * 3)) # and the two after it: jobs that share a node do not meet
resources=(--num-cpus="$SLURM_CPUS_PER_TASK" --num-gpus="${SLURM_GPUS_ON_NODE:-0}" --dashboard-agent-listen-port=0 --block)

on() { # replaces a subshell by a command on one node, which gets the node's address as $address
  # shellcheck disable=SC2016 # for the node's shell
  exec srun --nodes=1 --ntasks=1 --overlap --nodelist="$1" bash -c '
    if [[ -n $0 ]]; then address=$(ip -4 -o addr show dev "$0" | awk "{print \$4}"); address=${address%%/*}
    else address=$(hostname --all-ip-addresses); address=${address%% *}; fi
    exec env address="$address" "$@"' "$interface" "${@:2}"
}
# shellcheck disable=SC2016
address=$(on "$head" bash -c 'echo "$address"')

export RAY_ADDRESS=$address:$port
rays=()
alive='import ray, sys; ray.init(logging_level="ERROR"); sys.exit(sum(n["Alive"] for n in ray.nodes()) < int(sys.argv[1]))'
wait_for() { # so many nodes
  until (on "$head" python -c "$alive" "$1"); do
    for ray in "${rays[@]}"; do kill -0 "$ray"; done # one that did not start ends the job
    sleep 2
  done
}

# shellcheck disable=SC2016
on "$head" bash -c 'exec ray start --head --node-ip-address="$address" "$@"' ray \
  --port="$port" --ray-client-server-port="$((port + 1))" --include-dashboard=false --dashboard-port="$((port + 2))" \
  --temp-dir="/tmp/ray-$SLURM_JOB_ID" "${resources[@]}" &
rays+=($!)
wait_for 1 # the others give up where they find none
for node in "${nodes[@]:1}"; do
  # shellcheck disable=SC2016
  on "$node" bash -c 'exec ray start --node-ip-address="$address" "$@"' ray --address="$address:$port" "${resources[@]}" &
  rays+=($!)
done
wait_for "${#nodes[@]}"

on "$head" haltscale run "$study" -- "$@" &
running=$!
told=
trap 'told=1; kill -USR2 "$running"' USR1 # the study's runs save, and it ends
code=0
wait "$running" || code=$?
while kill -0 "$running" 2>/dev/null; do # the signal ended `wait`, not the study
  code=0
  wait "$running" || code=$?
done
if [[ -n $told && $code != 0 ]]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
