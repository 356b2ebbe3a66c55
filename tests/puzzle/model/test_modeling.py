from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from distill.config import RopeConfig
from puzzle.model.architecture import NO_ATTENTION, Architecture, BlockConfig, FFNConfig
from puzzle.model.checkpoint import build_model
from puzzle.model.modeling_decilm import DeciLMForCausalLM
from puzzle.model.tensor_layout import tensor_shapes

NUM_NEW = 10


def lively(architecture: Architecture, **kwargs: Any) -> DeciLMForCausalLM:
    """A model whose greedy continuation does not fall into a loop at once: matrices five times the usual size."""
    model = build_model(architecture, seed=0, **kwargs)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(5)
    return model


def random_ids(*shape: int) -> Tensor:
    return torch.randint(1, 320, shape, generator=torch.Generator().manual_seed(1))


def greedy_uncached(model: DeciLMForCausalLM, ids: Tensor, num_new: int = NUM_NEW) -> Tensor:
    with torch.no_grad():
        for _ in range(num_new):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return ids


def generate(model: DeciLMForCausalLM, ids: Tensor, **kwargs: Any) -> Any:
    settings = {"max_new_tokens": NUM_NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(ids, return_dict_in_generate=True, **(settings | kwargs))


@pytest.fixture
def heterogeneous(heterogeneous_architecture: Architecture) -> DeciLMForCausalLM:
    return lively(heterogeneous_architecture)


LLAMA3_ROPE = RopeConfig(
    theta=10_000.0,
    kind="llama3",
    factor=4.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_positions=64,
)
LLAMA3_KEYS = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_ROPE = RopeConfig(theta=10_000.0, kind="yarn", factor=4.0, original_max_positions=64)
YARN_KEYS = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR_ROPE = RopeConfig(theta=10_000.0, kind="linear", factor=2.0)


@pytest.mark.parametrize(
    ("ours", "config_class", "model_class", "theirs"),
    [
        pytest.param({}, LlamaConfig, LlamaForCausalLM, {}, id="llama"),
        pytest.param(
            {"rope": LLAMA3_ROPE}, LlamaConfig, LlamaForCausalLM, {"rope_scaling": LLAMA3_KEYS}, id="llama3_rope"
        ),
        pytest.param({"rope": YARN_ROPE}, LlamaConfig, LlamaForCausalLM, {"rope_scaling": YARN_KEYS}, id="yarn_rope"),
        pytest.param(
            {"rope": LINEAR_ROPE},
            LlamaConfig,
            LlamaForCausalLM,
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
            id="linear_rope",
        ),
        pytest.param({"sliding_window": 5}, MistralConfig, MistralForCausalLM, {"sliding_window": 5}, id="mistral"),
        pytest.param({"qkv_bias": True}, Qwen2Config, Qwen2ForCausalLM, {}, id="qwen2"),
        pytest.param({"qk_norm": True, "head_dim": 32}, Qwen3Config, Qwen3ForCausalLM, {"head_dim": 32}, id="qwen3"),
    ],
)
def test_logits_equal_transformers_own_classes(
    pico_architecture: Architecture, ours: dict[str, Any], config_class: Any, model_class: Any, theirs: dict[str, Any]
) -> None:
    model = lively(replace(pico_architecture, **ours))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(len(name)))
    reference = model_class(
        config_class(
            vocab_size=320,
            hidden_size=64,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            rms_norm_eps=1e-5,
            rope_theta=10_000.0,
            tie_word_embeddings=False,
            **theirs,
        )
    ).eval()
    reference.load_state_dict(model.state_dict())
    ids = random_ids(2, 100)
    with torch.no_grad():
        # The same operators in fp32; only the order of a sum may differ.
        torch.testing.assert_close(model(ids).logits, reference(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sliding_window", [None, 4])
def test_cached_generation_equals_uncached_greedy_decoding(
    heterogeneous_architecture: Architecture, sliding_window: int | None
) -> None:
    model = lively(replace(heterogeneous_architecture, sliding_window=sliding_window))
    ids = random_ids(2, 7)
    output = generate(model, ids)
    assert torch.equal(output.sequences, greedy_uncached(model, ids))
    assert len(set(output.sequences[0].tolist())) > 5, "a degenerate continuation would prove nothing"
    assert len(output.past_key_values.layers) == 3 == model.config.num_gqa_blocks


def test_cached_generation_without_rope_in_some_blocks(heterogeneous_architecture: Architecture) -> None:
    blocks = heterogeneous_architecture.blocks
    still = replace(blocks[3], attention=replace(blocks[3].attention, rope=False))
    model, rotating = lively(heterogeneous_architecture.with_block(3, still)), lively(heterogeneous_architecture)
    ids = random_ids(2, 7)
    assert torch.equal(generate(model, ids).sequences, greedy_uncached(model, ids))
    with torch.no_grad():
        assert (model(ids).logits - rotating(ids).logits).abs().max() > 1e-3
    attentions = [layer.self_attn for layer in model.model.layers if layer.has_attention]
    assert [getattr(attention, "rotates", None) for attention in attentions] == [True, None, False, True]


def test_static_cache_equals_uncached_greedy_decoding(heterogeneous: DeciLMForCausalLM) -> None:
    ids = random_ids(2, 7)
    output = generate(heterogeneous, ids, cache_implementation="static", disable_compile=True)
    assert torch.equal(output.sequences, greedy_uncached(heterogeneous, ids))
    assert len(output.past_key_values.layers) == 3


def test_cache_built_by_forward_has_a_layer_per_attention(heterogeneous: DeciLMForCausalLM) -> None:
    cache = heterogeneous(random_ids(2, 7)).past_key_values
    assert [tuple(layer.keys.shape) for layer in cache.layers] == [(2, 2, 7, 16), (2, 1, 7, 16), (2, 2, 7, 16)]


def test_training_mode_builds_no_cache(heterogeneous: DeciLMForCausalLM) -> None:
    assert heterogeneous.train()(random_ids(1, 4)).past_key_values is None


def test_left_padded_batch_generates_as_each_prompt_alone(heterogeneous: DeciLMForCausalLM) -> None:
    long, short = random_ids(1, 9), random_ids(1, 5)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), short], dim=1)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    output = generate(heterogeneous, torch.cat([long, padded]), attention_mask=mask).sequences
    assert torch.equal(output[:1], greedy_uncached(heterogeneous, long))
    assert torch.equal(output[1:, 4:], greedy_uncached(heterogeneous, short))


