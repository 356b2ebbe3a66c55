"""Blocks that read the same input: in the forward pass, with a cache, in training, and in config.json."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from puzzle.analytic import phases
from puzzle.config import WorkloadConfig
from puzzle.latency import model_step
from puzzle.model.architecture import Architecture, dense_blocks
from puzzle.model.checkpoint import build_model, load_model, read_architecture, save_model
from puzzle.model.compatibility import compatibility
from puzzle.model.configuration_decilm import DeciLMConfig
from puzzle.model.convert import export_hf
from puzzle.model.hf_config import architecture_from_config, hf_config
from puzzle.model.modeling_decilm import DeciLMForCausalLM
from puzzle.prune_attention import removable_attentions
from puzzle.slices import ParentSlice

NUM_NEW = 10
WINDOWS = ((1, 3), (4, 5))
"""Two windows that meet, one of them with linear attention and one with an attention that has no FFN."""
TIGHT = {"rtol": 1e-5, "atol": 1e-5}
"""fp32: a sum in another order."""


def random_ids(*shape: int) -> Tensor:
    return torch.randint(1, 320, shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def parallel_architecture(heterogeneous_architecture: Architecture) -> Architecture:
    """Seven blocks: dense, window (dense, linear attention, linear FFN), window (no FFN, dense), attention-free."""
    dense, ffn_only, linear, linear_ffn, _, attention_only = heterogeneous_architecture.blocks
    blocks = (dense, dense, linear, linear_ffn, attention_only, dense, ffn_only)
    numbered = tuple(replace(block, parent_block_indices=(index,)) for index, block in enumerate(blocks))
    return replace(heterogeneous_architecture, blocks=numbered, parallel_windows=WINDOWS)


@pytest.fixture
def model(parallel_architecture: Architecture) -> DeciLMForCausalLM:
    """Matrices five times the usual size: blocks that change their input, and continuations that do not loop."""
    model = build_model(parallel_architecture, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(5)
    return model


def by_definition(model: DeciLMForCausalLM, ids: Tensor) -> list[Tensor]:
    """Embeddings and the stream after every block: X + sum of f_i(X) - X within a window."""
    decoder = model.model
    states = [decoder.embed(ids)]
    shared = decoder.attention_inputs(states[0])
    first_of = {index: first for first, last in WINDOWS for index in range(first, last + 1)}
    for index, block in enumerate(decoder.layers):
        window_input = states[first_of.get(index, index)]
        states.append(states[-1] + block(window_input, **shared) - window_input)
    return states


@torch.no_grad()
def test_window_is_the_sum_of_what_its_blocks_add_to_its_input(model: DeciLMForCausalLM) -> None:
    ids = random_ids(2, 9)
    expected = by_definition(model, ids)
    output = model.model(ids, output_hidden_states=True)
    assert len(output.hidden_states) == 8
    for state, reported in zip(expected[:-1], output.hidden_states[:-1], strict=True):
        torch.testing.assert_close(reported, state, **TIGHT)
    torch.testing.assert_close(output.last_hidden_state, model.model.norm(expected[-1]), **TIGHT)
    torch.testing.assert_close(model(ids).logits, model.lm_head(model.model.norm(expected[-1])), **TIGHT)


@torch.no_grad()
def test_order_within_a_window_makes_no_difference(model: DeciLMForCausalLM) -> None:
    ids = random_ids(2, 9)
    before = model(ids).logits
    layers = model.model.layers
    layers[1], layers[3] = layers[3], layers[1]
    torch.testing.assert_close(model(ids, use_cache=False).logits, before, **TIGHT)
    model.model.config.parallel_windows = []
    assert (model(ids, use_cache=False).logits - before).abs().max() > 0.05, "the windows do nothing"


@torch.no_grad()
def test_decoding_token_by_token_gives_the_logits_of_the_whole_prompt(model: DeciLMForCausalLM) -> None:
    ids = random_ids(2, 9)
    whole = model(ids).logits
    outputs, cache = [], None
    for position in range(9):
        output = model(ids[:, position : position + 1], past_key_values=cache, use_cache=True)
        outputs.append(output.logits)
        cache = output.past_key_values
    # fp32, attention over a cache against attention under a mask.
    torch.testing.assert_close(torch.cat(outputs, dim=1), whole, rtol=1e-4, atol=1e-4)
    assert len(cache.layers) == 5 == model.config.num_gqa_blocks


@pytest.mark.parametrize("kwargs", [{}, {"cache_implementation": "static", "disable_compile": True}])
def test_generation_equals_uncached_greedy_decoding(model: DeciLMForCausalLM, kwargs: dict[str, Any]) -> None:
    ids = random_ids(2, 7)
    settings = {"max_new_tokens": NUM_NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    generated = model.generate(ids, **settings, **kwargs)
    with torch.no_grad():
        for _ in range(NUM_NEW):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(generated, ids)
    assert len(set(ids[0].tolist())) > 5, "a degenerate continuation would prove nothing"


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable")
def test_gradients_are_the_definitions_and_checkpointing_keeps_them(model: DeciLMForCausalLM) -> None:
    ids = random_ids(2, 6)
    logits = model.lm_head(model.model.norm(by_definition(model, ids)[-1]))
    model.loss_function(logits=logits, labels=ids, vocab_size=320).backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train()(ids, labels=ids).loss.backward()
        for name, parameter in model.named_parameters():
            assert expected[name].abs().sum() > 0, name
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6, msg=name)


@torch.no_grad()
def test_timed_step_runs_the_windows(model: DeciLMForCausalLM) -> None:
    workload = WorkloadConfig(prefill_tokens=16, generated_tokens=8, batch_size=2)
    prefill, decode = phases(workload)
    ids = torch.randint(320, (2, 16), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model_step(model, workload, prefill)(), model(ids).logits[:, -1:], **TIGHT)
    in_parallel = model_step(model, workload, decode)()
    model.config.parallel_windows = []
    assert (model_step(model, workload, decode)() - in_parallel).abs().max() > 0.05


REMOTE = """
import sys
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
source, copy, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True).eval()
ids = torch.arange(1, 21).reshape(2, 10)
with torch.no_grad():
    logits = model(ids).logits
    tokens = model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None)
