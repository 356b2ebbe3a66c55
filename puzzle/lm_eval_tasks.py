"""The adapter of lm-eval's tasks and evaluator: how well a model that is in memory does them.

Importing this module imports neither torch nor lm-eval.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from typing import Any, TextIO

from distill.config import require
from puzzle.lm_eval_index import TaskChoice, reason
from puzzle.lm_eval_seeds import SEEDS, seeded
from puzzle.task_metrics import Metric, TaskResult, choose_metric, read_result

DEFAULT_GENERATED_TOKENS = 256
"""lm-eval's own, where a task that generates does not say how many."""

BOOTSTRAP_ITERATIONS = 1000
"""For metrics whose standard error has no closed form; the one that comes out is certain to some 2%."""

Accuracies = dict[str, dict[tuple[str, int], float]]
"""By task of the configuration, and by lm-eval task and number of the example: 1 where the answer is right."""


@dataclass(frozen=True, kw_only=True)
class Tasks:
    """Tasks with their examples, for any number of models."""

    choice: TaskChoice
    loaded: Mapping[str, Mapping[str, Any]]
    """By task of the configuration, which may be a group: lm-eval's objects, as :meth:`TaskChoice.load` gives them."""

    @classmethod
    def read(cls, choice: TaskChoice) -> Tasks:
        """The tasks of ``choice``.

        Raises:
            ValueError: lm-eval is not installed, a task is unknown, of another type or cannot be read, two have one
                task with different settings, no metric can stand for one, or its questions cannot be put.
        """
        choice.installed_version()
        choice.require_usable()
        choice.require_model_class()
        tasks = cls(choice=choice, loaded=choice.load())
        with seeded():  # lm-eval draws where it is asked for a task's name
            tasks._require_one_setting()
        for name, task in tasks.members.items():
            choice.require_type(name, task.OUTPUT_TYPE)
            choice.require_no_code(name, getattr(task, "UNSAFE_CODE", False))
            require(
                not getattr(task, "MULTIMODAL", False),
                f"{choice.node}.tasks: {name} shows images or plays sounds; give tasks of text alone",
            )
            # Both as lm-eval's own command does: a task that says 0 stays without.
            own = task.get_config("num_fewshot")
            if own is None or (own != 0 and choice.num_fewshot is not None):
                task.set_config(key="num_fewshot", value=choice.num_fewshot or 0)
        if not choice.by_example:
            tasks.main_metrics()
        tasks._put_questions(limit=1)
        return tasks

    @property
    def members(self) -> dict[str, Any]:
        """lm-eval's task objects by name, those of groups among them."""
        return {name: task for loaded in self.loaded.values() for name, task in loaded["tasks"].items()}

    def main_metrics(self) -> dict[str, Metric]:
        """By task of the configuration: the metric that stands for it.

        That is the configuration's, else the first where more is better, with the first filter of answers.

        Raises:
            ValueError: a tag or a group has no value of its own, the configuration's metric is not there, or less is
                better, so that no share of the parent's can be told.
        """
        return {name: self._main_metric(name, loaded) for name, loaded in self.loaded.items()}

    def _main_metric(self, name: str, loaded: Mapping[str, Any]) -> Metric:
        group, tasks = loaded.get("groups", {}).get(name), loaded["tasks"]
        filters: list[str] = []
        if group is None:
            if name not in tasks:
                self.choice.refuse_tag(name, [*tasks])
            metrics = [*tasks[name].aggregation()]
        else:
            if not group.has_aggregation:
                self.choice.refuse_group(name, group.child_names)
            metrics = [each.metric for each in group.aggregate_metric_list]
        more_is_better = {
            metric: all(bool(task.higher_is_better().get(metric, True)) for task in tasks.values())
            for metric in metrics
        }
        metric = choose_metric(self.choice.node, name, more_is_better, self.choice.metrics.get(name))
        if group is not None:
            filters = next(each for each in group.aggregate_metric_list if each.metric == metric).filter_list or []
        first = next(iter(tasks.values()))
        return Metric(name=metric, filter=filters[0] if filters else first._filters[0].name)

    def num_truncated(self, tokenizer: Any, max_positions: int) -> dict[str, int]:
        """By task of the configuration: examples of which a question loses its beginning in ``max_positions`` tokens.

        Raises:
            ValueError: all examples of a task do, an answer alone fills the positions, or answers are to be as long.
        """
        self._require_room_to_generate(max_positions)
        self._put_questions(limit=self.choice.limit)
        cut = {name: self._num_cut(name, task, tokenizer, max_positions) for name, task in self.members.items()}
        return {name: sum(cut[member] for member in loaded["tasks"]) for name, loaded in self.loaded.items()}

    def _num_cut(self, name: str, task: Any, tokenizer: Any, max_positions: int) -> int:
        cut = set()
        for request in task.instances:
            if request.request_type == "loglikelihood":
                question, answer = request.args
                # The last token of the answer is asked for, not read.
                room = max_positions + 1
                require(
                    _num_tokens(tokenizer, answer) < room,
                    f"{self.choice.node}.tasks: an answer of {name} fills the {max_positions} positions that all "
                    "models have, without its question; leave it out",
                )
                length = _num_tokens(tokenizer, question + answer) + (question == "")
            elif request.request_type == "generate_until":
                length, room = _num_tokens(tokenizer, request.args[0]), max_positions - _generated_tokens(task)
            else:
                continue  # whole documents, read window by window
            if length > room:
                cut.add(request.doc_id)
        num_examples = len({request.doc_id for request in task.instances})
        require(
            len(cut) < num_examples,
            f"{self.choice.node}.tasks: with {task.get_config('num_fewshot')} worked examples, none of the "
            f"{num_examples} questions of {name} fits the {max_positions} positions that all models have; ask for "
            f"fewer ({self.choice.node}.num_fewshot), or leave it out",
        )
        return len(cut)

    def _require_room_to_generate(self, max_positions: int) -> None:
        for name, task in self.members.items():
            if task.OUTPUT_TYPE == "generate_until":
                length = _generated_tokens(task)
                require(
                    length < max_positions,
                    f"{self.choice.node}.tasks: {name} generates up to {length} tokens, beyond the {max_positions} "
                    "positions that all models have; leave it out, or set its generation_kwargs.max_gen_toks lower in "
                    f"a file of your own ({self.choice.node}.task_dir)",
                )

    def draw_fewshot(self) -> None:
        """Start the draw of worked examples anew: every model is to see the same ones."""
        for task in self.members.values():
            task.set_fewshot_seed(seed=SEEDS["fewshot_seed"])

    def _require_one_setting(self) -> None:
        """lm-eval runs a task once per name, whatever number of groups it is of."""
        seen: dict[str, tuple[str, dict[str, Any]]] = {}
        for name, loaded in self.loaded.items():
            group = loaded.get("groups", {}).get(name)
            for task in loaded["tasks"].values() if group is None else group.get_all_tasks():
                settings = task.dump_config()
                earlier, other = seen.setdefault(task.task_name, (name, settings))
                differing = [key for key in {**other, **settings} if other.get(key) != settings.get(key)]
                require(
                    not differing,
                    f"{self.choice.node}.tasks: {earlier} and {name} have {task.task_name} with different settings "
                    f"({', '.join(differing)}), and one step runs it with one of them; evaluate them in two steps",
                )

    def _put_questions(self, limit: int | None) -> None:
        """Templates, splits and the number of worked examples fail here, before any model is loaded."""
        self.draw_fewshot()
        for name, task in self.members.items():
            try:
                with _without_noise(), seeded():
                    task.build_all_requests(limit=limit, rank=0, world_size=1)
            except Exception as error:  # templates and code of the task raise what they like
                which = "the first question" if limit == 1 else "a question"
                raise ValueError(
                    f"{self.choice.node}.tasks: {which} of {name} cannot be put with "
                    f"{task.get_config('num_fewshot')} worked examples: {reason(error)}; correct its file, or "
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
                pretrained=model,
                backend="causal",
                tokenizer=tokenizer,
                batch_size=batch_size,
                max_length=max_positions,
                # The data type of the logits would round likelihoods that are summed and compared.
                softmax_dtype="float32",
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
        node = self.tasks.choice.node
        return {name: read_result(node, name, metric, found[name]) for name, metric in metrics.items()}

    def _run(self, *, bootstrap_iterations: int) -> Mapping[str, Any]:
        from lm_eval.evaluator import evaluate

        groups = {name: group for loaded in self.tasks.loaded.values() for name, group in loaded["groups"].items()}
        self.tasks.draw_fewshot()
        bars = _shown_answers(self.lm) if self.progress else nullcontext()
        with _without_cache(self.model), bars, _without_noise(), seeded():
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


def _generated_tokens(task: Any) -> int:
    options = task.get_config("generation_kwargs") or {}
    names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
    return int(next((options[key] for key in names if options.get(key)), DEFAULT_GENERATED_TOKENS))


def _num_tokens(tokenizer: Any, text: str) -> int:
    """As lm-eval counts: with the tokenizer's own first token, unless the text has it."""
    bos = tokenizer.bos_token
    return len(tokenizer.encode(text, **({"add_special_tokens": False} if bos and text.startswith(bos) else {})))


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
