"""Configuration of a context extension: phases of growing sequence length. Torch-free."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Literal

from distill.config import PLACEMENT, EvaluateConfig, ResumePointsConfig, RopeConfig, TrainConfig, require


@dataclass(frozen=True, kw_only=True)
class PhaseConfig:
    """One phase of context extension."""

    seq_len: int
    """Tokens per sequence; the model then has at least as many positions."""
    max_tokens: int
    """Token budget of the phase."""
    batch_size: int
    """Sequences per optimizer step."""
    rope: RopeConfig | None = None
    """Rotary settings from this phase on; null keeps those of the phase before."""
    data_end: Literal["refuse", "repeat", "stop"] = "refuse"
    """As in TrainConfig, of what the phases before leave of the train split. With repeat a phase for which that is not
    enough draws from the whole split."""
    separate_documents: bool = False
    """As in TrainConfig."""

    def __post_init__(self) -> None:
        for name in ("seq_len", "max_tokens", "batch_size"):
            require(getattr(self, name) > 0, f"extend_context.phases: {name} must be > 0, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class ExtendContextConfig:
    """Phases of growing sequence length (Llama-Nemotron: KD or continued pretraining)."""

    phases: tuple[PhaseConfig, ...]
    eval_every_tokens: int = 0
    """As in TrainConfig."""
    eval_sequences: int = 16
    """As in TrainConfig."""
    lengths: tuple[int, ...] = ()
    """Context lengths in tokens at which the model is probed, as stage evaluate does it, before the first phase and
    after each; empty: never."""
    num_needles: int = 32
    """Retrieval questions per length and task."""
    resume_points: ResumePointsConfig = field(default_factory=ResumePointsConfig, metadata=PLACEMENT)
    """As in TrainConfig; a phase has ten."""

    def __post_init__(self) -> None:
        require(len(self.phases) > 0, "extend_context.phases is empty; give at least one phase")
        lengths = [phase.seq_len for phase in self.phases]
        require(lengths == sorted(lengths), f"extend_context.phases must not shrink seq_len, got {lengths}")
        for index in range(len(self.phases)):
            self.train(index)
        require(
            all(1 < length <= lengths[-1] for length in self.lengths),
            f"extend_context.lengths must be in 2..{lengths[-1]} (the longest phase), got {list(self.lengths)}",
        )
        require(self.num_needles > 0, f"extend_context.num_needles must be > 0, got {self.num_needles}")

    @staticmethod
    def node(index: int) -> str:
        """Configuration node of phase ``index``."""
        return f"extend_context.phases.{index}"

    def train(self, index: int) -> TrainConfig:
        """Budget and cadence of phase ``index``; raises ``ValueError`` in its name where they make no sense."""
        own = asdict(self.phases[index])
        del own["rope"]
        try:
            return TrainConfig(
                **own,
                eval_every_tokens=self.eval_every_tokens,
                eval_sequences=self.eval_sequences,
                resume_points=self.resume_points,
            )
        except ValueError as error:
            raise ValueError(f"{self.node(index)}: {error}") from error

    @property
    def probe(self) -> EvaluateConfig:
        """What is asked at each of ``lengths``: as many tokens, and as many in a forward, as one held-out evaluation
        and one sequence of the last phase have."""
        return EvaluateConfig(
            seq_len=self.phases[-1].seq_len,
            num_sequences=self.eval_sequences,
            batch_size=1,
            lengths=self.lengths,
            num_needles=self.num_needles,
        )