def test_model_without_attention_needs_no_positions(pico_architecture: Architecture) -> None:
    block = BlockConfig(attention=NO_ATTENTION, ffn=FFNConfig(ffn_dim=256), parent_block_indices=(0,))
    model = lively(pico_architecture.with_blocks((block, block)))
    hidden = model.model.embed(random_ids(1, 4))
    assert model.model.attention_inputs(hidden) == {"position_embeddings": None, "attention_mask": None}
    ids = random_ids(1, 4)
    assert torch.equal(generate(model, ids).sequences, greedy_uncached(model, ids))


def test_eager_equals_sdpa(heterogeneous: DeciLMForCausalLM) -> None:
    ids = random_ids(2, 9)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :3] = 0
    fused = heterogeneous(ids, attention_mask=mask).logits
    heterogeneous.set_attn_implementation("eager")
    plain = heterogeneous(ids, attention_mask=mask).logits
    # fp32, another order of sums; padded positions attend to nothing that matters and are left out.
    torch.testing.assert_close(plain[mask.bool()], fused[mask.bool()], rtol=1e-4, atol=1e-4)


def test_hidden_states_are_embeddings_and_every_block_output(heterogeneous: DeciLMForCausalLM) -> None:
    decoder, ids = heterogeneous.model, random_ids(2, 6)
    output = decoder(ids, output_hidden_states=True)
    hidden = decoder.embed(ids)
    states, shared = [hidden], decoder.attention_inputs(hidden)
    for block in decoder.layers:
        if block.has_attention:
            hidden = hidden + block.attention_update(hidden, **shared)
        if block.has_ffn:
            hidden = hidden + block.ffn_update(hidden)
        states.append(hidden)
    assert len(output.hidden_states) == 7
    for expected, state in zip(states[:-1], output.hidden_states[:-1], strict=True):
        assert torch.equal(expected, state)
    assert torch.equal(output.hidden_states[-1], decoder.norm(hidden))
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)
    assert decoder(ids).hidden_states is None


