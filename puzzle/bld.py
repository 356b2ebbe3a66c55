"""Blockwise local distillation (Puzzle, section 3): every replacement learns to do what the parent's block does.

Decoupled: an attention trains beside the parent's frozen FFN, an FFN beside the parent's frozen attention, so that m
attentions and n FFNs are m + n trainings instead of m * n. An FFN whose attention is removed is the exception: it
trains on the input that it will read in the child, the residual stream without attention, and so learns to make up for
what is gone.

All replacements learn from one forward of the parent per batch. No gradient crosses a block, so activations are made
block by block and used at once: beside the weights, memory holds the activations of one block and one replacement.
"""

from __future__ import annotations

import json
import math
import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from distill import resume
from distill.config import EngineConfig, OptimConfig, TrainConfig
from distill.engine.base import micro_batch_size
from distill.metrics import Row, StepMeter
from distill.optim import learning_rate
from distill.tracking import Tracker
from distill.trainer import FLUSH_EVERY_STEPS, BatchSource
from puzzle.library import BlockLibrary, Replacement
from puzzle.model.architecture import Architecture, AttentionConfig
from puzzle.model.modeling_decilm import DeciLMForCausalLM
from puzzle.model.stats import attention_params, ffn_params
from puzzle.trainees import Trainees, output_power

Init = Callable[[Replacement], Mapping[str, Tensor]]
"""Tensors (CPU) of a replacement before training."""

TRAINING_BYTES_PER_PARAM = 16
"""fp32 weight, gradient and AdamW's two moments."""

MAX_SAVING_FRAC = 0.1
"""Share of the time that resume points may take: the training state is several times the parent, a step is short."""


@dataclass(frozen=True, kw_only=True)
class BldSettings:
    """What all replacements of one library share."""

    train: TrainConfig
    optim: OptimConfig
    engine: EngineConfig
    batches: BatchSource
    held_out: Tensor
    """Token ids [num_sequences, seq] on which the error before and after is measured."""

    @property
    def micro_batch(self) -> int:
        """Sequences per forward."""
        return micro_batch_size(self.engine, batch_size=self.train.batch_size, seq_len=self.train.seq_len)


def distill_library(
    library: BlockLibrary,
    parent: DeciLMForCausalLM,
    replacements: Sequence[Replacement],
    init: Init,
    settings: BldSettings,
    *,
    resume_dir: Path,
    tracker: Tracker,
) -> None:
    """Train ``replacements`` and add them to ``library``; one that training made worse is added as it was before.

    Goes on where an earlier call with the same arguments was killed, if ``library`` lies where that call left it; the
    result is then the same, bit for bit on a CPU. Where the training state of all replacements does not fit the
    device, blocks are trained group after group, each group from its own pass over the same batches: slower, and equal.

    Args:
        library: under construction, for this parent.
        parent: in the data type of ``engine.precision``, on its device.
        replacements: ordered by block.
        init: weights before training.
        settings: data, budget, optimizer, engine.
        resume_dir: private directory of resume points.
        tracker: receives one row per step (median NMSE over replacements) and per held-out evaluation. With several
            groups their tokens count one after the other.
    """
    resume_dir.mkdir(parents=True, exist_ok=True)
    parent.requires_grad_(False)
    power = output_power(parent, settings.held_out, batch_size=settings.micro_batch)
    budget_tokens = settings.train.num_steps * settings.train.tokens_per_step
    for number, group in enumerate(plan_groups(replacements, library.parent, memory_budget(parent))):
        name = f"blocks_{group[0].block}_{group[-1].block}"
        done = resume_dir / f"{name}.json"
        if done.exists():
            tracker.restore(json.loads(done.read_text()))
            continue
        # In a function of its own, so that one group's training state is gone before the next one's is made.
        curve = _distill_group(
            library,
            parent,
            {item: init(item) for item in group},
            settings,
            power,
            resume_dir=resume_dir / name,
            tracker=tracker,
            tokens_before=number * budget_tokens,
        )
        unfinished = done.with_suffix(".partial")
        unfinished.write_text(json.dumps(curve))
        unfinished.replace(done)
        shutil.rmtree(resume_dir / name, ignore_errors=True)


def _distill_group(
    library: BlockLibrary,
    parent: DeciLMForCausalLM,
    inits: Mapping[Replacement, Mapping[str, Tensor]],
    settings: BldSettings,
    power: Tensor,
    *,
    resume_dir: Path,
    tracker: Tracker,
    tokens_before: int,
) -> list[Row]:
    """Train replacements that fit the device at once and add them to the library; returns their curve."""
    trainees = Trainees(parent, library.parent, inits, settings.optim, power)
    run = _Run(trainees, settings, resume_dir, tracker, tokens_before=tokens_before)
    blocks = [item.block for item in inits]
    nmse_init, nmse = run.train(desc=f"BLD blocks {min(blocks)}-{max(blocks)}")
    for item, before, after in zip(inits, nmse_init, nmse, strict=True):
        better = after < before  # False for NaN: a training that diverged
        tensors = trainees.tensors(item) if better else inits[item]
        library.add(item, tensors, bld_nmse_init=before, bld_nmse=after if better else before)
    library.write_index()
    return run.curve


