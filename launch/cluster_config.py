"""Where the steps of a pipeline run: here, or as chained Slurm jobs. Torch-free."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from distill.config import require

if TYPE_CHECKING:
    from launch.config import StepConfig

_TIME = re.compile(r"(\d+-)?\d{1,2}:\d{2}:\d{2}")


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """The machines that a pipeline may use. Never part of a fingerprint."""

    kind: Literal["local", "slurm"] = "local"
    """local: the processes at hand run all steps; slurm: every step is a job, submitted in one go."""
    nodes: int = 1
    """Nodes of a step that does not say otherwise."""
    gpus_per_node: int = 8
    """Processes of a job on each of its nodes, one per GPU."""
    hardware: str = "h100_sxm"
    """The GPU, a file of conf/hardware: what the planner counts with."""
    cpu_memory_gib: float = 2048.0
    """Memory of a node, for what is offloaded."""
    time_limit: str = "04:00:00"
    """Of one job, as Slurm writes it ([days-]hours:minutes:seconds); a job that reaches it goes on in the next."""
    signal_seconds: int = 300
    """Before the limit, when the job is told to save its state and to queue itself again. Longer than a save takes."""
    max_failures: int = 5
    """Starts of one step that may fail before the chain stops."""

    def __post_init__(self) -> None:
        for name in ("nodes", "gpus_per_node", "signal_seconds", "max_failures"):
            require(getattr(self, name) >= 1, f"cluster.{name} must be >= 1, got {getattr(self, name)}")
        require(self.cpu_memory_gib > 0, f"cluster.cpu_memory_gib must be > 0, got {self.cpu_memory_gib}")
        require(
            _TIME.fullmatch(self.time_limit) is not None,
            f"cluster.time_limit={self.time_limit} is no time; write [days-]hours:minutes:seconds, as 04:00:00",
        )
        require(
            self.signal_seconds < self.job_seconds,
            f"cluster.signal_seconds={self.signal_seconds} is not before the start of a job of cluster.time_limit="
            f"{self.time_limit}; lengthen the one or shorten the other",
        )

    @property
    def job_seconds(self) -> int:
        """:attr:`time_limit` in seconds."""
        days, _, clock = self.time_limit.rpartition("-")
        hours, minutes, seconds = (int(part) for part in clock.split(":"))
        return 86_400 * int(days or 0) + 3600 * hours + 60 * minutes + seconds

    def for_step(self, step: StepConfig) -> ClusterConfig:
        """The machines of one step, which may ask for others."""
        asked = {name: getattr(step, name) for name in ("nodes", "gpus_per_node", "time_limit", "signal_seconds")}
        return replace(self, **{name: value for name, value in asked.items() if value is not None})
