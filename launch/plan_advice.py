"""What has to change for a training step to fit: the fewest settings, the cheap ones first. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import combinations, product
from typing import Any

from distill.config import EngineConfig
from distill.engine.dealing import Dealing, StepShape
from distill.engine.layout import check_options
from launch.plan_megatron import megatron_memory
from launch.plan_memory import Memory, training_memory
from launch.plan_step import Step
from puzzle.model.parallelism import refuses

ALLOCATOR_FRAC = 0.05
"""Of the allocated bytes, what torch's allocator holds beside them in pieces that are too small."""
CONTEXT_BYTES = 1.5 * 2**30
"""The CUDA context, the libraries' kernels and workspaces, and NCCL's buffers."""
_MAX_CHANGES = 4
_NODE_FACTORS = (2, 4, 8, 16)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a node has."""

    gpu_bytes: float
    """Of one GPU."""
    host_bytes: float
    """Of one node."""
    gpus_per_node: int


def step_memory(step: Step) -> Memory:
    """The fullest moment of ``step``, whatever the engine."""
    return megatron_memory(step) if step.engine.name == "megatron" else training_memory(step)


def needed_bytes(memory: Memory) -> float:
    """Of one GPU: what is allocated, and what comes with it."""
    return memory.total * (1 + ALLOCATOR_FRAC) + CONTEXT_BYTES


def fits(step: Step, memory: Memory, limits: Limits) -> bool:
    """Whether GPU and node have the room."""
    return needed_bytes(memory) <= limits.gpu_bytes and _host_bytes(step, memory, limits) <= limits.host_bytes


def _host_bytes(step: Step, memory: Memory, limits: Limits) -> float:
    """Of one node."""
    return memory.host_total * min(step.num_ranks, limits.gpus_per_node)


def _dealing(step: Step, node: str) -> Dealing:
    return Dealing(
        engine=step.engine,
        world_size=step.num_ranks,
        steps=(StepShape(node=node, batch_size=step.batch_size, seq_len=step.seq_len),),
        models=tuple(refuses(model, role=role) for role, model in step.models.items()),
    )


def nearest_fit(step: Step, limits: Limits, *, node: str) -> str | None:
    """The fewest changes of settings with which ``step`` fits, as overrides; None: none of those that were tried.

    More nodes are the last resort, and a whole multiple of those there are.
    """
    for changes in _candidates(step, limits, node=node):
        changed = step
        for change in changes:
            changed = change.apply(changed)
        if _works(changed, limits, node=node):
            return " ".join(change.text for change in changes)
    return None


@dataclass(frozen=True, kw_only=True)
class _Change:
    text: str
    apply: Callable[[Step], Step]


def _works(step: Step, limits: Limits, *, node: str) -> bool:
    try:
        check_options(step.engine)
        return _dealing(step, node).works and fits(step, step_memory(step), limits)
    except ValueError:
        return False


def _candidates(step: Step, limits: Limits, *, node: str) -> Iterator[tuple[_Change, ...]]:
    options = [_point_options(step, limits, node=node), *_engine_options(step), _node_options(step)]
    options = [choices for choices in options if choices]
    for number in range(1, _MAX_CHANGES + 1):
        for chosen in combinations(options, number):
            yield from product(*chosen)


def _point_options(step: Step, limits: Limits, *, node: str) -> list[_Change]:
    """Have training wait for the disk, where CPU memory is what lacks."""
    try:
        lacks = _host_bytes(step, step_memory(step), limits) > limits.host_bytes or step.engine.device == "cpu"
    except ValueError:
        return []
    if not (step.background_points and lacks):
        return []
    # The phases of stage extend_context share theirs.
    text = f"{node.partition('.phases.')[0]}.resume_points.background=false"
    return [_Change(text=text, apply=lambda step: replace(step, background_points=False))]


def _engine_options(step: Step) -> list[list[_Change]]:
    engine = step.engine
    options = [[] if engine.recompute else [_set(recompute=True)]]
    smallest = step.seq_len // engine.sequence_parallel
    options.append([_set(micro_batch_tokens=smallest)] if step.micro_sequences > 1 else [])
    if engine.name == "megatron":
        options.append([_set(tensor_parallel=n) for n in (2, 4, 8) if n > engine.tensor_parallel])
        options.append([_set(pipeline_parallel=n) for n in (2, 4, 8, 16, 32) if n > engine.pipeline_parallel])
        return options
    if engine.name == "torch":
        options.append([] if engine.shard else [_set(shard=True)])
    else:
        options.append([_set(zero_stage=stage) for stage in range(engine.zero_stage + 1, 4)])
    options.append([] if engine.ffn_tile_tokens else [_set(ffn_tile_tokens=4096)])
    options.append([_set(sequence_parallel=n) for n in (2, 4, 8) if n > engine.sequence_parallel])
    options.append([] if engine.offload_activations else [_set(recompute=True, offload_activations=True)])
    options.append([] if engine.offload_optimizer else [_set(offload_optimizer=True)])
    return options


def _set(**settings: Any) -> _Change:
    def apply(step: Step) -> Step:
        engine: EngineConfig = replace(step.engine, **settings)
        return replace(step, engine=engine)

    return _Change(
        text=" ".join(f"engine.{name}={str(value).lower()}" for name, value in settings.items()), apply=apply
    )


def _node_options(step: Step) -> list[_Change]:
    def more(factor: int) -> _Change:
        return _Change(text=f"nodes x {factor}", apply=lambda step: replace(step, num_ranks=factor * step.num_ranks))

    return [more(factor) for factor in _NODE_FACTORS]
