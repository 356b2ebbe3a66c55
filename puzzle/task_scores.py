"""lm-eval tasks as scores: how much accuracy a variant at one block, alone, costs.

Every variant runs through every example anew, in a whole model: this takes long, and needs no calibration tokens.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from distill.config import require
from distill.distributed import gather_objects, is_main
from puzzle.config import ScoreConfig
from puzzle.lm_eval_index import TaskChoice
from puzzle.lm_eval_tasks import Accuracies, Harness, Tasks
from puzzle.model.architecture import Architecture, BlockConfig
from puzzle.model.modeling_decilm import DeciLMForCausalLM
from puzzle.replacement_runs import ReplacedTensors, variant_block
from puzzle.slices import ParentSlice
from puzzle.tables import ScoreRow, ScoreTable


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
    # Generation would need a KV cache, in which a block that is built alone would take the first block's place.
    choice = TaskChoice(
        node="scores", tasks=config.tasks, directory=config.task_dir, limit=config.task_limit, by_example=True
    )
    harness = Harness.around(
        parent.model,
        tokenizer,
        Tasks.read(choice),
        batch_size=config.batch_size,
        max_positions=architecture.max_positions,
        progress=False,
    )
    exchange = _Exchange(parent=parent, architecture=architecture, replaced_tensors=replaced_tensors, harness=harness)
    base = tuple(architecture.blocks if base is None else base)
    at_parent = exchange.accuracies(architecture.blocks)
    at_base = at_parent if base == architecture.blocks else exchange.accuracies(base)
    flat = [(index, variant) for index, at_block in enumerate(variants) for variant in at_block]
    drops = {}
    share = parent.share(list(enumerate(flat)))
    for row, (index, variant) in tqdm(share, desc="tasks", unit="variant", leave=False, disable=not is_main()):
        is_base = variant == base[index]
        child = at_base if is_base else exchange.accuracies((*base[:index], variant, *base[index + 1 :]))
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
class _Exchange:
    """The parent within its harness, whose blocks are exchanged in place."""

    parent: ParentSlice
    architecture: Architecture
    replaced_tensors: ReplacedTensors
    harness: Harness

    def accuracies(self, blocks: Sequence[BlockConfig]) -> Accuracies:
        """Of the model with these ``blocks``."""
        model = self.parent.model
        own = list(model.model.layers)
        built = [
            variant_block(self.parent, self.architecture, index, block, self.replaced_tensors)
            for index, block in enumerate(blocks)
        ]
        _place(model, built)
        try:
            return self.harness.accuracies()
        finally:
            _place(model, own)


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
