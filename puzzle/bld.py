"""Blockwise local distillation (Puzzle, section 3): every replacement learns to do what the parent's block does.

Decoupled: an attention trains beside the parent's frozen FFN, an FFN beside the parent's frozen attention, so that m
attentions and n FFNs are m + n trainings instead of m * n. An FFN whose attention is removed is the exception: it
trains on the input that it will read in the child, the residual stream without attention, and so learns to make up for
what is gone. Coupled: every pair of subblocks is one training.

All replacements learn from one forward of the parent per batch. No gradient crosses a block, so activations are made
block by block and used at once: beside the weights, memory holds the activations of one block and one replacement. For
the same reason processes need nothing of each other but the hidden states between slices of the parent.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from distill import distributed
from distill.files import write_whole
from distill.metrics import Row
from distill.tracking import Tracker
from puzzle.child_init import Init
from puzzle.group_training import BldSettings, GroupRun, run_together
from puzzle.library import BlockLibrary, LibraryEntry, Replacement, file_of
from puzzle.model.architecture import Architecture
from puzzle.pool import Outcome, ReplacementPool
from puzzle.slices import ParentSlice
from puzzle.trainees import Trainees, output_power

Group = tuple[Replacement, ...]
"""Replacements that train at once."""

TRAINING_BYTES_PER_PARAM = 16
"""fp32 weight, gradient and AdamW's two moments."""


def distill_library(
    library: BlockLibrary,
    parent: ParentSlice,
    replacements: Sequence[Replacement],
    init: Init,
    settings: BldSettings,
    *,
    pool: ReplacementPool,
    resume_dir: Path,
    tracker: Tracker | None = None,
) -> int:
    """Fill ``library`` with ``replacements`` and write its index; one that training made worse stays as it was before.

    What ``pool`` has is taken from it; the rest is trained and put there group by group. Goes on where an earlier call
    with the same arguments was killed; the result is then the same, bit for bit on a CPU. Where the training state of
    all replacements does not fit the device, blocks are trained group after group, each group from its own pass over
    the same batches: slower, and equal.

    Every process of the stage has to call this. Each trains its share of the replacements of its own blocks and writes
    them to the library's directory, which all must see; the first writes the index.

    Args:
        library: empty, for this parent.
        parent: in the data type of ``engine.precision``, on its device.
        replacements: ordered by block.
        init: weights before training; asked for, block by block, where there is something to train.
        settings: data, budget, optimizer, engine.
        pool: finished replacements of this and other libraries.
        resume_dir: private directory, of all processes, for resume points.
        tracker: receives this process's curve. With several groups their tokens count one after the other.

    Returns:
        Training tokens that each replacement trained here has seen; 0 where the pool had all of them.
    """
    parent.model.requires_grad_(False)
    directory = resume_dir / f"rank_{distributed.rank()}"
    directory.mkdir(parents=True, exist_ok=True)
    own = parent.share([item for item in replacements if item.block in parent.blocks])
    keys = {item: pool.key(item, init.origin(item)) for item in own}
    outcomes = _take_all(library, pool, keys)
    groups = _plan(directory / "plan.json", keys, outcomes, library.parent, memory_budget(parent))
    pending: list[tuple[int, Group]] = []
    for number, group in enumerate(groups):
        if not all(item in outcomes for item in group):
            pending.append((number, group))
        elif tracker is not None:
            tracker.restore(_read_curve(directory, group, keys))
    budget_tokens = settings.num_steps * settings.train.tokens_per_step
    num_rounds = max(distributed.gather_objects(len(pending)))
    power = output_power(parent, settings.held_out, batch_size=settings.micro_batch) if num_rounds > 0 else {}
    for position in range(num_rounds):
        number, group = pending[position] if position < len(pending) else (0, ())
        # In a function of its own, so that one group's training state is gone before the next one's is made.
        outcomes |= _distill_group(
            library,
            parent,
            {item: (keys[item], init(item)) for item in group},
            settings,
            power,
            pool=pool,
            directory=directory,
            tracker=tracker,
            tokens_before=number * budget_tokens,
        )
    _write_index(library, replacements, outcomes)
    return budget_tokens if max(distributed.gather_objects(len(groups))) > 0 else 0


def plan_groups(replacements: Sequence[Replacement], parent: Architecture, budget_bytes: float) -> list[Group]:
    """Neighbouring blocks whose replacements train at once within ``budget_bytes``; a single block may exceed it."""
    groups: list[Group] = []
    used_bytes = 0
    for _, at_block in groupby(replacements, key=lambda replacement: replacement.block):
        block = tuple(at_block)
        num_params = sum(prod(shape) for item in block for shape in item.shapes(parent).values())
        block_bytes = TRAINING_BYTES_PER_PARAM * num_params
        if not groups or used_bytes + block_bytes > budget_bytes:
            groups.append(block)
            used_bytes = block_bytes
        else:
            groups[-1] += block
            used_bytes += block_bytes
    return groups


