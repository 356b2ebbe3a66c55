"""A heterogeneous decoder in terms of megatron-core: its specification, its stages and its weights, exactly.

Blocks are megatron-core's transformer layers with its tensor-parallel matrices. Three parts are our own, because those
of megatron-core need Transformer Engine to be fast or to run in sequence parallel: the norm, the rotary angles (every
scaling rule of the format, any positions) and attention through torch's fused kernels.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.models.gpt.heterogeneous.heterogeneous_layer_specs import get_gpt_heterogeneous_layer_spec
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.heterogeneous.heterogeneous_config import HeterogeneousTransformerConfig
from megatron.core.transformer.heterogeneous.linear_replacements import ColumnParallelLinearGathered
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask
from torch.utils.checkpoint import checkpoint
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from distill.config import require
from distill.engine.base import expect_shapes
from distill.forward import document_mask
from puzzle.model.architecture import Architecture, BlockConfig
from puzzle.model.configuration_decilm import DeciLMConfig
from puzzle.model.hf_config import hf_config
from puzzle.model.megatron_layout import TensorLayout, stage_layouts
from puzzle.model.stats import attention_flops_per_token, ffn_flops_per_token
from puzzle.model.tensor_layout import tensor_shapes

# It warns of every linear layer in place of an FFN that it is no kind of FFN that it knows.
logging.getLogger("megatron.core.transformer.transformer_layer").setLevel(logging.ERROR)

AfterBlock = Callable[[int, Tensor], Tensor]
"""(index of a block in the model, its output) -> what flows on."""


class MegatronModel:
    """An architecture as megatron-core builds it.

    Args:
        architecture: of the whole model.

    Raises:
        ValueError: megatron-core's layers cannot express it.
    """

    def __init__(self, architecture: Architecture) -> None:
        windows = [list(window) for window in architecture.parallel_windows]
        require(
            not windows,
            f"engine.name=megatron runs blocks one after another, and this model runs {windows} in parallel; train it "
            "with engine.name=torch or deepspeed, or before stage parallelize_blocks",
        )
        unrotated = [index for index, block in enumerate(architecture.blocks) if not block.attention.rope]
        require(
            not unrotated,
            f"engine.name=megatron rotates queries and keys in every attention, and this model does not in blocks "
            f"{unrotated}; train it with engine.name=torch or deepspeed",
        )
        self.architecture = architecture

    @property
    def num_blocks(self) -> int:
        """Decoder blocks."""
        return self.architecture.num_blocks

    @property
    def hidden_dim(self) -> int:
        """Channels of the residual stream."""
        return self.architecture.hidden_dim

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding."""
        return self.architecture.tie_embeddings

    def block_costs(self, seq_len: int) -> list[int]:
        """Forward FLOPs per token of every block, at the mean context of causal attention over ``seq_len`` tokens."""
        context = (seq_len + 1) // 2
        return [
            attention_flops_per_token(self.architecture, block.attention, context)
            + ffn_flops_per_token(self.architecture, block.ffn)
            for block in self.architecture.blocks
        ]

    def head_cost(self) -> int:
        """Forward FLOPs per token of the LM head. The embedding is a lookup and counts nothing."""
        return 2 * self.architecture.vocab_size * self.architecture.hidden_dim

    def config(
        self, *, tensor_parallel: int, stage_blocks: Sequence[int], dtype: torch.dtype, sequence_parallel: bool
    ) -> HeterogeneousTransformerConfig:
        """megatron-core's configuration, in which losses and gradients are summed over ranks, not averaged.

        Args:
            tensor_parallel: ranks that share every matrix.
            stage_blocks: blocks of every pipeline stage.
            dtype: of weights and activations.
            sequence_parallel: split activations between the matrices over the sequence.
        """
        a = self.architecture
        bf16 = dtype == torch.bfloat16
        rows = [["decoder"] * number for number in stage_blocks]
        layout = [["embedding", *rows[0]], *rows[1:-1], [*rows[-1], "loss"]] if len(rows) > 1 else None
        _, scaling = inverse_frequencies(a)
        return HeterogeneousTransformerConfig(
            num_layers=a.num_blocks,
            hidden_size=a.hidden_dim,
            num_attention_heads=a.num_heads,
            num_query_groups=a.num_heads,
            kv_channels=a.head_dim,
            ffn_hidden_size=4 * a.hidden_dim,
            heterogeneous_layers_config_encoded_json=json.dumps({"block_configs": [_entry(b) for b in a.blocks]}),
            normalization="RMSNorm",
            layernorm_epsilon=a.norm_eps,
            qk_layernorm=a.qk_norm,
            gated_linear_unit=True,
            activation_func=functional.silu,
            add_bias_linear=False,
            add_qkv_bias=a.qkv_bias,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            # Of yarn: its factor on cosines and sines of queries and of keys, so twice in a score.
            softmax_scale=a.head_dim**-0.5 * scaling**2,
            tensor_model_parallel_size=tensor_parallel,
            pipeline_model_parallel_size=len(stage_blocks),
            pipeline_model_parallel_layout=layout,
            pipeline_dtype=dtype,
            batch_p2p_sync=False,
            params_dtype=dtype,
            bf16=bf16,
            sequence_parallel=sequence_parallel,
            perform_initialization=False,
            calculate_per_token_loss=True,
            variable_seq_lengths=False,
            deallocate_pipeline_outputs=False,
            masked_softmax_fusion=False,
            bias_activation_fusion=torch.cuda.is_available(),
            bias_dropout_fusion=False,
            gradient_accumulation_fusion=False,
            apply_rope_fusion=False,
        )

    def stage(self, config: HeterogeneousTransformerConfig, *, max_positions: int, recompute: bool) -> DecoderStage:
        """The blocks of this process's stage, with embedding or head where it has them; weights are undefined."""
        spec = get_gpt_heterogeneous_layer_spec(config)
        for layer in spec.layer_specs:
            _use_own_parts(layer.submodules)
        spec.layer_norm = RMSNorm
        return DecoderStage(self.architecture, config, spec, max_positions=max_positions, recompute=recompute)

    def layouts(self, first_block: int, num_blocks: int) -> list[TensorLayout]:
        """How the tensors of a stage are made of those of the checkpoint."""
        return stage_layouts(self.architecture, first_block, num_blocks)

    def load_weights(self, stage: DecoderStage, layouts: Sequence[TensorLayout], read: Callable[[str], Tensor]) -> None:
        """Fill ``stage`` with this rank's shards of the checkpoint's tensors, which ``read`` returns, one by one."""
        rank, size = stage.tp_group.rank(), stage.tp_group.size()
        parameters = dict(stage.named_parameters())
        with torch.no_grad():
            for layout in layouts:
                parameter = parameters.pop(layout.name)
                parameter.copy_(layout.shard([read(source) for source in layout.sources], rank, size))
                if layout.kind != "whole" and not hasattr(parameter, "tensor_model_parallel"):
                    # Without it the gradients' norm counts the shard of the first rank alone. megatron-core sets it
                    # where it initialises weights itself.
                    dim = 1 if layout.kind == "columns" else 0
                    set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=dim, stride=1)
        assert not parameters, f"no tensor of the checkpoint is mapped to {sorted(parameters)}"

    def all_tokens(self, stage: DecoderStage, hidden: Tensor) -> Tensor:
        """Output of a stage in sequence parallel [seq / tensor_parallel, batch, hidden] -> [seq, batch, hidden].

        What reads it is to give every rank the whole gradient, of which each takes its tokens' part.
        """
        if not stage.config.sequence_parallel:
            return hidden
        return tensor_parallel.gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the checkpoint's tensors, by name."""
        return tensor_shapes(self.architecture)


