#!/bin/bash
# Slurm: `sbatch deploy/slurm.sh STUDY [ARGUMENTS...]`, such as `... quickstart --set gpus_per_worker=1`.
# One Ray head on the first node, one Ray worker on each other, the study as the job's own program. Submit it again after
# a time limit: finished runs are not run again, begun ones go on from their last checkpoint.
#SBATCH --job-name=haltscale
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=64
#SBATCH --gpus-per-node=8
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=48:00:00
#SBATCH --output=haltscale-%j.log
set -euo pipefail

study=${1:?usage: sbatch deploy/slurm.sh STUDY [ARGUMENTS...]}
shift

# CHANGE: a filesystem that all nodes share, and the environment that has haltscale.
export HALTSCALE_HOME=${HALTSCALE_HOME:-/shared/$USER/haltscale}
export HALTSCALE_STORE=${HALTSCALE_STORE:-$HALTSCALE_HOME/runs}
# shellcheck disable=SC1091 # of the cluster, not of this repository
source "${HALTSCALE_VENV:-/shared/$USER/haltscale-venv}/bin/activate"

RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_TOKEN RAY_AUTH_MODE=token # other users of these nodes cannot talk to this Ray
export RAY_TRAIN_V2_ENABLED=1 RAY_USAGE_STATS_ENABLED=0

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]}
address=$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address | awk '{print $1}')
port=$((20000 + SLURM_JOB_ID % 20000)) # jobs that share a node do not meet
resources=(--num-cpus="$SLURM_CPUS_PER_TASK" --num-gpus="$SLURM_GPUS_ON_NODE" --block)

srun --nodes=1 --ntasks=1 --nodelist="$head" \
  ray start --head --node-ip-address="$address" --port="$port" --include-dashboard=false "${resources[@]}" &
for node in "${nodes[@]:1}"; do
  srun --nodes=1 --ntasks=1 --nodelist="$node" ray start --address="$address:$port" "${resources[@]}" &
done

export RAY_ADDRESS=$address:$port
alive='import ray, sys; ray.init(logging_level="ERROR"); sys.exit(sum(n["Alive"] for n in ray.nodes()) < int(sys.argv[1]))'
until python -c "$alive" "${#nodes[@]}"; do
  sleep 2
done
srun --overlap --nodes=1 --ntasks=1 --nodelist="$head" python -m "haltscale.studies.$study" "$@"
