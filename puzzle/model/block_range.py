"""A model of some consecutive blocks: which tensors it has, and under which names.

The embedding goes with the first block, final norm and head with the last. Where the head is tied and the first block
is not there, the head holds a copy of the embedding.
"""

from __future__ import annotations

from torch import nn

from puzzle.model.architecture import Architecture
from puzzle.model.modeling_decilm import DeciLMForCausalLM
from puzzle.model.tensor_layout import EMBEDDING, FINAL_NORM, HEAD, block_prefix, block_shapes


def tensor_places(architecture: Architecture, blocks: range) -> dict[str, str]:
    """Stored name -> name in a model of ``blocks`` alone, whose layers are counted from zero."""
    places = {EMBEDDING: EMBEDDING} if blocks.start == 0 else {}
    for layer, index in enumerate(blocks):
        for name in block_shapes(architecture, architecture.blocks[index]):
            places[block_prefix(index) + name] = block_prefix(layer) + name
    if blocks.stop == architecture.num_blocks:
        places[FINAL_NORM] = FINAL_NORM
        if not architecture.tie_embeddings:
            places[HEAD] = HEAD
        elif blocks.start > 0:
            places[EMBEDDING] = HEAD
    return places


def keep_blocks(model: DeciLMForCausalLM, blocks: range) -> None:
    """Take the modules out of a whole ``model`` that have no place in one of ``blocks`` alone."""
    if blocks.start > 0:
        model.model.register_module("embed_tokens", None)
    if blocks.stop < len(model.model.layers):
        model.model.register_module("norm", None)
        model.register_module("lm_head", None)
    model.model.layers = nn.ModuleList(model.model.layers[index] for index in blocks)
