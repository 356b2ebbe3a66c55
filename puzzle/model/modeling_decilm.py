"""A decoder whose blocks differ: any KV head count, any FFN width, linear replacements, no-ops.

The one model file for training and for serving. Self-contained (torch, transformers and its configuration alone): it is
copied into every model directory, where transformers loads it as remote code. A no-op has no weights, no norm, no KV
cache and no cost. The KV cache is indexed by the ordinal of the attention, not of the block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple

from .configuration_decilm import DeciLMConfig

Rotation = tuple[Tensor, Tensor]
"""Cosines and sines of the rotary angles, each [batch or 1, seq, head_dim]."""


class DeciLMRMSNorm(nn.Module):
    """Root-mean-square norm with the variance in fp32, as in Llama."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        """``hidden [..., dim]`` -> [..., dim], in the same data type."""
        wide = hidden.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(hidden.dtype)


class DeciLMRotaryEmbedding(nn.Module):
    """Rotary angles of every position.

    The inverse frequencies are a plain attribute, made on first use: a buffer would be rounded by
    ``model.to(bfloat16)`` and lost when the model is built on the meta device.
    """

    def __init__(self, config: DeciLMConfig) -> None:
        super().__init__()
        self.config = config
        self._inverse_frequencies: Tensor | None = None
        self._attention_scaling = 1.0

    def _frequencies(self, device: torch.device) -> Tensor:
        if self._inverse_frequencies is None or self._inverse_frequencies.device != device:
            rope, dim = self.config.rope_parameters, self.config.head_dim
            if rope["rope_type"] == "default":
                exponents = torch.arange(0, dim, 2, dtype=torch.float, device=device) / dim
                self._inverse_frequencies = 1.0 / (rope["rope_theta"] ** exponents)
            else:
                compute = ROPE_INIT_FUNCTIONS[rope["rope_type"]]
                self._inverse_frequencies, self._attention_scaling = compute(self.config, device)
        return self._inverse_frequencies

    @torch.no_grad()
    def forward(self, hidden: Tensor, position_ids: Tensor) -> Rotation:
        """Rotation of ``position_ids [batch or 1, seq]``, in the data type of ``hidden``."""
        angles = position_ids[..., None].float() * self._frequencies(hidden.device)
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos() * self._attention_scaling, angles.sin() * self._attention_scaling
        return cos.to(hidden.dtype), sin.to(hidden.dtype)


def rotate(heads: Tensor, rotation: Rotation) -> Tensor:
    """Apply the rotary angles to ``heads [batch, num_heads, seq, head_dim]`` (halves paired, as in Llama)."""
    cos, sin = (part.unsqueeze(1) for part in rotation)
    first, second = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat((-second, first), dim=-1) * sin


def eager_attention(
    module: DeciLMAttention, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:
    """Attention in plain operators, for ``attn_implementation="eager"``.

    ``query [batch, num_heads, seq, head_dim]``, ``key`` and ``value [batch, num_kv_heads, context, head_dim]`` and an
    additive mask [batch or 1, 1, seq, context] -> output [batch, seq, num_heads, head_dim] and attention weights.
    """
    key, value = (heads.repeat_interleave(module.num_key_value_groups, dim=1) for heads in (key, value))
    scores = query @ key.transpose(2, 3) * options["scaling"]
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.dropout(scores.softmax(-1, dtype=torch.float32).to(query.dtype), options["dropout"], module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class DeciLMAttention(nn.Module):
    """Grouped-query attention with this block's own number of KV heads."""

    def __init__(self, config: DeciLMConfig, index: int, cache_index: int) -> None:
        super().__init__()
        num_kv_heads = config.num_kv_heads(index)
        self.config = config
        self.layer_idx = cache_index
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // num_kv_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        self.rotates = index not in config.no_rope_blocks
        query_dim, kv_dim = config.num_attention_heads * self.head_dim, num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_dim, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_dim, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_dim, bias=config.qkv_bias)
        self.o_proj = nn.Linear(query_dim, config.hidden_size, bias=False)
        self.q_norm = DeciLMRMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = DeciLMRMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else None

    def forward(
        self,
        hidden: Tensor,
        position_embeddings: Rotation,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
    ) -> Tensor:
        """``hidden [batch, seq, hidden]`` -> [batch, seq, hidden]; of a cache only ``update`` is needed."""
        shape = (*hidden.shape[:-1], -1, self.head_dim)
        query, key, value = (project(hidden).view(shape) for project in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = (heads.transpose(1, 2) for heads in (query, key, value))
        if self.rotates:
            query, key = rotate(query, position_embeddings), rotate(key, position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        dropout = self.config.attention_dropout if self.training else 0.0
        options = {"dropout": dropout, "scaling": self.scaling, "sliding_window": self.config.sliding_window}
        output, _ = attend(self, query, key, value, attention_mask, **options)
        return self.o_proj(output.reshape(*hidden.shape[:-1], -1))


class DeciLMLinear(nn.Module):
    """One matrix in place of an attention or an FFN (Puzzle, section 2); ``name`` is what the format calls it."""

    def __init__(self, config: DeciLMConfig, name: str) -> None:
        super().__init__()
        self.name = name
        self.register_module(name, nn.Linear(config.hidden_size, config.hidden_size, bias=False))

    def forward(self, hidden: Tensor, *_: Any) -> Tensor:
        """``hidden [batch, seq, hidden]`` -> [batch, seq, hidden]; positions, mask and cache mean nothing here."""
        return self.get_submodule(self.name)(hidden)


class DeciLMMLP(nn.Module):
    """SwiGLU with this block's own width."""

    def __init__(self, config: DeciLMConfig, index: int) -> None:
        super().__init__()
        width = config.ffn_dim(index)
        self.gate_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """``hidden [batch, seq, hidden]`` -> [batch, seq, hidden]."""
        return self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))


