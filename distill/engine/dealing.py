"""What can be dealt over the processes at hand, and the settings nearest to the wanted ones that can. Torch-free.

Everything that has a say is asked together: the processes, the optimizer steps and the models. A suggestion that suits
some of them alone would lead from one error to the next.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from itertools import product
from typing import Any

from distill.config import EngineConfig

Refuses = Callable[[EngineConfig], "str | None"]
"""Why a model cannot be dealt as the settings say, with the setting at fault; None: it can. Every model can be dealt
where nothing is split."""
Settings = Mapping[str, tuple[object, ...]]
"""What to set: full name -> values that work, of which one alone has more than one."""
TEACHER_PLACES = ("same", "cpu")
"""Where the teachers of several processes have room."""


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """One optimizer step, and the bounds within which its sizes may be suggested."""

    node: str
    """Configuration node of the sizes, for errors: ``distill``, ``pretrain.train``."""
    batch_size: int
    """Sequences, over all processes."""
    seq_len: int
    """Tokens per sequence."""
    min_seq_len: int = 2
    max_seq_len: int | None = None
    max_tokens: int | None = None
    """Of the whole run; one step has no more."""

    def allows(self, batch_size: int, seq_len: int) -> bool:
        """Whether these sizes are within bounds; what stays as given, or gets smaller, is for others to check."""
        fits = seq_len == self.seq_len or (
            seq_len >= self.min_seq_len and (self.max_seq_len is None or seq_len <= self.max_seq_len)
        )
        tokens, given = batch_size * seq_len, self.batch_size * self.seq_len
        return fits and (tokens <= given or self.max_tokens is None or tokens <= self.max_tokens)


@dataclass(frozen=True, kw_only=True)
class Dealing:
    """Settings of an engine, and all that is to be dealt by them."""

    engine: EngineConfig
    world_size: int
    """Processes."""
    steps: tuple[StepShape, ...]
    models: tuple[Refuses, ...]

    @property
    def works(self) -> bool:
        """Whether everything can be dealt as it is."""
        return _changes(self, self.engine) == {}

    @property
    def refusal(self) -> str | None:
        """Of the first model that cannot be dealt."""
        return next((why for refuses in self.models if (why := refuses(self.engine)) is not None), None)


def num_model_ranks(engine: EngineConfig) -> int:
    """Ranks that work on the same sequences; as many ranks as there are share one data rank."""
    return engine.sequence_parallel * engine.tensor_parallel * engine.pipeline_parallel


def splits(engine: EngineConfig) -> tuple[str, ...]:
    """The settings by which this engine splits a sequence or a model."""
    return ("tensor_parallel", "pipeline_parallel") if engine.name == "megatron" else ("sequence_parallel",)


def around(number: int, step: int) -> tuple[int, ...]:
    """The multiples of ``step`` next to ``number``: itself, or those below (unless 0) and above."""
    below = number // step * step
    if below == number:
        return (number,)
    return (below, below + step) if below else (step,)


def plain(value: object) -> str:
    """``value`` as on the command line."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def text_of(settings: Settings) -> str:
    """``settings`` as on the command line: ``a=1 or 2``, ``a=1 b=2``."""
    return " ".join(f"{name}={' or '.join(map(plain, values))}" for name, values in settings.items())


def other_splits(dealing: Dealing) -> Settings | None:
    """Other ranks to a sequence or a model, with as few further settings as possible; None: none can be dealt.

    Where one setting is enough, its values below and, up to twice as many, above the wanted one.
    """
    names = splits(dealing.engine)
    wanted = tuple(getattr(dealing.engine, name) for name in names)
    found = []
    for ranks in product(*(_up_to_twice(number, dealing.world_size) for number in wanted)):
        if ranks != wanted:
            split: dict[str, Any] = dict(zip(names, ranks, strict=True))
            settings = _changes(dealing, replace(dealing.engine, **split))
            if settings is not None:
                distance = sum(abs(one - given) for one, given in zip(ranks, wanted, strict=True))
                found.append((len(settings), distance, ranks, settings))
    if not found:
        return None
    num_settings, _, _, best = min(found, key=lambda entry: entry[:3])
    if num_settings > 1:
        return best
    (name,) = best
    index = names.index(name.removeprefix("engine."))
    ranks_of = sorted(ranks[index] for length, _, ranks, settings in found if length == 1 and name in settings)
    below = [number for number in ranks_of if number < wanted[index]]
    above = [number for number in ranks_of if number > wanted[index]]
    return {name: (*below[-1:], *above[:1])}


