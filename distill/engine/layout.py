"""Which layouts can work: engine, options, ranks, batch and sequence, before anything is loaded. Torch-free.

Every error names what does not fit together, with the values, and the nearest settings that do. What depends on the
model stands in :mod:`puzzle.model.parallelism`.
"""

from __future__ import annotations

import re

from distill.config import EngineConfig, ObjectiveConfig, require

_ALTERNATIVE = {
    "shard": "set engine.name=torch, or engine.name=deepspeed with engine.zero_stage=3, which deals the weights too",
    "offload_optimizer": "set engine.name=torch or deepspeed, or deal the state over more ranks",
    "offload_activations": "set engine.name=torch or deepspeed",
    "ffn_tile_tokens": "set it to 0; engine.tensor_parallel makes every FFN narrower",
    "compile": "set engine.compile=false",
}
"""Option that an engine may lack -> the way out."""
_NOT_OF_ENGINE = {
    "torch": (),
    "deepspeed": ("shard",),
    "megatron": ("shard", "offload_optimizer", "offload_activations", "ffn_tile_tokens", "compile"),
}
"""Engine -> options that it does not have."""


def check_options(engine: EngineConfig) -> None:
    """Compare the options of ``engine`` with what its library can do, at any number of processes.

    Raises:
        ValueError: an option is not one of this engine's, or means nothing without another.
    """
    for option in _NOT_OF_ENGINE[engine.name]:
        value = getattr(engine, option)
        require(
            not value,
            f"engine.{option}={_plain(value)} is no option of engine.name={engine.name}; {_ALTERNATIVE[option]}",
        )
    if engine.name == "megatron":
        ranks = engine.sequence_parallel
        require(
            ranks == 1,
            f"engine.sequence_parallel={ranks} is the Ulysses of torch and deepspeed; engine.name=megatron splits the "
            f"sequence over engine.tensor_parallel: set engine.tensor_parallel={ranks} engine.sequence_parallel=1",
        )
    else:
        ranks = engine.tensor_parallel * engine.pipeline_parallel
        require(
            ranks == 1,
            f"engine.tensor_parallel={engine.tensor_parallel} and engine.pipeline_parallel={engine.pipeline_parallel} "
            f"are megatron's, engine.name={engine.name}; set engine.name=megatron, or both to 1"
            + (" and engine.shard=true" if engine.name == "torch" else " and engine.zero_stage=3"),
        )
    require(
        engine.recompute or not engine.offload_activations,
        "engine.offload_activations=true moves the inputs that recomputing starts from; set engine.recompute=true",
    )
    _check_teacher_device(engine)


def check_whole_model(engine: EngineConfig, stage: str, *, may_shard: bool) -> None:
    """Compare ``engine`` with a stage whose processes share the work and each run a whole model.

    Args:
        engine: settings.
        stage: named in the message.
        may_shard: ``engine.shard`` deals the model's weights all the same.

    Raises:
        ValueError: a layout is asked for that the stage does not have.
    """
    asked = {
        name: getattr(engine, name)
        for name in ("tensor_parallel", "pipeline_parallel", "sequence_parallel", "slices")
        if getattr(engine, name) > 1
    }
    if engine.shard and not may_shard:
        asked["shard"] = True
    given = " ".join(f"engine.{name}={_plain(value)}" for name, value in asked.items())
    ways = "engine=torch_bf16" + (", or engine=torch_fsdp to deal its weights" if may_shard else "")
    require(not asked, f"{given}: every process of stage {stage} runs the model by itself; set {ways} for this step")


def check_objective_memory(engine: EngineConfig, objective: ObjectiveConfig) -> None:
    """Compare what ``engine`` moves out of the way with what ``objective`` holds on to.

    Raises:
        ValueError: the offload of activations would save nothing.
    """
    weights = f"objective.hidden_cosine={objective.hidden_cosine:g}, objective.hidden_mse={objective.hidden_mse:g}"
    require(
        not (engine.offload_activations and objective.compares_hidden),
        "engine.offload_activations=true moves the blocks' inputs to CPU memory, but to compare hidden states "
        f"({weights}) all of them stay on the device until the backward pass; set objective=kld (or another without "
        "hidden terms), or engine.offload_activations=false",
    )


