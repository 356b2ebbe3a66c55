"""A parent run block by block, and single blocks outside of any model.

The residual stream is fp32 whatever the precision: only matrix products run in the parent's data type. In bf16 the sum
of a large residual and a small update loses what the replacements differ in.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from puzzle.model.architecture import Architecture, BlockConfig
from puzzle.model.configuration_decilm import DeciLMConfig
from puzzle.model.hf_config import hf_config
from puzzle.model.modeling_decilm import DeciLMDecoderLayer, DeciLMForCausalLM


def precision(model: DeciLMForCausalLM) -> torch.autocast:
    """Autocast to the data type of the model's weights; no more than a null context for fp32."""
    return torch.autocast(model.device.type, dtype=model.dtype, enabled=model.dtype != torch.float32)


def embed(model: DeciLMForCausalLM, input_ids: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """The first block's input [batch, seq, hidden] in fp32, and the keyword arguments of every attention."""
    hidden = model.model.embed(input_ids.to(model.device, non_blocking=True)).float()
    return hidden, model.model.attention_inputs(hidden)


def build_block(
    model: DeciLMForCausalLM, architecture: Architecture, block: BlockConfig, tensors: Mapping[str, Tensor]
) -> DeciLMDecoderLayer:
    """A block of shape ``block`` that holds ``tensors`` themselves (no copies) and attends as ``model`` does.

    Parameters of ``model`` may be among the tensors; they are then shared.
    """
    config = DeciLMConfig(**hf_config(architecture.with_blocks((block,)), "float32"))
    config._attn_implementation = model.config._attn_implementation
    with torch.device("meta"):
        layer = DeciLMDecoderLayer(config, 0, 0)
    parameters = {name: _as_parameter(tensor) for name, tensor in tensors.items()}
    layer.load_state_dict(parameters, strict=True, assign=True)
    return layer


def _as_parameter(tensor: Tensor) -> nn.Parameter:
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=tensor.requires_grad)
