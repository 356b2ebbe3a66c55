# Environment of every job, sourced by the sbatch scripts. Copy what your site needs into slurm/site.sh (git-ignored):
# module loads, a virtual environment, proxies, HF_HOME on a shared disk.
export PYTHONUNBUFFERED=1
export TOKENIZERS_PARALLELISM=false
if [ -f "$SLURM_SUBMIT_DIR/slurm/site.sh" ]; then
    . "$SLURM_SUBMIT_DIR/slurm/site.sh"
fi
