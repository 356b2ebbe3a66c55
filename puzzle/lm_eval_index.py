"""The adapter of lm-eval's index: which tasks are meant, and whether their files let them run here.

Importing this module imports neither torch nor lm-eval, and checking tasks imports no torch: a login node does both.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

from packaging.version import Version

from distill.config import require
from puzzle.lm_eval_seeds import seeded
from puzzle.task_metrics import choose_metric

MIN_VERSION = "0.4.13"

COMPARING = ("multiple_choice", "loglikelihood")
"""Types of task that compare likelihoods."""

WHOLE_MODEL = (*COMPARING, "loglikelihood_rolling", "generate_until")
"""Types of task that a whole model can do."""

DEFAULT_OUTPUT_TYPE = "generate_until"
"""lm-eval's own, where a file does not say."""

GROUP_FIELDS = frozenset(("group", "group_alias", "task", "aggregate_metric_list", "metadata", "tag"))
"""What a group's file says of itself; all else it says holds for its members."""

Find = Callable[[str], Any]
"""Name to lm-eval's entry, None where there is none."""


@dataclass(frozen=True, kw_only=True)
class TaskChoice:
    """What a configuration says of tasks."""

    node: str
    """Node of the configuration, for errors: its fields are ``tasks``, ``task_dir`` and so on."""
    tasks: tuple[str, ...]
    """Tasks, groups or tags of lm-eval."""
    directory: str | None
    """Further task files, which come before those of lm-eval."""
    limit: int | None
    """Examples per task; None: all."""
    num_fewshot: int | None = None
    """Worked examples before each question; None: as the task's file says, or none."""
    metrics: Mapping[str, str] = field(default_factory=dict)
    """By task: the metric that stands for it, where that is not the first of its file."""
    by_example: bool = False
    """The accuracy of every example is wanted, of tasks that compare likelihoods, rather than a value of the whole."""

    @property
    def output_types(self) -> tuple[str, ...]:
        """Types of task that may be meant."""
        return COMPARING if self.by_example else WHOLE_MODEL

    def installed_version(self) -> str:
        """Version of lm-eval. Raises ``ValueError`` where it is not installed, or too old."""
        try:
            version = metadata.version("lm_eval")
        except metadata.PackageNotFoundError as error:
            raise self._not_installed(error) from error
        require(
            Version(version) >= Version(MIN_VERSION),
            f"{self.node}.tasks={list(self.tasks)} needs lm-eval >= {MIN_VERSION}, and {version} is installed; "
            f"pip install 'lm-eval[hf]>={MIN_VERSION}', or set {self.node}.tasks=[]",
        )
        return version

    def require_usable(self) -> None:
        """Raise ``ValueError`` where lm-eval is not installed, knows no task of a name, or a file says that its task
        cannot be run or measured here. Reads no examples, and leaves to :meth:`load` what only code can tell."""
        local = self._local().task_index
        find: Find = lambda name: local.get(name) or _shipped().task_index.get(name)  # noqa: E731
        for name in self.tasks:
            entry = find(name)
            if entry is None:
                known = {*local, *_shipped().task_index}
                near = ", ".join(difflib.get_close_matches(name, known, n=3, cutoff=0.6))
                raise ValueError(
                    f"{self.node}.tasks: lm-eval knows no {name}; near names are {near or 'none'}. Name one of its "
                    f"tasks, or give the directory of a readable file of it as {self.node}.task_dir (now "
                    f"{self.directory})"
                )
            members = [*_files(name, find, {})]
            for member, file in members:
                # What a class of Python does, its file does not say.
                if "class" not in file:
                    self.require_type(member, file.get("output_type", DEFAULT_OUTPUT_TYPE))
                    self.require_no_code(member, file.get("unsafe_code", False))
            if not self.by_example:
                self._require_measured(name, entry, members)

    def require_type(self, task: str, output_type: str) -> None:
        """Raise ``ValueError`` where tasks of the type cannot be done."""
        require(
            output_type in self.output_types,
            f"{self.node}.tasks: {task} is of type {output_type}; give tasks of type {' or '.join(self.output_types)}",
        )

    def require_no_code(self, task: str, runs_code: bool) -> None:
        """Raise ``ValueError`` where the task runs what the model writes."""
        require(
            not runs_code,
            f"{self.node}.tasks: {task} runs code that the model writes, which this program does not; leave it out",
        )

    def require_model_class(self) -> None:
        """Raise ``ValueError`` where what lm-eval needs for models of transformers is not installed. Imports torch."""
        try:
            import lm_eval.models.huggingface  # noqa: F401
        except ImportError as error:
            raise self._not_installed(error) from error

    def load(self) -> dict[str, Mapping[str, Any]]:
        """By task, group or tag: lm-eval's objects, ``tasks`` and ``groups`` by name. Fetches their examples;
        ``ValueError`` where they or a file cannot be read."""
        local = self._local()
        # A group or tag of a user's own may have members of lm-eval's.
        whole = functools.cache(lambda: _shipped() if self.directory is None else _manager(include_path=self.directory))
        loaded = {}
        for name in self.tasks:
            try:
                # Anew for each: what one draws must not depend on those before it.
                with seeded():
                    loaded[name] = (local if _is_all_of(local.task_index, name) else whole()).load([name])
            except Exception as error:  # whatever the library of data sets, the hub or code of the task raises
                raise ValueError(
                    f"{self.node}.tasks: {name} cannot be loaded: {reason(error)}; hub tasks need a network, or their "
                    "examples in the cache of Hugging Face datasets"
                ) from error
        return loaded

    def _require_measured(self, name: str, entry: Any, members: list[tuple[str, Mapping[str, Any]]]) -> None:
        """By the files alone: a value of the whole, and a metric where more is better."""
        names = [member for member, _ in members]
        if entry.kind.name == "TAG":
            self.refuse_tag(name, names)
        listed = [_listed_metrics(file) for _, file in members]
        if entry.kind.name == "GROUP":
            aggregates = _as_list(entry.cfg.get("aggregate_metric_list"))
            if not aggregates:
                self.refuse_group(name, names)
            metrics = {each["metric"]: all(file.get(each["metric"], True) for file in listed) for each in aggregates}
        else:
            (metrics,) = listed
        if metrics:
            choose_metric(self.node, name, metrics, self.metrics.get(name))

    def refuse_tag(self, name: str, members: list[str]) -> NoReturn:
        """Raise the ``ValueError`` of a tag."""
        raise ValueError(
            f"{self.node}.tasks: {name} stands for several tasks without a value of the whole; name them: "
            f"{', '.join(members)}"
        )

    def refuse_group(self, name: str, members: list[str]) -> NoReturn:
        """Raise the ``ValueError`` of a group without a value."""
        raise ValueError(
            f"{self.node}.tasks: {name} is a group without a value of the whole (aggregate_metric_list); name its "
            f"members: {', '.join(members)}"
        )

    def _local(self) -> Any:
        """The manager of the user's own task files alone."""
        try:
            return _manager(include_path=self.directory, include_defaults=False)
        except ImportError as error:
            raise self._not_installed(error) from error

    def _not_installed(self, error: ImportError) -> ValueError:
        return ValueError(
            f"{self.node}.tasks={list(self.tasks)} needs the package lm-eval ({error}); "
            f"pip install 'lm-eval[hf]>={MIN_VERSION}', or set {self.node}.tasks=[]"
        )


