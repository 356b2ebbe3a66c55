"""Configuration of synthetic text: documents sampled from a model. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass

from distill.config import require

TEXT_NAME = "text.jsonl"
"""File of the documents, one JSON object per line, in the artifact of stage generate_text."""


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """What stage generate_text samples.

    The documents are numbered. Each is drawn with numbers of its own, a function of the seed and its number, so that
    the text does not depend on the number of processes.
    """

    max_tokens: int
    """Tokens in all, those of prompts included; sampling ends with the first batch that reaches them."""
    document_tokens: int = 1024
    """Most tokens of one document. Longer ones are cut."""
    batch_size: int = 64
    """Documents that are sampled at once, from one prompt."""
    temperature: float = 1.0
    """Divides the logits: below 1 likelier text, above 1 more varied text."""
    top_p: float = 1.0
    """Tokens are drawn among the fewest, most probable first, whose probabilities add up to this. 1: among all."""
    prompts: tuple[str, ...] = ()
    """Texts that documents begin with, batch by batch in turn. Empty: they begin with the begin-of-text token alone."""

    def __post_init__(self) -> None:
        for name in ("max_tokens", "document_tokens", "batch_size"):
            require(getattr(self, name) > 0, f"generation.{name} must be > 0, got {getattr(self, name)}")
        require(self.temperature > 0, f"generation.temperature must be > 0, got {self.temperature}")
        require(0 < self.top_p <= 1, f"generation.top_p must be in 0..1 and not 0, got {self.top_p}")
        require(all(self.prompts), "generation.prompts has an empty text; leave it out, or set generation.prompts=[]")
