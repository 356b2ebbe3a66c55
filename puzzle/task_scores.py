"""lm-eval tasks as scores: how much accuracy a variant at one block, alone, costs. The one module that knows lm-eval.

Every variant runs through every example anew, in a whole model: this takes long, and needs no calibration tokens.
"""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from distill.config import require
from distill.distributed import gather_objects, is_main
from puzzle.config import ScoreConfig
from puzzle.model.architecture import Architecture, BlockConfig
from puzzle.model.modeling_decilm import DeciLMForCausalLM
from puzzle.replacement_runs import ReplacedTensors, variant_block
from puzzle.slices import ParentSlice
from puzzle.tables import ScoreRow, ScoreTable

OUTPUT_TYPES = ("multiple_choice", "loglikelihood")
"""Tasks that compare likelihoods. Generation would need a KV cache, which a single foreign block has no place in."""

MIN_VERSION = "0.4.13"

FEWSHOT_SEED = 1234
"""lm-eval's own."""

Accuracies = dict[str, dict[tuple[str, int], float]]
"""By task of the configuration, and by lm-eval task and number of the example: 1 where the answer is right."""


def add_task_scores(
    table: ScoreTable,
    parent: ParentSlice,
    architecture: Architecture,
    variants: Sequence[Sequence[BlockConfig]],
    replaced_tensors: ReplacedTensors,
    tokenizer: PreTrainedTokenizerBase,
    config: ScoreConfig,
    *,
    base: Sequence[BlockConfig] | None = None,
) -> ScoreTable:
    """``table`` with a column per task of ``config.tasks``: the base's accuracy less the variant's.

    Replicas share the variants. The model runs in the data type of its weights throughout. Arguments are those of
    :func:`puzzle.score.score_variants`; ``table`` has a row for each of ``variants``, in their order.

    Raises:
        ValueError: lm-eval is not installed, the parent is sliced, or a task is unknown, generates, or has no accuracy.
    """
    require(
        parent.num_slices == 1,
        f"scores.tasks: lm-eval runs whole models, engine.slices={parent.num_slices}; set it to 1, or scores.tasks=[]",
    )
    harness = _Harness.create(parent, architecture, replaced_tensors, tokenizer, config)
    base = tuple(architecture.blocks if base is None else base)
    at_parent = harness.accuracies(architecture.blocks)
    at_base = at_parent if base == architecture.blocks else harness.accuracies(base)
    flat = [(index, variant) for index, at_block in enumerate(variants) for variant in at_block]
    drops = {}
    share = parent.share(list(enumerate(flat)))
    for row, (index, variant) in tqdm(share, desc="tasks", unit="variant", leave=False, disable=not is_main()):
        is_base = variant == base[index]
        child = at_base if is_base else harness.accuracies((*base[:index], variant, *base[index + 1 :]))
        drops[row] = _drops(at_base, child)
    if parent.num_replicas > 1:
        drops = {row: drop for part in gather_objects(drops) for row, drop in part.items()}
    return replace(
        table,
        parent=table.parent | {name: statistics.fmean(values.values()) for name, values in at_parent.items()},
        rows=tuple(_with_tasks(row, *drops[number]) for number, row in enumerate(table.rows)),
        base_values=None if table.base_values is None else table.base_values | _drops(at_parent, at_base)[0],
    )


