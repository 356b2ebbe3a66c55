"""Time of a training step: matrix products at a stated share of the device's rate, or the links, if they take longer.

Torch-free. FLOPs are those of :mod:`puzzle.model.stats`: the teacher's forward pass once, the student's three times,
and once more what recomputation and tiles compute again (the heads never: their gradient is made beside the loss).
The rate is ``flops_per_s`` of ``conf/hardware``, which large products sustain, times the utilization that the plan
states.
"""

from __future__ import annotations

from dataclasses import dataclass

from distill.config import require
from distill.utilization import training_flops
from launch.plan_state import is_sharded, product_bytes
from launch.plan_step import Step
from puzzle.config import HardwareConfig
from puzzle.model.architecture import Architecture
from puzzle.model.stats import ffn_flops_per_token, num_params, sequence_flops

UTILIZATION = 0.6
"""Of conf/hardware's sustained rate, itself 0.7 of the data sheet's: an MFU of 42 % where nothing is computed again."""
NODE_LINK_BYTES_PER_S = 45e9
"""Between nodes, per GPU: one port of 400 Gbit/s each, less the protocol. An assumption."""
HOST_BYTES_PER_S = 200e9
"""Memory bandwidth of a node, at which an optimizer on the CPU streams its state. An assumption."""
HOST_STEP_BYTES = 28
"""Per parameter: AdamW reads gradient, weight and two moments and writes the last three, in fp32."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What the time goes by."""

    flops_per_s: float
    """Of one GPU, utilization included."""
    link_bytes_per_s: float
    """Of one GPU's links to the others of its node."""
    gpus_per_node: int

    @classmethod
    def of(cls, hardware: HardwareConfig, *, utilization: float, gpus_per_node: int) -> Rates:
        """The rates of a file of conf/hardware.

        Raises:
            ValueError: it has none: they would be calibrated, on the device.
        """
        require(
            hardware.flops_per_s is not None and hardware.all_reduce_bytes_per_s is not None,
            "cluster.hardware=here has no rates before it is calibrated; name a file with numbers, as h100_sxm",
        )
        assert hardware.flops_per_s is not None
        assert hardware.all_reduce_bytes_per_s is not None
        return cls(
            flops_per_s=hardware.flops_per_s * utilization,
            link_bytes_per_s=hardware.all_reduce_bytes_per_s,
            gpus_per_node=gpus_per_node,
        )


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of one optimizer step."""

    compute_s: float
    link_s: float
    """Gathering weights and reducing gradients, which overlaps with computation."""
    exposed_s: float
    """What does not: tensor parallelism within blocks, and an optimizer on the CPU."""

    @property
    def total_s(self) -> float:
        """Seconds."""
        return max(self.compute_s, self.link_s) + self.exposed_s


def step_time(step: Step, rates: Rates) -> StepTime:
    """Time of one optimizer step of ``step``."""
    engine, micro = step.engine, step.num_micro_batches
    compute = step_flops(step) / (rates.flops_per_s * step.num_ranks)
    if engine.pipeline_parallel > 1:
        # 1F1B: a stage waits for p - 1 micro-batches (Narayanan et al., 2021, section 2.2).
        compute *= (micro + engine.pipeline_parallel - 1) / micro
    across = NODE_LINK_BYTES_PER_S if step.num_ranks > rates.gpus_per_node else rates.link_bytes_per_s
    exposed = _tensor_parallel_bytes(step) / rates.link_bytes_per_s
    if engine.offload_optimizer:
        ranks_here = min(step.num_ranks, rates.gpus_per_node)
        exposed += HOST_STEP_BYTES * num_params(step.student) / step.num_ranks * ranks_here / HOST_BYTES_PER_S
    return StepTime(compute_s=compute, link_s=_data_parallel_bytes(step) / across, exposed_s=exposed)


def step_flops(step: Step) -> float:
    """FLOPs of one optimizer step, with what is computed again."""
    objective, teacher = step.objective, 0
    if step.teacher is not None:
        teacher = sequence_flops(step.teacher, step.seq_len, head=objective.kld > 0)
    flops = training_flops(sequence_flops(step.student, step.seq_len, head=objective.reads_logits), teacher)
    if step.engine.recompute:
        flops += sequence_flops(step.student, step.seq_len, head=False)
    if 0 < step.engine.ffn_tile_tokens < step.micro_tokens:
        flops += sum(ffn_flops_per_token(step.student, block.ffn) for block in step.student.blocks) * step.seq_len
    return flops * step.batch_size


def _data_parallel_bytes(step: Step) -> float:
    """Through one rank's links, per step: gathering or scattering passes (n - 1) / n of the whole, an all-reduce twice
    that."""
    engine, micro, c = step.engine, step.num_micro_batches, product_bytes(step.engine)
    values = num_params(step.student)
    if engine.name == "megatron":
        n = step.data_ranks
        values = values // (engine.tensor_parallel * engine.pipeline_parallel)
        # Gradients are scattered in fp32 and weights gathered, once a step.
        return (4 + c) * values * (n - 1) / n
    n = step.num_ranks
    if is_sharded(engine):
        # Weights forward and backward, gradients in fp32, in every micro-batch; and the teacher's weights.
        per_batch = 2 * c * values + 4 * values + _taught_bytes(step)
        return micro * per_batch * (n - 1) / n
    if engine.name == "deepspeed":
        reductions = micro if engine.zero_stage == 2 else 1
        return (4 * reductions + c) * values * (n - 1) / n
    return 2 * 4 * values * (n - 1) / n


def _taught_bytes(step: Step) -> int:
    """Weights of a teacher that is dealt as the student is."""
    if step.teacher is None or not (step.engine.shard or step.engine.name == "deepspeed"):
        return 0
    return product_bytes(step.engine) * num_params(step.teacher)


def _tensor_parallel_bytes(step: Step) -> float:
    """Gathering and scattering activations around every attention and FFN: twice forward, three times backward."""
    t = step.engine.tensor_parallel
    if t == 1:
        return 0.0
    c, tokens = product_bytes(step.engine), step.micro_tokens * step.num_micro_batches
    passes = 5 + 2 * step.engine.recompute
    own = _subblocks(step.student) * step.student.hidden_dim * passes
    taught = 0 if step.teacher is None else 2 * _subblocks(step.teacher) * step.teacher.hidden_dim
    return c * tokens * (own + taught) * (t - 1) / t / step.engine.pipeline_parallel


def _subblocks(architecture: Architecture) -> int:
    return sum((not block.attention.is_no_op) + (not block.ffn.is_no_op) for block in architecture.blocks)
