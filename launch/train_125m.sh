#!/bin/bash
# Train configs/125m.yaml. From the checkout:
#
#   sbatch launch/train_125m.sh
#   DATA=/shared/pile sbatch -N 4 -p PARTITION -A ACCOUNT launch/train_125m.sh train.steps=5000
#
# Nodes with 4 GPUs: --ntasks-per-node=4 --gpus-per-node=4. A run that exists goes on where it stopped.

#SBATCH --job-name=megaboat-125m
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR1@300
#SBATCH --output=%x-%j.out

# SLURM runs a copy of this file: the checkout is where sbatch was called.
cd "${SLURM_SUBMIT_DIR:?submit this script with sbatch}" || exit 2
[ -f launch/run.sh ] || cd .. || exit 2
[ -f launch/run.sh ] || { echo "no launch/run.sh in $SLURM_SUBMIT_DIR: call sbatch in the checkout"; exit 2; }
exec bash launch/run.sh launch/train_125m.sh configs/125m.yaml "$@"
