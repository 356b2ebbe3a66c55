"""Memory of the Megatron engine: tensor ranks share every matrix, stages the blocks, data ranks the optimizer.

Torch-free. Per parameter of a stage's tensor shard, with d data ranks: bf16 weights 2, gradients in one fp32 buffer 4
(``grad_reduce_in_fp32``), fp32 master weights 4 / d and AdamW 8 / d (``use_distributed_optimizer``); in fp32 the
weights are their own masters. Activations are split over the sequence between the matrices: every norm keeps its input
alone (``puzzle.model.megatron.RMSNorm``, compiled), matrices read the sequence's part and gather it again in the
backward pass, SwiGLU is fused. Stage s of p holds the activations of min(p - s, micro-batches) micro-batches (1F1B).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from distill.engine.megatron_stages import ModelCosts, StagePlan, plan_stages
from launch.plan_activations import Numerics
from launch.plan_heads import Parts, head_bytes
from launch.plan_memory import Memory, point_copy
from launch.plan_state import POINT_BYTES, product_bytes
from launch.plan_step import Step
from puzzle.model.architecture import Architecture, BlockConfig
from puzzle.model.stats import attention_flops_per_token, block_params, ffn_flops_per_token


def megatron_memory(step: Step) -> Memory:
    """The fullest moment of ``step`` on the fullest stage."""
    engine = step.engine
    plan = stage_plan(step)
    stages = [_stage(step, plan, index) for index in range(engine.pipeline_parallel)]
    # Tensor and data ranks of one stage are neighbours: a node has ranks of the one that copies most.
    host = max((memory.host for memory in stages), key=lambda parts: sum(parts.values()))
    return replace(max(stages, key=lambda memory: memory.total), host=host)


def stage_plan(step: Step) -> StagePlan:
    """How the engine will cut student and teacher (``distill.engine.megatron_engine._plan``)."""
    teacher = None if step.teacher is None else _costs(step.teacher, step.seq_len)
    pairs: Sequence[int] = ()
    if step.teacher is not None and step.objective.compares_hidden:
        pairs = _pairs(step.student, step.teacher)
    student = _costs(step.student, step.seq_len)
    return plan_stages(step.engine.pipeline_parallel, student, teacher, pairs, recompute=step.engine.recompute)


def _pairs(student: Architecture, teacher: Architecture) -> tuple[int, ...]:
    """Teacher block of every student block; none where the two do not come from one parent."""
    blocks = {block.parent_block_indices[-1]: index for index, block in enumerate(teacher.blocks)}
    pairs = tuple(blocks.get(block.parent_block_indices[-1], -1) for block in student.blocks)
    is_map = list(pairs) == sorted(set(pairs)) and pairs[0] >= 0 and pairs[-1] == teacher.num_blocks - 1
    return pairs if is_map else ()


def _costs(architecture: Architecture, seq_len: int) -> ModelCosts:
    context = (seq_len + 1) // 2
    return ModelCosts(
        blocks=[
            attention_flops_per_token(architecture, block.attention, context)
            + ffn_flops_per_token(architecture, block.ffn)
            for block in architecture.blocks
        ],
        head=2 * architecture.vocab_size * architecture.hidden_dim,
    )


@dataclass(frozen=True, kw_only=True)
class _Kept:
    """Bytes of a block's activations on one tensor rank."""

    saved: float
    extra: float
    """Within its backward pass."""


