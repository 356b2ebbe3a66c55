from __future__ import annotations

from dataclasses import replace

import pytest

from distill.config import TrainConfig
from distill.data.budget import Stretch, require_sequences, stretch, within_data

TRAIN = TrainConfig(max_tokens=400, seq_len=10, batch_size=4)
"""Ten steps: 40 sequences."""


def test_a_budget_within_the_data_stays() -> None:
    for data_end in ("refuse", "repeat", "stop"):
        train = replace(TRAIN, data_end=data_end)
        assert within_data(train, 40, where="distill") == train


def test_a_budget_beyond_the_data_is_refused_with_the_choices() -> None:
    message = (
        r"distill\.max_tokens=400 is beyond the data: 39 sequences of 10 tokens fill 9 steps \(360 tokens\) .*"
        r"distill\.data_end=repeat .* distill\.data_end=stop .* raise data\.train_tokens to 400"
    )
    with pytest.raises(ValueError, match=message):
        within_data(TRAIN, 39, where="distill")


def test_a_budget_beyond_the_data_repeats_or_stops() -> None:
    repeat, stop = replace(TRAIN, data_end="repeat"), replace(TRAIN, data_end="stop")
    assert within_data(repeat, 39, where="distill") == repeat
    stopped = within_data(stop, 39, where="distill")
    assert stopped == replace(stop, max_tokens=360)
    assert stopped.num_steps == 9
    with pytest.raises(ValueError, match=r"3 sequences of 10 tokens do not fill one step of distill\.batch_size=4"):
        within_data(stop, 3, where="distill")


def test_phases_draw_one_behind_the_other() -> None:
    first = stretch(TRAIN, 900, where="phases.0", used_tokens=0)
    second = stretch(TRAIN, 900, where="phases.1", used_tokens=400)
    assert first == Stretch(first_token=0, num_sequences=40, train=TRAIN)
    assert second == Stretch(first_token=400, num_sequences=40, train=TRAIN)


@pytest.mark.parametrize("num_tokens", [700, 300])
def test_a_phase_without_enough_left_refuses_stops_or_draws_from_all(num_tokens: int) -> None:
    with pytest.raises(ValueError, match=r"phases\.1\.max_tokens=400 .* that the 400 tokens of earlier phases leave"):
        stretch(TRAIN, num_tokens, where="phases.1", used_tokens=400)
    repeat = replace(TRAIN, data_end="repeat")
    drawn = stretch(repeat, num_tokens, where="phases.1", used_tokens=400)
    assert drawn == Stretch(first_token=0, num_sequences=num_tokens // 10, train=repeat)


def test_a_phase_stops_where_the_split_ends() -> None:
    drawn = stretch(replace(TRAIN, data_end="stop"), 700, where="phases.1", used_tokens=400)
    assert (drawn.first_token, drawn.num_sequences, drawn.train.max_tokens) == (400, 30, 280)


def test_a_run_without_phases_draws_from_all_or_from_what_it_may() -> None:
    assert stretch(TRAIN, 905, where="distill").num_sequences == 90
    assert stretch(TRAIN, 905, where="distill", num_cached=50).num_sequences == 50
    with pytest.raises(
        ValueError,
        match=r"distill\.max_tokens=400 is beyond the data: 30 sequences .* raise teacher_cache\.max_tokens to 400",
    ):
        stretch(TRAIN, 905, where="distill", num_cached=30)
    with pytest.raises(ValueError, match=r"distill\.seq_len=10 is longer than the train split of 9 tokens"):
        stretch(TRAIN, 9, where="distill")


def test_too_few_held_out_sequences_are_counted() -> None:
    require_sequences(3, 10, split="validation", num_tokens=30)
    with pytest.raises(ValueError, match=r"4 sequences of 10 tokens .* has 3 \(35 tokens\); raise .*_tokens to 40"):
        require_sequences(4, 10, split="validation", num_tokens=35)
