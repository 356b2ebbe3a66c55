#!/bin/bash
# Llama-3.3-70B-Instruct to 49B: one job per step. From the repository `sbatch launch/super_49b.sh [overrides]`, a small job
# that submits the others, or `launch/super_49b.sh [overrides]` on a login node. --dry-run prints the scripts.
#SBATCH --job-name=submit-super_49b
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --time=00:30:00
#SBATCH --output=%x_%j.log

# sbatch runs a copy from elsewhere; the repository is then where it was submitted.
root="$(dirname "$0")/.."
[ -f "$root/slurm/env.sh" ] || root="$SLURM_SUBMIT_DIR"
cd "$root" || exit 1
. slurm/env.sh
exec "$PYTHON" -m launch super_49b cluster=slurm "$@"