def _check_teacher_device(engine: EngineConfig) -> None:
    place = engine.teacher_device
    require(
        re.fullmatch(r"same|cpu|cuda:\d+", place) is not None,
        f"engine.teacher_device={place} is not a place; give same, cpu or a device such as cuda:1",
    )
    require(
        place == "same" or engine.name != "megatron",
        f"engine.teacher_device={place}: with engine.name=megatron the teacher is dealt over the same ranks as the "
        "student; set engine.teacher_device=same",
    )


def num_model_ranks(engine: EngineConfig) -> int:
    """Ranks that work on the same sequences; as many ranks as there are share one data rank."""
    return engine.sequence_parallel * engine.tensor_parallel * engine.pipeline_parallel


def check_layout(engine: EngineConfig, *, world_size: int, batch_size: int, seq_len: int, node: str) -> None:
    """Compare ``engine`` with the processes and with the shape of an optimizer step.

    Args:
        engine: what trains.
        world_size: processes.
        batch_size: sequences of one optimizer step, over all processes.
        seq_len: tokens per sequence.
        node: configuration node of the two, for errors: ``distill``, ``pretrain.train``.

    Raises:
        ValueError: an option is not one of this engine's (:func:`check_options`), or the processes, the batch or the
            sequence cannot be dealt.
    """
    check_options(engine)
    check_world(engine, world_size)
    # Between tensor-parallel ranks, too, activations are split over the sequence.
    for name in ("sequence_parallel", "tensor_parallel"):
        parts = getattr(engine, name)
        require(
            seq_len % parts == 0,
            f"engine.{name}={parts} splits every sequence into equal parts, {node}.seq_len={seq_len} does not divide; "
            f"set {node}.seq_len={nearest_multiples(seq_len, parts)}",
        )
    require(
        world_size == 1 or engine.teacher_device in ("same", "cpu"),
        f"engine.teacher_device={engine.teacher_device} would put the teachers of all {world_size} processes on one "
        "device; set engine.teacher_device=same or cpu, or train from the signals of stage cache_teacher",
    )
    shared = num_model_ranks(engine)
    data_ranks = world_size // shared
    fewer = nearest_divisor(batch_size, data_ranks) * shared
    require(
        batch_size % data_ranks == 0,
        f"{node}.batch_size={batch_size} cannot be dealt evenly over {data_ranks} data ranks ({world_size} processes"
        + (f", {shared} to a sequence" if shared > 1 else "")
        + f"); set {node}.batch_size={nearest_multiples(batch_size, data_ranks)}, or start {fewer} "
        + ("process" if fewer == 1 else "processes"),
    )


def check_world(engine: EngineConfig, world_size: int) -> None:
    """Compare the ranks that share a sequence or a model in ``engine`` with the number of processes.

    Raises:
        ValueError: the processes are no multiple of those ranks.
    """
    shared = num_model_ranks(engine)
    splits = ("sequence_parallel", "tensor_parallel", "pipeline_parallel")
    names = [name for name in splits if getattr(engine, name) > 1]
    given = " x ".join(f"engine.{name}={getattr(engine, name)}" for name in names)
    settings, rest = [], world_size
    for name in names:
        nearest = nearest_divisor(rest, getattr(engine, name))
        settings.append(f"engine.{name}={nearest}")
        rest //= nearest
    require(
        world_size % shared == 0,
        f"{given} needs a multiple of {shared} processes, got {world_size}; set {' '.join(settings)}, or start "
        f"{shared * max(1, round(world_size / shared))} processes (torchrun --nproc-per-node ... -m launch ...)",
    )


def nearest_divisor(number: int, wanted: int) -> int:
    """The divisor of ``number`` that is nearest to ``wanted``; of two, the smaller."""
    divisors = [candidate for candidate in range(1, number + 1) if number % candidate == 0]
    return min(divisors, key=lambda divisor: (abs(divisor - wanted), divisor))


def nearest_multiples(number: int, step: int) -> str:
    """The multiples of ``step`` below and above ``number``, as ``8 or 12``; the one above alone where 0 is below."""
    below = number // step * step
    return f"{below} or {below + step}" if below else f"{step}"


def _plain(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
