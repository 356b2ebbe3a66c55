"""What is timed computes what a model computes; how it is timed takes turns."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from puzzle import latency
from puzzle.analytic import phases
from puzzle.config import WorkloadConfig
from puzzle.latency import (
    FixedCache,
    attention_arguments,
    blocks_step,
    cpu_threads,
    interleaved_ms,
    median_ratio,
    model_step,
    models_ms,
    peak_memory_bytes,
    require_positions,
    spread,
)
from puzzle.model.checkpoint import build_model

CPU = torch.device("cpu")
WORKLOAD = WorkloadConfig(batch_size=2, prefill_tokens=12, generated_tokens=8)
PREFILL, DECODE = phases(WORKLOAD)
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
"""fp32: attention over one query and over many sums in different orders."""


@pytest.fixture(params=[None, 5], ids=["full attention", "sliding window"])
def model(request, heterogeneous_architecture):
    return build_model(replace(heterogeneous_architecture, sliding_window=request.param), seed=0)


def test_phases():
    assert (PREFILL.new_tokens, PREFILL.context_tokens) == (12, 12)
    assert (DECODE.new_tokens, DECODE.context_tokens) == (1, 12 + 4)
    assert phases(replace(WORKLOAD, generated_tokens=1))[1].context_tokens == 13


def test_cache_is_always_full_and_stays_where_it_is():
    cache = FixedCache(4)
    keys, values = cache.update(torch.ones(1, 2, 1, 3), torch.full((1, 2, 1, 3), 2.0), 7)
    assert keys.shape == (1, 2, 4, 3)
    assert keys[0, 0, :, 0].tolist() == [0, 0, 0, 1]
    assert values[0, 1, :, 2].tolist() == [0, 0, 0, 2]
    again, _ = cache.update(torch.full((1, 2, 1, 3), 5.0), values[:, :, -1:].clone(), 7)
    assert again.data_ptr() == keys.data_ptr()
    assert again[0, 0, :, 0].tolist() == [0, 0, 0, 5]


def test_cache_takes_the_end_of_a_prompt_which_attends_to_itself():
    cache = FixedCache(2)
    prompt = torch.arange(3.0).reshape(1, 1, 3, 1)
    keys, values = cache.update(prompt, prompt, 0)
    assert keys is prompt
    assert values is prompt
    cached, _ = cache.update(torch.full((1, 1, 1, 1), 9.0), torch.zeros(1, 1, 1, 1), 0)
    assert cached.flatten().tolist() == [1, 9]


@torch.inference_mode()
def test_prefill_step_gives_the_logits_of_the_last_position(model):
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(model.config.vocab_size, (2, 12), generator=generator)
    expected = model(input_ids).logits[:, -1:]
    torch.testing.assert_close(model_step(model, WORKLOAD, PREFILL)(), expected, **TOLERANCE)


@torch.inference_mode()
def test_decode_arguments_continue_a_prompt(model):
    """One token over the filled cache of the timing gives what the model gives at the end of the whole sequence."""
    input_ids = torch.randint(model.config.vocab_size, (2, DECODE.context_tokens))
    arguments = attention_arguments(model.model, WORKLOAD, DECODE)
    hidden = model.model.embed(input_ids)
    shared = model.model.attention_inputs(hidden)
    for block in model.model.layers:
        hidden = block(hidden, **shared, past_key_values=arguments["past_key_values"])
    newest = model.model.embed(input_ids[:, -1:])
    for block in model.model.layers:
        newest = block(newest, **arguments)
    torch.testing.assert_close(newest, hidden[:, -1:], **TOLERANCE)


@torch.inference_mode()
@pytest.mark.parametrize("phase", [PREFILL, DECODE], ids=lambda phase: phase.name)
def test_a_step_repeats_itself(model, phase):
    for step in (model_step(model, WORKLOAD, phase), blocks_step(model.model, model.model.layers[:3], WORKLOAD, phase)):
        first = step()
        assert first.shape[:2] == (2, 1 if first.shape[2] == model.config.vocab_size else phase.new_tokens)
        torch.testing.assert_close(step(), first, rtol=0, atol=0)


def test_full_attention_needs_no_mask(pico_model):
    """With a mask, attention would fall back to a slower kernel than a serving engine uses."""
    for phase in (PREFILL, DECODE):
        assert attention_arguments(pico_model.model, WORKLOAD, phase)["attention_mask"] is None


def test_steps_take_turns_and_every_other_round_goes_backwards(monkeypatch):
    monkeypatch.setattr(latency, "MIN_SAMPLE_MS", 0.0)
    calls = []
    steps = {name: lambda name=name: calls.append(name) for name in "abc"}
    samples = interleaved_ms(steps, device=CPU, repeats=3, warmup=1, desc="test")
    assert "".join(calls) == "abc" + "abc" + "abc" + "cba" + "abc" + "cba"
    assert {name: len(values) for name, values in samples.items()} == {"a": 3, "b": 3, "c": 3}
    assert all(value >= 0 for values in samples.values() for value in values)


def test_short_steps_run_several_times_per_sample(monkeypatch):
    calls = []
    monkeypatch.setattr(latency, "cpu_timer", lambda step: lambda num_runs: calls.append(num_runs) or 0.5)
    assert interleaved_ms({"a": lambda: None}, device=CPU, repeats=2, warmup=0, desc="test") == {"a": [0.5, 0.5]}
    assert calls == [1, 4, 4]


def test_models_are_timed_in_both_phases(pico_model):
    rounds = models_ms({"parent": pico_model, "same": pico_model}, WORKLOAD, device=CPU, repeats=2, warmup=0)
    assert {phase: {name: len(v) for name, v in by_name.items()} for phase, by_name in rounds.items()} == {
        "prefill": {"parent": 2, "same": 2},
        "decode": {"parent": 2, "same": 2},
    }


def test_median_ratio_pairs_rounds():
    # A load that slows down whole rounds leaves the ratio alone.
    assert median_ratio([2.0, 20.0, 200.0], [4.0, 40.0, 400.0]) == 0.5


def test_spread_is_the_interquartile_range_over_the_median():
    assert spread([1.0, 2.0, 4.0, 5.0, 90.0]) == 0.75
    assert spread([7.0]) == 0.0


def test_more_tokens_than_positions(pico_architecture):
    require_positions(replace(WORKLOAD, prefill_tokens=248), pico_architecture, "parent")
    with pytest.raises(
        ValueError, match=r"workload.prefill_tokens=249 .*generated_tokens=8 is beyond the 256 .* child"
    ):
        require_positions(replace(WORKLOAD, prefill_tokens=249), pico_architecture, "child")


def test_threads_are_given_back():
    before = torch.get_num_threads()
    with cpu_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
    with cpu_threads(None):
        assert torch.get_num_threads() == before


@pytest.mark.gpu
def test_cuda_graphs_of_whole_models(heterogeneous_architecture):
    device = torch.device("cuda", torch.cuda.current_device())
    for sliding_window in (None, 5):
        model = build_model(replace(heterogeneous_architecture, sliding_window=sliding_window), seed=0).to(device)
        rounds = models_ms({"parent": model}, WORKLOAD, device=device, repeats=3, warmup=1)
        assert all(value > 0 for by_name in rounds.values() for value in by_name["parent"])
        weight_bytes = sum(parameter.nbytes for parameter in model.parameters())
        assert weight_bytes < peak_memory_bytes(model, WORKLOAD) < 4 * weight_bytes
