"""Our arithmetic on a vLLM whose times are known, and the real one where it is installed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from distill.config import RopeConfig
from puzzle import vllm_costs
from puzzle.config import CostConfig, WorkloadConfig
from puzzle.model.architecture import NO_ATTENTION, NO_FFN, Architecture, AttentionConfig, FFNConfig, dense_blocks
from puzzle.model.hf_config import ffn_dim
from puzzle.tables import CostTable
from puzzle.vllm_costs import vllm_table

KV4, KV1 = AttentionConfig(num_kv_heads=4), AttentionConfig(num_kv_heads=1)
W512, W256 = FFNConfig(ffn_dim=512), FFNConfig(ffn_dim=256)
WORKLOAD = WorkloadConfig(batch_size=4, prefill_tokens=32, generated_tokens=16)


@pytest.fixture(scope="module")
def parent() -> Architecture:
    return Architecture(
        vocab_size=320,
        hidden_dim=256,
        num_heads=4,
        head_dim=64,
        blocks=dense_blocks(4, num_kv_heads=4, ffn_dim=512),
        max_positions=256,
        rope=RopeConfig(theta=10_000.0),
    )


@dataclass
class FakeVLLM:
    """Takes a fixed time per step, per block and token, and per block and step, on a clock of its own."""

    step_s: float = 1.0
    ffn_s: Callable[[int], float] = lambda width: 0.01 + width / 10_000
    noise: list[float] = field(default_factory=list)
    """Seconds that further models take more, one after another."""
    now: float = 0.0
    settings: list[dict[str, Any]] = field(default_factory=list)
    prompts: list[int] = field(default_factory=list)
    num_open: int = 0

    def install(self, monkeypatch: pytest.MonkeyPatch) -> FakeVLLM:
        module = ModuleType("vllm")
        module.LLM, module.SamplingParams = self.load, SimpleNamespace  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "vllm", module)
        monkeypatch.setattr(vllm_costs, "time", SimpleNamespace(perf_counter=lambda: self.now))
        return self

    def load(self, *, model: str, **settings: Any) -> SimpleNamespace:
        self.settings.append(settings)
        assert (Path(model) / "configuration_decilm.py").is_file()
        config = json.loads((Path(model) / "config.json").read_text())
        block_s = sum(self._block_s(entry, config) for entry in config["block_configs"])
        late_s = self.noise.pop(0) if self.noise else 0.0
        self.num_open += 1

        def generate(prompts: list[dict[str, list[int]]], sampling: Any, use_tqdm: bool) -> None:
            assert not use_tqdm
            assert sampling.ignore_eos
            assert len(prompts) <= settings["max_num_seqs"]
            length = len(prompts[0]["prompt_token_ids"])
            self.prompts.append(length)
            assert length + sampling.max_tokens <= settings["max_model_len"]
            # A prompt takes a tenth of a decode step per token; the first token comes with it.
            self.now += (self.step_s + block_s) * (length / 10 + sampling.max_tokens - 1) + late_s * sampling.max_tokens

        def shutdown() -> None:
            self.num_open -= 1

        return SimpleNamespace(
            generate=generate, llm_engine=SimpleNamespace(engine_core=SimpleNamespace(shutdown=shutdown))
        )

    def _block_s(self, entry: dict[str, Any], config: dict[str, Any]) -> float:
        attention, ffn = entry["attention"], entry["ffn"]
        seconds = 0.0
        if not attention["no_op"]:
            seconds += 0.2 + 0.05 * config["num_attention_heads"] / attention["n_heads_in_group"]
        if not ffn["no_op"]:
            seconds += self.ffn_s(ffn_dim(ffn["ffn_mult"], config["hidden_size"]))
        return seconds


def table(parent: Architecture, *subblocks: Any, workload: WorkloadConfig = WORKLOAD, repeats: int = 3) -> CostTable:
    config = CostConfig(repeats=repeats, warmup=1)
    return vllm_table(parent, subblocks, workload=workload, config=config, hardware="a clock")


def test_differences_give_every_subblocks_own_time(parent: Architecture, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeVLLM().install(monkeypatch)
    found = table(parent, KV4, KV1, NO_ATTENTION, W512, W256, NO_FFN)
    assert (found.source, found.hardware, found.clamped) == ("vllm", "a clock", ())
    # Prompts of 32 tokens: 3.2 steps. Rounding of the clock's sums alone.
    decode = {(row.subblock, row.variant): row.decode_ms for row in found.subblocks}
    assert decode["attention", "kv4"] == pytest.approx(400)
    assert decode["attention", "kv1"] == pytest.approx(250)
    assert decode["ffn", "w512"] == pytest.approx(61.2)
    assert decode["attention", "no_op"] == decode["ffn", "no_op"] == 0
    assert found.subblock("ffn", "w256").prefill_ms == pytest.approx(3.2 * 35.6)
    # scheduling, sampling, embedding, head: what is left of a model with one block
    assert found.overhead.decode_ms == pytest.approx(1000)
    assert found.overhead.prefill_ms == pytest.approx(3200)
    # two FFNs have two fixed parts of 10 ms, one of twice the width has one
    assert found.ffn_merge_saving.decode_ms == pytest.approx(10)
    assert found.ffn_merge_saving.prefill_ms == pytest.approx(32)
    assert fake.num_open == 0


def test_the_whole_batch_runs_at_once(parent: Architecture, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one sequence at a time weights would be read for every sequence, and FFNs look a batch too dear."""
    fake = FakeVLLM().install(monkeypatch)
    table(parent, KV4, W512, workload=WorkloadConfig(batch_size=96, prefill_tokens=48, generated_tokens=32))
    assert {settings["max_num_seqs"] for settings in fake.settings} == {96}
    assert {settings["enable_prefix_caching"] for settings in fake.settings} == {False}
    assert all(settings["max_num_batched_tokens"] >= 96 * 48 for settings in fake.settings)
    assert not any(settings.get("enforce_eager", False) for settings in fake.settings)
    # the standard block alone: its KV cache holds the batch at full length
    needed = 96 * (48 + 32) * 2 * 4 * 64 * 4
    assert min(settings["kv_cache_memory_bytes"] for settings in fake.settings) >= needed
    # prompts of the workload for the prefill, and such that decoding passes the middle of the generation
    assert set(fake.prompts) == {48, 48 + 16 - 24}


