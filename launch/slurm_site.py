"""What a Slurm site wants said in every job: account, partition, software. Torch-free."""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dacite
import yaml

from distill.config import require

DIRECTORY = Path(__file__).resolve().parents[1] / "slurm"
"""Template, example and the site's own file."""
FILE_VARIABLE = "FUSION_SITE"
"""Environment variable that names another file."""


@dataclass(frozen=True, kw_only=True)
class Container:
    """An image that steps run in, through the pyxis plugin of srun."""

    image: str
    """Image or squashfs file, as ``--container-image`` takes it."""
    mounts: tuple[str, ...] = ()
    """``source:target`` pairs. The directories of the run, the data and this repository have to be among them."""


@dataclass(frozen=True, kw_only=True)
class SiteConfig:
    """Content of ``slurm/site.yaml``."""

    account: str | None = None
    partition: str | None = None
    qos: str | None = None
    gpu_request: str | None = "--gpus-per-node={count}"
    """sbatch option that asks for GPUs; null: none is needed, for example because nodes are exclusive."""
    options: tuple[str, ...] = ()
    """Further sbatch options of every job, such as ``--exclusive``."""
    modules: tuple[str, ...] = ()
    """Loaded in this order."""
    venv: str | None = None
    """Directory of a virtual environment, on a disk that all nodes see; null: the Python that submits."""
    container: Container | None = None
    environment: dict[str, str] = field(default_factory=dict)
    """Variables of every process, such as HF_HOME or NCCL_SOCKET_IFNAME."""

    def __post_init__(self) -> None:
        require(
            self.venv is None or self.container is None,
            f"venv={self.venv} and container are both given; an image brings its own Python, so use one",
        )
        for option in self.options:
            require(option.startswith("-"), f"options: {option!r} is not an sbatch option; write --name=value")

    @property
    def python(self) -> str:
        """The interpreter of a job, as a shell word."""
        if self.container is not None:
            return "python"
        return shlex.quote(f"{self.venv}/bin/python" if self.venv else sys.executable)

    def sbatch_options(self, gpus: int) -> list[str]:
        """Options of a job with ``gpus`` GPUs on each of its nodes."""
        named = {"account": self.account, "partition": self.partition, "qos": self.qos}
        given = [f"--{name}={value}" for name, value in named.items() if value is not None]
        asked = [self.gpu_request.format(count=gpus)] if self.gpu_request is not None and gpus else []
        return [*given, *asked, *self.options]

    def srun_options(self) -> list[str]:
        """Options of every srun."""
        if self.container is None:
            return []
        mounts = [f"--container-mounts={','.join(self.container.mounts)}"] if self.container.mounts else []
        return [f"--container-image={self.container.image}", *mounts]


def read_site() -> SiteConfig:
    """The site's file: ``slurm/site.yaml``, or what ``$FUSION_SITE`` names.

    Raises:
        ValueError: it is missing or cannot be read; names the example.
    """
    file = Path(os.environ.get(FILE_VARIABLE) or DIRECTORY / "site.yaml")
    example = DIRECTORY / "site.example.yaml"
    require(
        file.is_file(),
        f"cluster.kind=slurm needs {file} (account, partition, software of this site), which is missing; "
        f"cp {example} {file} and fill it in",
    )
    try:
        content = yaml.safe_load(file.read_text()) or {}
        return dacite.from_dict(SiteConfig, _tuples(content), dacite.Config(strict=True))
    except (yaml.YAMLError, dacite.DaciteError, ValueError, AttributeError) as error:
        raise ValueError(f"{file}: {' '.join(str(error).split())}; {example} says what may stand in it") from error


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _tuples(item) for key, item in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
