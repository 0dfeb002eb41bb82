#!/bin/sh
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
# One peer on each node: sbatch slurm.sh run.toml. The first node founds the run.
FIRST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export FIRST
srun sh -c '
    [ "$SLURM_PROCID" = 0 ] || set -- "$@" --bootstrap "$FIRST:7000"
    exec shoal peer "$@" --listen 0.0.0.0:7000 --advertise "$(hostname):7000" \
        --store "store-$SLURM_PROCID"
' peer "$@"