class DeciLMDecoderLayer(GradientCheckpointingLayer):
    """One block. ``self_attn`` and ``mlp``, with their norms, are None where they are no-ops."""

    def __init__(self, config: DeciLMConfig, index: int, cache_index: int) -> None:
        super().__init__()
        entry, dim, eps = config.block_configs[index], config.hidden_size, config.rms_norm_eps
        self.input_layernorm = None if entry.attention.no_op else DeciLMRMSNorm(dim, eps)
        self.self_attn: DeciLMAttention | DeciLMLinear | None = None
        if entry.attention.replace_with_linear:
            self.self_attn = DeciLMLinear(config, "linear_attn")
        elif not entry.attention.no_op:
            self.self_attn = DeciLMAttention(config, index, cache_index)
        self.post_attention_layernorm = None if entry.ffn.no_op else DeciLMRMSNorm(dim, eps)
        self.mlp: DeciLMMLP | DeciLMLinear | None = None
        if entry.ffn.replace_with_linear:
            self.mlp = DeciLMLinear(config, "linear_mlp")
        elif not entry.ffn.no_op:
            self.mlp = DeciLMMLP(config, index)

    @property
    def has_attention(self) -> bool:
        """Whether ``attention_update`` may be called: a grouped-query or linear attention stands here."""
        return self.self_attn is not None

    @property
    def has_ffn(self) -> bool:
        """Whether ``ffn_update`` may be called: a SwiGLU or linear FFN stands here."""
        return self.mlp is not None

    def attention_update(
        self,
        hidden: Tensor,
        position_embeddings: Rotation | None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
    ) -> Tensor:
        """What attention adds to ``hidden [batch, seq, hidden]``: Attn(norm(hidden)), without the residual."""
        assert self.self_attn is not None
        assert self.input_layernorm is not None
        return self.self_attn(self.input_layernorm(hidden), position_embeddings, attention_mask, past_key_values)

    def ffn_update(self, hidden: Tensor) -> Tensor:
        """What the FFN adds to ``hidden [batch, seq, hidden]``: FFN(norm(hidden)), without the residual."""
        assert self.mlp is not None
        assert self.post_attention_layernorm is not None
        return self.mlp(self.post_attention_layernorm(hidden))

    def forward(
        self,
        hidden: Tensor,
        position_embeddings: Rotation | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        stream: Tensor | None = None,
    ) -> Tensor:
        """``hidden [batch, seq, hidden]`` -> [batch, seq, hidden]: ``stream`` (None: ``hidden``) plus both updates."""
        if self.has_attention:
            update = self.attention_update(hidden, position_embeddings, attention_mask, past_key_values)
            hidden, stream = hidden + update, None if stream is None else stream + update
            del update  # the FFN's activations are the peak of memory
        stream = hidden if stream is None else stream
        return stream + self.ffn_update(hidden) if self.has_ffn else stream


class DeciLMPreTrainedModel(PreTrainedModel):
    """What transformers needs to know of both classes below."""

    config_class = DeciLMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("DeciLMDecoderLayer",)
    _skip_keys_device_placement = ("past_key_values",)
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True


