"""What stays on every rank of a training step: weights, gradients, optimizer state, buffers, teacher. Torch-free.

P parameters, n ranks, bytes per parameter, and where the engines make them so:

===================  =========  ==========  ===========  ============  ==============================================
engine               weights    master      AdamW        gradients     source
===================  =========  ==========  ===========  ============  ==============================================
torch, one process   4          -           8            4             ``TorchEngine._build`` (fp32), ``distill.optim``
torch, DDP           4          -           8            4 + 4         buckets: ``gradient_as_bucket_view``
torch, shard         gathered   4 / n       8 / n        4 / n         ``torch_sharding.shard_student`` (fp32 shards)
deepspeed, stage 1   2          4 / n       8 / n        4             ZeRO's bf16 optimizer: ``grad_accum_dtype`` fp32
deepspeed, stage 2   2          4 / n       8 / n        4 / n         ``zero_config``
deepspeed, stage 3   2 / n      4 / n       8 / n        4 / n         ``zero_config``
===================  =========  ==========  ===========  ============  ==============================================

DDP's gradients are views of its buckets (``gradient_as_bucket_view``) from the first backward pass that reduces them
on; until then micro-batches have gradients beside them. Before the second forward pass it orders the buckets anew, with
the old ones still there. Either is 4 bytes more. In fp32 DeepSpeed's running weights take 4 bytes. With
``offload_optimizer`` master weights, AdamW and gradients are on the host.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from distill.config import EngineConfig
from puzzle.model.architecture import Architecture
from puzzle.model.stats import block_params, num_params, other_params

POINT_BYTES = 12
"""Per parameter of a resume point, whatever the engine: fp32 weights and AdamW's moments."""
REDUCE_BUCKET_VALUES = 500_000_000
"""DeepSpeed's ``reduce_bucket_size``, which ``zero_config`` leaves as it is: buffers have it, whatever the model."""
MAX_LIVE_VALUES = 1_000_000_000
"""DeepSpeed's ``stage3_max_live_parameters``: gathered weights that stage 3 keeps for their next use."""


@dataclass(frozen=True, kw_only=True)
class State:
    """Bytes per rank between two steps."""

    weights: float = 0.0
    """What stands there whole or as this rank's part, in the type that runs."""
    master: float = 0.0
    optimizer: float = 0.0
    gradients: float = 0.0
    """Those that stay from micro-batch to micro-batch."""
    buffers: float = 0.0
    """Of the library, for communication."""
    host: dict[str, float] = field(default_factory=dict)
    """The same on the CPU, by name."""


def is_sharded(engine: EngineConfig) -> bool:
    """Whether no rank has the student's weights whole (``TorchEngine._is_sharded``, ZeRO 3)."""
    if engine.name == "torch":
        return engine.shard or engine.offload_optimizer
    return engine.name == "deepspeed" and engine.zero_stage == 3


def product_bytes(engine: EngineConfig) -> int:
    """Bytes per value of weights as matrix products read them."""
    return 2 if engine.precision == "bf16" else 4


def student_state(student: Architecture, engine: EngineConfig, num_ranks: int, *, on_gpu: bool = True) -> State:
    """What the torch and DeepSpeed engines keep of a student on every rank.

    Gradients are those of :class:`State`; without DDP or ZeRO they are gone between two steps, and the whole 4 bytes
    per parameter exist from the backward pass to the optimizer's step.
    """
    values = num_params(student)
    if engine.name == "torch":
        return _torch_state(values, engine, num_ranks)
    return _zero_state(values, engine, num_ranks, on_gpu=on_gpu)


def _torch_state(values: int, engine: EngineConfig, num_ranks: int) -> State:
    dealt = values / num_ranks if is_sharded(engine) else values
    if engine.offload_optimizer:
        return State(host={"master weights": 4 * dealt, "optimizer": 8 * dealt, "gradients": 4 * dealt})
    if is_sharded(engine):
        return State(master=4 * dealt, optimizer=8 * dealt, gradients=4 * dealt)
    buckets = 4 * dealt if num_ranks > 1 else 0.0
    return State(weights=4 * dealt, optimizer=8 * dealt, gradients=4 * dealt, buffers=buckets)


def _zero_state(values: int, engine: EngineConfig, num_ranks: int, *, on_gpu: bool) -> State:
    running, stage = product_bytes(engine), engine.zero_stage
    part = values / num_ranks
    weights = running * (part if stage == 3 else values)
    if engine.offload_optimizer:
        host = {"master weights": 4 * part, "optimizer": 8 * part, "gradients": 4 * part}
        return State(weights=weights, buffers=_zero_buffers(engine, on_gpu=on_gpu), host=host)
    # The bf16 optimizer of stage 1 keeps all gradients in fp32; the others a rank's own.
    whole = stage == 1 and engine.precision == "bf16"
    return State(
        weights=weights,
        master=4 * part,
        optimizer=8 * part,
        gradients=4 * (values if whole else part),
        buffers=0.0 if whole else _zero_buffers(engine, on_gpu=on_gpu),
    )


def _zero_buffers(engine: EngineConfig, *, on_gpu: bool) -> float:
    """Buckets that gradients are gathered in: two of stages 1 and 2 where communication overlaps, one of stage 3."""
    number = 2 if engine.zero_stage < 3 and on_gpu else 1
    return number * product_bytes(engine) * REDUCE_BUCKET_VALUES


def point_bytes(student: Architecture, num_ranks: int) -> float:
    """What one rank writes of a resume point, and copies first where a thread is to write it.

    FSDP2's shards are a rank's own. Of what all ranks have, DDP's ranks take turns by tensor and ZeRO's by parameter
    (``torch_state.snapshot``, ``DeepSpeedEngine.snapshot``): on the mean over the ranks as much, and on a node that
    has them all exactly.
    """
    return POINT_BYTES * num_params(student) / num_ranks


def teacher_bytes(teacher: Architecture, engine: EngineConfig, num_ranks: int) -> float:
    """Weights of a teacher on every rank, in the precision of the engine (``distill.engine.teachers``).

    Where the student is sharded by FSDP2 or ZeRO 3, the teacher's blocks are dealt; embedding, norm and head stay whole
    (``torch_sharding.shard_teacher``).
    """
    dealt = engine.shard or (engine.name == "deepspeed" and engine.zero_stage == 3)
    blocks = sum(block_params(teacher, block) for block in teacher.blocks)
    return product_bytes(engine) * (other_params(teacher) + blocks / (num_ranks if dealt else 1))