def other_engines(dealing: Dealing) -> Iterator[Settings]:
    """torch and deepspeed for a model that megatron cannot build, with what else has to change then."""
    if dealing.engine.name == "megatron":
        whole = _unsplit(dealing.engine)
        for engine in (replace(whole, name="torch", shard=True), replace(whole, name="deepspeed")):
            settings = _changes(dealing, engine)
            if settings is not None:
                yield settings


def other_sizes(dealing: Dealing) -> Settings | None:
    """Other sizes of the steps alone, at the same ranks; None: there are none."""
    return _changes(dealing, dealing.engine)


def other_processes(dealing: Dealing) -> int | None:
    """The number of processes, nearest to the present one, at which nothing else has to change; None: there is none."""
    shared = num_model_ranks(dealing.engine)
    # Without a step any number of data ranks will do.
    batch = math.gcd(*(step.batch_size for step in dealing.steps))
    most = batch or dealing.world_size // shared + 1
    numbers = [shared * ranks for ranks in range(1, most + 1) if batch % ranks == 0]
    numbers.sort(key=lambda number: (abs(number - dealing.world_size), number))
    return next(
        (number for number in numbers if _changes(replace(dealing, world_size=number), dealing.engine) == {}), None
    )


def unsplit(dealing: Dealing) -> tuple[Settings, int]:
    """The last resort: nothing split, over as many processes as share the batch evenly. It always works."""
    engine = _unsplit(dealing.engine)
    if replace(dealing, engine=engine).refusal is not None:
        engine = replace(engine, name="torch", shard=True)
    last = replace(dealing, engine=engine)
    if engine.teacher_device not in TEACHER_PLACES:
        last = replace(last, engine=replace(engine, teacher_device=TEACHER_PLACES[0]))
    number = other_processes(last)
    assert number is not None, "a model that is not split was refused"
    settings = _changes(replace(dealing, world_size=number), last.engine)
    assert settings is not None
    return settings, number


def _changes(dealing: Dealing, engine: EngineConfig) -> Settings | None:
    """What has to be set for ``engine`` to deal everything over the same processes; None: it cannot."""
    shared = num_model_ranks(engine)
    if dealing.world_size % shared or replace(dealing, engine=engine).refusal is not None:
        return None
    settings: dict[str, tuple[object, ...]] = {}
    for name in (entry.name for entry in fields(engine)):
        if getattr(engine, name) != getattr(dealing.engine, name):
            settings[f"engine.{name}"] = (getattr(engine, name),)
    # Between tensor-parallel ranks, too, activations are split over the sequence; an engine has one of the two.
    parts = engine.sequence_parallel * engine.tensor_parallel
    for step in dealing.steps:
        sizes = [
            (batch_size, seq_len)
            for batch_size in around(step.batch_size, dealing.world_size // shared)
            for seq_len in around(step.seq_len, parts)
            if step.allows(batch_size, seq_len)
        ]
        if not sizes:
            return None
        for name, present, values in zip(
            ("batch_size", "seq_len"), (step.batch_size, step.seq_len), zip(*sizes, strict=True), strict=True
        ):
            if values[0] != present:
                settings[f"{step.node}.{name}"] = values
    if dealing.world_size > 1 and engine.teacher_device not in TEACHER_PLACES:
        settings["engine.teacher_device"] = TEACHER_PLACES
    if len(settings) == 1:
        return settings
    return {name: values[:1] for name, values in settings.items()}


def _up_to_twice(wanted: int, world_size: int) -> list[int]:
    """Divisors of the number of processes, up to twice the ``wanted`` number."""
    return [number for number in range(1, min(2 * wanted, world_size) + 1) if world_size % number == 0]


def _unsplit(engine: EngineConfig) -> EngineConfig:
    return replace(engine, sequence_parallel=1, tensor_parallel=1, pipeline_parallel=1)
