"""The optimizer step that the planner counts: who trains on what, and how it is dealt. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass

from distill.config import EngineConfig, ObjectiveConfig
from distill.engine.dealing import num_model_ranks
from launch.plan_activations import Numerics
from launch.plan_state import is_sharded, product_bytes
from puzzle.model.architecture import Architecture


@dataclass(frozen=True, kw_only=True)
class Step:
    """One optimizer step: who trains on what, and how it is dealt."""

    student: Architecture
    teacher: Architecture | None = None
    """Runs beside the student; None: no one, or a cache."""
    objective: ObjectiveConfig
    engine: EngineConfig
    num_ranks: int
    batch_size: int
    """Sequences, over all ranks."""
    seq_len: int
    background_points: bool = False
    """A resume point is copied to CPU memory, and written while the next steps run (``resume_points.background``)."""

    @property
    def models(self) -> dict[str, Architecture]:
        """Those that run, by role."""
        return {"student": self.student, **({} if self.teacher is None else {"teacher": self.teacher})}

    @property
    def data_ranks(self) -> int:
        """Ranks with sequences of their own."""
        return self.num_ranks // num_model_ranks(self.engine)

    @property
    def micro_sequences(self) -> int:
        """Sequences in one forward pass (``distill.engine.base.micro_batch_size``)."""
        own = max(1, self.batch_size // self.data_ranks)
        most, part = self.engine.micro_batch_tokens, self.seq_len // self.engine.sequence_parallel
        return own if most == 0 else max(1, min(own, most // part))

    @property
    def num_micro_batches(self) -> int:
        """Forward passes of a step on one rank."""
        return -(-max(1, self.batch_size // self.data_ranks) // self.micro_sequences)

    @property
    def micro_tokens(self) -> int:
        """Tokens in one forward pass on one rank."""
        return self.micro_sequences * self.seq_len // self.engine.sequence_parallel

    @property
    def numerics(self) -> Numerics:
        """Autocast keeps the residual stream in fp32 beside fp32 weights; weights in bf16 make it bf16."""
        autocast = self.engine.name == "torch" and not is_sharded(self.engine)
        c = product_bytes(self.engine)
        flash = c == 2 or self.engine.device == "cpu"
        return Numerics(residual=4 if autocast else c, product=c, compiled=self.engine.compile, flash=flash)
