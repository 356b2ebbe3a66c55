"""``python -m launch dashboard GROUP [entity=...] [project=...] [--json]``: a W&B workspace for the runs of a group.

The only importer of wandb-workspaces. Torch-free.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distill import wandb_run
from distill.config import TrackingConfig, require

X_AXIS = "tokens"
MAX_RUNS = 100
"""Drawn in one plot."""

USAGE = "python -m launch dashboard GROUP [entity=<team or user>] [project=<project>] [--json]"

RECOVERY = {
    "KL to the teacher, nats per token": ("eval/kld", "eval/kld_top_k"),
    "LM loss over the teacher's, nats per token": ("eval/lm_loss_gap",),
    "Top-1 agreement": ("eval/top1_agreement_frac",),
    "Retained: teacher's perplexity over the student's": ("eval/retained_frac",),
    "Gap closed, from the student at the start": ("eval/gap_closed_frac",),
    "LM loss and the teacher's": ("eval/lm_loss", "eval/teacher_lm_loss"),
}
"""Titles of line plots, and the metrics in them."""

TRAINING = {
    "Training loss": ("train/loss",),
    "Gradient norm": ("optim/grad_norm",),
    "Learning rate": ("optim/lr",),
}
SPEED = {
    "Throughput, tokens/s": ("perf/tokens_per_s",),
    "Model FLOPs utilization": ("perf/mfu_frac",),
    "Peak memory, GiB": ("mem/peak_gib",),
}
SYSTEM = {
    "GPU utilization, %": r"system\.gpu\.\d+\.gpu",
    "GPU memory allocated, %": r"system\.gpu\.\d+\.memoryAllocated",
}
"""Titles of line plots over time, and patterns of what W&B samples by itself."""

TABLES = ("search/blocks", "search/pareto", "evaluate/models", "benchmark/models")
PAGES = {
    "What became of every block": "architecture/strip",
    "Block dependency": "dependency/heat_map",
    "Pareto front of the search": "search/pareto_front",
    "Replace-1-block scores": "scores/kld",
}
COLUMNS = (
    "run:displayName",
    "run:jobType",
    "summary:eval/kld",
    "summary:eval/lm_loss_gap",
    "summary:eval/top1_agreement_frac",
    "summary:eval/retained_frac",
    "summary:tokens",
    "summary:result/headline",
)
"""Of the list of runs."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One dashboard."""

    group: str
    """Name of a pipeline run."""
    project: str = TrackingConfig.project
    entity: str | None = None
    """Team or user; None: the account's default."""
    is_printed: bool = False
    """Print the specification and save nothing."""

    def __post_init__(self) -> None:
        require(
            bool(re.fullmatch(r"[\w.,=+-]+", self.group)),
            f"{self.group!r} is not the name of a run; use that of a directory under run.root; {USAGE}",
        )


def run(arguments: Sequence[str]) -> int:
    """Save the workspace and print its address, or print its specification. Returns the exit status.

    Raises:
        ValueError: the arguments are not as in :data:`USAGE`, wandb-workspaces is missing, or W&B does not take it.
    """
    request = parse(arguments)
    if request.is_printed:
        print(json.dumps(specification(request), indent=1))
        return 0
    entity = request.entity or wandb_run.default_entity()
    workspace = workspace_of(request, entity)
    try:
        workspace.save()
    except Exception as error:
        # Of the library, of GraphQL and of the network, without a common class.
        raise ValueError(
            f"W&B does not save the dashboard in {entity}/{request.project} ({wandb_run.first_line(error)}); look at "
            "entity= and project=, or print it with --json"
        ) from error
    print(workspace.url)
    return 0


def parse(arguments: Sequence[str]) -> Request:
    """What the command line asks for.

    Raises:
        ValueError: it is not as in :data:`USAGE`.
    """
    options = [text for text in arguments if text.startswith("-")]
    settings = dict(text.split("=", 1) for text in arguments if re.match(r"(entity|project)=", text))
    groups = [text for text in arguments if text not in options and not re.match(r"(entity|project)=", text)]
    require(set(options) <= {"--json"}, f"unknown option {' '.join(options)}; {USAGE}")
    require(len(groups) == 1, f"dashboard takes the name of one run, got {len(groups)}; {USAGE}")
    return Request(group=groups[0], is_printed=bool(options), **settings)


def specification(request: Request) -> dict[str, Any]:
    """The workspace as W&B stores it, without a network."""
    workspace = workspace_of(request, request.entity or "<entity>")
    # The library has no public way to look at a workspace before it is saved.
    return workspace._to_model().model_dump(mode="json", by_alias=True, exclude_none=True)


def workspace_of(request: Request, entity: str) -> Any:
    """The ``wandb_workspaces`` workspace of ``request``: runs of the group alone, panels by section.

    Raises:
        ValueError: wandb-workspaces is not installed.
    """
    workspaces, panels = _library()

    def lines(plots: Mapping[str, Sequence[str]], **style: Any) -> list[Any]:
        return [panels.LinePlot(title=title, x=X_AXIS, y=list(names), **style) for title, names in plots.items()]

    sampled = [
        panels.LinePlot(title=title, x="RelativeTime(Wall)", metric_regex=names) for title, names in SYSTEM.items()
    ]
    media = [panels.MediaBrowser(title=title, media_keys=[name], num_columns=1) for title, name in PAGES.items()]
    tables = [panels.WeavePanelSummaryTable(table_name=name) for name in TABLES]
    sections = {
        "Recovery with tokens": lines(RECOVERY),
        "Architecture, search and dependency": [*media, *tables],
        "Training": lines(TRAINING),
        "Throughput and memory": [*lines(SPEED), *sampled],
    }
    workspace = workspaces.Workspace(
        entity=entity,
        project=request.project,
        # The library takes signs of mathematics for emojis, which names may not have.
        name=re.sub("[=+]", " ", request.group),
        sections=[workspaces.Section(name=name, panels=content, is_open=True) for name, content in sections.items()],
        settings=workspaces.WorkspaceSettings(x_axis=X_AXIS, max_runs=MAX_RUNS),
        runset_settings=workspaces.RunsetSettings(
            filters=workspaces.And(workspaces.Metric("Group") == request.group), pinned_columns=list(COLUMNS)
        ),
    )
    # It doubles every "=" in the value of a filter, and runs of a sweep have that in their names. What stands here it
    # takes for the filter of a workspace that it has loaded, and leaves as it is.
    condition = {"key": {"section": "run", "name": "group"}, "op": "=", "value": request.group, "disabled": False}
    workspace._stashed_filter_string = workspace.runset_settings.filters
    workspace._stashed_filters_v2 = {"filterFormat": "filterV2", "filters": [condition]}
    return workspace


def _library() -> tuple[Any, Any]:
    try:
        from wandb_workspaces import workspaces
        from wandb_workspaces.reports.v2 import interface
    except ImportError as error:
        raise ValueError(
            "dashboard needs the package wandb-workspaces, which is not installed; install it with "
            "`pip install -e '.[wandb]'`"
        ) from error
    return workspaces, interface
