"""What each stage of a pipeline demands: training steps, forward passes, bytes on disk. Torch-free.

Training stages are followed step by step (:mod:`launch.plan_memory`, :mod:`launch.plan_megatron`). Of the others the
weights that a process holds, the heads' chunks and one block's activations are counted, and their forward passes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from distill.config import EngineConfig, ObjectiveConfig, TrainConfig
from launch.plan_activations import Numerics, Shape, forward_bytes
from launch.plan_heads import chunk_rows
from launch.plan_memory import Memory
from launch.plan_models import PlannedModel
from launch.plan_state import POINT_BYTES, product_bytes
from launch.plan_step import Step
from puzzle.config import SpaceConfig
from puzzle.model.architecture import Architecture
from puzzle.model.stats import (
    attention_flops_per_token,
    attention_params,
    block_params,
    ffn_flops_per_token,
    ffn_params,
    flops_per_token,
    kv_bytes_per_token,
    num_params,
    other_params,
)
from puzzle.space import attention_variants, ffn_variants

STORED_BYTES = 2
"""Per parameter of a model artifact: bf16."""
TRAINEE_BYTES = 16
"""Per parameter of a replacement in BLD (``puzzle.bld.TRAINING_BYTES_PER_PARAM``)."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """A run of the training loop."""

    name: str
    """Configuration node, for errors."""
    step: Step
    num_steps: int
    """Optimizer steps."""
    evaluated_tokens: int
    """Held-out tokens over the whole run."""


@dataclass(frozen=True, kw_only=True)
class Forward:
    """Work without a training loop of its own."""

    flops: float | None = None
    """None: not modelled; a measurement, or work of a CPU."""
    memory: Memory | None = None
    """Of the fullest process; None: no device is needed."""
    ranks: int = 1
    """Processes that share the work."""


@dataclass(frozen=True, kw_only=True)
class Demand:
    """What one step of a pipeline needs."""

    trainings: tuple[Training, ...] = ()
    forward: Forward | None = None
    artifact_bytes: float = 0.0
    resume_bytes: float = 0.0
    notes: tuple[str, ...] = ()


Models = Mapping[str, PlannedModel]
"""Of a step's inputs, by their names."""


def stage_demand(stage: str, config: Any, models: Models, num_ranks: int, given: PlannedModel | None) -> Demand:
    """What ``stage`` needs on ``num_ranks`` processes.

    Args:
        stage: name.
        config: its typed configuration.
        models: inputs that are models.
        num_ranks: processes of a distributed stage.
        given: the model that the stage gives, if it gives one.
    """
    function = {
        "distill": _distill,
        "extend_context": _extend_context,
        "pretrain": _pretrain,
        "build_library": _build_library,
        "score_library": _score_library,
        "measure_dependency": _measure_dependency,
        "cache_teacher": _cache_teacher,
        "evaluate": _evaluate,
        "prepare_data": _prepare_data,
        "generate_text": _generate_text,
        "measure_costs": _measure_costs,
        "benchmark": _benchmark,
        **dict.fromkeys(("prune_attention", "score_groups", "check_additivity", "distill_groups"), _whole_model),
    }.get(stage, _on_cpu)
    models = models if given is None else {**models, "": given}
    demand = function(config, models, num_ranks)
    if given is not None and demand.artifact_bytes == 0:
        demand = replace(demand, artifact_bytes=float(STORED_BYTES * num_params(given.architecture)))
    return demand


def _distill(config: Any, models: Models, num_ranks: int) -> Demand:
    student = models["student"].architecture
    teacher = models.get("teacher")
    step = _step(config.engine, config.objective, student, teacher, config.distill, num_ranks)
    run = _training("distill", step, config.distill)
    return _trained((run,), student, config.distill)


def _extend_context(config: Any, models: Models, num_ranks: int) -> Demand:
    student = models["student"].architecture
    extend = config.extend_context
    phases = [extend.train(index) for index in range(len(extend.phases))]
    runs = [
        _training(
            extend.node(index),
            _step(config.engine, config.objective, student, models.get("teacher"), phase, num_ranks),
            phase,
        )
        for index, phase in enumerate(phases)
    ]
    demand = _trained(tuple(runs), student, phases[-1])
    # Of a finished phase its points stay, and its model in fp32.
    earlier = sum(POINT_BYTES * len(phase.kept_points(point_steps(phase))) + 4 for phase in phases[:-1])
    return replace(demand, resume_bytes=demand.resume_bytes + earlier * num_params(student))


def _pretrain(config: Any, models: Models, num_ranks: int) -> Demand:
    student, train = models[""].architecture, config.pretrain.train
    step = _step(config.engine, ObjectiveConfig(lm=1.0), student, None, train, num_ranks)
    return _trained((_training("pretrain.train", step, train),), student, train)


def _step(
    engine: EngineConfig,
    objective: ObjectiveConfig,
    student: Architecture,
    teacher: PlannedModel | None,
    train: TrainConfig,
    num_ranks: int,
) -> Step:
    return Step(
        student=student,
        teacher=None if teacher is None or not objective.needs_teacher else teacher.architecture,
        objective=objective,
        engine=engine,
        num_ranks=num_ranks,
        batch_size=train.batch_size,
        seq_len=train.seq_len,
        background_points=train.resume_points.background,
    )


