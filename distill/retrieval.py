"""What a model still does at a context length, without a download: finding things far back, and predicting long text.

Retrieval is a single needle in a haystack in the manner of RULER (arXiv 2404.06654), scored by ranking instead of
generation, so that base models and small vocabularies can be asked too. Every value is one token: one forward ranks
all candidates.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from distill.config import EvaluateConfig, require
from distill.data.dataset import TokenDataset, TokenSplit
from distill.data.tokenizer import load_tokenizer
from distill.evaluate import evaluate_model

NUM_CANDIDATES = 16
"""Values that a question ranks; a model that ignores the needle is right in one of so many."""

LENGTH_COLUMNS = ("lm_loss", "retrieval_accuracy_frac")

_NUM_WORDS = 256
"""Values are drawn from so many words of the vocabulary."""

_CUE, _END = "\nThe secret word of {key} is", ".\n"


@dataclass(frozen=True, kw_only=True)
class Needles:
    """Questions of one context length."""

    input_ids: Tensor
    """int64 [num_needles, length]: text, the needle within it, and the cue of the needle again at the end."""
    candidates: Tensor
    """int64 [num_needles, NUM_CANDIDATES]: values that could come next; column 0 is the true one."""


def make_needles(dataset: TokenDataset, *, length: int, num_needles: int, seed: int) -> Needles:
    """Hide one key and its value in each of ``num_needles`` stretches of the validation split.

    ``length`` is in tokens, question and needle included. Depths run evenly from the beginning to the end of the text.
    Deterministic in ``seed``. Raises ``ValueError`` where ``length`` leaves no room for text, or the validation split
    is shorter.
    """
    tokenizer = load_tokenizer(dataset.directory)
    words = _word_tokens(tokenizer)
    split = dataset.split("validation")
    rng = random.Random(f"{seed} {length}")
    input_ids, candidates = [], []
    for number in range(num_needles):
        key = "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(4))
        values = rng.sample(words, NUM_CANDIDATES)
        cue = tokenizer.encode(_CUE.format(key=key), add_special_tokens=False)
        needle = [*cue, values[0], *tokenizer.encode(_END, add_special_tokens=False)]
        num_question_tokens = len(needle) + len(cue)
        require(
            length > num_question_tokens,
            f"evaluate.lengths has {length}, and a retrieval question alone takes {num_question_tokens} tokens; "
            "use lengths of 128 or more",
        )
        text = _stretch(split, length - num_question_tokens, rng)
        depth = round(len(text) * number / max(1, num_needles - 1))
        input_ids.append([*text[:depth], *needle, *text[depth:], *cue])
        candidates.append(values)
    return Needles(input_ids=torch.tensor(input_ids), candidates=torch.tensor(candidates))


@dataclass(frozen=True, kw_only=True)
class LengthProbe:
    """What models are asked at one context length."""

    sequences: Tensor
    """int64 [num_sequences, length]"""
    needles: Needles
    batch_size: int
    """Sequences per forward."""

    def measure(self, model: PreTrainedModel, *, chunk_tokens: int) -> dict[str, float]:
        """``LENGTH_COLUMNS`` of one model: LM loss in nats per token, and share of needles found."""
        quality = evaluate_model(model, self.sequences, batch_size=self.batch_size, chunk_tokens=chunk_tokens)
        retrieval = retrieval_accuracy(model, self.needles, batch_size=self.batch_size)
        return dict(zip(LENGTH_COLUMNS, (quality["lm_loss"], retrieval["accuracy_frac"]), strict=True))


def make_probe(dataset: TokenDataset, config: EvaluateConfig, *, length: int, seed: int) -> LengthProbe:
    """Sequences and needles of ``length`` tokens: as many tokens in all, and in a batch, as the main evaluation has.

    Raises ``ValueError`` where the validation split is too short.
    """
    num_sequences = max(1, config.num_sequences * config.seq_len // length)
    return LengthProbe(
        sequences=dataset.split("validation").first(num_sequences, length),
        needles=make_needles(dataset, length=length, num_needles=config.num_needles, seed=seed),
        batch_size=max(1, config.batch_size * config.seq_len // length),
    )


@torch.no_grad()
def retrieval_accuracy(model: PreTrainedModel, needles: Needles, *, batch_size: int) -> dict[str, float]:
    """Share of needles whose true value the model gives a lower loss than every other candidate.

    Returns ``accuracy_frac``, and the ``chance_frac`` of a model that cannot look back.
    """
    head = model.get_output_embeddings().weight
    num_needles, length = needles.input_ids.shape
    num_right = 0
    for start in tqdm(range(0, num_needles, batch_size), desc=f"retrieval {length}", unit="batch", leave=False):
        rows = slice(start, start + batch_size)
        hidden = model.model(needles.input_ids[rows].to(head.device), use_cache=False).last_hidden_state[:, -1]
        # Candidates alone, in fp32: bf16 logits of likely words are often equal.
        candidate_rows = head[needles.candidates[rows].to(head.device)].float()
        scores = torch.einsum("bh,bch->bc", hidden.float(), candidate_rows)
        # Strictly better: a model that gives every candidate the same score has found nothing.
        num_right += int((scores[:, :1] > scores[:, 1:]).all(dim=1).sum())
    return {"accuracy_frac": num_right / num_needles, "chance_frac": 1 / NUM_CANDIDATES}


def _word_tokens(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Ids of tokens that are words: those of four letters or more first, the earliest in the vocabulary first of all.

    Early means frequent, hence well trained. A vocabulary without so many words makes do with shorter ones.
    """
    special = set(tokenizer.all_special_ids)
    texts = {index: tokenizer.decode([index]) for index in sorted(set(tokenizer.get_vocab().values()) - special)}
    words = [index for index, text in texts.items() if text.isascii() and text.strip().isalnum()]
    # A leading space first: it makes natural text after the cue, and no pair of the same word with and without one.
    words.sort(key=lambda index: (-min(4, len(texts[index].strip())), not texts[index].startswith(" ")))
    require(
        len(words) >= NUM_CANDIDATES,
        f"retrieval needs {NUM_CANDIDATES} tokens that are letters or words, the tokenizer in "
        f"{tokenizer.name_or_path} has {len(words)}; leave evaluate.lengths empty",
    )
    return words[:_NUM_WORDS]


def _stretch(split: TokenSplit, num_tokens: int, rng: random.Random) -> list[int]:
    """Token ids of a random stretch of ``num_tokens`` tokens."""
    require(
        num_tokens <= split.num_tokens,
        f"retrieval needs {num_tokens} tokens of {split.name} text in a row, the data has {split.num_tokens}; "
        f"raise data.{split.name}_tokens or lower evaluate.lengths",
    )
    start = rng.randrange(split.num_tokens - num_tokens + 1)
    return [int(token) for token in split.tokens[start : start + num_tokens]]