def plan_groups(
    replacements: Sequence[Replacement], parent: Architecture, budget_bytes: float
) -> list[tuple[Replacement, ...]]:
    """Neighbouring blocks whose replacements train at once within ``budget_bytes``; a single block may exceed it."""
    groups: list[tuple[Replacement, ...]] = []
    used_bytes = 0
    for _, at_block in groupby(replacements, key=lambda replacement: replacement.block):
        block = tuple(at_block)
        block_bytes = TRAINING_BYTES_PER_PARAM * sum(_num_params(item, parent) for item in block)
        if not groups or used_bytes + block_bytes > budget_bytes:
            groups.append(block)
            used_bytes = block_bytes
        else:
            groups[-1] += block
            used_bytes += block_bytes
    return groups


def memory_budget(parent: DeciLMForCausalLM) -> float:
    """Bytes that training state may take: on a GPU 0.7 of what the parent leaves, else no bound.

    From the size of the device, not from what is free just now: a resumed run has to form the same groups.
    """
    if parent.device.type != "cuda":
        return math.inf
    total_bytes = torch.cuda.get_device_properties(parent.device).total_memory
    parent_bytes = sum(parameter.numel() * parameter.element_size() for parameter in parent.parameters())
    return 0.7 * (total_bytes - parent_bytes)


def _num_params(replacement: Replacement, parent: Architecture) -> int:
    if isinstance(replacement.variant, AttentionConfig):
        return attention_params(parent, replacement.variant)
    return ffn_params(parent, replacement.variant)


class _Run:
    """The training of one group of replacements, and its curve."""

    def __init__(
        self, trainees: Trainees, settings: BldSettings, resume_dir: Path, tracker: Tracker, *, tokens_before: int
    ) -> None:
        self.curve: list[Row] = []
        self._trainees = trainees
        self._settings = settings
        self._resume_dir = resume_dir
        self._tracker = tracker
        self._tokens_before = tokens_before
        self._meter = StepMeter(trainees.parent.device, tokens_per_step=settings.train.tokens_per_step)
        self._nmse_init: list[float] = []
        self._next_save = 0.0

    def train(self, *, desc: str) -> tuple[list[float], list[float]]:
        """Held-out NMSE of every replacement before and after."""
        settings, train = self._settings, self._settings.train
        first_step = self._start()
        total_tokens, done_tokens = (steps * train.tokens_per_step for steps in (train.num_steps, first_step))
        with tqdm(total=total_tokens, initial=done_tokens, desc=desc, unit="tok", unit_scale=True, leave=False) as bar:
            for step in range(first_step, train.num_steps):
                tokens = (step + 1) * train.tokens_per_step
                lr = learning_rate(settings.optim, min(1.0, tokens / train.max_tokens))
                metrics = self._trainees.step(settings.batches.batch(step), lr=lr, micro_batch=settings.micro_batch)
                self._meter.add(metrics, tokens=self._tokens_before + tokens, lr=lr)
                bar.update(train.tokens_per_step)
                self._after_step(step + 1, bar)
        return self._nmse_init, self._evaluate(total_tokens)

    def _start(self) -> int:
        """Restores the newest resume point, or measures the replacements as they come. Returns the first step."""
        point = resume.latest(self._resume_dir)
        if point is None:
            self._nmse_init = self._evaluate(0)
            return 0
        self._trainees.load_state_dict(point.tensors())
        self._nmse_init = point.state["nmse_init"]
        self.curve = point.state["curve"]
        self._tracker.restore(self.curve)
        return point.step

    def _after_step(self, num_steps: int, bar: tqdm) -> None:
        train = self._settings.train
        last = num_steps == train.num_steps
        saves = not last and self._saves(num_steps)
        evaluates = not last and train.is_due(num_steps, train.eval_every_tokens)
        if len(self._meter) >= FLUSH_EVERY_STEPS or saves or evaluates or last:
            for row in self._meter.flush():
                self._add(row)
            bar.set_postfix(nmse=f"{self.curve[-1]['train/nmse']:.4f}")
        if evaluates:
            self._evaluate(num_steps * train.tokens_per_step)
        if saves:
            started = time.perf_counter()
            state = {"nmse_init": self._nmse_init, "curve": self.curve}
            resume.save(self._resume_dir, num_steps, tensors=self._trainees.state_dict(), state=state)
            self._next_save = time.perf_counter() + (time.perf_counter() - started) / MAX_SAVING_FRAC
        if saves or evaluates:
            self._meter.restart()

    def _saves(self, num_steps: int) -> bool:
        """Whether a resume point is due. Without a cadence of the user's, one that would cost too much time is not."""
        train = self._settings.train
        if train.resume_every_tokens > 0:
            return train.is_due(num_steps, train.resume_every_tokens)
        return train.is_due(num_steps, train.default_resume_tokens) and time.perf_counter() >= self._next_save

    def _evaluate(self, tokens: int) -> list[float]:
        nmse = self._trainees.held_out_nmse(self._settings.held_out, batch_size=self._settings.micro_batch)
        finite = [value for value in nmse if math.isfinite(value)]
        median = statistics.median(finite) if finite else math.nan
        self._add({"tokens": self._tokens_before + tokens, "eval/nmse": median})
        return nmse

    def _add(self, row: Row) -> None:
        if not all(map(math.isfinite, row.values())):
            raise ValueError(
                f"BLD: no replacement has a finite error at {row['tokens']:,} tokens; lower library.optim.lr"
            )
        self.curve.append(row)
        self._tracker.log(row)