def _training(name: str, step: Step, train: TrainConfig) -> Training:
    points = 2 + (train.max_tokens // train.eval_every_tokens if train.eval_every_tokens else 0)
    return Training(
        name=name,
        step=step,
        num_steps=train.num_steps,
        evaluated_tokens=points * train.eval_sequences * train.seq_len,
    )


def _trained(runs: tuple[Training, ...], student: Architecture, train: TrainConfig) -> Demand:
    return Demand(trainings=runs, resume_bytes=float(points_on_disk(train) * POINT_BYTES * num_params(student)))


def point_steps(train: TrainConfig) -> list[int]:
    """Optimizer steps after which an uninterrupted run writes a resume point, in rising order."""
    # Nothing is due more often than at every step.
    every = max(train.resume_every_tokens or train.default_resume_tokens, train.tokens_per_step)
    total = train.spent_tokens
    due = {-(-tokens // train.tokens_per_step) for tokens in range(every, total + 1, every)}
    return sorted(due | {train.num_steps})


def points_on_disk(train: TrainConfig) -> int:
    """Most resume points at once: while the last one is written, those before it that ``resume_points`` keeps."""
    return len(train.kept_points(point_steps(train)[:-1])) + 1


def _build_library(config: Any, models: Models, num_ranks: int) -> Demand:
    parent, bld, slices = models["parent"].architecture, config.library.bld, config.engine.slices
    flops, values, largest = _replacements(parent, config.space, bld.seq_len)
    # Every replica runs the parent over all tokens; its replacements are dealt over the replicas.
    replicas = max(1, num_ranks // slices)
    work = bld.max_tokens * (replicas * flops_per_token(parent, bld.seq_len // 2) + 3 * flops)
    tokens = _micro(config.engine, bld.batch_size, bld.seq_len) * bld.seq_len
    memory = _running(parent, config.engine, tokens, bld.seq_len, dealt=slices)
    # At the least, the replacements of one block train at once (puzzle.bld.plan_groups).
    trainees = TRAINEE_BYTES * largest / replicas
    return Demand(
        forward=Forward(
            flops=float(work),
            memory=replace(memory, parts={**memory.parts, "replacements of a block": trainees}),
            ranks=num_ranks,
        ),
        artifact_bytes=4.0 * values,
        resume_bytes=float(points_on_disk(bld) * POINT_BYTES * values),
        notes=("more replacements at once where memory is left: fewer passes of the parent",),
    )


def _replacements(parent: Architecture, space: SpaceConfig, seq_len: int) -> tuple[float, int, int]:
    """Forward FLOPs per token and parameters of all replacements that train, and parameters at the largest block."""
    flops, values, largest = 0.0, 0, 0
    for index in range(parent.num_blocks):
        attentions = [item for item in attention_variants(parent, index, space)[1:] if not item.is_no_op]
        ffns = [item for item in ffn_variants(parent, index, space)[1:] if not item.is_no_op]
        flops += sum(attention_flops_per_token(parent, item, seq_len // 2) for item in attentions)
        flops += sum(ffn_flops_per_token(parent, item) for item in ffns)
        own = sum(attention_params(parent, item) for item in attentions) + sum(ffn_params(parent, i) for i in ffns)
        values, largest = values + own, max(largest, own)
    return flops, values, largest


def _score_library(config: Any, models: Models, num_ranks: int) -> Demand:
    # The space is that of the library's stage, unknown here: one removal and one narrowing per block stand for it.
    parent, scores = models["parent"].architecture, config.scores
    per_token = flops_per_token(parent, scores.seq_len // 2)
    variants = 2 * parent.num_blocks
    # A replacement in block i runs the blocks behind it alone: half of the model on average.
    flops = scores.num_sequences * scores.seq_len * per_token * (1 + variants / 2)
    tokens = min(scores.batch_size, scores.num_sequences) * scores.seq_len
    memory = _running(parent, config.engine, tokens, scores.seq_len, dealt=config.engine.slices)
    return Demand(
        forward=Forward(flops=flops, memory=memory, ranks=num_ranks), notes=("counted with two variants per block",)
    )


def _measure_dependency(config: Any, models: Models, num_ranks: int) -> Demand:
    model, node = models["model"].architecture, config.dependency
    flops = node.num_sequences * node.seq_len * flops_per_token(model, node.seq_len // 2) * (1 + model.num_blocks / 2)
    tokens = min(node.batch_size, node.num_sequences) * node.seq_len
    # The stage runs in fp32, whatever the engine says.
    engine = replace(config.engine, precision="fp32")
    memory = _running(model, engine, tokens, node.seq_len, dealt=engine.slices)
    return Demand(forward=Forward(flops=flops, memory=memory, ranks=num_ranks))


def _cache_teacher(config: Any, models: Models, num_ranks: int) -> Demand:
    teacher, node = models["teacher"].architecture, config.teacher_cache
    dealt = num_ranks if config.engine.shard else 1
    memory = _running(teacher, config.engine, node.batch_size * node.seq_len, node.seq_len, dealt=dealt)
    bytes_per_token = node.top_k * (4 if teacher.vocab_size <= 65_536 else 6) + 2
    return Demand(
        forward=Forward(
            flops=node.max_tokens * float(flops_per_token(teacher, node.seq_len // 2)), memory=memory, ranks=num_ranks
        ),
        artifact_bytes=float(node.max_tokens * bytes_per_token),
    )


def _evaluate(config: Any, models: Models, num_ranks: int) -> Demand:
    node = config.evaluate
    tokens = node.num_sequences * node.seq_len
    flops = sum(tokens * float(flops_per_token(model.architecture, node.seq_len // 2)) for model in models.values())
    parent = _running(
        models["parent"].architecture, config.engine, node.batch_size * node.seq_len, node.seq_len, dealt=1
    )
    others = [model.architecture for name, model in models.items() if name != "parent"]
    beside = max((product_bytes(config.engine) * num_params(other) for other in others), default=0)
    return Demand(forward=Forward(flops=flops, memory=replace(parent, parts={**parent.parts, "model": float(beside)})))


def _prepare_data(config: Any, models: Models, num_ranks: int) -> Demand:
    data = config.data
    tokens = data.train_tokens + data.validation_tokens + data.calibration_tokens
    wide = data.tokenizer == "parent" or data.vocab_size >= 2**16
    parent = models.get("parent")
    wide = wide if parent is None else parent.architecture.vocab_size >= 2**16
    return Demand(artifact_bytes=float(tokens * (4 if wide else 2)))


def _whole_model(config: Any, models: Models, num_ranks: int) -> Demand:
    """A stage that holds its largest input whole, in the engine's precision, in one process."""
    inputs = [model.architecture for name, model in models.items() if name]
    parts = {"weights": float(product_bytes(config.engine) * max(map(num_params, inputs)))}
    return Demand(forward=Forward(memory=Memory(moment="whole model", parts=parts)))


def _generate_text(config: Any, models: Models, num_ranks: int) -> Demand:
    teacher, node = models["teacher"].architecture, config.generation
    c = product_bytes(config.engine)
    cache = kv_bytes_per_token(teacher, c) * node.batch_size * node.document_tokens
    memory = Memory(moment="generation", parts={"weights": float(c * num_params(teacher)), "KV cache": float(cache)})
    return Demand(forward=Forward(memory=memory, ranks=num_ranks))


def _measure_costs(config: Any, models: Models, num_ranks: int) -> Demand:
    """Subblocks of one rank's share, one after another; no weights of the parent."""
    parent, workload = models["parent"].architecture, config.workload
    largest = max(block_params(parent, block) for block in parent.blocks)
    per_token = kv_bytes_per_token(parent, workload.bytes_per_value) / parent.num_blocks
    parts = {
        "weights": float(workload.bytes_per_value * largest / workload.tensor_parallel),
        "KV cache": per_token * workload.batch_size * workload.max_context_tokens / workload.tensor_parallel,
    }
    return Demand(forward=Forward(memory=Memory(moment="largest block", parts=parts), ranks=num_ranks))


def _benchmark(config: Any, models: Models, num_ranks: int) -> Demand:
    """All models at once, whole."""
    workload = config.workload
    shapes = [model.architecture for model in models.values()]
    cache = max(kv_bytes_per_token(shape, workload.bytes_per_value) for shape in shapes)
    parts = {
        "weights": float(workload.bytes_per_value * sum(map(num_params, shapes))),
        "KV cache": float(cache * workload.batch_size * workload.max_context_tokens),
    }
    return Demand(forward=Forward(memory=Memory(moment="all models", parts=parts)))


def _on_cpu(config: Any, models: Models, num_ranks: int) -> Demand:
    """Tensor by tensor, in CPU memory."""
    return Demand()


def _micro(engine: EngineConfig, batch_size: int, seq_len: int) -> int:
    most = engine.micro_batch_tokens
    return batch_size if most == 0 else max(1, min(batch_size, most // seq_len))


def _running(architecture: Architecture, engine: EngineConfig, tokens: int, seq_len: int, *, dealt: int) -> Memory:
    """A model without gradient in ``dealt`` parts: weights, one block at work, and two models' chunks of logits."""
    c = product_bytes(engine)
    blocks = [block_params(architecture, block) for block in architecture.blocks]
    # puzzle.slices.slice_blocks: at best even, at least the largest block, with embedding or head at the ends.
    share = max(num_params(architecture) / dealt, max(blocks) + (other_params(architecture) / 2 if dealt > 1 else 0))
    rows = chunk_rows(tokens, architecture.vocab_size, 0)
    running = forward_bytes(architecture, Shape(tokens=tokens, seq_len=seq_len), Numerics(residual=c, product=c))
    return Memory(
        moment="forward pass",
        parts={"weights": c * share, "activations": running, "logits": 8.0 * rows * architecture.vocab_size},
    )
