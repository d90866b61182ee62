#!/bin/bash
# After the ranks of a job that `megaboat launch` submitted: requeue it when its run says so, or when it crashed and a
# further attempt is allowed.
#
#   bash launch/after.sh FOLDER      FOLDER holds a file JOB.run that names the run folder
set -u
# shellcheck source=launch/common.sh
. "$(dirname "$0")/common.sh"

run=$(cat "$1/$SLURM_JOB_ID.run" 2>/dev/null) || {
    say "no rank of job $job has started: see the logs beside $1"
    exit 1
}
[ -n "$run" ] || exit 0 # an earlier job of a chain has finished it
what=$(outcome "$run")
say "${what:-crashed}: $run"
case $what in
done) exit 0 ;;
fatal) exit 1 ;;
requeue) put_back "" ;;
esac
"$python" -m megaboat.tools.preflight again "$run" && put_back ""
exit 1
