"""A whole decode step of :class:`shard.DecodeShard` against the model file of the project with the same weights."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[1:1] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import torch  # noqa: E402 - the project is found by the line above
from measuring import make_bench  # noqa: E402
from products import Weight  # noqa: E402
from self_check import Finding  # noqa: E402
from shard import DOWN, GATE_UP, OUTPUT, QKV, DecodeShard, Setting  # noqa: E402
from torch import Tensor  # noqa: E402

from distill.config import RopeConfig  # noqa: E402
from puzzle.latency import FixedCache  # noqa: E402
from puzzle.model.architecture import (  # noqa: E402
    NO_ATTENTION,
    Architecture,
    BlockConfig,
    FFNConfig,
    dense_blocks,
)
from puzzle.model.configuration_decilm import DeciLMConfig  # noqa: E402
from puzzle.model.hf_config import hf_config  # noqa: E402
from puzzle.model.modeling_decilm import DeciLMForCausalLM  # noqa: E402

KV_TOKENS = 70
STEP_TOLERANCE = {False: 0.02, True: 0.15}
"""By fp8; relative, of the logits. 16 bits: a dozen roundings of 0.004 at most each. FP8: the model file has the same
e4m3 weights, but its activations are not quantised (3 bits of mantissa: 0.03 on average in each of a dozen
products)."""
INTERPRETER_FP8_TOLERANCE = 0.35
"""Triton's interpreter cuts where e4m3 rounds, which doubles the error."""


def step_check(device: torch.device, *, fp8: bool, triton: bool) -> Finding:
    """Three blocks, one of them without attention; 2 sequences; logits of the new tokens."""
    architecture = Architecture(
        vocab_size=512,
        hidden_dim=256,
        num_heads=4,
        head_dim=64,
        blocks=(
            *dense_blocks(2, 2, 512),
            BlockConfig(attention=NO_ATTENTION, ffn=FFNConfig(ffn_dim=768), parent_block_indices=(2,)),
        ),
        max_positions=128,
        rope=RopeConfig(theta=10_000.0),
        tie_embeddings=True,
    )
    torch.manual_seed(0)
    bench = make_bench(device, weight_bytes=2**24, cache_bytes=2**20, picks_path=None, keeps_picks=False, triton=triton)
    bench.use_kernels(set())
    setting = Setting(fp8=fp8, batch=2, kv_tokens=KV_TOKENS, num_ranks=1, reduce="none", device=device)
    shard = DecodeShard(architecture, setting, bench.machinery(setting)).build_model()
    caches = [cache.clone() for cache in shard.caches]
    shard.run()
    expected = _model_logits(architecture, shard, caches)
    error = ((shard.logits.float() - expected).norm() / expected.norm()).item()
    kernels = "Triton" if triton else "plain torch"
    tolerance = INTERPRETER_FP8_TOLERANCE if fp8 and device.type == "cpu" else STEP_TOLERANCE[fp8]
    return Finding(name=f"whole step, {'fp8' if fp8 else '16 bits'}, {kernels}", error=error, tolerance=tolerance)


@torch.inference_mode()
def _model_logits(architecture: Architecture, shard: DecodeShard, caches: list[Tensor]) -> Tensor:
    model = DeciLMForCausalLM(DeciLMConfig(**hf_config(architecture, "float32"))).to(shard.tokens.device).float().eval()
    matrices = iter(shard.matrices)
    cache = FixedCache(KV_TOKENS)
    attentions = iter(caches)
    for index, (layer, block) in enumerate(zip(model.model.layers, architecture.blocks, strict=True)):
        if not block.attention.is_no_op:
            names = (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)
            _fill(names, _next(matrices, QKV))
            _fill((layer.self_attn.o_proj,), _next(matrices, OUTPUT))
            keys, values = next(attentions).float()
            cache._layers[index] = (keys, values)
        _fill((layer.mlp.gate_proj, layer.mlp.up_proj), _next(matrices, GATE_UP))
        _fill((layer.mlp.down_proj,), _next(matrices, DOWN))
    table = next(matrices)[1].values.float()
    model.model.embed_tokens.weight.data.copy_(table)
    model.lm_head.weight.data.copy_(table)
    hidden = model.model.embed_tokens(shard.tokens[:, None])
    positions = torch.full((1, 1), KV_TOKENS - 1, device=hidden.device)
    shared = model.model.attention_inputs(hidden, position_ids=positions) | {"attention_mask": None}
    for layer in model.model.layers:
        hidden = layer(hidden, past_key_values=cache, **shared)
    return model.lm_head(model.model.norm(hidden))[:, 0]


def _next(matrices: object, op_class: str) -> Weight:
    found, weight = next(matrices)  # type: ignore[call-overload]
    assert found == op_class, f"{found} where {op_class} was due"
    return weight


def _fill(modules: tuple[torch.nn.Module, ...], weight: Weight) -> None:
    values = weight.values.float()
    if weight.scale is not None:
        values = values * weight.scale[:, None]
    start = 0
    for module in modules:
        num_rows = module.weight.shape[0]
        module.weight.data.copy_(values[start : start + num_rows])
        start += num_rows
    assert start == len(values)
