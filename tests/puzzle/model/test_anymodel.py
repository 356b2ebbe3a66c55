"""ModelOpt's AnyModel directories: a family's own configuration with ``block_configs``, and a shard per subblock."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from launch.stages.import_parent import HUB_FILES
from puzzle.model.checkpoint import load_model, read_architecture
from puzzle.model.convert import import_hf

LOGITS_ATOL = 1e-5
"""fp32 rounding of the same operations, in another order inside attention; logits are of order 1."""
PICO: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 512,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BLOCKS: tuple[tuple[int | None, int | None], ...] = ((4, 512), (2, 300), (None, 256), (1, None), (None, None))
"""KV heads and FFN width of every block; None: nothing."""


class _Nothing(nn.Module):
    """What ModelOpt puts in the place of a subblock that is none: zeros on the residual stream."""

    def __init__(self, *, is_attention: bool) -> None:
        super().__init__()
        self.is_attention = is_attention

    def forward(self, hidden: Tensor | None = None, hidden_states: Tensor | None = None, **_: Any) -> Any:
        given = hidden if hidden is not None else hidden_states
        assert given is not None
        zeros = torch.zeros_like(given)
        return (zeros, None) if self.is_attention else zeros


def _heterogeneous(config_class: type, model_class: type, **changed: Any) -> tuple[nn.Module, dict[str, Any]]:
    """transformers' own model with the blocks of other shapes put in one by one, and its config.json."""
    torch.manual_seed(0)
    config = config_class(**PICO | changed)
    model = model_class(config)
    for index, (kv_heads, width) in enumerate(BLOCKS):
        own = config_class(**PICO | changed)
        own._attn_implementation = config._attn_implementation
        own.num_key_value_heads, own.intermediate_size = kv_heads or 4, width or 256
        layer = type(model.model.layers[index])(own, index)
        for parameter in layer.parameters():
            deviation, mean = (0.2, 0.0) if parameter.dim() == 2 else (0.3, 1.0)
            nn.init.normal_(parameter, mean, deviation)
        if kv_heads is None:
            layer.input_layernorm, layer.self_attn = nn.Identity(), _Nothing(is_attention=True)
        if width is None:
            layer.post_attention_layernorm, layer.mlp = nn.Identity(), _Nothing(is_attention=False)
        model.model.layers[index] = layer
    return model.eval(), json.loads(config.to_json_string(use_diff=False))


def _entry(kv_heads: int | None, width: int | None) -> dict[str, Any]:
    common = {"replace_with_linear": False, "sparsify": None, "weights_precision": "bf16"}
    attention = {"no_op": kv_heads is None, "num_key_value_heads": kv_heads, "llama4": None, "mamba": None}
    ffn = {"no_op": width is None, "moe": None, "intermediate_size": width}
    return {"attention": common | attention, "ffn": common | ffn, "parallel_blocks": None}


def _subblock(name: str) -> str:
    parts = name.split(".")
    if parts[1] != "layers":
        return "embeddings" if "embed_tokens" in name else "lm_head"
    kind = "attention" if parts[3] in ("input_layernorm", "self_attn") else "ffn"
    return f"block_{parts[2]}_{kind}"


def _save(model: nn.Module, config: Mapping[str, Any], directory: Path) -> dict[str, Tensor]:
    """Write the directory as ModelOpt does; what it stores comes back."""
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if config["tie_word_embeddings"]:
        del tensors["lm_head.weight"]
    shards = defaultdict(dict)
    for name, tensor in tensors.items():
        shards[f"subblocks_safetensors/{_subblock(name)}.safetensors"][name] = tensor
    (directory / "subblocks_safetensors").mkdir(parents=True)
    for file, own in shards.items():
        save_file(own, directory / file, metadata={"format": "pt"})
    index = {"metadata": {"format": "pt"}, "weight_map": {name: file for file, own in shards.items() for name in own}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps(dict(config) | {"block_configs": [_entry(*b) for b in BLOCKS]}))
    return tensors


@torch.no_grad()
def _logits(model: nn.Module) -> Tensor:
    ids = torch.randint(0, PICO["vocab_size"], (2, 32), generator=torch.Generator().manual_seed(1))
    return model(ids, use_cache=False).logits