@dataclass(frozen=True, kw_only=True)
class _Harness:
    """lm-eval around the parent, whose blocks are exchanged in place."""

    parent: ParentSlice
    architecture: Architecture
    replaced_tensors: ReplacedTensors
    lm: Any
    tasks: Mapping[str, Mapping[str, Any]]
    """lm-eval's task objects, by task of the configuration (which may be a group) and name."""
    limit: int | None

    @classmethod
    def create(
        cls,
        parent: ParentSlice,
        architecture: Architecture,
        replaced_tensors: ReplacedTensors,
        tokenizer: PreTrainedTokenizerBase,
        config: ScoreConfig,
    ) -> _Harness:
        """Reads the tasks."""
        try:
            from lm_eval.models.huggingface import HFLM
        except ImportError as error:
            raise ValueError(
                f"scores.tasks={list(config.tasks)} needs the package lm-eval ({error}); "
                f"pip install 'lm-eval>={MIN_VERSION}', or set scores.tasks=[]"
            ) from error
        lm = HFLM(
            pretrained=parent.model,
            backend="causal",
            tokenizer=tokenizer,
            batch_size=config.batch_size,
            max_length=architecture.max_positions,
        )
        return cls(
            parent=parent,
            architecture=architecture,
            replaced_tensors=replaced_tensors,
            lm=lm,
            tasks=_tasks(config),
            limit=config.task_limit,
        )

    def accuracies(self, blocks: Sequence[BlockConfig]) -> Accuracies:
        """Of the model with these ``blocks``."""
        from lm_eval.evaluator import evaluate

        model = self.parent.model
        own, use_cache = list(model.model.layers), model.config.use_cache
        built = [
            variant_block(self.parent, self.architecture, index, block, self.replaced_tensors)
            for index, block in enumerate(blocks)
        ]
        tasks = {name: task for members in self.tasks.values() for name, task in members.items()}
        _place(model, built)
        # A block that is built alone would take the first block's place in a cache.
        model.config.use_cache = False
        try:
            # Without its bars, which scroll ours away, and its bootstrapped errors: ours are of paired differences.
            with redirect_stderr(io.StringIO()):
                found = evaluate(self.lm, {"tasks": tasks, "groups": {}}, limit=self.limit, bootstrap_iters=0)
        finally:
            _place(model, own)
            model.config.use_cache = use_cache
        samples = found["samples"]
        return {
            name: {
                (member, sample["doc_id"]): _accuracy(member, sample) for member in tasks for sample in samples[member]
            }
            for name, tasks in self.tasks.items()
        }


def _tasks(config: ScoreConfig) -> dict[str, dict[str, Any]]:
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=config.task_dir)
    unknown = [name for name in config.tasks if name not in manager.all_tasks]
    require(
        not unknown,
        f"scores.tasks: lm-eval knows no {', '.join(unknown)}; name one of its tasks, or give the directory of its "
        f"file as scores.task_dir (now {config.task_dir})",
    )
    tasks = {name: manager.load([name])["tasks"] for name in config.tasks}
    for members in tasks.values():
        for name, task in members.items():
            require(
                task.OUTPUT_TYPE in OUTPUT_TYPES,
                f"scores.tasks: {name} is of type {task.OUTPUT_TYPE}; give tasks that compare likelihoods, of type "
                f"{' or '.join(OUTPUT_TYPES)}",
            )
            # As lm-eval's own command does where nobody asks for anything else.
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=FEWSHOT_SEED)
    return tasks


def _accuracy(task: str, sample: Mapping[str, Any]) -> float:
    require(
        "acc" in sample,
        f"scores.tasks: {task} has no accuracy (acc) for its examples, only {', '.join(sample.get('metrics', ()))}; "
        "give tasks that have it",
    )
    return float(sample["acc"])


def _drops(base: Accuracies, child: Accuracies) -> tuple[dict[str, float], dict[str, float]]:
    """By task: mean over examples of the base's accuracy less the child's, and its standard error."""
    values, stderr = {}, {}
    for name, examples in base.items():
        differences = [accuracy - child[name][key] for key, accuracy in examples.items()]
        values[name] = statistics.fmean(differences)
        if len(differences) > 1:
            stderr[name] = statistics.stdev(differences) / math.sqrt(len(differences))
    return values, stderr


def _with_tasks(row: ScoreRow, values: Mapping[str, float], stderr: Mapping[str, float]) -> ScoreRow:
    return replace(row, values={**row.values, **values}, stderr={**row.stderr, **stderr})


def _place(model: DeciLMForCausalLM, blocks: Sequence[nn.Module]) -> None:
    for index, block in enumerate(blocks):
        model.model.layers[index] = block
