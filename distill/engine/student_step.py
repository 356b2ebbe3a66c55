"""The student and its objective as one module, which DDP, FSDP2 and DeepSpeed wrap, and what is done to it before."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm

from distill import distributed
from distill.config import EngineConfig, ObjectiveConfig
from distill.data.batch import Batch
from distill.distributed import DataRanks
from distill.engine.base import compile_blocks
from distill.evaluate import add_sums, equal_shares, held_out_sums, means
from distill.objective import Objective, Totals
from distill.teacher import CachedTeacher, Teacher


class StudentStep(nn.Module):
    """Runs the objective within one forward call: sharded parameters are whole inside of it, the head's too.

    Teachers are no submodules.

    Args:
        model: student with the Hugging Face surface.
        objective: what each step minimises.
        held_out_teacher: whom the student is compared with on held-out sequences; None: no one.
    """

    def __init__(
        self, model: nn.Module, objective: Objective, held_out_teacher: Teacher | CachedTeacher | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self._objective = objective
        self._held_out_teacher = held_out_teacher

    def forward(self, batch: Batch, totals: Totals | None) -> Any:
        """Loss and metrics of ``batch`` as a contribution to a step of ``totals``.

        With ``totals`` None, without gradient and in eval mode, the sums of :func:`distill.evaluate.held_out_sums`.
        """
        if totals is not None:
            return self._objective(self.model, batch, totals)
        return held_out_sums(
            self.model, batch, teacher=self._held_out_teacher, chunk_tokens=self._objective.config.chunk_tokens
        )


def prepare_student(model: nn.Module, engine: EngineConfig, group: ProcessGroup | None) -> None:
    """Apply in place, before any wrapping, what ``engine`` asks of the model's own computation.

    Sequence parallelism, tiled FFNs, compiled blocks, recomputation and the offload of the blocks' inputs. The results
    stay the same up to rounding.

    Args:
        model: causal LM with the Hugging Face surface, perhaps on the meta device. Names of parameters stay.
        engine: which of them.
        group: ranks that share every sequence; None: each has its own whole.
    """
    share_sequences(model, group)
    if engine.ffn_tile_tokens > 0:
        from distill.memory import tile_ffns

        tile_ffns(model, engine.ffn_tile_tokens, compile=engine.compile)
    if engine.compile:
        compile_blocks(model)
    if engine.recompute:
        recompute_blocks(model)
    if engine.offload_activations:
        from distill.memory import offload_block_inputs

        offload_block_inputs(model)


def share_sequences(model: nn.Module, group: ProcessGroup | None) -> None:
    """Have ``model`` read one part of every sequence on each rank of ``group`` (Ulysses); None: leave it as it is."""
    if group is not None:
        from distill.sequence_parallel import use_ulysses

        use_ulysses(model, group)


def recompute_blocks(model: nn.Module) -> None:
    """Keep of each block its input alone, and compute the rest again in the backward pass (Chen et al., 2016)."""
    for block in model.model.layers:
        # Around forward, not the call: hooks that gather a block's weights stay outside of what is computed again.
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def freeze_untrained(model: nn.Module, objective: ObjectiveConfig) -> None:
    """Take what no term of ``objective`` reaches out of training: without a term on the logits, a head of its own."""
    head = model.get_output_embeddings().weight
    if not objective.reads_logits and head is not model.get_input_embeddings().weight:
        head.requires_grad_(False)


def evaluate_step(
    step: Callable[[Batch, None], dict[str, Tensor]],
    sequences: Tensor | Batch,
    *,
    ranks: DataRanks,
    micro_batch: int,
    device: torch.device,
) -> dict[str, float]:
    """Held-out metrics over all ranks, without gradient; every rank calls it.

    Args:
        step: a :class:`StudentStep` in evaluation mode, perhaps wrapped.
        sequences: as :meth:`distill.engine.base.Engine.evaluate` takes them, all of them on every rank.
        ranks: which of them are this rank's.
        micro_batch: sequences in one forward pass.
        device: the student's.
    """
    share = equal_shares(sequences, rank=ranks.data_rank, num_ranks=ranks.num_data_ranks)
    sums: dict[str, Tensor] = {}
    with torch.no_grad(), tqdm(total=len(share), desc="evaluate", unit="seq", leave=False) as bar:
        for batch in share.split(micro_batch):
            add_sums(sums, step(own_part(batch, ranks, device), None))
            bar.update(len(batch))
    return means(distributed.all_reduce_sums(sums))


def own_part(batch: Batch, ranks: DataRanks, device: torch.device) -> Batch:
    """This rank's part of the sequences of its data rank, on ``device``."""
    if ranks.num_parts > 1:
        batch = batch.sequence_part(ranks.part, ranks.num_parts)
    return batch.to(device)


def sum_metrics(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Sums by name over micro-batches; all have the same names."""
    return {name: sum((part[name] for part in parts[1:]), parts[0][name]) for name in parts[0]}
