"""Text sampled from a causal LM, a batch of documents at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from distill.data.generation import GenerationConfig
from distill.data.tokenizer import encode_documents, vocab_size_of

CHECK_EVERY_TOKENS = 16
"""Steps between looks at which documents have ended. Each look waits for the device."""


@dataclass(frozen=True, kw_only=True)
class SampledDocument:
    """One document."""

    text: str
    num_tokens: int
    """With those of the prompt and the end-of-text token."""
    ended: bool
    """Whether the model ended it; otherwise it is cut at ``document_tokens``."""


class DocumentSampler:
    """Samples batches of documents by their number.

    Args:
        model: causal LM with the Hugging Face surface, in evaluation mode.
        tokenizer: its tokenizer; token ids beyond it, with which a vocabulary may be padded, are never drawn.
        generation: settings.
        seed: of all documents.
    """

    def __init__(
        self, model: nn.Module, tokenizer: PreTrainedTokenizerFast, generation: GenerationConfig, *, seed: int
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._generation = generation
        self._seed = seed
        self._device = next(model.parameters()).device
        self._vocab_size = vocab_size_of(tokenizer)
        begin = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        self._prompts = [[begin, *ids] for ids in prompt_ids(tokenizer, generation)]

    def batch(self, index: int) -> list[SampledDocument]:
        """Documents ``index * batch_size`` to ``(index + 1) * batch_size - 1``."""
        generation = self._generation
        prompt = self._prompts[index % len(self._prompts)]
        num_steps = generation.document_tokens - (len(prompt) - 1)
        numbers = range(index * generation.batch_size, (index + 1) * generation.batch_size)
        draws = np.stack([np.random.default_rng([self._seed, number]).random(num_steps) for number in numbers])
        sampled = self._sample(prompt, torch.from_numpy(draws).to(self._device))
        return [self._document(prompt[1:], row) for row in sampled.tolist()]

    @torch.no_grad()
    def _sample(self, prompt: list[int], draws: Tensor) -> Tensor:
        """Tokens int64 [batch, steps] after ``prompt``, by uniform numbers ``draws`` [batch, steps].

        What follows a document's end-of-text token has no meaning. Documents that have ended leave the batch once they
        are half of it.
        """
        batch, num_steps = draws.shape
        tokens = torch.full((batch, num_steps), self._tokenizer.eos_token_id, device=self._device)
        rows = torch.arange(batch, device=self._device)
        ended = torch.zeros(batch, dtype=torch.bool, device=self._device)
        inputs = torch.tensor(prompt, device=self._device).expand(batch, -1)
        cache: Any = None
        for step in range(num_steps):
            outputs = self._model.model(inputs, past_key_values=cache, use_cache=True)
            cache = outputs.past_key_values
            logits = self._model.get_output_embeddings()(outputs.last_hidden_state[:, -1])
            chosen = self._choose(logits, draws[rows, step])
            tokens[rows, step] = chosen
            ended |= chosen == self._tokenizer.eos_token_id
            inputs = chosen[:, None]
            if (step + 1) % CHECK_EVERY_TOKENS == 0:
                going = torch.nonzero(~ended)[:, 0]
                if len(going) == 0:
                    break
                if 2 * len(going) <= len(rows):
                    rows, ended, inputs = rows[going], ended[going], inputs[going]
                    cache.batch_select_indices(going)
        return tokens

    def _choose(self, logits: Tensor, draws: Tensor) -> Tensor:
        """Token ids [batch] of ``logits`` [batch, vocab] by uniform numbers ``draws`` [batch]."""
        logits = logits[:, : self._vocab_size].float() / self._generation.temperature
        return draw_tokens(logits.softmax(dim=-1), draws, top_p=self._generation.top_p)

    def _document(self, prompt: list[int], sampled: list[int]) -> SampledDocument:
        eos = self._tokenizer.eos_token_id
        ended = eos in sampled
        kept = sampled[: sampled.index(eos)] if ended else sampled
        text = self._tokenizer.decode([*prompt, *kept], skip_special_tokens=True)
        if not ended:
            # A character whose last bytes were not sampled.
            text = text.rstrip("\N{REPLACEMENT CHARACTER}")
        return SampledDocument(text=text, num_tokens=len(prompt) + len(kept) + ended, ended=ended)


def prompt_ids(tokenizer: PreTrainedTokenizerFast, generation: GenerationConfig) -> list[list[int]]:
    """Token ids of the prompts, without the begin-of-text token; one empty prompt where there is none."""
    return list(encode_documents(tokenizer, list(generation.prompts))) if generation.prompts else [[]]


def draw_tokens(probs: Tensor, draws: Tensor, *, top_p: float) -> Tensor:
    """Draw by inversion among the fewest most probable tokens whose probabilities reach ``top_p`` (nucleus sampling).

    Args:
        probs: fp32 [batch, vocab], each row adds up to 1.
        draws: uniform in 0..1 [batch].
        top_p: in 0..1, not 0.

    Returns:
        Token ids int64 [batch].
    """
    ordered, token_ids = probs.sort(dim=-1, descending=True, stable=True)
    reached = ordered.double().cumsum(dim=-1)
    # A token is kept where those before it do not reach top_p: the first always is.
    num_kept = ((reached - ordered) < top_p).sum(dim=-1, keepdim=True)
    mass = reached.gather(-1, num_kept - 1)
    position = (reached <= draws.double()[:, None] * mass).sum(dim=-1, keepdim=True)
    return token_ids.gather(-1, torch.minimum(position, num_kept - 1))[:, 0]
