"""One rank's share of a parent under tensor parallelism, by arithmetic alone. Torch-free.

The shares are those of Megatron and vLLM. Query heads, FFN channels and vocabulary go to the ranks in equal parts. So
do KV heads, as long as there is one for every rank; beyond that each rank holds a copy of the one that its query heads
read. A linear subblock is split by its input channels. Norms stand on every rank. Each subblock thus ends in one
all-reduce of what it adds to the residual stream.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

from distill.config import require
from puzzle.model.architecture import NO_ATTENTION, NO_FFN, Architecture, AttentionConfig, BlockConfig, FFNConfig
from puzzle.model.tensor_layout import Shapes, attention_shapes, ffn_shapes, other_shapes

Subblock = AttentionConfig | FFNConfig

_EMPTY = BlockConfig(attention=NO_ATTENTION, ffn=NO_FFN, parent_block_indices=(0,))


@dataclass(frozen=True, kw_only=True)
class Shard:
    """What one of ``num_ranks`` ranks holds of the subblocks of ``parent``.

    Raises:
        ValueError: the query heads cannot be dealt equally.
    """

    parent: Architecture
    num_ranks: int

    def __post_init__(self) -> None:
        self._part(self.parent.num_heads, "query heads")

    @property
    def architecture(self) -> Architecture:
        """The parent with one rank's query heads and vocabulary, around a single block that does nothing. The last
        rank's vocabulary is filled up where it does not divide, as serving engines do."""
        vocab_size = -(-self.parent.vocab_size // self.num_ranks)
        num_heads = self.parent.num_heads // self.num_ranks
        return replace(self.parent, vocab_size=vocab_size, num_heads=num_heads, blocks=(_EMPTY,))

    def num_kv_heads(self, attention: AttentionConfig) -> int:
        """KV heads of ``attention`` on one rank; 0 for a linear one and for a no-op.

        Raises:
            ValueError: neither do the ranks divide the heads nor the heads the ranks.
        """
        heads, ranks = attention.num_kv_heads, self.num_ranks
        if heads is None:
            return 0
        require(
            heads % ranks == 0 or ranks % heads == 0,
            f"workload.tensor_parallel={ranks} and the {heads} KV heads of attention {attention.name}: one must divide "
            "the other, so that every rank holds equally many; choose other ranks or leave the variant out",
        )
        return max(1, heads // ranks)

    def ffn_dim(self, ffn: FFNConfig) -> int:
        """Channels of ``ffn`` on one rank; 0 for a linear one and for a no-op.

        Raises:
            ValueError: they cannot be dealt equally.
        """
        return self._part(ffn.ffn_dim or 0, f"channels of ffn {ffn.name}")

    def linear_input_dim(self) -> int:
        """Input channels of a linear subblock on one rank.

        Raises:
            ValueError: they cannot be dealt equally.
        """
        return self._part(self.parent.hidden_dim, "input channels of a linear subblock")

    def shapes(self, subblock: Subblock) -> Shapes:
        """Tensors of one rank's share of ``subblock``, its norm included, named relative to the block.

        Raises:
            ValueError: it cannot be dealt equally.
        """
        hidden_dim = self.parent.hidden_dim
        if isinstance(subblock, AttentionConfig):
            heads = self.num_kv_heads(subblock)
            shapes = attention_shapes(self.architecture, replace(subblock, num_kv_heads=heads) if heads else subblock)
            linear = "self_attn.linear_attn.weight"
        else:
            shapes = ffn_shapes(self.parent, subblock)
            linear = "mlp.linear_mlp.weight"
            if width := self.ffn_dim(subblock):
                shapes |= {f"mlp.{name}_proj.weight": (width, hidden_dim) for name in ("gate", "up")}
                shapes["mlp.down_proj.weight"] = (hidden_dim, width)
        if linear in shapes:
            shapes[linear] = (hidden_dim, self.linear_input_dim())
        return shapes

    def num_weights(self, subblock: Subblock) -> int:
        """Weights of one rank's share of ``subblock``, its norm included."""
        return _num_values(self.shapes(subblock))

    def num_other_weights(self) -> int:
        """Weights of one rank outside of the blocks: embedding, final norm and head; a tied head counts once."""
        return _num_values(other_shapes(self.architecture))

    def kv_values_per_token(self, subblock: Subblock) -> int:
        """Values that one rank's share of ``subblock`` adds to the KV cache per token and sequence."""
        if isinstance(subblock, AttentionConfig):
            return 2 * self.num_kv_heads(subblock) * self.parent.head_dim
        return 0

    def _part(self, number: int, what: str) -> int:
        require(
            number % self.num_ranks == 0,
            f"workload.tensor_parallel={self.num_ranks} does not divide the {number} {what}; "
            f"choose a divisor of {number}",
        )
        return number // self.num_ranks


def _num_values(shapes: Shapes) -> int:
    return sum(prod(shape) for shape in shapes.values())