def test_no_op_has_no_module_and_no_tensor(heterogeneous: DeciLMForCausalLM) -> None:
    dummy = heterogeneous.model.layers[4]
    assert (dummy.self_attn, dummy.input_layernorm, dummy.mlp, dummy.post_attention_layernorm) == (None,) * 4
    hidden = torch.randn(1, 3, 64, generator=torch.Generator().manual_seed(0))
    assert dummy(hidden) is hidden


def test_tensor_layout_is_that_of_the_module(heterogeneous_architecture: Architecture) -> None:
    for changes in ({}, {"qkv_bias": True}, {"qk_norm": True, "head_dim": 32}):
        architecture = replace(heterogeneous_architecture, **changes)
        tensors = build_model(architecture, seed=0).state_dict()
        assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == tensor_shapes(architecture)


def test_block_needs_only_update_of_a_cache(heterogeneous: DeciLMForCausalLM) -> None:
    class Recorder:
        def update(self, key: Tensor, value: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
            calls.append((layer_idx, tuple(key.shape)))
            return key, value

    calls: list[tuple[int, tuple[int, ...]]] = []
    hidden = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0))
    shared = heterogeneous.model.attention_inputs(hidden)
    for block in heterogeneous.model.layers:
        block(hidden, **shared, past_key_values=Recorder())
    assert calls == [(0, (2, 2, 3, 16)), (1, (2, 1, 3, 16)), (2, (2, 2, 3, 16))]


def test_logits_to_keep(heterogeneous: DeciLMForCausalLM) -> None:
    ids = random_ids(2, 6)
    logits = heterogeneous(ids).logits
    # A product with fewer rows may sum in another order.
    torch.testing.assert_close(heterogeneous(ids, logits_to_keep=2).logits, logits[:, -2:])
    chosen = torch.tensor([1, 4])
    torch.testing.assert_close(heterogeneous(ids, logits_to_keep=chosen).logits, logits[:, chosen])


def test_loss_is_the_shifted_cross_entropy(heterogeneous: DeciLMForCausalLM) -> None:
    ids = random_ids(2, 6)
    labels = ids.clone()
    labels[0, :3] = -100
    output = heterogeneous(ids, labels=labels)
    expected = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable")
def test_gradients_reach_every_parameter_and_checkpointing_keeps_them(heterogeneous: DeciLMForCausalLM) -> None:
    ids = random_ids(2, 6)
    heterogeneous.train()(ids, labels=ids).loss.backward()
    plain = {name: parameter.grad.clone() for name, parameter in heterogeneous.named_parameters()}
    assert all(gradient.abs().sum() > 0 for gradient in plain.values())
    heterogeneous.zero_grad()
    heterogeneous.gradient_checkpointing_enable()
    heterogeneous(ids, labels=ids).loss.backward()
    for name, parameter in heterogeneous.named_parameters():
        assert torch.equal(parameter.grad, plain[name]), name


def test_tied_head_is_the_embedding(pico_architecture: Architecture) -> None:
    model = build_model(replace(pico_architecture, tie_embeddings=True), seed=0)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert "lm_head.weight" not in dict(model.named_parameters())


def test_bfloat16_model_keeps_fp32_rotary_frequencies(pico_architecture: Architecture) -> None:
    model = build_model(pico_architecture, seed=0)
    positions = torch.arange(200, 256)[None]
    probe = torch.zeros(1, 1)
    before = model.model.rotary_emb(probe, positions)
    after = model.to(torch.bfloat16).model.rotary_emb(probe, positions)
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


def test_forward_wants_ids_or_embeddings(pico_model: DeciLMForCausalLM) -> None:
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        pico_model.model()
    ids = random_ids(1, 4)
    from_embeddings = pico_model(inputs_embeds=pico_model.model.embed(ids)).logits
    assert torch.equal(from_embeddings, pico_model(ids).logits)
