"""The adapter of lm-eval: which tasks are meant, and how well a model that is in memory does them.

Importing this module imports neither torch nor lm-eval, and checking the names of tasks imports no torch: a login node
does both.
"""

from __future__ import annotations

import difflib
import functools
import io
import math
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

from distill.config import require

MIN_VERSION = "0.4.13"

COMPARING = ("multiple_choice", "loglikelihood")
"""Types of task that compare likelihoods."""

WHOLE_MODEL = (*COMPARING, "loglikelihood_rolling", "generate_until")
"""Types of task that a whole model can do."""

FEWSHOT_SEED = 1234
"""lm-eval's own."""

DEFAULT_GENERATED_TOKENS = 256
"""lm-eval's own, where a task that generates does not say how many."""

BOOTSTRAP_ITERATIONS = 1000
"""For metrics whose standard error has no closed form; the one that comes out is certain to some 2%."""

Accuracies = dict[str, dict[tuple[str, int], float]]
"""By task of the configuration, and by lm-eval task and number of the example: 1 where the answer is right."""


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

    def installed_version(self) -> str:
        """Version of lm-eval. Raises ``ValueError`` where it is not installed."""
        try:
            return metadata.version("lm_eval")
        except metadata.PackageNotFoundError as error:
            raise self._not_installed(error) from error

    def require_known(self) -> None:
        """Raise ``ValueError`` where lm-eval is not installed, or knows no task of a name."""
        known = {*self._local().all_tasks}
        if not known.issuperset(self.tasks):
            known.update(_shipped().all_tasks)
        for name in self.tasks:
            near = ", ".join(difflib.get_close_matches(name, known, n=3, cutoff=0.6))
            require(
                name in known,
                f"{self.node}.tasks: lm-eval knows no {name}; near names are {near or 'none'}. Name one of its tasks, "
                f"or give the directory of a readable file of it as {self.node}.task_dir (now {self.directory})",
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
                loaded[name] = (local if name in local.all_subtasks else whole()).load([name])
            except Exception as error:  # whatever the library of data sets, the hub or code of the task raises
                raise ValueError(
                    f"{self.node}.tasks: {name} cannot be loaded: {_reason(error)}; hub tasks need a network, or their "
                    "examples in the cache of Hugging Face datasets"
                ) from error
        return loaded

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


def _manager(**options: Any) -> Any:
    from lm_eval.tasks import TaskManager

    path = options.pop("include_path", None)
    return TaskManager(include_path=None if path is None else Path(path).expanduser(), **options)


@functools.cache
def _shipped() -> Any:
    """The manager of lm-eval's own tasks, whose index of thousands of files takes seconds."""
    return _manager()


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """How a model does a task."""

    metric: str
    """lm-eval's name, with the filter of answers where there is one: ``acc``, ``exact_match,strict-match``."""
    value: float
    """Higher is better."""
    stderr: float | None
    """lm-eval's standard error; None where it has none."""
    n: int
    """Examples; of a group, those of all its tasks."""


@dataclass(frozen=True, kw_only=True)
class Tasks:
    """Tasks with their examples, for any number of models."""

    choice: TaskChoice
    loaded: Mapping[str, Mapping[str, Any]]
    """By task of the configuration, which may be a group: lm-eval's objects, as :meth:`TaskChoice.load` gives them."""

    @classmethod
    def read(cls, choice: TaskChoice, *, output_types: Collection[str]) -> Tasks:
        """Tasks of ``output_types``.

        Raises:
            ValueError: lm-eval is not installed, a task is unknown, of another type or cannot be read, or its questions
                cannot be put.
        """
        choice.require_known()
        choice.require_model_class()
        tasks = cls(choice=choice, loaded=choice.load())
        for name, task in tasks.members.items():
            require(
                task.OUTPUT_TYPE in output_types,
                f"{choice.node}.tasks: {name} is of type {task.OUTPUT_TYPE}; give tasks of type "
                f"{' or '.join(output_types)}",
            )
            _require_runnable(task, f"{choice.node}.tasks: {name}")
            # Both as lm-eval's own command does: a task that says 0 stays without.
            own = task.get_config("num_fewshot")
            if own is None or (own != 0 and choice.num_fewshot is not None):
                task.set_config(key="num_fewshot", value=choice.num_fewshot or 0)
        tasks._put_one_question()
        return tasks

    @property
    def members(self) -> dict[str, Any]:
        """lm-eval's task objects by name, those of groups among them."""
        return {name: task for loaded in self.loaded.values() for name, task in loaded["tasks"].items()}

    def main_metrics(self) -> dict[str, str]:
        """By task of the configuration: the metric that its file lists first, which stands for it.

        Raises:
            ValueError: a tag or a group has no value of its own, or less is better, so that no share of the parent's
                can be told.
        """
        metrics = {}
        for name, loaded in self.loaded.items():
            where, group = f"{self.choice.node}.tasks: {name}", loaded.get("groups", {}).get(name)
            if group is None:
                require(
                    name in loaded["tasks"],
                    f"{where} stands for several tasks without a value of the whole; name them: "
                    f"{', '.join(loaded['tasks'])}",
                )
                metric = next(iter(loaded["tasks"][name].aggregation()))
            else:
                require(
                    group.has_aggregation,
                    f"{where} is a group without a value of the whole (aggregate_metric_list); name its members: "
                    f"{', '.join(group.child_names)}",
                )
                metric = group.aggregate_metric_list[0].metric
            require(
                all(task.higher_is_better().get(metric, True) for task in loaded["tasks"].values()),
                f"{where} is measured by {metric}, where less is better, and has no share of the parent's; "
                "give tasks where more is better",
            )
            metrics[name] = metric
        return metrics

    def require_room(self, max_positions: int, model: str) -> None:
        """Raise ``ValueError`` where answers are to be as long as all ``max_positions`` of ``model``."""
        for name, task in self.members.items():
            if task.OUTPUT_TYPE == "generate_until":
                options = task.get_config("generation_kwargs") or {}
                names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
                length = next((options[key] for key in names if options.get(key)), DEFAULT_GENERATED_TOKENS)
                require(
                    length < max_positions,
                    f"{self.choice.node}.tasks: {name} generates up to {length} tokens, beyond the {max_positions} "
                    f"positions of {model}; leave it out, or set its generation_kwargs.max_gen_toks lower in a file of "
                    f"your own ({self.choice.node}.task_dir)",
                )

    def draw_fewshot(self) -> None:
        """Start the draw of worked examples anew: every model is to see the same ones."""
        for task in self.members.values():
            task.set_fewshot_seed(seed=FEWSHOT_SEED)

    def _put_one_question(self) -> None:
        """Templates, splits and the number of worked examples fail here, before any model is loaded."""
        self.draw_fewshot()
        for name, task in self.members.items():
            try:
                with _without_noise():
                    task.build_all_requests(limit=1, rank=0, world_size=1)
            except Exception as error:  # templates and code of the task raise what they like
                raise ValueError(
                    f"{self.choice.node}.tasks: the first question of {name} cannot be put with "
                    f"{task.get_config('num_fewshot')} worked examples: {_reason(error)}; correct its file, or "
                    "ask for fewer"
                ) from error


@dataclass(frozen=True, kw_only=True)
class Harness:
    """lm-eval around one model. The model's weights and blocks may change between calls."""

    tasks: Tasks
    model: Any
    """``DeciLMForCausalLM``."""
    lm: Any
    progress: bool

    @classmethod
    def around(
        cls, model: Any, tokenizer: Any, tasks: Tasks, *, batch_size: int, max_positions: int, progress: bool
    ) -> Harness:
        """The harness of a model in memory.

        Args:
            model: ``DeciLMForCausalLM``, on its device.
            tokenizer: transformers' tokenizer.
            tasks: what it is asked.
            batch_size: sequences per forward.
            max_positions: tokens of a question with its answer; longer ones lose their beginning.
            progress: show lm-eval's bars over the questions that are being answered.
        """
        from lm_eval.models.huggingface import HFLM

        with _without_noise():
            lm = HFLM(
                pretrained=model, backend="causal", tokenizer=tokenizer, batch_size=batch_size, max_length=max_positions
            )
        return cls(tasks=tasks, model=model, lm=lm, progress=progress)

    def accuracies(self) -> Accuracies:
        """Of every example; for tasks that compare likelihoods.

        Raises:
            ValueError: a task has no accuracy.
        """
        samples = self._run(bootstrap_iterations=0)["samples"]
        return {
            name: {
                (member, sample["doc_id"]): self._accuracy(member, sample)
                for member in loaded["tasks"]
                for sample in samples[member]
            }
            for name, loaded in self.tasks.loaded.items()
        }

    def results(self) -> dict[str, TaskResult]:
        """By task of the configuration, by its main metric; of groups the value of the whole.

        Raises:
            ValueError: as :meth:`Tasks.main_metrics`, or lm-eval gives no number.
        """
        metrics = self.tasks.main_metrics()
        found = self._run(bootstrap_iterations=BOOTSTRAP_ITERATIONS)["results"]
        return {name: self._result(name, metric, found[name]) for name, metric in metrics.items()}

    def _run(self, *, bootstrap_iterations: int) -> Mapping[str, Any]:
        from lm_eval.evaluator import evaluate

        groups = {name: group for loaded in self.tasks.loaded.values() for name, group in loaded["groups"].items()}
        self.tasks.draw_fewshot()
        bars = _shown_answers(self.lm) if self.progress else nullcontext()
        with _without_cache(self.model), bars, _without_noise():
            return evaluate(
                self.lm,
                {"tasks": self.tasks.members, "groups": groups},
                limit=self.tasks.choice.limit,
                bootstrap_iters=bootstrap_iterations,
            )

    def _accuracy(self, task: str, sample: Mapping[str, Any]) -> float:
        require(
            "acc" in sample,
            f"{self.tasks.choice.node}.tasks: {task} has no accuracy (acc) for its examples, only "
            f"{', '.join(sample.get('metrics', ()))}; give tasks that have it",
        )
        return float(sample["acc"])

    def _result(self, name: str, metric: str, found: Mapping[str, Any]) -> TaskResult:
        key = next((key for key in found if key.partition(",")[0] == metric), None)
        value = None if key is None else found[key]
        require(
            isinstance(value, int | float) and math.isfinite(value),
            f"{self.tasks.choice.node}.tasks: lm-eval gives {value} as {metric} of {name}, which is no number; "
            "leave it out",
        )
        assert key is not None
        assert value is not None
        filter_name = key.partition(",")[2]
        stderr = found.get(f"{metric}_stderr,{filter_name}")
        is_known = isinstance(stderr, int | float) and math.isfinite(stderr)
        return TaskResult(
            metric=metric if filter_name == "none" else key,
            value=float(value),
            stderr=float(stderr) if is_known and stderr is not None else None,
            n=int(found["sample_len"]),
        )


def _require_runnable(task: Any, where: str) -> None:
    require(
        not getattr(task, "UNSAFE_CODE", False),
        f"{where} runs code that the model writes, which this program does not; leave it out",
    )
    require(not getattr(task, "MULTIMODAL", False), f"{where} shows images or plays sounds; give tasks of text alone")


@contextmanager
def _without_cache(model: Any) -> Iterator[None]:
    """Likelihoods need no KV cache; generation asks for one itself."""
    use_cache, model.config.use_cache = model.config.use_cache, False
    try:
        yield
    finally:
        model.config.use_cache = use_cache


def _without_noise() -> redirect_stderr[io.StringIO]:
    """lm-eval has a bar for every task whose questions it puts together, and warns of models that are in memory."""
    return redirect_stderr(io.StringIO())


@contextmanager
def _shown_answers(lm: Any) -> Iterator[None]:
    """Within :func:`_without_noise`: the bars of the methods that answer come through all the same."""
    methods = ("loglikelihood", "loglikelihood_rolling", "generate_until")
    for name in methods:
        setattr(lm, name, _writing_to(sys.stderr, getattr(lm, name)))
    try:
        yield
    finally:
        # Left there, they would keep the model alive beside the next one, until a collection of garbage.
        for name in methods:
            delattr(lm, name)


def _writing_to(stream: TextIO, method: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **options: Any) -> Any:
        with redirect_stderr(stream):
            return method(*args, **options)

    return call


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