def reason(error: Exception) -> str:
    """One line on ``error``."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _manager(**options: Any) -> Any:
    from lm_eval.tasks import TaskManager

    path = options.pop("include_path", None)
    return TaskManager(include_path=None if path is None else Path(path).expanduser(), **options)


@functools.cache
def _shipped() -> Any:
    """The manager of lm-eval's own tasks, whose index of thousands of files takes seconds."""
    return _manager()


def _files(name: str, find: Find, overrides: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Name and content of the file of every task that ``name`` stands for, with what groups set over it."""
    entry = find(name)
    if entry is None:
        if "task" in overrides:  # written out within a group
            yield name, overrides
    elif entry.kind.name == "TAG":
        for member in sorted(entry.tags):
            yield from _files(member, find, overrides)
    elif entry.kind.name == "GROUP":
        yield from _member_files(entry.cfg, find, overrides)
    else:
        yield name, {**(entry.cfg or {}), **overrides}


def _is_all_of(index: Mapping[str, Any], name: str) -> bool:
    """Whether ``index`` has ``name`` and all that it stands for."""
    lacking = set()

    def find(member: str) -> Any:
        if member not in index:
            lacking.add(member)
        return index.get(member)

    return bool([*_files(name, find, {})]) and not lacking


def _member_files(
    group: Mapping[str, Any], find: Find, overrides: Mapping[str, Any]
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    inherited = {**{key: value for key, value in group.items() if key not in GROUP_FIELDS}, **overrides}
    for member in _as_list(group.get("task")):
        if isinstance(member, str):
            yield from _files(member, find, inherited)
        elif "group" not in member:
            yield from _files(member["task"], find, {**inherited, **member})
        elif find(member["group"]) is None:
            yield from _member_files(member, find, inherited)
        else:
            yield from _files(member["group"], find, {**inherited, **{k: v for k, v in member.items() if k != "group"}})


def _listed_metrics(file: Mapping[str, Any]) -> dict[str, bool]:
    """By metric of a task's file: whether more is better, True where it leaves that to lm-eval."""
    names = {}
    for each in _as_list(file.get("metric_list")):
        name = str(each["metric"])
        # A function of the user's own is given by path, and lm-eval calls the metric by the function's name.
        names[name.rpartition(".")[2] if "/" in name else name] = each.get("higher_is_better") is not False
    return names


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]
