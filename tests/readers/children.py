"""Small children that together have every feature of the format, each as a model directory."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from distill.config import RopeConfig
from puzzle.model.architecture import (
    NO_ATTENTION,
    NO_FFN,
    Architecture,
    AttentionConfig,
    BlockConfig,
    FFNConfig,
    dense_blocks,
)
from puzzle.model.checkpoint import build_model, save_model
from puzzle.model.convert import import_hf
from tests.conftest import VOCAB_SIZE

KV4, KV2, KV1 = (AttentionConfig(num_kv_heads=heads) for heads in (4, 2, 1))
LINEAR = AttentionConfig(kind="linear")
W256, W512, WIDE = (FFNConfig(ffn_dim=width) for width in (256, 512, 2048))
DUMMY = (NO_ATTENTION, NO_FFN)

PARENT = Architecture(
    vocab_size=VOCAB_SIZE,
    hidden_dim=128,
    num_heads=4,
    head_dim=32,
    blocks=dense_blocks(4, num_kv_heads=2, ffn_dim=512),
    max_positions=256,
    rope=RopeConfig(theta=10_000.0),
    token_ids={"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0},
)
LLAMA3 = RopeConfig(
    theta=500_000.0, kind="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=8192
)


def _blocks(*subblocks: tuple[AttentionConfig, FFNConfig]) -> Architecture:
    blocks = tuple(
        BlockConfig(attention=attention, ffn=ffn, parent_block_indices=(index,))
        for index, (attention, ffn) in enumerate(subblocks)
    )
    return replace(PARENT, blocks=blocks)


PRUNED = _blocks((KV2, W512), (NO_ATTENTION, W256), (KV2, W512), (NO_ATTENTION, WIDE))
ARCHITECTURES: dict[str, Architecture] = {
    "attention removed, wide fused FFN": PRUNED,
    "variable KV heads": _blocks((KV4, W512), (KV2, W512), (NO_ATTENTION, W512), (KV1, W256)),
    "dummy blocks, one of them last": _blocks((KV2, W512), DUMMY, (KV2, W256), (NO_ATTENTION, WIDE), DUMMY),
    "attention without FFN, also last": _blocks((KV2, W512), (KV2, NO_FFN), (NO_ATTENTION, W512), (KV2, NO_FFN)),
    "no attention in block 0": _blocks((NO_ATTENTION, W512), (KV2, W512), (NO_ATTENTION, W512), (KV1, W512)),
    "no attention at all": _blocks((NO_ATTENTION, W512), (NO_ATTENTION, W256)),
    "tied embeddings": replace(PRUNED, tie_embeddings=True),
    "llama3 scaling": replace(PRUNED, rope=LLAMA3),
    "llama3 scaling from 64 positions": replace(PRUNED, rope=replace(LLAMA3, original_max_positions=64)),
    "linear scaling": replace(PRUNED, rope=RopeConfig(theta=10_000.0, kind="linear", factor=4.0)),
    "yarn scaling": replace(
        PRUNED, rope=RopeConfig(theta=10_000.0, kind="yarn", factor=4.0, original_max_positions=64)
    ),
    "biases of q, k, v": replace(PRUNED, qkv_bias=True),
    "head_dim of its own": replace(PRUNED, head_dim=64),
    "sliding window": replace(PRUNED, sliding_window=16),
    "linear attention, also in block 0": _blocks((LINEAR, W512), (KV2, W512), (LINEAR, W256), (KV1, W512)),
    "linear attention alone": _blocks((LINEAR, W512), (NO_ATTENTION, W256), (LINEAR, W256)),
}
"""By what is special about them."""

PADDED = "FFN width 300, padded to 512"


def build(directory: Path, tokenizer_from: Path) -> dict[str, Path]:
    """Write every child under ``directory``: weights that make themselves felt, in fp32, with a tokenizer."""
    makers: dict[str, Callable[[Path], None]] = {
        name: lambda path, seed=seed, architecture=architecture: build_lively(path, architecture, tokenizer_from, seed)
        for seed, (name, architecture) in enumerate(ARCHITECTURES.items())
    }
    makers[PADDED] = lambda path: _padded(path, tokenizer_from)
    paths = {}
    for number, (name, make) in enumerate(makers.items()):
        paths[name] = directory / f"child_{number}"
        make(paths[name])
    return paths


def build_lively(path: Path, architecture: Architecture, tokenizer_from: Path, seed: int) -> None:
    """Write ``architecture`` with weights that make themselves felt."""
    model = build_model(architecture, seed=seed)
    _enliven(dict(model.named_parameters()), seed)
    save_model(model, path, architecture=architecture, tokenizer_from=tokenizer_from)


@torch.no_grad()
def _enliven(tensors: dict[str, torch.Tensor], seed: int) -> None:
    """Norms that are not one, biases that are not zero, matrices that keep a residual stream of unit size."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in tensors.items():
        if "norm" in name:
            tensor.uniform_(0.5, 1.5, generator=generator)
        elif tensor.ndim == 1:
            tensor.normal_(0.0, 0.5, generator=generator)
        else:
            tensor.normal_(0.0, 1.5 / tensor.shape[1] ** 0.5, generator=generator)


def _padded(path: Path, tokenizer_from: Path) -> None:
    """A Llama checkpoint in its own format, imported: its width is no multiple of 256."""
    source = path.with_name("llama")
    source.mkdir()
    hidden, width, kv_dim = PARENT.hidden_dim, 300, 64
    shapes = {"model.embed_tokens.weight": (VOCAB_SIZE, hidden), "model.norm.weight": (hidden,)}
    shapes["lm_head.weight"] = (VOCAB_SIZE, hidden)
    for index in range(2):
        block = {
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (kv_dim, hidden),
            "self_attn.v_proj": (kv_dim, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (width, hidden),
            "mlp.up_proj": (width, hidden),
            "mlp.down_proj": (hidden, width),
        }
        shapes |= {f"model.layers.{index}.{name}.weight": shape for name, shape in block.items()}
    tensors = {name: torch.empty(shape) for name, shape in shapes.items()}
    _enliven(tensors, 99)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": hidden,
        "intermediate_size": width,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    (source / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).write_text((tokenizer_from / name).read_text())
    import_hf(source, path, dtype=torch.float32)