class DeciLMModel(DeciLMPreTrainedModel):
    """Embeddings, blocks and final norm."""

    def __init__(self, config: DeciLMConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        cache_indices = [sum(config.has_gqa(i) for i in range(index)) for index in range(config.num_hidden_layers)]
        self.layers = nn.ModuleList(DeciLMDecoderLayer(config, i, cache) for i, cache in enumerate(cache_indices))
        self.norm = DeciLMRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = DeciLMRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    def embed(self, input_ids: Tensor) -> Tensor:
        """``input_ids [batch, seq]`` -> hidden [batch, seq, hidden], the input of the first block."""
        return self.embed_tokens(input_ids)

    def attention_inputs(
        self,
        hidden: Tensor,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> dict[str, Any]:
        """Keyword arguments that every block's forward shares: rotation and causal (or sliding-window) mask.

        Args:
            hidden: [batch, seq, hidden]; only its shape, device and data type count.
            past_key_values: cache whose length is the position of the first token.
            attention_mask: [batch, context], 0 at padding; or a ready mask [batch, 1, seq, context].
            position_ids: [batch or 1, seq]; None: consecutive after the cache.
        """
        if self.config.num_gqa_blocks == 0:
            return {"position_embeddings": None, "attention_mask": None}
        make_mask = create_causal_mask if self.config.sliding_window is None else create_sliding_window_causal_mask
        # Default positions are kept from the mask: it would look for packed sequences in them, and wait for the device.
        inputs = {"inputs_embeds": hidden, "attention_mask": attention_mask, "position_ids": position_ids}
        mask = make_mask(config=self.config, past_key_values=past_key_values, **inputs)
        if position_ids is None:
            start = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(hidden.shape[1], device=hidden.device) + start)[None]
        return {"position_embeddings": self.rotary_emb(hidden, position_ids), "attention_mask": mask}

    def block_outputs(self, hidden: Tensor, **inputs: Any) -> Iterator[Tensor]:
        """The residual stream [batch, seq, hidden] after every block, from the first one's input ``hidden``.

        The blocks f_i of a parallel window all read the window's input X; the stream is X + sum of f_i(X) - X over
        those that have run (FFN Fusion, Appendix B). ``inputs`` are the further arguments of every block.
        """
        last_of, last, window_input = dict(self.config.parallel_windows), -1, hidden
        for index, block in enumerate(self.layers):
            if starts := index > last:
                window_input, last = hidden, last_of.get(index, index)
            hidden = block(window_input, stream=None if starts else hidden, **inputs)
            yield hidden

    def new_cache(self) -> DynamicCache:
        """Empty KV cache with one layer per grouped-query attention."""
        cache = DynamicCache(config=self.config)
        del cache.layers[self.config.num_gqa_blocks :]
        return cache

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> BaseModelOutputWithPast:
        """Run all blocks on ``input_ids [batch, seq]`` or on ``inputs_embeds [batch, seq, hidden]``.

        Returns:
            ``last_hidden_state [batch, seq, hidden]`` after the final norm; with ``output_hidden_states`` also
            ``hidden_states``: the embeddings and the output of every block, the last one after the final norm.

        Raises:
            ValueError: both or neither of ``input_ids`` and ``inputs_embeds`` are given.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        hidden = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and past_key_values is None:
            past_key_values = self.new_cache()
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        shared = self.attention_inputs(hidden, past_key_values, attention_mask, position_ids)
        states = [hidden]
        for output in self.block_outputs(hidden, past_key_values=past_key_values, **shared):
            states = [*states, output] if output_hidden_states else [output]
        hidden = self.norm(states[-1])
        every = (*states[:-1], hidden) if output_hidden_states else None
        return BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=past_key_values, hidden_states=every)


class DeciLMForCausalLM(DeciLMPreTrainedModel, GenerationMixin):
    """The decoder with its language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 (transformers declares it so)

    def __init__(self, config: DeciLMConfig) -> None:
        super().__init__(config)
        self.model = DeciLMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any) -> None:
        """As transformers does, less the cache layers of blocks that have no KV cache."""
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)
        cache = model_kwargs.get("past_key_values")
        if isinstance(cache, Cache):
            del cache.layers[self.config.num_gqa_blocks :]

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [batch, kept, vocab] of the last ``logits_to_keep`` positions (0: all; a tensor: those positions).

        ``labels [batch, seq]`` are input ids, shifted here; -100 is ignored. Further keywords go to the loss.
        """
        outputs = self.model(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, output_hidden_states
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        further = {"past_key_values": outputs.past_key_values, "hidden_states": outputs.hidden_states}
        return CausalLMOutputWithPast(loss=loss, logits=logits, **further)
