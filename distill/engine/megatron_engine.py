"""The Megatron engine: tensor, sequence and pipeline parallelism for student and teacher, a distributed optimizer."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill import distributed
from distill.config import EngineConfig, ObjectiveConfig, OptimConfig, require
from distill.data.batch import Batch
from distill.distributed import TIMEOUT, DataRanks
from distill.engine.base import export_from, micro_batch_size, resolve_device, resolve_dtype
from distill.engine.layout import check_layout
from distill.engine.megatron_stages import ModelCosts, StagePlan, plan_stages
from distill.engine.setup import ModelProvider, TrainingSetup
from distill.engine.teachers import build_teachers
from distill.evaluate import NUM_TARGETS, add_sums, equal_shares, means
from distill.logits import divergence_name
from distill.objective import Objective, Totals
from distill.teacher import Teacher

try:
    with warnings.catch_warnings():
        # That Apex and Transformer Engine are missing: nothing of theirs is used.
        warnings.simplefilter("ignore", UserWarning)
        from megatron.core import parallel_state, tensor_parallel
        from megatron.core.distributed import finalize_model_grads

        from distill.engine import megatron_checkpoint
        from distill.engine.megatron_pipeline import Stage
        from distill.engine.megatron_state import MASTER, Optimizer, wrap
except ImportError as error:
    raise ValueError(
        f"engine.name=megatron needs megatron-core, and its import failed ({error}); run pip install "
        "'ffn-fusion[megatron]', or set engine.name=torch or deepspeed"
    ) from error


_STATE = "megatron"
"""Of a resume point, the directory with what megatron-core writes."""


class MegatronEngine:
    """Student and teacher in the same tensor- and pipeline-parallel grid; data ranks share the optimizer's state.

    Activations between the matrices are split over the sequence. The teacher's logits and the student's meet one
    vocabulary shard at a time; hidden states are compared in the stage that has the blocks. With bf16 precision weights
    are bf16 beside fp32 master weights, which start from the stored ones and are what :meth:`export` writes. See
    :class:`distill.engine.base.Engine` for the interface and :func:`distill.engine.base.create_engine` for the
    arguments.
    """

    def __init__(
        self, setup: TrainingSetup, *, optim: OptimConfig, engine: EngineConfig, batch_size: int, seq_len: int
    ) -> None:
        require(
            torch.cuda.device_count() > 0,
            "engine.name=megatron needs CUDA devices, and torch finds none; set engine.name=torch or deepspeed",
        )
        self.device = resolve_device(engine)
        _start_grid(engine)
        self.data_rank = parallel_state.get_data_parallel_rank()
        self.num_data_ranks = parallel_state.get_data_parallel_world_size()
        assert batch_size % self.num_data_ranks == 0, f"{batch_size} sequences for {self.num_data_ranks} data ranks"
        self._engine = engine
        self._provider = setup.student
        self._objective = setup.objective
        self._num_positions = batch_size * seq_len
        self._cached = (
            build_teachers(setup, engine, device=self.device, ranks=_own_ranks(self)) if setup.store else None
        )
        taught = setup.teacher if setup.store is None else None
        if taught is None:
            Objective(config=setup.objective, teacher=self._cached.training if self._cached else None)  # its checks
        self._model = setup.student.megatron()
        self._teacher_model = None if taught is None else taught.megatron()
        self._plan = _plan(self._model, self._teacher_model, setup, engine, seq_len)
        student = self._build(self._model, setup.student, self._plan.student, seq_len, recompute=engine.recompute)
        self._layouts = self._model.layouts(self._plan.first_block(_stage()), self._plan.student[_stage()])
        self._parameters = dict(student.named_parameters())
        if not setup.objective.reads_logits and parallel_state.is_pipeline_last_stage():
            # Nothing gives the head a gradient, and weight decay alone is not to move it.
            student.head.requires_grad_(self._model.tied)
        teacher = None
        if taught is not None:
            teacher = self._build(self._teacher_model, taught, self._plan.teacher, seq_len, recompute=False)
            teacher.eval().requires_grad_(False)
        self._wrapped = wrap(student, overlap=_overlaps(engine, setup.objective, tied=self._model.tied))
        self._stage = Stage(
            student=student,
            wrapped=self._wrapped,
            teacher=teacher,
            objective=setup.objective,
            layer_map=tuple(setup.layer_map),
            all_tokens=self._model.all_tokens,
        )
        self._optimizer = Optimizer(self._wrapped, optim)
        if resolve_dtype(engine) == torch.bfloat16 != setup.student.dtype:
            self._start_masters()

    def step(self, batch: Batch, *, lr: float) -> dict[str, Tensor]:
        """See :class:`distill.engine.base.Engine`. Waits for the device: megatron-core reads the gradients' norm."""
        batch = batch.to(self.device)
        num_targets = batch.num_targets()
        torch.distributed.all_reduce(num_targets, group=parallel_state.get_data_parallel_group())
        totals = Totals(num_positions=self._num_positions, num_targets=num_targets)
        self._optimizer.clear()
        cached = None if self._cached is None else self._cached.training
        assert not isinstance(cached, Teacher), "a teacher that runs is dealt over the stages"
        parts = self._stage.train(self._micro_batches(batch), totals, cached)
        finalize_model_grads([self._wrapped])
        sums: dict[str, Tensor] = {}
        for part in parts:
            add_sums(sums, part)
        metrics = self._over_ranks(sums, self._metric_names(), over_tokens=self._sums_token_parts)
        return {**metrics, "grad_norm": torch.tensor(self._optimizer.step(lr), device=self.device)}

    @torch.no_grad()
    def evaluate(self, sequences: Tensor | Batch) -> dict[str, float]:
        """See :class:`distill.engine.base.Engine`."""
        share = equal_shares(sequences, rank=self.data_rank, num_ranks=self.num_data_ranks).to(self.device)
        held_out = None if self._cached is None else self._cached.held_out
        assert not isinstance(held_out, Teacher)
        self._wrapped.eval()
        parts = self._stage.evaluate(self._micro_batches(share), self._objective.chunk_tokens, held_out)
        self._wrapped.train()
        sums: dict[str, Tensor] = {}
        for part in parts:
            add_sums(sums, part)
        names = ["lm_loss"]
        if self._stage.teacher is not None:
            names += [divergence_name("forward", top_k=False), "top1_agreement", "teacher_lm_loss"]
        elif held_out is not None:
            names += [divergence_name("forward", top_k=True), "top1_agreement"]
        known = {} if self._cached is None else self._cached.known_metrics(len(sequences))
        return {**means(self._over_ranks(sums, [*names, NUM_TARGETS], over_tokens=False)), **known}

    def save(self, directory: Path) -> None:
        """See :class:`distill.engine.base.Engine`. Any number of tensor, pipeline and data ranks can load it.

        Every rank writes what it keeps of master weights and moments, without a message to any other.
        """
        self._own_part().write(directory / _STATE)

    def snapshot(self) -> Callable[[Path], None]:
        """See :class:`distill.engine.base.Engine`."""
        copied = self._own_part().copied()
        return lambda directory: copied.write(directory / _STATE)

    def _own_part(self) -> megatron_checkpoint.Part:
        return megatron_checkpoint.own_part(self._optimizer, self._parameters, self._place())

    def load(self, directory: Path) -> None:
        """See :class:`distill.engine.base.Engine`."""
        require(
            (directory / _STATE).is_dir(),
            f"{directory} has no {_STATE} state: another engine wrote it; go on with that one, or start anew",
        )
        megatron_checkpoint.load(directory / _STATE, self._optimizer, self._place())

    def export(self, directory: Path) -> None:
        """See :class:`distill.engine.base.Engine`. No rank holds more than its stage and one whole tensor."""
        export_from(self._provider, self._whole_tensors(), directory)

    def _build(
        self, model: Any, provider: ModelProvider, stage_blocks: tuple[int, ...], seq_len: int, *, recompute: bool
    ) -> Any:
        tensor_ranks = self._engine.tensor_parallel
        config = model.config(
            tensor_parallel=tensor_ranks,
            stage_blocks=stage_blocks,
            dtype=resolve_dtype(self._engine),
            sequence_parallel=tensor_ranks > 1,
        )
        stage = model.stage(config, max_positions=seq_len, recompute=recompute)
        layouts = model.layouts(sum(stage_blocks[: _stage()]), stage_blocks[_stage()])
        model.load_weights(stage, layouts, provider.read)
        return stage

    def _start_masters(self) -> None:
        """Have the master weights start from what is stored, not from what bf16 leaves of it."""
        rank, size = parallel_state.get_tensor_model_parallel_rank(), self._engine.tensor_parallel
        layouts = {layout.name: layout for layout in self._layouts}

        def stored(name: str, start: int, end: int) -> dict[str, Tensor]:
            whole = [self._provider.read(source) for source in layouts[name].sources]
            return {MASTER: layouts[name].shard(whole, rank, size).flatten()[start:end]}

        self._optimizer.set_own_parts(stored)

    def _place(self) -> megatron_checkpoint.Place:
        return megatron_checkpoint.Place(
            rank=distributed.rank(),
            num_ranks=distributed.world_size(),
            tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
            num_tensor_ranks=self._engine.tensor_parallel,
            layouts=self._layouts,
            shapes=self._model.shapes(),
        )

    def _micro_batches(self, batch: Batch) -> list[Batch]:
        """Equal parts, of at most as many tokens as the engine's setting allows."""
        most = micro_batch_size(self._engine, batch_size=len(batch), seq_len=batch.input_ids.shape[1])
        size = next(size for size in range(most, 0, -1) if len(batch) % size == 0)
        return list(batch.split(size))

    @property
    def _sums_token_parts(self) -> bool:
        return self._engine.tensor_parallel > 1

    def _metric_names(self) -> list[str]:
        config, names = self._objective, ["loss"]
        if config.hidden_cosine > 0:
            names.append("hidden_cosine")
        if config.hidden_mse > 0:
            names.append("hidden_mse")
        if config.kld > 0:
            names.append(divergence_name(config.divergence, top_k=self._cached is not None))
        return [*names, "lm_loss"] if config.reads_logits else names

    def _over_ranks(self, sums: dict[str, Tensor], names: list[str], *, over_tokens: bool) -> dict[str, Tensor]:
        """Sums over stages and data ranks, and with ``over_tokens`` over the tensor ranks' parts of the sequence."""
        assert sums.keys() <= set(names), f"{sorted(sums)} beside {names}"
        zero = torch.zeros((), device=self.device, dtype=torch.float64)
        total = torch.stack([sums.get(name, zero).to(torch.float64) for name in names])
        groups = [parallel_state.get_pipeline_model_parallel_group(), parallel_state.get_data_parallel_group()]
        for group in (*groups, parallel_state.get_tensor_model_parallel_group()) if over_tokens else groups:
            torch.distributed.all_reduce(total, group=group)
        return dict(zip(names, total.unbind(), strict=True))

    @torch.no_grad()
    def _whole_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The checkpoint's tensors one by one in fp32, on the first rank; every rank takes part."""
        shapes = self._model.shapes()
        seen: set[str] = set()
        for stage in range(self._engine.pipeline_parallel):
            sender = stage * distributed.world_size() // self._engine.pipeline_parallel
            for layout in self._model.layouts(self._plan.first_block(stage), self._plan.student[stage]):
                if seen.issuperset(layout.sources):  # a tied head on the last stage
                    continue
                seen.update(layout.sources)
                # No rank runs ahead of the one that writes, into the time limit of a message.
                distributed.barrier()
                whole = self._merged(layout) if stage == _stage() else {}
                for name in layout.sources:
                    if stage > 0 and distributed.rank() == sender:
                        torch.distributed.send(whole[name].contiguous(), dst=0)
                    elif stage > 0 and distributed.is_main():
                        whole[name] = torch.empty(shapes[name], dtype=torch.float32, device=self.device)
                        torch.distributed.recv(whole[name], src=sender)
                    if distributed.is_main():
                        yield name, whole[name]

    def _merged(self, layout: Any) -> dict[str, Tensor]:
        """Whole tensors of one parameter of this stage, on its first data rank; all ranks of the stage take part."""
        parameter = self._parameters[layout.name]
        if not self._optimizer.trains(parameter):
            return {source: self._provider.read(source).to(self.device, torch.float32) for source in layout.sources}
        shard = self._optimizer.whole_master(parameter)
        return dict(layout.merge(_gathered(shard))) if self.data_rank == 0 else {}


