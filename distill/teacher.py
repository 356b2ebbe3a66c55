"""The teacher as a source of training signals."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class TeacherSignal:
    """What a student learns from on one batch. Nothing here has a gradient."""

    hidden: Tensor
    """[batch, seq, hidden], after the final norm."""
    head: Tensor
    """LM head [vocab, hidden]."""
    blocks: dict[int, Tensor]
    """Output [batch, seq, hidden] of the teacher's blocks that were asked for, by index; the last block's is taken
    after the final norm, as transformers reports it."""


class Teacher:
    """A frozen model that runs beside the student, on the same device, in the precision of its own weights.

    Args:
        model: causal LM with the Hugging Face surface. It is put in eval mode and its parameters are frozen.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model.eval().requires_grad_(False)

    @property
    def num_blocks(self) -> int:
        """Blocks of the teacher."""
        return self.model.config.num_hidden_layers

    @torch.no_grad()
    def signal(self, input_ids: Tensor, blocks: Collection[int] = ()) -> TeacherSignal:
        """Signals on ``input_ids`` [batch, seq]. Outputs of blocks that are not in ``blocks`` are freed at once."""
        with torch.autocast(input_ids.device.type, enabled=False):
            outputs = self.model.model(input_ids, output_hidden_states=bool(blocks), use_cache=False)
        return TeacherSignal(
            hidden=outputs.last_hidden_state,
            head=self.model.get_output_embeddings().weight,
            blocks={block: outputs.hidden_states[block + 1] for block in sorted(set(blocks))},
        )
