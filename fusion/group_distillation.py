"""Block-local distillation of fusion groups: what fusion breaks is mended where it breaks, before any global training.

Fusion replaces the chain of a group's FFNs by their parallel sum (FFN Fusion, arXiv 2503.18908, eq. 5). Both directions
of this training learn from the frozen unfused model, from the hidden state before the group towards the hidden state
after it, by the normalised error of blockwise local distillation (Puzzle, arXiv 2411.19146, section 3):

- a fused FFN learns to output what its members output one after another;
- the members of a group that is not fused yet learn to output the same when they all read the group's input, without
  forgetting to do so one after another: its fusion costs less, for what the second error of every group leaves.

All groups learn from one pass of the unfused model per batch. No gradient crosses a group, so that memory holds the
weights and the activations of one group, and what one group learns does not depend on the others.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path

from torch import Tensor

from distill import resume
from distill.tracking import Tracker
from fusion.config import Norm
from fusion.group_trainees import GroupTrainees, Learners
from fusion.grouping import Group, block_spans, format_groups
from puzzle.bld import TRAINING_BYTES_PER_PARAM, memory_budget
from puzzle.group_training import BldSettings, GroupRun, run_together
from puzzle.model.architecture import Architecture
from puzzle.model.checkpoint import WEIGHTS_FILE, TensorReader, check_tensors, copy_checkpoint, read_architecture
from puzzle.model.tensor_layout import EMBEDDING, block_shapes
from puzzle.slices import ParentSlice
from puzzle.trainees import HeldOut, output_power


@dataclass(frozen=True, kw_only=True)
class GroupOutcome:
    """What came of one group: MSE(child, model) / MSE(0, model) of the hidden state after it on held-out sequences, of
    the weights as they are stored."""

    first: int
    """First block of the group in the unfused model."""
    last: int
    """Last block, inclusive."""
    nmse_init: float
    """In parallel form (the fused FFN's own), before training."""
    nmse: float
    """In parallel form, as stored."""
    sequential_nmse: float | None
    """The members one after another, as stored; null where they are fused."""
    trained: bool
    """False: training had made the held-out loss worse, so that the weights are those from before."""

    @property
    def group(self) -> Group:
        """First and last block."""
        return self.first, self.last


def learning_blocks(num_blocks: int, groups: Sequence[Group], *, fused: bool) -> dict[Group, tuple[int, ...]]:
    """The :data:`Learners` of ``groups`` of an unfused model of ``num_blocks`` blocks.

    Args:
        groups: in rising order.
        fused: whether the checkpoint that learns holds every group as one block; otherwise it is the unfused one.
    """
    if not fused:
        return {group: tuple(range(group[0], group[1] + 1)) for group in groups}
    spans = block_spans(num_blocks, groups)
    return {group: (spans.index(group),) for group in groups}


def distill_groups(
    parent: ParentSlice,
    source_dir: Path,
    learners: Learners,
    settings: BldSettings,
    *,
    norm: Norm,
    sequential_weight: float,
    out_dir: Path,
    resume_dir: Path,
    tracker: Tracker | None = None,
) -> tuple[GroupOutcome, ...]:
    """Train the blocks of ``learners`` and write the checkpoint that they belong to; all other tensors are copied.

    A group that training made worse on the held-out sequences stays as it was. Goes on where an earlier call with the
    same arguments was killed; the result is then the same, bit for bit on a CPU. Where the training state of all groups
    does not fit the device, they are trained one part after another, each from its own pass over the same batches:
    slower, and equal.

    Args:
        parent: the unfused model, or its blocks up to the last group's end; in the data type of ``engine.precision``,
            on its device.
        source_dir: checkpoint that the learning blocks start from.
        learners: groups and their blocks in that checkpoint.
        settings: data, budget, optimizer, engine. ``grad_clip`` bounds each group's own gradient.
        norm: what a fused FFN makes of its members' norms; concerns unfused groups.
        sequential_weight: weight of the members' error one after another beside that of their parallel sum; concerns
            unfused groups.
        out_dir: of the new checkpoint.
        resume_dir: private directory of this call.
        tracker: receives the curve: medians over groups. With several parts their tokens count one after the other.

    Returns:
        One outcome per group, in rising order.

    Raises:
        ValueError: no group has a finite error; or, before training, the tensors of ``source_dir`` are not those of its
            configuration.
    """
    assert parent.num_slices == 1, "groups may lie across slices"
    parent.model.requires_grad_(False)
    architecture = read_architecture(source_dir)
    with TensorReader(source_dir) as reader:
        check_tensors(reader, architecture)
    parts = plan_parts(learners, architecture, memory_budget(parent))
    finished = []
    for number, part in enumerate(parts):
        name = hashlib.sha256(format_groups(tuple(part)).encode()).hexdigest()[:16]
        point = resume.latest(resume_dir / f"{name}_trained")
        if point is None:
            # In a function of its own, so that one part's training state is gone before the next one's is made.
            point = _distill_part(
                parent,
                source_dir,
                architecture,
                part,
                settings,
                norm=norm,
                sequential_weight=sequential_weight,
                resume_dir=resume_dir / name,
                trained_dir=resume_dir / f"{name}_trained",
                tracker=tracker,
                tokens_before=number * settings.num_steps * settings.train.tokens_per_step,
            )
        elif tracker is not None:
            tracker.restore(point.state["curve"])
        finished.append(point)
    _write_checkpoint(source_dir, [point.directory for point in finished], out_dir)
    return tuple(GroupOutcome(**row) for point in finished for row in point.state["outcomes"])


def plan_parts(learners: Learners, architecture: Architecture, budget_bytes: float) -> list[Learners]:
    """Neighbouring groups that train at once within ``budget_bytes``; a single group may exceed it."""
    parts: list[dict[Group, tuple[int, ...]]] = []
    used_bytes = 0
    for group, blocks in learners.items():
        shapes = [
            shape for block in blocks for shape in block_shapes(architecture, architecture.blocks[block]).values()
        ]
        group_bytes = TRAINING_BYTES_PER_PARAM * sum(map(prod, shapes))
        if not parts or used_bytes + group_bytes > budget_bytes:
            parts.append({})
            used_bytes = 0
        parts[-1][group] = blocks
        used_bytes += group_bytes
    return list(parts)


def _distill_part(
    parent: ParentSlice,
    source_dir: Path,
    architecture: Architecture,
    learners: Learners,
    settings: BldSettings,
    *,
    norm: Norm,
    sequential_weight: float,
    resume_dir: Path,
    trained_dir: Path,
    tracker: Tracker | None,
    tokens_before: int,
) -> resume.ResumePoint:
    """Train groups that fit the device at once, and commit what came of them to ``trained_dir``.

    The point there holds the tensors of the groups that training made better, under the checkpoint's names and in its
    data type, the outcomes of all, and the curve.
    """
    power = output_power(parent, settings.held_out, batch_size=settings.micro_batch)
    with TensorReader(source_dir) as reader:
        dtype = reader.dtype(EMBEDDING)
        trainees = GroupTrainees(
            parent,
            architecture,
            reader,
            learners,
            settings.optim,
            power,
            norm=norm,
            sequential_weight=sequential_weight,
            compiled=settings.engine.compile,
        )
    run = GroupRun(trainees, settings, resume_dir, tracker, tokens_before=tokens_before)
    run_together(parent, run, settings, desc=f"groups {format_groups(trainees.groups)}")
    trainees.round_to(dtype)
    errors = trainees.held_out(settings.held_out, batch_size=settings.micro_batch)
    columns = (trainees.groups, run.init_errors, errors, trainees.sequential_nmse)
    outcomes = [_outcome(*row) for row in zip(*columns, strict=True)]
    tensors: dict[str, Tensor] = {}
    for outcome in outcomes:
        if outcome.trained:
            tensors |= {name: tensor.to("cpu", dtype) for name, tensor in trainees.tensors(outcome.group).items()}
    state = {"outcomes": [asdict(outcome) for outcome in outcomes], "curve": run.curve}
    resume.save(trained_dir, settings.num_steps, tensors={"model": tensors} if tensors else {}, state=state)
    shutil.rmtree(resume_dir, ignore_errors=True)
    point = resume.latest(trained_dir)
    assert point is not None
    return point


def _outcome(group: Group, before: HeldOut, after: HeldOut, sequential_nmse: float | None) -> GroupOutcome:
    better = after.loss < before.loss  # False for NaN: a training that diverged
    # Untouched members compute exactly what the model computes.
    untouched = None if sequential_nmse is None else 0.0
    return GroupOutcome(
        first=group[0],
        last=group[1],
        nmse_init=before.nmse,
        nmse=after.nmse if better else before.nmse,
        sequential_nmse=sequential_nmse if better else untouched,
        trained=better,
    )


def _write_checkpoint(source_dir: Path, finished: Sequence[Path], out_dir: Path) -> None:
    """The checkpoint of ``source_dir`` with the trained tensors in place of its own, streamed."""
    architecture = read_architecture(source_dir)
    trained = [directory for directory in finished if (directory / WEIGHTS_FILE).is_file()]
    with ExitStack() as stack:
        source, *others = [stack.enter_context(TensorReader(directory)) for directory in (source_dir, *trained)]
        copy_checkpoint(source, out_dir, architecture, instead=others)