def _block(architecture: Architecture, block: BlockConfig, step: Step) -> _Kept:
    t, c, tokens = step.engine.tensor_parallel, product_bytes(step.engine), step.micro_tokens
    saved = extra = 0.0
    hidden = architecture.hidden_dim * c
    heads = block.attention.num_kv_heads
    if not block.attention.is_no_op:
        # The norm's input, and its output for the matrix.
        saved += 2 * hidden
    if heads is not None:
        q = architecture.num_heads * architecture.head_dim
        kv = max(heads, t) * architecture.head_dim
        # Stacked projections, whose values attention reads; rotated queries and keys; output; sums per head.
        saved += c * (q + 2 * kv) + c * (q + kv) + c * q + 4 * architecture.num_heads
        extra = c * (2 * q + 2 * kv) + (2 * c * q if heads < architecture.num_heads else 0) + 4 * q
    if not block.ffn.is_no_op:
        saved += 2 * hidden
    if block.ffn.ffn_dim is not None:
        # Gate and up, stacked, and the product; their gradients.
        saved += 3 * c * block.ffn.ffn_dim
        extra = max(extra, 3 * c * block.ffn.ffn_dim)
    # What a matrix reads is gathered over the sequence while it works: input, and gradient in the backward pass.
    return _Kept(saved=saved * tokens / t, extra=extra * tokens / t + 2 * hidden * tokens)


def stage_params(architecture: Architecture, blocks: range, *, first: bool, last: bool) -> int:
    """Parameters of a stage over all its tensor ranks; norms, which every rank has whole, count once."""
    table = architecture.vocab_size * architecture.hidden_dim
    total = sum(block_params(architecture, architecture.blocks[index]) for index in blocks)
    head = last and not (architecture.tie_embeddings and first)
    return total + table * (first + head) + architecture.hidden_dim * last


def _stage(step: Step, plan: StagePlan, index: int) -> Memory:
    engine, c = step.engine, product_bytes(step.engine)
    t, p = engine.tensor_parallel, engine.pipeline_parallel
    first, last = index == 0, index == p - 1
    blocks = range(sum(plan.student[:index]), sum(plan.student[: index + 1]))
    params = stage_params(step.student, blocks, first=first, last=last) / t
    d = step.data_ranks
    master = 4 / d if c == 2 else 0.0
    parts: Parts = {
        "weights": c * params,
        "gradients": 4 * params,
        "master weights": master * params,
        "optimizer": 8 * params / d,
        **point_copy(step, POINT_BYTES * params / d, on_host=False),
    }
    if step.teacher is not None:
        own = range(sum(plan.teacher[:index]), sum(plan.teacher[: index + 1]))
        parts["teacher"] = c * stage_params(step.teacher, own, first=first, last=last) / t
    part_tokens = step.micro_tokens / t
    kept = [_block(step.student, step.student.blocks[block], step) for block in blocks]
    stream = c * part_tokens * step.student.hidden_dim
    per_batch = len(kept) * stream if engine.recompute else sum(block.saved for block in kept)
    in_flight = min(p - index, step.num_micro_batches)
    work = max((block.extra + (block.saved if engine.recompute else 0) for block in kept), default=0.0)
    if step.teacher is not None:
        targets = len(kept) if step.objective.compares_hidden else 1
        parts["teacher's outputs"] = in_flight * targets * c * part_tokens * step.teacher.hidden_dim
    activations = in_flight * per_batch + 2 * stream
    at_head = _heads(step) if last else {}
    head_total = sum(at_head.values())
    moment = f"stage {index}: " + ("heads" if head_total > work else "backward")
    parts["activations"] = activations + (0.0 if head_total > work else work)
    if head_total > work:
        for name, size in at_head.items():
            parts[name] = parts.get(name, 0.0) + size
    return Memory(
        moment=moment,
        parts={name: size for name, size in parts.items() if size > 0},
        host=point_copy(step, POINT_BYTES * params / d, on_host=True),
    )


def _heads(step: Step) -> Parts:
    """The last stage's: hidden states of all tokens on every tensor rank, rows of the vocabulary dealt over them."""
    c, tokens = product_bytes(step.engine), step.micro_tokens
    vocab = step.student.vocab_size // step.engine.tensor_parallel
    has_teacher = step.teacher is not None
    numerics = Numerics(residual=c, product=c)
    parts = head_bytes(tokens, vocab, step.student.hidden_dim, step.objective, numerics, has_teacher=has_teacher)
    whole = c * tokens * step.student.hidden_dim
    whole += c * tokens * step.teacher.hidden_dim if step.teacher is not None else 0
    return {**parts, "activations": parts.get("activations", 0.0) + whole}