def memory_budget(parent: ParentSlice) -> float:
    """Bytes that training state may take: on a GPU 0.7 of what the parent leaves, else no bound.

    From the size of the device, not from what is free just now: a resumed run has to form the same groups.
    """
    if parent.device.type != "cuda":
        return math.inf
    total_bytes = torch.cuda.get_device_properties(parent.device).total_memory
    parent_bytes = sum(parameter.numel() * parameter.element_size() for parameter in parent.model.parameters())
    return 0.7 * (total_bytes - parent_bytes)


def _take_all(
    library: BlockLibrary, pool: ReplacementPool, keys: Mapping[Replacement, str]
) -> dict[Replacement, Outcome]:
    """Those replacements that the pool has, now in the library's directory."""
    found = {item: pool.take(key, library.directory / file_of(item)) for item, key in keys.items()}
    return {item: outcome for item, outcome in found.items() if outcome is not None}


def _plan(
    path: Path,
    keys: Mapping[Replacement, str],
    outcomes: Mapping[Replacement, Outcome],
    parent: Architecture,
    budget_bytes: float,
) -> list[Group]:
    """Groups of what the pool did not have when this library was begun.

    The plan outlives a kill: a group of which the pool has a part by now goes on from its own resume point.
    """
    missing = [item for item in keys if item not in outcomes]
    by_key = {key: item for item, key in keys.items()}
    if path.is_file():
        planned = json.loads(path.read_text())
        known = {key for group in planned for key in group}
        if known <= by_key.keys() and {keys[item] for item in missing} <= known:
            return [tuple(by_key[key] for key in group) for group in planned]
    groups = plan_groups(missing, parent, budget_bytes)
    write_whole(path, json.dumps([[keys[item] for item in group] for group in groups]))
    return groups


def _distill_group(
    library: BlockLibrary,
    parent: ParentSlice,
    inits: Mapping[Replacement, tuple[str, Mapping[str, Tensor]]],
    settings: BldSettings,
    power: Mapping[int, Tensor],
    *,
    pool: ReplacementPool,
    directory: Path,
    tracker: Tracker | None,
    tokens_before: int,
) -> dict[Replacement, Outcome]:
    """Train replacements that fit the device at once and put them into pool and library.

    ``inits`` holds their keys and first weights; with none of its own, a process only keeps the others company.
    """
    if not inits:
        run_together(parent, None, settings, desc="BLD")
        return {}
    group, keys = tuple(inits), {item: key for item, (key, _) in inits.items()}
    resume_dir = directory / _group_name(group, keys)
    trainees = Trainees(
        parent,
        library.parent,
        {item: tensors for item, (_, tensors) in inits.items()},
        settings.optim,
        power,
        nmse=settings.nmse,
        compiled=settings.engine.compile,
    )
    run = GroupRun(trainees, settings, resume_dir, tracker, tokens_before=tokens_before)
    run_together(parent, run, settings, desc=f"BLD blocks {group[0].block}-{group[-1].block}")
    outcomes = {}
    for item, before, after in zip(group, run.init_errors, run.errors, strict=True):
        better = after.loss < before.loss  # False for NaN: a training that diverged
        outcomes[item] = Outcome(
            bld_nmse_init=before.nmse, bld_nmse=after.nmse if better else before.nmse, trained=better
        )
        key, tensors = inits[item]
        tensors = trainees.tensors(item) if better else tensors
        pool.put(key, tensors, outcomes[item], library.directory / file_of(item), dtype=library.dtype)
    write_whole(_curve_file(directory, group, keys), json.dumps(run.curve))
    shutil.rmtree(resume_dir, ignore_errors=True)
    return outcomes


def _write_index(
    library: BlockLibrary, replacements: Sequence[Replacement], outcomes: Mapping[Replacement, Outcome]
) -> None:
    """On the first process, once the files of all are there."""
    gathered = {item: outcome for part in distributed.gather_objects(dict(outcomes)) for item, outcome in part.items()}
    for item in replacements:
        library.entries[item] = LibraryEntry(replacement=item, file=file_of(item), **asdict(gathered[item]))
    if distributed.is_main():
        library.write_index()


def _group_name(group: Group, keys: Mapping[Replacement, str]) -> str:
    """By their keys: a resume point is never taken up by other replacements, or by the same ones of other origin."""
    return hashlib.sha256(" ".join(keys[item] for item in group).encode()).hexdigest()[:16]


def _curve_file(directory: Path, group: Group, keys: Mapping[Replacement, str]) -> Path:
    return directory / f"{_group_name(group, keys)}.json"


def _read_curve(directory: Path, group: Group, keys: Mapping[Replacement, str]) -> list[Row]:
    """Empty where the process was killed between the last replacement of the group and its curve."""
    path = _curve_file(directory, group, keys)
    return json.loads(path.read_text()) if path.is_file() else []
