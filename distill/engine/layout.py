"""Which layouts can work: engine, options, ranks, batch and sequence, before anything is loaded. Torch-free.

Every error names what does not fit together, with the values, and the nearest settings with which everything does
(:mod:`distill.engine.dealing`). Which models can be dealt how stands in :mod:`puzzle.model.parallelism`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from distill.config import EngineConfig, ObjectiveConfig, require
from distill.engine.dealing import (
    TEACHER_PLACES,
    Dealing,
    Refuses,
    Settings,
    StepShape,
    num_model_ranks,
    other_engines,
    other_processes,
    other_sizes,
    other_splits,
    plain,
    splits,
    text_of,
    unsplit,
)

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
            f"engine.{option}={plain(value)} is no option of engine.name={engine.name}; {_ALTERNATIVE[option]}",
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
    given = " ".join(f"engine.{name}={plain(value)}" for name, value in asked.items())
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


def check_layout(
    engine: EngineConfig, *, world_size: int, steps: Sequence[StepShape] = (), models: Sequence[Refuses] = ()
) -> None:
    """Compare ``engine`` with the processes, with the shapes of optimizer steps and with models.

    Args:
        engine: what trains.
        world_size: processes.
        steps: of all that is trained with these settings: the phases of a stage.
        models: each says why settings do not suit it; what is not known yet is left out.

    Raises:
        ValueError: an option is not one of this engine's (:func:`check_options`), or the processes, a batch, a
            sequence or a model cannot be dealt. With the settings that the message names, all of them can.
    """
    check_options(engine)
    dealing = Dealing(engine=engine, world_size=world_size, steps=tuple(steps), models=tuple(models))
    _check_world(dealing)
    if dealing.refusal is not None:
        raise ValueError(f"{dealing.refusal}; {_ways_out(dealing, other_splits(dealing))}")
    for step in dealing.steps:
        _check_seq_len(step, dealing)
        _check_batch_size(step, dealing)
    require(
        world_size == 1 or engine.teacher_device in TEACHER_PLACES,
        f"engine.teacher_device={engine.teacher_device} would put the teachers of all {world_size} processes on one "
        "device; set engine.teacher_device=same or cpu, or train from the signals of stage cache_teacher",
    )


def _check_world(dealing: Dealing) -> None:
    engine, world_size, shared = dealing.engine, dealing.world_size, num_model_ranks(dealing.engine)
    if world_size % shared:
        names = [name for name in splits(engine) if getattr(engine, name) > 1]
        given = " x ".join(f"engine.{name}={getattr(engine, name)}" for name in names)
        processes = other_processes(dealing)
        ways = _ways_out(dealing, other_splits(dealing), processes=processes)
        launcher = "" if processes is None else " (torchrun --nproc-per-node ... -m launch ...)"
        raise ValueError(f"{given} needs a multiple of {shared} processes, got {world_size}; {ways}{launcher}")


def _check_seq_len(step: StepShape, dealing: Dealing) -> None:
    # Between tensor-parallel ranks, too, activations are split over the sequence.
    for name in ("sequence_parallel", "tensor_parallel"):
        parts = getattr(dealing.engine, name)
        if step.seq_len % parts:
            sizes, ranks = other_sizes(dealing), other_splits(dealing)
            # Other ranks are a way of their own where the step may stay as it is.
            own = ranks is not None and all(setting.startswith("engine.") for setting in ranks)
            ways = _ways_out(dealing, sizes, ranks if own or sizes is None else None)
            raise ValueError(
                f"engine.{name}={parts} splits every sequence into equal parts, {step.node}.seq_len={step.seq_len} "
                f"does not divide; {ways}"
            )


def _check_batch_size(step: StepShape, dealing: Dealing) -> None:
    shared = num_model_ranks(dealing.engine)
    data_ranks = dealing.world_size // shared
    if step.batch_size % data_ranks:
        sizes, processes = other_sizes(dealing), other_processes(dealing)
        ranks = other_splits(dealing) if sizes is None and processes is None else None
        raise ValueError(
            f"{step.node}.batch_size={step.batch_size} cannot be dealt evenly over {data_ranks} data ranks "
            f"({dealing.world_size} processes{f', {shared} to a sequence' if shared > 1 else ''}); "
            + _ways_out(dealing, sizes, ranks, processes=processes)
        )


def _ways_out(dealing: Dealing, *ways: Settings | None, processes: int | None = None) -> str:
    """``set a=1, or b=2, or start 3 processes``: each way is enough."""
    texts = [text_of(settings) for settings in ways if settings]
    if not texts and processes is None:
        texts = [text_of(settings) for settings in other_engines(dealing)]
    if not texts and processes is None:
        settings, number = unsplit(dealing)
        return f"set {text_of(settings)} and start {_count(number)}"
    setting = [f"set {', or '.join(texts)}"] if texts else []
    starting = [] if processes is None else [f"start {_count(processes)}"]
    return ", or ".join(setting + starting)


def _count(processes: int) -> str:
    return "1 process" if processes == 1 else f"{processes} processes"