@pytest.mark.parametrize(
    ("config_class", "model_class", "changed"),
    [
        (LlamaConfig, LlamaForCausalLM, {}),
        (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True}),
        (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 24}),
    ],
    ids=["llama", "llama_tied", "qwen3"],
)
def test_blocks_keep_their_tensors_and_logits(
    config_class: type, model_class: type, changed: dict[str, Any], tmp_path: Path
) -> None:
    model, config = _heterogeneous(config_class, model_class, **changed)
    tensors = _save(model, config, tmp_path / "theirs")
    architecture = import_hf(tmp_path / "theirs", tmp_path / "ours", dtype=torch.float32)
    names = [block.name for block in architecture.blocks]
    assert names == ["kv4+w512", "kv2+w512", "no_op+w256", "kv1+no_op", "no_op+no_op"]
    assert read_architecture(tmp_path / "ours") == architecture
    assert architecture.family == config["model_type"]
    ours = load_model(tmp_path / "ours")
    stored = ours.state_dict()
    for name, tensor in tensors.items():
        kept = stored[name][tuple(slice(0, length) for length in tensor.shape)]
        assert torch.equal(kept, tensor), name
        assert not stored[name].numel() > tensor.numel() or name.startswith("model.layers.1.mlp."), name
    expected = _logits(model)
    assert expected.std() > 0.1
    torch.testing.assert_close(_logits(ours), expected, atol=LOGITS_ATOL, rtol=0)


@pytest.mark.parametrize(
    ("where", "changed", "message"),
    [
        ((), {"num_hidden_layers": 4}, "num_hidden_layers=4 differs from 5 block_configs"),
        ((), {"per_layer_config": {}}, "per_layer_config is not supported"),
        ((), {"model_type": "gpt_oss"}, "gpt_oss is not supported .*mixtures of experts"),
        ((0, "ffn"), {"moe": {"num_local_experts": 4}}, "block 0: ffn: moe={'num_local_experts': 4} is not supported"),
        ((0, "attention"), {"mamba": {"state_dim": 4}}, "block 0: attention: mamba={'state_dim': 4}"),
        ((0, "attention"), {"llama4": {"use_rope": False}}, "block 0: attention: llama4="),
        ((0, "attention"), {"num_key_value_heads": 3}, "num_key_value_heads=3 must divide num_attention_heads=4"),
        (
            (1, "attention"),
            {"replace_with_linear": True},
            "block 1: replace_with_linear=true is not supported",
        ),
        ((1,), {"parallel_blocks": [{}]}, r"block 1: parallel_blocks=\[{}\]"),
        ((1,), {"attention": None}, "block 1: attention is None"),
        ((1,), {"ffn": {"no_op": False}}, "block 1 of block_configs lacks the key 'ffn_mult'"),
        ((2, "attention"), {"no_op": False, "num_key_value_heads": 2}, "lacks 5 tensors: .*2.input_layernorm"),
        (
            (1, "ffn"),
            {"intermediate_size": 301},
            r"shape .*1\.mlp\.gate_proj\.weight \[300, 64\] instead of \[301",
        ),
    ],
)
def test_what_is_not_supported_is_named_and_nothing_written(
    where: tuple[Any, ...], changed: dict[str, Any], message: str, tmp_path: Path
) -> None:
    _save(*_heterogeneous(LlamaConfig, LlamaForCausalLM), tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    node = config if not where else config["block_configs"]
    for key in where:
        node = node[key]
    node.update(changed)
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message) as error:
        import_hf(tmp_path / "theirs", tmp_path / "ours", dtype=torch.float32)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "ours").exists()


def test_missing_shards_are_named(tmp_path: Path) -> None:
    _save(*_heterogeneous(LlamaConfig, LlamaForCausalLM), tmp_path / "theirs")
    (tmp_path / "theirs" / "subblocks_safetensors" / "block_1_ffn.safetensors").unlink()
    with pytest.raises(ValueError, match=r"shard subblocks_safetensors/block_1_ffn\.safetensors .* is missing"):
        import_hf(tmp_path / "theirs", tmp_path / "ours", dtype=torch.float32)


def test_shards_are_fetched_from_a_hub_too() -> None:
    assert "subblocks_safetensors/*.safetensors" in HUB_FILES
