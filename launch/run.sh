#!/bin/bash
# The life of a training job: check, srun, read what became of the run, then stop, requeue or try again.
#
#   bash launch/run.sh SCRIPT CONFIG.yaml [section.key=value ...]      in an sbatch job, in the checkout
#
# SCRIPT is the batch script, submitted again where a requeue is forbidden. Settings are in launch/README.md.
set -u

script=$1 config=$2
shift 2
overrides=(${DATA:+"data.path=$DATA"} "$@")
case ${1:-} in # `sbatch launch/train_1b.sh my.yaml train.steps=100`
*.yaml | *.yml)
    config=$1
    shift
    overrides=(${DATA:+"data.path=$DATA"} "$@")
    ;;
esac

# shellcheck source=/dev/null
[ -f launch/site.sh ] && . launch/site.sh # modules, NCCL_SOCKET_IFNAME: what only your cluster knows
# shellcheck source=/dev/null
[ -z "${VIRTUAL_ENV:-}" ] && [ -f .venv/bin/activate ] && . .venv/bin/activate
# shellcheck source=launch/common.sh
. launch/common.sh

export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # since 22.05 srun does not take it from sbatch
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$SRUN_CPUS_PER_TASK}
export NCCL_DEBUG=${NCCL_DEBUG:-WARN} TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}

# TERM comes with scancel, a requeue or preemption: SLURM has decided what follows, so this shell requeues nothing.
terminated=""
trap 'terminated=yes' TERM

# srun in the background: bash runs a trap only while it waits.
step() {
    srun --distribution=block --unbuffered --mem=0 --nodes="$nodes" "$@" &
    local child=$! code=0
    while kill -0 "$child" 2>/dev/null; do
        wait "$child"
        code=$?
    done
    return "$code"
}

# A signal that comes during the check is kept by rank.sh and told in the answers: 75 asks for a requeue.
check_nodes() {
    rm -f "$run/logs/$job".node-*
    step --ntasks="$nodes" --ntasks-per-node=1 --overlap --output="$run/logs/$job.node-%t" bash launch/rank.sh \
        "$python" -m megaboat.tools.preflight node "$run" "$tasks_per_node" "$config" "$data/index.json"
    "$python" -m megaboat.tools.preflight compare "$run/logs/$job.node" "$nodes"
    case $? in
    0) ;;
    75) if [ -n "$terminated" ]; then exit 0; else say "a signal came during the check" && requeue; fi ;;
    *) exit 2 ;;
    esac
}

# Every try is a step with a port of its own; -K ends all ranks when one of them dies.
train() {
    logs=$run/logs/$job.${SLURM_RESTART_COUNT:-0}.$1
    step --ntasks=$((nodes * tasks_per_node)) --ntasks-per-node="$tasks_per_node" --kill-on-bad-exit=1 \
        --output="$logs-%t.log" bash launch/rank.sh "$python" -m megaboat train "$config" "${overrides[@]}"
}

# The signal before the limit comes once: ranks that start after it would be killed at the limit, and SLURM requeues no
# job that reached its limit.
near_limit() {
    local end
    end=$(date -d "$(squeue -h -j "$SLURM_JOB_ID" -o %e)" +%s 2>/dev/null) || return 1
    [ $((end - $(date +%s))) -lt 330 ]
}

requeue() {
    put_back --job-name="$SLURM_JOB_NAME" --partition="$SLURM_JOB_PARTITION" \
        --nodes="${ELASTIC:+$ELASTIC-}$SLURM_JOB_NUM_NODES" \
        ${SLURM_JOB_ACCOUNT:+--account="$SLURM_JOB_ACCOUNT"} --time="$(squeue -h -j "$SLURM_JOB_ID" -o %l)" \
        --ntasks-per-node="$tasks_per_node" ${SLURM_GPUS_PER_NODE:+--gpus-per-node="$SLURM_GPUS_PER_NODE"} \
        "$script" "$config" "${overrides[@]}"
}

# Sets run, data, nodes, tasks_per_node and finished, or says in one line what is wrong with config, corpus or ranks.
run="" data="" nodes="" tasks_per_node="" finished="" logs=""
checked=$("$python" -m megaboat launch "$config" "${overrides[@]}" --check) || exit 2
eval "$checked"
[ -n "$finished" ] && say "$run is done" && exit 0
mkdir -p "$run/logs" || exit 2
say "job $job, restart ${SLURM_RESTART_COUNT:-0}: $nodes x $tasks_per_node ranks on $SLURM_JOB_NODELIST, run $run"
say "$("$python" --version), $(srun --version), megaboat at $(git rev-parse --short HEAD 2>/dev/null || echo '?')"
check_nodes
[ -n "${ELASTIC:-}" ] && srun --overlap --mem=0 --cpus-per-task=1 --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
    --output=/dev/null bash launch/fewer.sh $((ELASTIC * tasks_per_node)) 2>/dev/null &

for try in 1 2 3 4 5 6 7 8 9; do
    train "$try"
    what=$(outcome "$run")
    [ -n "$terminated" ] && say "told to end, ranks may still be saving" && exit 0
    say "try $try: ${what:-crashed}; logs in $run/logs"
    case $what in
    done) exit 0 ;;
    fatal) exit 1 ;;
    requeue) requeue ;;
    esac
    "$python" -m megaboat.tools.preflight again "$run" "$logs" || exit 1
    near_limit && requeue
done
exit 1
