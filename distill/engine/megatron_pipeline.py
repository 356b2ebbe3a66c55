"""One pipeline stage at work: student and teacher side by side through megatron-core's schedules.

The teacher's activations travel beside the student's, concatenated over channels, and hidden states are compared in the
stage that has the blocks. So the last stage needs the heads alone. Gradients of the student's half alone travel back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from distill.config import ObjectiveConfig
from distill.data.batch import IGNORE_INDEX, Batch
from distill.engine.megatron_messages import ForwardBeside, grid_groups
from distill.engine.megatron_state import wait_for_weight
from distill.engine.megatron_terms import HiddenTerms, add_term
from distill.evaluate import NUM_TARGETS
from distill.losses import head_losses, token_metrics
from distill.objective import Totals
from distill.teacher import CachedTeacher

AllTokens = Callable[[Any, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What this process has of student and teacher, and how it works on a batch.

    Hidden states are laid out [seq, batch, hidden], as megatron-core's; under sequence parallel ranks have equal parts
    of the sequence.
    """

    student: Any
    """``puzzle.model.megatron.DecoderStage``."""
    wrapped: nn.Module
    """The student in megatron-core's DDP."""
    teacher: Any
    """The same of the teacher; None: none runs."""
    objective: ObjectiveConfig
    layer_map: tuple[int, ...]
    all_tokens: AllTokens
    """Activations of a stage -> those of all tokens, on every rank."""

    @property
    def is_last(self) -> bool:
        """Whether this stage has the heads."""
        return parallel_state.is_pipeline_last_stage()

    @property
    def tensor_group(self) -> ProcessGroup:
        """Ranks that share every matrix, and the vocabulary."""
        return parallel_state.get_tensor_model_parallel_group()

    def train(self, batches: list[Batch], totals: Totals, cached: CachedTeacher | None) -> list[dict[str, Tensor]]:
        """Forward and backward of equal micro-batches on the device; gradients are added up, not yet over ranks.

        Args:
            batches: micro-batches.
            totals: of the whole optimizer step.
            cached: teacher whose signals stand in place of one that runs.

        Returns:
            This stage's contributions to the metrics, per micro-batch: on the last stage those of the heads as well.
        """
        metrics: list[dict[str, Tensor]] = []

        teaches = self.teacher is not None and self.objective.needs_teacher

        def work(data: Iterator[Batch], model: nn.Module) -> tuple[Tensor, Callable]:
            batch = next(data)
            hidden, taught, terms = self._forward(batch, totals, teaches=teaches)
            found = {} if terms is None else dict(terms.metrics)
            term = None if terms is None else terms.loss
            if not self.is_last:
                metrics.append(found if term is None else {"loss": term.detach(), **found})
                return self._outgoing(hidden if term is None else add_term(hidden, term), taught), _unused_loss
            loss = torch.zeros((), device=hidden.device) if term is None else term
            found["loss"] = loss.detach()
            if self.objective.reads_logits:
                head_loss, head_metrics = self._head_terms(hidden, taught, batch, totals, cached)
                loss = loss + head_loss
                # Every rank of the tensor group has the heads' terms whole, and under sequence parallel a part of the
                # others: what is summed over it later is dealt here.
                share = 1 / self._num_token_parts
                found["loss"] = found["loss"] + head_loss.detach() * share
                found |= {name: value * share for name, value in head_metrics.items()}
            metrics.append(found)
            # With a number of tokens megatron-core leaves the loss as it is; it is not divided by that number here.
            return loss, lambda output: (output, torch.zeros((), dtype=torch.int, device=output.device), {})

        self._run(work, batches, forward_only=False, teaches=teaches)
        return metrics

    @torch.no_grad()
    def evaluate(
        self, batches: list[Batch], chunk_tokens: int, cached: CachedTeacher | None
    ) -> list[dict[str, Tensor]]:
        """Sums as :func:`distill.evaluate.held_out_sums`, per micro-batch, on the last stage; elsewhere nothing."""
        sums: list[dict[str, Tensor]] = []
        teaches = self.teacher is not None

        def work(data: Iterator[Batch], model: nn.Module) -> tuple[Tensor, Callable]:
            batch = next(data)
            hidden, taught, _ = self._forward(batch, None, teaches=teaches)
            if not self.is_last:
                return self._outgoing(hidden, taught), _unused_loss
            labels = _by_position(batch.labels)
            found = token_metrics(
                self.all_tokens(self.student, hidden).flatten(0, 1),
                self._head,
                **{"teacher_hidden": None, "teacher_head": None, **self._teaching(taught, batch, cached)},
                labels=labels,
                chunk_tokens=chunk_tokens,
                vocab_group=self._vocab_group,
            )
            total = {name: values.sum(dtype=torch.float64) for name, values in found.items()}
            sums.append({**total, NUM_TARGETS: (labels != IGNORE_INDEX).sum(dtype=torch.float64)})
            return hidden, lambda output: (output, torch.zeros((), dtype=torch.int, device=output.device), {})

        self._run(work, batches, forward_only=True, teaches=teaches)
        return sums

    def _run(self, work: Callable, batches: list[Batch], *, forward_only: bool, teaches: bool) -> None:
        num_sequences, seq = batches[0].input_ids.shape
        assert all(len(batch) == num_sequences for batch in batches), "stages send tensors of one shape"
        travels = teaches and parallel_state.get_pipeline_model_parallel_world_size() > 1
        messages = {}
        if travels:
            extra = self.teacher.config.hidden_size
            messages = {"p2p_communicator": ForwardBeside(self.student.config, extra), "pg_collection": grid_groups()}
        get_forward_backward_func()(
            forward_step_func=work,
            data_iterator=iter(batches),
            model=self.wrapped,
            num_microbatches=len(batches),
            seq_length=seq,
            micro_batch_size=num_sequences,
            forward_only=forward_only,
            adjust_tensor_shapes_fn=self._with_teacher if travels else None,
            **messages,
        )

    def _with_teacher(self, received: list[tuple], sent: list[tuple]) -> tuple[list[tuple], list[tuple]]:
        extra = self.teacher.config.hidden_size
        widened = [[(seq, batch, hidden + extra) for seq, batch, hidden in shapes] for shapes in (received, sent)]
        return widened[0], widened[1]

    def _outgoing(self, hidden: Tensor, taught: Tensor | None) -> Tensor:
        return (hidden if taught is None else torch.cat((hidden, taught), dim=-1)).contiguous()

    def _forward(
        self, batch: Batch, totals: Totals | None, *, teaches: bool
    ) -> tuple[Tensor, Tensor | None, HiddenTerms | None]:
        """Outputs of the student and, if it ``teaches``, of the teacher, and the terms on what is in between (with
        ``totals``)."""
        received = self.student.decoder.input_tensor
        inputs = (batch.input_ids, batch.position_ids)
        taught, targets = None, {}
        if teaches:
            if received is not None:
                received, beside = received.split(
                    [self.student.config.hidden_size, self.teacher.config.hidden_size], -1
                )
                self.teacher.set_input_tensor(beside.detach())
            taught, targets = self._teach(batch)
        self.student.set_input_tensor(received)
        terms = None
        if totals is not None and self.objective.compares_hidden:
            terms = HiddenTerms(
                self.objective,
                self.layer_map,
                targets=targets,
                num_positions=totals.num_positions,
            )
        hidden = self.wrapped(*inputs, separate_documents=batch.separate_documents, after_block=terms)
        return hidden, taught, terms

    @torch.no_grad()
    def _teach(self, batch: Batch) -> tuple[Tensor, dict[int, Tensor]]:
        """The teacher's output, and those of its blocks here that the student's are paired with."""
        targets: dict[int, Tensor] = {}
        wanted = set(self.layer_map) if self.objective.compares_hidden else set()

        def keep(block: int, hidden: Tensor) -> Tensor:
            if block in wanted:
                targets[block] = hidden
            return hidden

        output = self.teacher(
            batch.input_ids, batch.position_ids, separate_documents=batch.separate_documents, after_block=keep
        )
        return output, targets

    def _head_terms(
        self, hidden: Tensor, taught: Tensor | None, batch: Batch, totals: Totals, cached: CachedTeacher | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return head_losses(
            self.all_tokens(self.student, hidden).flatten(0, 1),
            self._head,
            labels=_by_position(batch.labels),
            **(self._teaching(taught, batch, cached) if self.objective.kld > 0 else {}),
            kld_weight=self.objective.kld,
            lm_weight=self.objective.lm,
            divergence=self.objective.divergence,
            jsd_beta=self.objective.jsd_beta,
            temperature=self.objective.temperature,
            num_targets=totals.num_targets,
            vocab_group=self._vocab_group,
            chunk_tokens=self.objective.chunk_tokens,
        )

    def _teaching(self, taught: Tensor | None, batch: Batch, cached: CachedTeacher | None) -> dict[str, Any]:
        if cached is not None:
            top = cached.signal(batch).top
            assert top is not None
            return {"teacher_top": top.map(_by_position)}
        if taught is None:
            return {}
        hidden = self.all_tokens(self.teacher, taught).flatten(0, 1)
        return {"teacher_hidden": hidden, "teacher_head": self.teacher.head}

    @property
    def _head(self) -> Tensor:
        return wait_for_weight(self.wrapped, self.student.head)

    @property
    def _vocab_group(self) -> ProcessGroup | None:
        return self.tensor_group if self.tensor_group.size() > 1 else None

    @property
    def _num_token_parts(self) -> int:
        return self.tensor_group.size() if self.student.config.sequence_parallel else 1


def _by_position(tensor: Tensor) -> Tensor:
    """[batch, seq, ...] -> [seq * batch, ...]: the order of hidden states that are laid out by position."""
    return tensor.transpose(0, 1).flatten(0, 1)


def _unused_loss(_: Tensor) -> None:
    raise AssertionError("only the last stage has a loss")
