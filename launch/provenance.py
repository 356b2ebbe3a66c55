"""Where an artifact came from: commit, command, packages, hardware. Torch-free."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "datasets", "numpy", "scipy", "hydra-core")
REPOSITORY = Path(__file__).resolve().parents[1]


def provenance(*, seed: int | None) -> dict[str, Any]:
    """Facts for the manifest. None of them enters a fingerprint."""
    return {**_process_provenance(), "seed": seed}


@functools.cache
def _process_provenance() -> dict[str, Any]:
    return {
        "git_commit": _git("rev-parse", "HEAD"),
        "dirty_diff_sha256": _dirty_diff(),
        "argv": list(sys.argv),
        "num_processes": int(os.environ.get("WORLD_SIZE", "1")),
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "hardware": {"cpu": cpu_name(), "num_cores": os.cpu_count(), "gpus": list(gpu_names())},
    }


def _git(*arguments: str) -> str | None:
    if shutil.which("git") is None:
        return None
    done = subprocess.run(["git", "-C", str(REPOSITORY), *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def _dirty_diff() -> str | None:
    difference = _git("diff", "HEAD")
    return hashlib.sha256(difference.encode()).hexdigest() if difference else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@functools.cache
def cpu_name() -> str:
    """Model name of the processor."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@functools.cache
def gpu_names() -> tuple[str, ...]:
    """Names of the NVIDIA GPUs that this process may use, asked of the driver so that torch is not needed."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if shutil.which("nvidia-smi") is None or visible == "":
        return ()
    chosen = [] if visible is None else [f"--id={visible}"]
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader", *chosen]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    return tuple(done.stdout.strip().splitlines()) if done.returncode == 0 else ()
