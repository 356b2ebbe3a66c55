"""What fusing each group of neighbouring FFNs does to a model, and what removing each FFN does.

Every group of attention-free FFNs is scored with that group alone in parallel form: each member reads the input of the
first, and what they add is summed (FFN Fusion, arXiv 2503.18908, eq. 5), which is what the fused FFN computes (Theorem
3.1). No weights are built. Nothing before a group is computed again: the unfused model advances block by block beside
the groups that are open, and only what follows the end of a group runs anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from distill.config import require
from distill.engine.base import compile_blocks, expect_shapes
from fusion.config import Norm
from fusion.group_table import GroupScore, RemovalScore
from fusion.grouping import Group, group_width
from puzzle.blockwise import embed, precision
from puzzle.model.architecture import Architecture, require_sequential
from puzzle.model.modeling_decilm import DeciLMDecoderLayer, DeciLMForCausalLM
from puzzle.score_metrics import sequence_metrics

Values = dict[str, Tensor]
"""``kld`` and ``lm_loss``, each fp64 [models, sequences]."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Groups and removals of one model, each alone."""

    lm_loss: float
    """Next-token loss of the unfused model, nats per token."""
    groups: tuple[GroupScore, ...]
    removals: tuple[RemovalScore, ...]


def attention_free_blocks(architecture: Architecture) -> tuple[int, ...]:
    """Blocks with nothing but a SwiGLU FFN."""
    return tuple(index for index, block in enumerate(architecture.blocks) if block.is_attention_free)


def scored_groups(architecture: Architecture, max_members: int | None) -> tuple[Group, ...]:
    """Every group of two to ``max_members`` neighbouring attention-free FFNs; FFNs that are fused already end a run.

    Raises:
        ValueError: there is none, or the model has parallel windows.
    """
    require_sequential(architecture.parallel_windows, "score_groups")
    reach = (max_members or architecture.num_blocks) - 1
    groups = [
        (first, last)
        for run_first, run_last in architecture.fusible_runs()
        for first in range(run_first, run_last)
        for last in range(first + 1, min(run_last, first + reach) + 1)
    ]
    require(
        len(groups) > 0,
        f"group_scores: no two neighbouring blocks of the {architecture.num_blocks} have an FFN that is not fused "
        "already, and no attention; remove neighbouring attentions first (stage prune_attention or search)",
    )
    return tuple(groups)


def score_groups(
    model: DeciLMForCausalLM,
    architecture: Architecture,
    sequences: Tensor,
    *,
    norm: Norm,
    batch_size: int,
    max_members: int | None = None,
    compile: bool = False,
) -> Scores:
    """Score every group of :func:`scored_groups`, fused alone, and every attention-free FFN, removed alone.

    Besides the model, memory holds some four hidden states [batch, seq, hidden] in fp32 for every FFN of the longest
    run.

    Args:
        model: unfused, in the data type to score in; matrix products run in it, all else in fp32.
        architecture: of ``model``.
        sequences: token ids [num_sequences, seq].
        norm: "folded": every member reads its own norm of the common input; "last": all read the last member's.
        batch_size: sequences per forward; a batch counts once for each group that shares the forward of what follows.
        max_members: FFNs of the longest group; None: whole runs.
        compile: compile with torch.compile the blocks, in place, what members add, and the metrics. Blocks and members
            then round alike, so that no difference of theirs is in a divergence.

    Raises:
        ValueError: fewer than two sequences, which have no standard error; nothing to fuse.
    """
    require(
        len(sequences) >= 2,
        f"group_scores.num_sequences={len(sequences)}: a standard error takes two sequences or more; raise it",
    )
    groups, removable = scored_groups(architecture, max_members), attention_free_blocks(architecture)
    largest_batch = min(batch_size, len(sequences))
    runs = _GroupRuns(
        model=model,
        groups=frozenset(groups),
        removable=frozenset(removable),
        norm=norm,
        models_per_forward=batch_size // largest_batch,
        compile=compile,
    )
    batches = sequences.split(largest_batch)
    total = len(batches) * (len(groups) + len(removable))
    with torch.no_grad(), precision(model), tqdm(total=total, desc="score", unit="model", leave=False) as progress:
        measured = [runs.measure(batch.to(model.device), progress) for batch in batches]
    of = {
        key: {name: torch.cat([part[key][name] for part in measured]).cpu() for name in _NAMES} for key in measured[0]
    }
    return Scores(
        lm_loss=of[_UNFUSED]["lm_loss"].mean().item(),
        groups=tuple(
            GroupScore(first=group[0], last=group[1], ffn_dim=group_width(architecture, group), **_summary(of[group]))
            for group in groups
        ),
        removals=tuple(RemovalScore(block=index, **_summary(of[index, index])) for index in removable),
    )


_NAMES = ("kld", "lm_loss")
_UNFUSED: Group = (-1, -1)
"""Stands for the unfused model where the others are named by their group; (i, i) is the removal of the FFN of i."""