def _entry(block: BlockConfig) -> dict[str, Any]:
    attention, ffn = block.attention, block.ffn
    return {
        "attention": {
            "no_op": attention.is_no_op,
            "replace_with_linear": attention.kind == "linear",
            "num_query_groups": attention.num_kv_heads,
        },
        "ffn": {
            "no_op": ffn.is_no_op,
            "replace_with_linear": ffn.kind == "linear",
            "ffn_hidden_size": ffn.ffn_dim,
        },
    }


def _use_own_parts(layer: Any) -> None:
    for name in ("input_layernorm", "pre_mlp_layernorm"):
        if getattr(layer, name) is not IdentityOp:
            setattr(layer, name, RMSNorm)
    attention = layer.self_attention
    if attention.module is SelfAttention:
        attention.submodules.core_attention = FusedAttention
        for name in ("q_layernorm", "k_layernorm"):
            norm = getattr(attention.submodules, name)
            setattr(attention.submodules, name, None if norm is IdentityOp else HeadNorm)
    for subblock in (attention, layer.mlp):
        if subblock.module is ColumnParallelLinearGathered:
            subblock.module = ReplacementLinear


class RMSNorm(nn.Module):
    """Root-mean-square norm with the variance in fp32, as in the checkpoint's own model; runs in sequence parallel."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=_device()))
        # megatron-core sums the gradients of such weights, each of a part of the tokens, over the ranks.
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, hidden: Tensor) -> Tensor:
        """``hidden [..., dim]`` -> [..., dim], in the same data type."""
        fuses = hidden.is_cuda and importlib.util.find_spec("triton") is not None
        return (_compiled_rms_norm() if fuses else _rms_norm)(hidden, self.weight, self.eps)


def _rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = hidden.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(hidden.dtype)


@functools.cache
def _compiled_rms_norm() -> Callable[[Tensor, Tensor, float], Tensor]:
    """One kernel each way, which keeps its input alone: as it stands the norm keeps two fp32 copies."""
    expect_shapes(16)  # hidden states and heads, of student and teacher, with and without gradient, full and last batch
    return torch.compile(_rms_norm, dynamic=False)


class HeadNorm(RMSNorm):
    """The norm of queries or keys. Heads are dealt over the ranks, so megatron-core sums its gradients by its name."""


class ReplacementLinear(ColumnParallelLinearGathered):
    """One matrix in place of an attention or an FFN, its rows dealt over the ranks.

    In sequence parallel megatron-core 0.16 would pad the sequence in place of the channels.
    """

    def forward(self, hidden: Tensor, **_: Any) -> tuple[Tensor, None]:
        """Tokens of this rank ``[seq, batch, hidden]`` -> the same; and no bias."""
        channels, _ = tensor_parallel.ColumnParallelLinear.forward(self, hidden)
        whole = tensor_parallel.gather_from_tensor_model_parallel_region(channels)
        return (tensor_parallel.scatter_to_sequence_parallel_region(whole) if self.sequence_parallel else whole), None


class FusedAttention(MegatronModule):
    """Causal grouped-query attention through torch's fused kernels: with a long mask FlexAttention."""

    def __init__(self, config: Any, layer_number: int, softmax_scale: float, **_: Any) -> None:
        super().__init__(config=config)
        self.softmax_scale = softmax_scale

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | BlockMask | None, **_: Any
    ) -> Tensor:
        """Heads ``[seq, batch, heads or KV heads, head_dim]`` of this rank -> [seq, batch, heads * head_dim].

        ``attention_mask`` is one of :func:`distill.forward.document_mask`; None: every token attends to all before it.
        """
        query, key, value = (heads.permute(1, 2, 0, 3) for heads in (query, key, value))
        if isinstance(attention_mask, BlockMask):
            output, _ = flex_attention_forward(self, query, key, value, attention_mask, scaling=self.softmax_scale)
            return output.transpose(0, 1).flatten(2)
        output = functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=attention_mask,
            is_causal=attention_mask is None,
            scale=self.softmax_scale,
            enable_gqa=True,
        )
        return output.permute(2, 0, 1, 3).flatten(2)