def test_a_negative_difference_is_measured_again(parent: Architecture, monkeypatch: pytest.MonkeyPatch) -> None:
    # The short model of the first variant comes out late once.
    fake = FakeVLLM(noise=[0.0, 50.0]).install(monkeypatch)
    found = table(parent, KV4, W512)
    assert found.subblock("attention", "kv4").decode_ms == pytest.approx(400)
    assert found.clamped == ()
    # two more models than the two of every variant, of the merge and of the overhead
    assert len(fake.settings) == 2 * 4 + 2


def test_what_stays_negative_is_named(parent: Architecture, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeVLLM(noise=[0.0, 50.0] * 3).install(monkeypatch)
    found = table(parent, KV4, W512)
    assert found.subblock("attention", "kv4").decode_ms == 0
    assert found.clamped == ("attention kv4 prefill_ms", "attention kv4 decode_ms")


def test_a_merge_that_does_not_pay_saves_nothing(parent: Architecture, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeVLLM(ffn_s=lambda width: (width / 1000) ** 2).install(monkeypatch)
    found = table(parent, KV4, W512)
    assert found.ffn_merge_saving.decode_ms == 0
    assert found.clamped == ("ffn_merge_saving prefill_ms", "ffn_merge_saving decode_ms")


@pytest.mark.parametrize(
    ("subblock", "message"),
    [
        (AttentionConfig(kind="linear"), "an attention is replaced by a linear layer"),
        (FFNConfig(kind="linear"), "an FFN is replaced by a linear layer"),
    ],
)
def test_what_vllm_cannot_run_is_named(parent: Architecture, subblock: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"vllm cannot run this parent and space: {message}; take that out"):
        table(parent, KV4, subblock)


def test_parents_that_vllm_cannot_run_are_named(parent: Architecture) -> None:
    with pytest.raises(ValueError, match="normalised per head"):
        table(replace(parent, qk_norm=True), KV4)
    free = tuple(replace(block, attention=NO_ATTENTION) for block in parent.blocks)
    with pytest.raises(ValueError, match="a parent that has a grouped-query attention"):
        table(parent.with_blocks(free), W512)


def test_without_vllm_there_is_one_clear_error(parent: Architecture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ValueError, match=r"costs.sources: vllm cannot be imported here .*pip install vllm"):
        table(parent, KV4)


def test_threads_beyond_the_cores_are_refused(parent: Architecture) -> None:
    with pytest.raises(ValueError, match=r"workload.num_cpu_threads=4096 on 1 ranks are more than the \d+ cores"):
        table(parent, KV4, workload=replace(WORKLOAD, num_cpu_threads=4096))


@pytest.mark.slow
def test_real_vllm_times_a_small_parent(parent: Architecture) -> None:
    """Minutes: eight engines are started, each of which compiles its model."""
    pytest.importorskip("vllm")
    found = table(parent, KV4, NO_ATTENTION, W512, NO_FFN)
    assert found.subblock("attention", "kv4").prefill_ms > 0
    assert found.overhead.decode_ms > 0
    assert found.subblock("ffn", "no_op").decode_ms == 0