def _summary(values: Mapping[str, Tensor]) -> dict[str, float]:
    kld = values["kld"]
    return {
        "kld": kld.mean().item(),
        "kld_stderr": kld.std().item() / math.sqrt(len(kld)),
        "lm_loss": values["lm_loss"].mean().item(),
    }


@dataclass(kw_only=True)
class _OpenGroup:
    """A group that later members may still join."""

    first: int
    input: Tensor
    """[batch, seq, hidden], fp32: what all members read."""
    output: Tensor
    """[batch, seq, hidden]: the input, and what the members so far add to it, each by its own norm."""


@dataclass(kw_only=True)
class _GroupRuns:
    """Runs the models that differ from one unfused model in one group or one removal."""

    model: DeciLMForCausalLM
    groups: frozenset[Group]
    removable: frozenset[int]
    norm: Norm
    models_per_forward: int
    compile: bool
    _attention_inputs: dict[int, dict[str, Any]] = field(default_factory=dict)
    _update: Callable[[nn.Module, nn.Module, Tensor], Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self._update = _update
        if self.compile:
            compile_blocks(self.model)
            # Forwards of full and of last batches, and of every power of two of models.
            expect_shapes(len(self._blocks) * (self.models_per_forward.bit_length() + 1))
            self._update = torch.compile(_update, dynamic=False)

    @property
    def _blocks(self) -> list[DeciLMDecoderLayer]:
        return list(self.model.model.layers)

    def measure(self, input_ids: Tensor, progress: Any) -> dict[Group, Values]:
        """Every model's values on ``input_ids`` [batch, seq], each [batch], on the device."""
        hidden, _ = embed(self.model, input_ids)
        final = self.model.model.norm(self._through(hidden, self._blocks))
        found = self._compared({_UNFUSED: final}, final, input_ids)
        open_groups: list[_OpenGroup] = []
        for index, block in enumerate(self._blocks):
            after = self._through(hidden, [block])
            ended: dict[Group, Tensor] = {(index, index): hidden} if index in self.removable else {}
            open_groups = [group for group in open_groups if (group.first, index) in self.groups]
            for group in open_groups:
                ended[group.first, index] = self._joined(group, index)
            if ended:
                later = self._blocks[index + 1 :]
                found |= self._compared(self._finals(ended, later), final, input_ids)
                progress.update(len(ended))
            open_groups.append(_OpenGroup(first=index, input=hidden, output=after))
            hidden = after
        return found

    def _joined(self, group: _OpenGroup, last: int) -> Tensor:
        """Output [batch, seq, hidden] of ``group`` with the members up to ``last``, which joins it now."""
        norm = self._blocks[last].post_attention_layernorm
        assert norm is not None
        if self.norm == "folded":
            group.output = group.output + self._update(norm, self._ffn(last), group.input)
            return group.output
        # Another last member is another norm for all of them: no sum of theirs is of use.
        output = group.input
        for index in range(group.first, last + 1):
            output = output + self._update(norm, self._ffn(index), group.input)
        return output

    def _ffn(self, index: int) -> nn.Module:
        ffn = self._blocks[index].mlp
        assert ffn is not None
        return ffn

    def _finals(self, ended: Mapping[Group, Tensor], later: Sequence[DeciLMDecoderLayer]) -> dict[Group, Tensor]:
        """What becomes of hidden states behind one block after the ``later`` ones and the final norm."""
        keys = list(ended)
        finals: list[Tensor] = []
        while (done := len(finals)) < len(keys):
            # Powers of two, so that few shapes are compiled.
            num_models = 1 << (min(len(keys) - done, self.models_per_forward).bit_length() - 1)
            chunk = torch.cat([ended[key] for key in keys[done : done + num_models]])
            states = self.model.model.norm(self._through(chunk, later))
            finals.extend(states.unflatten(0, (num_models, -1)).unbind())
        return dict(zip(keys, finals, strict=True))

    def _compared(self, finals: Mapping[Group, Tensor], unfused: Tensor, input_ids: Tensor) -> dict[Group, Values]:
        head = self.model.get_output_embeddings().weight
        values = sequence_metrics(torch.stack([*finals.values()]), unfused, head, input_ids, compile=self.compile)
        return {key: {name: values[name][row] for name in _NAMES} for row, key in enumerate(finals)}

    def _through(self, hidden: Tensor, blocks: Sequence[DeciLMDecoderLayer]) -> Tensor:
        if len(hidden) not in self._attention_inputs:
            self._attention_inputs[len(hidden)] = self.model.model.attention_inputs(hidden)
        for block in blocks:
            hidden = block(hidden, **self._attention_inputs[len(hidden)])
        return hidden


def _update(norm: nn.Module, ffn: nn.Module, hidden: Tensor) -> Tensor:
    """What a member with ``ffn`` adds to the common input ``hidden`` [batch, seq, hidden], read through ``norm``."""
    return ffn(norm(hidden))
