# What launch/run.sh and launch/after.sh share: names, the word that a run left behind, the requeue. Sourced by bash.
# shellcheck shell=bash

# SLURM_JOB_ID of an array's last element names the whole array: a requeue by that number would restart all of it.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-${SLURM_JOB_ID:?not inside a SLURM job: use sbatch}}
export MEGABOAT_JOB=${MEGABOAT_JOB:-$job} # successors count their attempts under the first job's number
# shellcheck disable=SC2034 # used by those who source this
python=${PYTHON:-python}

say() { echo "$(date +%T) launch: $*"; }

# One word from a run folder's outcome.json: done, requeue or fatal; nothing after a crash, and nothing where another
# attempt wrote it: this shell may live on behind a cut cable.
outcome() {
    local mine="\"attempt\": *\"$SLURM_JOB_ID\.${SLURM_RESTART_COUNT:-0}\."
    sed -n "/$mine/s/.*\"outcome\": *\"\([a-z]*\)\".*/\1/p" "$1/outcome.json" 2>/dev/null
}

# Put this job back into the queue, or its successor ("$@": sbatch's arguments, "" for none) where that is forbidden.
put_back() {
    local restarts
    restarts=$(scontrol show job "$job" | sed -n 's/.*Restarts=\([0-9]*\).*/\1/p')
    if [ "${restarts:-0}" -gt "${SLURM_RESTART_COUNT:-0}" ]; then
        say "SLURM has put $job back already"
        exit 0
    fi
    say "requeue $job"
    trap '' TERM # the requeue itself sends TERM to whoever asks for it
    if scontrol requeue "$job"; then
        exit 0
    fi
    say "requeue was refused: submit a successor"
    if [ -n "$1" ] && sbatch --dependency="afterany:$job" "$@"; then
        exit 0
    fi
    say "submit the same command again: the run goes on where this job stopped"
    exit 1
}
