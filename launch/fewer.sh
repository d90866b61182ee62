#!/bin/bash
# On each node of an elastic job, beside its ranks: when the job is requeued, ask for as few tasks as at first. SLURM
# would ask for those of the last attempt again and wait for a node that is lost. It takes the change only once the job
# waits, and the batch shell may be lost with its node; hence one of these on every node, which hears SLURM's TERM.
#
#   bash launch/fewer.sh TASKS
set -u
trap '' USR1 USR2
trap 'kill %1' TERM
sleep infinity &
wait
wait # for the child, where TERM ended the first wait
until said=$(scontrol update JobId="$SLURM_JOB_ID" NumTasks="$1" 2>&1); do
    case $said in
    *"no longer pending"*) ;;             # preempted: it runs on during the grace time
    *"timed out"* | *"Unable to contact"*) ;; # a busy controller
    *) exit ;;                            # the job is over: TERM came with its end
    esac
    sleep 1
done
