"""Which channels of an FFN matter: the ranking that every narrower FFN is cut by (Puzzle, appendix A)."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from puzzle.blockwise import embed, precision
from puzzle.model.modeling_decilm import DeciLMForCausalLM, DeciLMMLP


@torch.no_grad()
def channel_contributions(model: DeciLMForCausalLM, sequences: Tensor, *, batch_size: int) -> dict[int, Tensor]:
    """Mean over tokens of how far the FFN's output moves when one channel is removed.

    Channel i, whose activation is x_i, adds x_i * W_down[:, i] to the output, so that C_i = |x_i| * ||W_down[:, i]||_2
    (Puzzle, appendix A). All blocks are measured in one pass through the unchanged parent, each on its own input.

    Args:
        model: the parent.
        sequences: token ids [num_sequences, seq].
        batch_size: sequences per forward.

    Returns:
        Contributions [ffn_dim] (fp32, CPU) of every block that has a SwiGLU, by block index.
    """
    down_projs = {
        index: block.mlp.down_proj for index, block in enumerate(model.model.layers) if isinstance(block.mlp, DeciLMMLP)
    }
    sums = {
        index: torch.zeros(down_proj.in_features, dtype=torch.float32, device=model.device)
        for index, down_proj in down_projs.items()
    }
    with ExitStack() as hooks:
        for index, down_proj in down_projs.items():
            hooks.enter_context(down_proj.register_forward_pre_hook(partial(_add_magnitudes, sums[index])))
        for batch in tqdm(sequences.split(batch_size), desc="channel importance", unit="batch", leave=False):
            with precision(model):
                hidden, attention_inputs = embed(model, batch)
                for block in model.model.layers:
                    hidden = block(hidden, **attention_inputs)
    return {
        index: (sums[index] / sequences.numel() * down_projs[index].weight.float().norm(dim=0)).cpu() for index in sums
    }


def rank_channels(contributions: Tensor) -> Tensor:
    """Channel indices [ffn_dim], dearest first; equal channels keep their order.

    One ranking serves all widths of a block, so that a narrower FFN is contained in every wider one.
    """
    return contributions.argsort(descending=True, stable=True)


def _add_magnitudes(total: Tensor, _: nn.Module, args: tuple[Any, ...]) -> None:
    total += args[0].abs().sum(dim=(0, 1), dtype=torch.float32)