def _gathered(shard: Tensor) -> list[Tensor]:
    """The shards of all tensor ranks."""
    group = parallel_state.get_tensor_model_parallel_group()
    shards = [torch.empty_like(shard) for _ in range(group.size())]
    torch.distributed.all_gather(shards, shard, group=group)
    return shards


def _overlaps(engine: EngineConfig, objective: ObjectiveConfig, *, tied: bool) -> bool:
    """Whether gradients and new weights travel beside the computation.

    Not where the last stage has a copy of the embedding that no term gives a gradient: megatron-core would wait for it.
    """
    trains_copy = not tied or engine.pipeline_parallel == 1 or objective.reads_logits
    return torch.cuda.is_available() and trains_copy


def _start_grid(engine: EngineConfig) -> None:
    """Have megatron-core deal the processes: ranks of a tensor group are neighbours, stages are furthest apart."""
    distributed.everyone()
    sizes = engine.tensor_parallel, engine.pipeline_parallel
    check_layout(engine, world_size=distributed.world_size())
    if parallel_state.model_parallel_is_initialized():
        present = (
            parallel_state.get_tensor_model_parallel_world_size(),
            parallel_state.get_pipeline_model_parallel_world_size(),
        )
        if present == sizes:
            return
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(*sizes, distributed_timeout_minutes=int(TIMEOUT.total_seconds() / 60))
    # Sequence parallelism asks for megatron-core's generators, though nothing here draws from them.
    tensor_parallel.model_parallel_cuda_manual_seed(0)


def _stage() -> int:
    return parallel_state.get_pipeline_model_parallel_rank()


def _own_ranks(engine: MegatronEngine) -> DataRanks:
    """Every rank has its sequences whole."""
    return DataRanks(data_rank=engine.data_rank, num_data_ranks=engine.num_data_ranks, part=0, num_parts=1, group=None)


def _plan(model: Any, teacher: Any, setup: TrainingSetup, engine: EngineConfig, seq_len: int) -> StagePlan:
    return plan_stages(
        engine.pipeline_parallel,
        ModelCosts(blocks=model.block_costs(seq_len), head=model.head_cost()),
        None if teacher is None else ModelCosts(blocks=teacher.block_costs(seq_len), head=teacher.head_cost()),
        setup.layer_map if setup.objective.compares_hidden else (),
        recompute=engine.recompute,
    )