model.save_pretrained(copy)
assert not any(name.split(".")[0] in ("puzzle", "distill") for name in sys.modules)
save_file({"logits": logits, "tokens": tokens}, out)
"""


def test_saved_model_loads_as_remote_code_and_is_saved_again(
    tmp_path: Path, model: DeciLMForCausalLM, parallel_architecture: Architecture
) -> None:
    save_model(model, tmp_path / "model", architecture=parallel_architecture, tokenizer_from=None)
    assert read_architecture(tmp_path / "model") == parallel_architecture
    paths = [str(tmp_path / name) for name in ("model", "copy", "out.safetensors")]
    script = subprocess.run([sys.executable, "-c", REMOTE, *paths], capture_output=True, text=True, cwd=tmp_path)
    assert script.returncode == 0, script.stderr[-2000:]
    remote, ids = load_file(tmp_path / "out.safetensors"), torch.arange(1, 21).reshape(2, 10)
    with torch.no_grad():
        own = load_model(tmp_path / "model")
        assert torch.equal(own(ids).logits, remote["logits"])
        tokens = own.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert torch.equal(tokens, remote["tokens"])
    assert json.loads((tmp_path / "copy" / "config.json").read_text())["parallel_windows"] == [[1, 3], [4, 5]]
    assert read_architecture(tmp_path / "copy").parallel_windows == WINDOWS


def test_configuration_keeps_windows_and_has_no_key_without_them(parallel_architecture: Architecture) -> None:
    config = json.loads(json.dumps(hf_config(parallel_architecture, "float32")))
    assert config["parallel_windows"] == [[1, 3], [4, 5]]
    assert architecture_from_config(config) == parallel_architecture
    assert architecture_from_config(DeciLMConfig(**config).to_dict()).parallel_windows == WINDOWS
    plain = hf_config(replace(parallel_architecture, parallel_windows=()), "float32")
    assert "parallel_windows" not in plain
    assert "parallel_windows" not in DeciLMConfig(**plain).to_dict()


@pytest.mark.parametrize("entries", [[[1]], [[1, 2, 3]], [1, 2], [["1", "3"]], [[1, None]]])
def test_malformed_windows_in_a_configuration(parallel_architecture: Architecture, entries: Any) -> None:
    config = hf_config(parallel_architecture, "float32") | {"parallel_windows": entries}
    with pytest.raises(ValueError, match=r"must be a list of \[first block, last block\]"):
        architecture_from_config(config)


@pytest.mark.parametrize(
    ("windows", "message"),
    [
        (((1, 1),), r"parallel window \[1, 1\] must name at least two blocks within 0..6"),
        (((5, 7),), r"parallel window \[5, 7\] must name at least two blocks within 0..6"),
        (((-1, 1),), r"parallel window \[-1, 1\] must name"),
        (((4, 6),), r"parallel window \[4, 6\] has blocks without attention: 6; stage fuse"),
        (((1, 3), (3, 5)), r"\[1, 3\] and \[3, 5\] overlap or are out of order"),
        (((4, 5), (1, 2)), r"\[4, 5\] and \[1, 2\] overlap or are out of order"),
    ],
)
def test_windows_that_no_model_can_have(parallel_architecture: Architecture, windows: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(parallel_architecture, parallel_windows=windows)


def test_windows_stay_where_blocks_change_and_forbid_another_number(parallel_architecture: Architecture) -> None:
    block = replace(parallel_architecture.blocks[0], parent_block_indices=(1,))
    assert parallel_architecture.with_block(1, block).parallel_windows == WINDOWS
    with pytest.raises(ValueError, match=r"number of blocks takes blocks one after another.* blocks 1-3, 4-5 in para"):
        parallel_architecture.with_blocks(parallel_architecture.blocks[:-1])


def test_code_that_walks_blocks_refuses(model: DeciLMForCausalLM, parallel_architecture: Architecture) -> None:
    with pytest.raises(ValueError, match="runs blocks 1-3, 4-5 in parallel; give it the model from before stage para"):
        ParentSlice.whole(model)
    with pytest.raises(ValueError, match="prune_attention takes blocks one after another"):
        removable_attentions(parallel_architecture, num_attentions=1, keep_attention=())


def test_no_reader_of_the_format_but_transformers_loads_windows(pico_architecture: Architecture) -> None:
    dense = replace(pico_architecture, blocks=dense_blocks(4, num_kv_heads=2, ffn_dim=512))
    statuses = {}
    for windows in ((), ((1, 2),)):
        reports = compatibility(replace(dense, parallel_windows=windows))
        statuses[windows] = {report.target for report in reports if report.status == "loads"}
    assert statuses[()] >= {"transformers", "vllm", "sglang", "llama_cpp", "mlx"}
    assert statuses[((1, 2),)] == {"transformers"}


def test_dense_export_of_windows_is_refused_and_writes_nothing(tmp_path: Path, pico_architecture: Architecture) -> None:
    parallel = replace(pico_architecture, parallel_windows=((1, 2),))
    save_model(build_model(parallel, seed=0), tmp_path / "model", architecture=parallel, tokenizer_from=None)
    with pytest.raises(ValueError, match="the llama format takes blocks one after another"):
        export_hf(tmp_path / "model", tmp_path / "out")
    assert not (tmp_path / "out").exists()