def inverse_frequencies(architecture: Architecture, device: torch.device | None = None) -> tuple[Tensor, float]:
    """Inverse rotary frequencies [head_dim / 2] in fp32, and the factor of cosines and sines (1, but for yarn)."""
    config = DeciLMConfig(**hf_config(architecture, "float32"))
    rope = config.rope_parameters
    if rope["rope_type"] == "default":
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float, device=device) / config.head_dim
        return 1.0 / (rope["rope_theta"] ** exponents), 1.0
    return ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, device)


class DecoderStage(GPTModel):
    """The blocks of one pipeline stage. Its parameters are those of a GPTModel."""

    def __init__(self, architecture: Architecture, config: Any, spec: Any, *, max_positions: int, recompute: bool):
        super().__init__(
            config,
            spec,
            vocab_size=architecture.vocab_size,
            max_sequence_length=max_positions,
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
            share_embeddings_and_output_weights=architecture.tie_embeddings,
            position_embedding_type="none",
        )
        self.recompute = recompute
        self.sliding_window = architecture.sliding_window
        self.num_gqa_blocks = sum(block.attention.kind == "gqa" for block in architecture.blocks)
        self._inverse_frequencies, _ = inverse_frequencies(architecture, _device())

    @property
    def head(self) -> Tensor:
        """This rank's rows of the LM head [vocab / tensor_parallel, hidden]; on the last stage."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        *,
        separate_documents: bool = False,
        after_block: AfterBlock | None = None,
    ) -> Tensor:
        """Run the stage on what was set by ``set_input_tensor``, or on the tokens on the first stage.

        Args:
            input_ids: [batch, seq].
            position_ids: [batch or 1, seq].
            separate_documents: whether documents, which begin where a position is 0, attend to themselves alone.
            after_block: may replace the output of a block; never called within a recomputation. The last block's output
                comes after the final norm, as transformers reports it.

        Returns:
            [seq, batch, hidden]; under sequence parallel [seq / tensor_parallel, batch, hidden]. On the last stage
            after the final norm.
        """
        hidden = self.embedding(input_ids, position_ids) if self.pre_process else self.decoder.input_tensor
        angles = position_ids.T[..., None].float() * self._inverse_frequencies
        shared = {
            "attention_mask": self._mask(position_ids, separate_documents),
            "rotary_pos_emb": torch.cat((angles, angles), dim=-1)[:, :, None],
        }
        for layer in self.decoder.layers:
            run: Callable[[Tensor], Tensor] = partial(_run_layer, layer, **shared)
            recomputes = self.recompute and torch.is_grad_enabled()
            # There is no dropout, so no random state to keep for the second run.
            hidden = (
                checkpoint(run, hidden, use_reentrant=False, preserve_rng_state=False) if recomputes else run(hidden)
            )
            is_last = layer.layer_number == self.config.num_layers
            if is_last:
                hidden = self.decoder.final_layernorm(hidden)
            if after_block is not None:
                hidden = after_block(layer.layer_number - 1, hidden)
        return hidden

    def _mask(self, position_ids: Tensor, separate_documents: bool) -> Tensor | BlockMask | None:
        """Who attends to whom; None where every token does to all before it."""
        window = self.sliding_window
        if not separate_documents and (window is None or window >= position_ids.shape[1]):
            return None
        return document_mask(position_ids, sliding_window=window)


def _run_layer(layer: nn.Module, hidden: Tensor, **inputs: Any) -> Tensor:
    return layer(hidden_states=hidden, **inputs)[0]


def _device() -> torch.device:
    return torch.device(torch.cuda.current_device())
