"""Whether a split has the tokens that a run asks of it, and which of them it draws. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, replace

from distill.config import TrainConfig, require

SPLITS = ("train", "validation", "calibration")
"""Of a data artifact."""


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """What a run draws of the train split."""

    first_token: int
    """Tokens of the split before it."""
    num_sequences: int
    """Sequences of ``train.seq_len`` tokens, side by side."""
    train: TrainConfig
    """The budget, as far as the split reaches (:func:`within_data`)."""


def stretch(
    train: TrainConfig,
    num_tokens: int,
    *,
    where: str,
    num_cached: int | None = None,
    used_tokens: int | None = None,
    more: str = "raise data.train_tokens",
) -> Stretch:
    """Where in a train split of ``num_tokens`` tokens ``train`` draws.

    Args:
        train: budget, sequence length, batch.
        num_tokens: of the split.
        where: settings node of ``train`` (``distill``, ``library.bld``), for errors.
        num_cached: sequences of the split whose teacher signals are cached, and no others may be drawn; None: all may.
        used_tokens: tokens at the beginning of the split that earlier phases have had. The run then draws from the
            stretch behind them that its budget fills, so that the next phase finds new tokens behind that; where there
            is not enough and ``data_end=repeat``, from the whole split. None: from the whole split.
        more: how the split becomes longer, for errors.

    Raises:
        ValueError: the split is too short.
    """
    if used_tokens is not None:
        wanted = train.num_steps * train.batch_size
        left = max(0, num_tokens - used_tokens) // train.seq_len
        if left >= wanted or train.data_end != "repeat":
            reached = within_data(train, min(wanted, left), where=where, used_tokens=used_tokens, more=more)
            return Stretch(first_token=used_tokens, num_sequences=min(wanted, left), train=reached)
    available = num_tokens // train.seq_len
    require(
        available > 0,
        f"{where}.seq_len={train.seq_len} is longer than the train split of {num_tokens} tokens; {more} to "
        f"{train.seq_len} or lower {where}.seq_len",
    )
    if num_cached is None:
        return Stretch(
            first_token=0, num_sequences=available, train=within_data(train, available, where=where, more=more)
        )
    require(
        num_cached <= available,
        f"the teacher signals are of {num_cached} sequences of {train.seq_len} tokens, the train split has "
        f"{available}; give the data that stage cache_teacher read",
    )
    reached = within_data(train, num_cached, where=where, more="raise teacher_cache.max_tokens")
    return Stretch(first_token=0, num_sequences=num_cached, train=reached)


def within_data(
    train: TrainConfig, num_sequences: int, *, where: str, used_tokens: int = 0, more: str = "raise data.train_tokens"
) -> TrainConfig:
    """``train`` as far as one pass over ``num_sequences`` sequences allows, by ``train.data_end``.

    refuse: unchanged, or an error; repeat: unchanged; stop: with its budget cut to the whole steps of one pass, which
    shortens the learning-rate schedule with it.

    Args:
        train: budget.
        num_sequences: sequences of ``train.seq_len`` tokens that there are.
        where: settings node of ``train`` (``distill``, ``library.bld``), for the message.
        used_tokens: tokens of the split before those sequences, which earlier phases have had; for the message.
        more: how there are more of them, for the message.

    Raises:
        ValueError: the budget is beyond one pass and ``data_end`` is refuse, or one pass is less than one step.
    """
    num_steps = num_sequences // train.batch_size
    if train.num_steps <= num_steps or train.data_end == "repeat":
        return train
    reach = num_steps * train.tokens_per_step
    beyond = f" that the {used_tokens} tokens of earlier phases leave" if used_tokens else ""
    require(
        train.data_end == "stop",
        f"{where}.max_tokens={train.max_tokens} is beyond the data: {num_sequences} sequences of {train.seq_len} "
        f"tokens{beyond} fill {num_steps} steps ({reach} tokens) of {where}.batch_size={train.batch_size}; set "
        f"{where}.data_end=repeat (train on them again, in another order) or {where}.data_end=stop (after one pass), "
        f"or {more} to {used_tokens + train.spent_tokens}",
    )
    require(
        num_steps > 0,
        f"{where}.data_end=stop, but the data's {num_sequences} sequences of {train.seq_len} tokens{beyond} do not "
        f"fill one step of {where}.batch_size={train.batch_size}; lower it, or {more}",
    )
    return replace(train, max_tokens=reach)


def require_sequences(n: int, seq_len: int, *, split: str, num_tokens: int) -> None:
    """Raise ``ValueError`` where ``split``, of ``num_tokens`` tokens, has fewer than ``n`` sequences of ``seq_len``."""
    available = num_tokens // seq_len
    require(
        n <= available,
        f"{n} sequences of {seq_len} tokens asked of the {split} split, which has {available} ({num_tokens} tokens); "
        f"raise data.{split}_tokens to {n * seq_len} or ask for fewer",
    )
