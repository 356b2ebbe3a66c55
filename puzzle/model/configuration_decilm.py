"""Configuration of a heterogeneous decoder in the nemotron-nas format.

Self-contained (transformers and the standard library alone): it is copied into every model directory, where
transformers and serving engines load it as remote code.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from transformers import PretrainedConfig


@dataclass(frozen=True)
class AttentionEntry:
    """Attention of one block; the key set of the format, whole."""

    n_heads_in_group: int | None = None
    """Query heads per KV head; null where there is no grouped-query attention."""
    no_op: bool = False
    num_sink_tokens: int | None = None
    replace_with_linear: bool = False
    sparsify: list[str] | None = None
    unshifted_sink: bool = False
    use_prefill_window_in_sink_attention: bool = False
    window_length: int | None = None


@dataclass(frozen=True)
class FFNEntry:
    """FFN of one block; the key set of the format, whole."""

    ffn_mult: float | None = None
    """1.5 x width / hidden_size, six decimals; null where there is no SwiGLU."""
    no_op: bool = False
    replace_with_linear: bool = False
    sparsify: list[str] | None = None


@dataclass(frozen=True)
class BlockEntry:
    """One block. Engines read it by attribute: ``block.attention.no_op``."""

    attention: AttentionEntry
    ffn: FFNEntry

    @classmethod
    def from_dict(cls, entry: dict[str, Any]) -> BlockEntry:
        """Keys that the format does not have are left out, as every reader of the format does."""
        return cls(attention=_known(AttentionEntry, entry["attention"]), ffn=_known(FFNEntry, entry["ffn"]))


def _known(kind: type, values: dict[str, Any]) -> Any:
    names = {item.name for item in fields(kind)}
    return kind(**{name: value for name, value in values.items() if name in names})


class DeciLMConfig(PretrainedConfig):
    """Llama's configuration with one entry per block in place of one width and one KV head count.

    ``qkv_bias``, ``qk_norm``, ``sliding_window`` and ``head_dim`` extend the format to Qwen and Mistral parents,
    ``no_rope_blocks`` (indices) to attentions that do not rotate, ``parallel_windows`` (first and last block of each,
    inclusive) to blocks that read the same input; without them a configuration is exactly what other readers of
    nemotron-nas expect.
    """

    model_type = "nemotron-nas"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (transformers declares it so)

    def __init__(
        self,
        *,
        vocab_size: int = 32_000,
        hidden_size: int = 256,
        num_hidden_layers: int | None = None,
        num_attention_heads: int = 4,
        block_configs: list[dict[str, Any]] | list[BlockEntry] | None = None,
        max_position_embeddings: int = 2048,
        hidden_act: str = "silu",
        rms_norm_eps: float = 1e-5,
        rope_theta: float = 10_000.0,
        rope_scaling: dict[str, Any] | None = None,
        rope_parameters: dict[str, Any] | None = None,
        initializer_range: float = 0.02,
        attention_bias: bool = False,
        attention_dropout: float = 0.0,
        mlp_bias: bool = False,
        head_dim: int | None = None,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        sliding_window: int | None = None,
        no_rope_blocks: list[int] | None = None,
        parallel_windows: list[list[int]] | None = None,
        use_cache: bool = True,
        bos_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        pad_token_id: int | None = None,
        tie_word_embeddings: bool = False,
        **kwargs: Any,
    ) -> None:
        blocks = block_configs or []
        entries = [block if isinstance(block, BlockEntry) else BlockEntry.from_dict(block) for block in blocks]
        if num_hidden_layers is not None and num_hidden_layers != len(entries):
            raise ValueError(f"num_hidden_layers={num_hidden_layers} differs from {len(entries)} block_configs")
        if hidden_act != "silu" or attention_bias or mlp_bias:
            raise ValueError(
                f"hidden_act={hidden_act}, attention_bias={attention_bias}, mlp_bias={mlp_bias}: "
                "only silu without these biases is supported (qkv_bias adds one to q, k and v)"
            )
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = len(entries)
        self.num_attention_heads = num_attention_heads
        self.block_configs = entries
        self.max_position_embeddings = max_position_embeddings
        self.hidden_act = hidden_act
        self.rms_norm_eps = rms_norm_eps
        self.initializer_range = initializer_range
        self.attention_bias = attention_bias
        self.attention_dropout = attention_dropout
        self.mlp_bias = mlp_bias
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.qkv_bias = qkv_bias
        self.qk_norm = qk_norm
        self.sliding_window = sliding_window
        self.no_rope_blocks = list(no_rope_blocks or [])
        self.parallel_windows = [list(window) for window in parallel_windows or []]
        self.use_cache = use_cache
        # transformers moves rope_theta and rope_scaling into this attribute, and only where it already stands.
        self.rope_parameters: Any = dict(rope_parameters) if rope_parameters else None
        if self.rope_parameters is None:
            kwargs |= {"rope_theta": rope_theta, "rope_scaling": dict(rope_scaling) if rope_scaling else None}
        kwargs |= {"bos_token_id": bos_token_id, "eos_token_id": eos_token_id, "pad_token_id": pad_token_id}
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)
        self.bos_token_id, self.eos_token_id, self.pad_token_id = bos_token_id, eos_token_id, pad_token_id
        self.tie_word_embeddings = tie_word_embeddings

    def has_gqa(self, index: int) -> bool:
        """Whether block ``index`` has grouped-query attention, and so a KV cache."""
        attention = self.block_configs[index].attention
        return not (attention.no_op or attention.replace_with_linear)

    @property
    def num_gqa_blocks(self) -> int:
        """Blocks that own a KV cache."""
        return sum(self.has_gqa(index) for index in range(self.num_hidden_layers))

    def num_kv_heads(self, index: int) -> int:
        """KV heads of block ``index``, which has grouped-query attention."""
        group = self.block_configs[index].attention.n_heads_in_group
        assert group is not None
        return self.num_attention_heads // group

    def ffn_dim(self, index: int) -> int:
        """Channels of the SwiGLU of block ``index``: the format's rule, rounded up to a multiple of 256."""
        mult = self.block_configs[index].ffn.ffn_mult
        assert mult is not None
        return -(-int(2 * mult * self.hidden_size / 3) // 256) * 256

    def to_dict(self) -> dict[str, Any]:
        """JSON values in the legacy spelling: engines that read config.json themselves know no ``rope_parameters``."""
        entries, self.block_configs = self.block_configs, []
        try:
            output = super().to_dict()
        finally:
            self.block_configs = entries
        output["block_configs"] = [asdict(entry) for entry in entries]
        output |= {"intermediate_size": None, "num_key_value_heads": None}
        if rope := output.pop("rope_parameters", None):
            output["rope_theta"] = rope.pop("rope_theta")
            output["rope_scaling"] = None if rope["rope_type"] == "default" else rope
        if self.head_dim == self.hidden_size // self.num_attention_heads:
            output.pop("head_dim")
        for key in ("no_rope_blocks", "parallel_windows"):
            if not output[key]:
                output.pop(key)
        return output
