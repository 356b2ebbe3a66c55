#!/bin/bash
# Llama-3.1-405B-Instruct to 253B: one job per step. From the repository `sbatch launch/ultra.sh [overrides]`, a small job
# that submits the others, or `launch/ultra.sh [overrides]` on a login node. --dry-run prints the scripts.
#SBATCH --job-name=submit-ultra
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --time=00:30:00
#SBATCH --output=%x_%j.log

# sbatch runs a copy from elsewhere; the repository is then where it was submitted.
root="$(dirname "$0")/.."
[ -f "$root/slurm/env.sh" ] || root="$SLURM_SUBMIT_DIR"
cd "$root" || exit 1
. slurm/env.sh
exec "$PYTHON" -m launch ultra cluster=slurm "$@"
