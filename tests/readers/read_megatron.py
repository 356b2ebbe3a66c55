"""Reader: stock megatron-core with heterogeneous layers, from what is written for Megatron-LM. Arguments: job file,
result directory.

The model is what Megatron-LM builds for the flags in ``megatron_arguments.txt``; the weights are mapped from the
checkpoint beside it by the table in ``docs/export.md``.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
import megatron_cpu

megatron_cpu.install()

import megatron.core  # noqa: E402
from megatron.core import parallel_state, tensor_parallel  # noqa: E402
from megatron.core.models.gpt.gpt_model import GPTModel  # noqa: E402
from megatron.core.models.gpt.heterogeneous.heterogeneous_layer_specs import get_gpt_heterogeneous_layer_spec  # noqa: E402
from megatron.core.transformer.heterogeneous.heterogeneous_config import HeterogeneousTransformerConfig  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

IMPLIED = {
    "swiglu", "disable-bias-linear", "group-query-attention", "use-rotary-position-embeddings", "use-rope-scaling",
    "untie-embeddings-and-output-weights",
}  # fmt: skip
"""Flags without a value."""


def flags(directory: Path) -> dict[str, str]:
    lines = (directory / "megatron_arguments.txt").read_text().splitlines()
    parts = [line.removeprefix("--").partition(" ") for line in lines]
    found = {name: value for name, _, value in parts}
    assert {name for name, value in found.items() if not value} <= IMPLIED
    return found


def check(found: dict[str, str], layers: dict) -> None:
    """What Megatron-LM compares before it starts."""
    groups = {block["attention"]["n_heads_in_group"] for block in layers["block_configs"]} - {None}
    (group,) = groups
    expected = {
        "num-layers": layers["num_hidden_layers"],
        "hidden-size": layers["hidden_size"],
        "num-attention-heads": layers["num_attention_heads"],
        "num-query-groups": layers["num_attention_heads"] // group,
        "rotary-base": layers["rope_theta"],
        "rope-scaling-factor": layers["rope_scaling"]["factor"],
        "rotary-percent": 1.0,
    }
    assert {name: float(found[name]) for name in expected} == {name: float(value) for name, value in expected.items()}
    assert layers["hidden_act"] == "silu"
    assert ("untie-embeddings-and-output-weights" in found) is not layers["tie_word_embeddings"]
    assert (found["normalization"], found["position-embedding-type"]) == ("RMSNorm", "rope")
    assert found.keys() >= IMPLIED - {"untie-embeddings-and-output-weights"}


def build(directory: Path) -> GPTModel:
    found = flags(directory)
    check(found, json.loads((directory / "megatron_layers.json").read_text()))
    config = HeterogeneousTransformerConfig(
        num_layers=int(found["num-layers"]),
        hidden_size=int(found["hidden-size"]),
        num_attention_heads=int(found["num-attention-heads"]),
        num_query_groups=int(found["num-query-groups"]),
        ffn_hidden_size=4 * int(found["hidden-size"]),
        heterogeneous_layers_config_path=str(directory / found["heterogeneous-layers-config-path"]),
        normalization=found["normalization"],
        layernorm_epsilon=float(found["norm-epsilon"]),
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=float(found["hidden-dropout"]),
        attention_dropout=float(found["attention-dropout"]),
        use_cpu_initialization=True,
        perform_initialization=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
    )
    return GPTModel(
        config,
        get_gpt_heterogeneous_layer_spec(config),
        vocab_size=int(found["vocab-size"]),
        max_sequence_length=int(found["max-position-embeddings"]),
        position_embedding_type=found["position-embedding-type"],
        rotary_base=int(found["rotary-base"]),
        rope_scaling="use-rope-scaling" in found,
        rope_scaling_factor=float(found["rope-scaling-factor"]),
        share_embeddings_and_output_weights="untie-embeddings-and-output-weights" not in found,
        parallel_output=False,
    )


def weights(directory: Path, model: GPTModel) -> dict[str, torch.Tensor]:
    stored = {}
    for path in directory.glob("*.safetensors"):
        stored |= load_file(path)
    names = {
        "model.embed_tokens.weight": "embedding.word_embeddings.weight",
        "model.norm.weight": "decoder.final_layernorm.weight",
        "lm_head.weight": "output_layer.weight",
    }
    mapped = {new: stored[name] for name, new in names.items() if name in stored}
    for index in range(model.config.num_layers):
        prefix = f"model.layers.{index}."
        block = {name.removeprefix(prefix): tensor for name, tensor in stored.items() if name.startswith(prefix)}
        mapped |= {f"decoder.layers.{index}.{name}": tensor for name, tensor in of_block(block, model.config)}
    return mapped


def of_block(block: dict[str, torch.Tensor], config: HeterogeneousTransformerConfig):
    if "self_attn.q_proj.weight" in block:
        projections = (block[f"self_attn.{name}_proj.weight"] for name in "qkv")
        grouped = [matrix.unflatten(0, (config.num_query_groups, -1)) for matrix in projections]
        yield "input_layernorm.weight", block["input_layernorm.weight"]
        yield "self_attention.linear_qkv.weight", torch.cat(grouped, dim=1).flatten(0, 1)
        yield "self_attention.linear_proj.weight", block["self_attn.o_proj.weight"]
    if "mlp.up_proj.weight" in block:
        yield "pre_mlp_layernorm.weight", block["post_attention_layernorm.weight"]
        yield "mlp.linear_fc1.weight", torch.cat([block["mlp.gate_proj.weight"], block["mlp.up_proj.weight"]])
        yield "mlp.linear_fc2.weight", block["mlp.down_proj.weight"]


def logits(model: GPTModel, ids: list[int]) -> torch.Tensor:
    mask = torch.ones(len(ids), len(ids), dtype=torch.bool).triu(1)[None, None]
    return model(torch.tensor([ids]), torch.arange(len(ids))[None], mask)[0].float()


@torch.no_grad()
def read(directory: Path, prompt: list[int], num_tokens: int) -> tuple[list[int], np.ndarray]:
    model = build(directory)
    result = model.load_state_dict(weights(directory, model), strict=False)
    missing = [name for name in result.missing_keys if "_extra_state" not in name]
    assert (missing, result.unexpected_keys) == ([], [])
    model.eval()
    logprobs = logits(model, prompt).log_softmax(-1).numpy()
    tokens: list[int] = []
    while len(tokens) < num_tokens:
        tokens.append(int(logits(model, [*prompt, *tokens])[-1].argmax()))
    return tokens, logprobs


def main() -> None:
    job, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1"}
    dist.init_process_group("gloo", init_method=f"file://{out / 'meeting'}", rank=0, world_size=1)
    parallel_state.initialize_model_parallel(1)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    for name, path in job["models"].items():
        tokens, logprobs = read(Path(path), job["prompt"], job["num_tokens"])
        np.savez(out / f"{name}.npz", tokens=tokens, logprobs=logprobs)
    (out / "version.txt").write_text(f"megatron-core {megatron.core.__version__}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
