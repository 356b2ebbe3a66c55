"""What a model still does at a context length, without a download: finding things far back, and predicting long text.

Retrieval is needles in a haystack in the manner of RULER (arXiv 2404.06654): a single needle, one among needles of
other keys, and several values of one key. It is scored by ranking instead of generation, so that base models and small
vocabularies can be asked too. Every value is one token: one forward ranks all candidates.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
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
"""A true value is ranked among so many, itself included; a model that ignores the needles puts it first in one of so
many questions."""


@dataclass(frozen=True, kw_only=True)
class RetrievalTask:
    """What is hidden in one text. The first key is asked for, the others distract."""

    name: str
    num_keys: int
    values_per_key: int

    @property
    def num_needles(self) -> int:
        """Needles in one text: each says one value of one key."""
        return self.num_keys * self.values_per_key

    @property
    def column(self) -> str:
        """Name of its accuracy in evaluations."""
        return "retrieval_accuracy_frac" if self == SINGLE else f"{self.name}_accuracy_frac"


SINGLE = RetrievalTask(name="single", num_keys=1, values_per_key=1)
TASKS = (
    SINGLE,
    RetrievalTask(name="multi_key", num_keys=4, values_per_key=1),
    RetrievalTask(name="multi_value", num_keys=1, values_per_key=4),
)

LENGTH_COLUMNS = ("lm_loss", *(task.column for task in TASKS))

_NUM_WORDS = 256
"""Values are drawn from so many words of the vocabulary."""

_CUE, _END = "\nThe secret word of {key} is", ".\n"


@dataclass(frozen=True, kw_only=True)
class Needles:
    """Questions of one task at one context length."""

    input_ids: Tensor
    """int64 [num_questions, length]: text, the needles within it, and the cue of the first key again at the end."""
    candidates: Tensor
    """int64 [num_questions, num_true + NUM_CANDIDATES - 1]: values that could come next, the true ones first, then
    those of other keys, then words that are not hidden."""
    num_true: int


def make_needles(
    dataset: TokenDataset,
    *,
    length: int,
    num_needles: int,
    seed: int,
    task: RetrievalTask = SINGLE,
    node: str = "evaluate",
) -> Needles:
    """Questions of ``task``, each in a stretch of the validation split.

    The first needle's depths run evenly from the beginning to the end of the text, the others' are random.
    Deterministic in the arguments.

    Args:
        dataset: whose validation split hides the needles.
        length: tokens of one question, needles and cue included.
        num_needles: questions.
        seed: of everything random.
        task: what is hidden.
        node: configuration node of ``lengths``, for errors.

    Raises:
        ValueError: ``length`` leaves no room for text, or the validation split is shorter.
    """
    tokenizer = load_tokenizer(dataset.directory)
    words = _word_tokens(tokenizer)
    split = dataset.split("validation")
    rng = random.Random(f"{seed} {length} {task.name}")
    input_ids, candidates = [], []
    for number in range(num_needles):
        values = rng.sample(words, task.values_per_key + NUM_CANDIDATES - 1)
        cues = [_encode(tokenizer, _CUE.format(key=_key(rng))) for _ in range(task.num_keys)]
        hidden = [
            [*cues[index // task.values_per_key], value, *_encode(tokenizer, _END)]
            for index, value in enumerate(values[: task.num_needles])
        ]
        num_question_tokens = sum(map(len, hidden)) + len(cues[0])
        require(
            length > num_question_tokens,
            f"{node}.lengths has {length}, and a retrieval question ({task.name}) alone takes {num_question_tokens} "
            "tokens; use lengths of 128 or more",
        )
        text = _stretch(split, length - num_question_tokens, rng, node)
        depths = [round(len(text) * number / max(1, num_needles - 1))]
        depths += [rng.randrange(len(text) + 1) for _ in hidden[1:]]
        input_ids.append([*_insert(text, hidden, depths), *cues[0]])
        candidates.append(values)
    return Needles(input_ids=torch.tensor(input_ids), candidates=torch.tensor(candidates), num_true=task.values_per_key)


@dataclass(frozen=True, kw_only=True)
class LengthProbe:
    """What models are asked at one context length."""

    sequences: Tensor
    """int64 [num_sequences, length]"""
    needles: dict[str, Needles | None]
    """By column; None where a question is longer than the context."""
    batch_size: int
    """Sequences per forward."""

    def measure(self, model: PreTrainedModel, *, chunk_tokens: int) -> dict[str, float | None]:
        """``LENGTH_COLUMNS`` of one model: LM loss in nats per token, and shares of values found, task by task."""
        quality = evaluate_model(model, self.sequences, batch_size=self.batch_size, chunk_tokens=chunk_tokens)
        measured: dict[str, float | None] = {"lm_loss": quality["lm_loss"]}
        for column, needles in self.needles.items():
            measured[column] = None
            if needles is not None:
                found = retrieval_accuracy(model, needles, batch_size=self.batch_size)
                measured[column] = found["accuracy_frac"]
        return measured


def measure_lengths(
    model: PreTrainedModel, probes: Mapping[int, LengthProbe], *, max_positions: int, chunk_tokens: int
) -> dict[str, dict[str, float | None]]:
    """Columns of one model by length, without values where a length is beyond its ``max_positions``."""
    return {
        str(length): probe.measure(model, chunk_tokens=chunk_tokens)
        if length <= max_positions
        else dict.fromkeys(LENGTH_COLUMNS)
        for length, probe in probes.items()
    }


def make_probe(
    dataset: TokenDataset, config: EvaluateConfig, *, length: int, seed: int, node: str = "evaluate"
) -> LengthProbe:
    """Sequences and needles of ``length`` tokens: as many tokens in all, and in a batch, as the main evaluation has.

    Tasks of several needles are left out where ``length`` is too short for their questions. ``node`` is the
    configuration node of the lengths, for errors.

    Raises:
        ValueError: the validation split is too short, or ``length`` is too short for a single needle.
    """
    sequences = dataset.split("validation").first(config.num_sequences_at(length), length)
    needles: dict[str, Needles | None] = {}
    for task in TASKS:
        fits = task == SINGLE or length > _most_question_tokens(dataset, task)
        needles[task.column] = (
            make_needles(dataset, length=length, num_needles=config.num_needles, seed=seed, task=task, node=node)
            if fits
            else None
        )
    return LengthProbe(
        sequences=sequences,
        needles=needles,
        batch_size=max(1, config.batch_size * config.seq_len // length),
    )


@torch.no_grad()
def retrieval_accuracy(model: PreTrainedModel, needles: Needles, *, batch_size: int) -> dict[str, float]:
    """Share of true values that the model gives a lower loss than every candidate that is not true.

    Returns ``accuracy_frac``, and the ``chance_frac`` of a model that cannot look back.
    """
    head = model.get_output_embeddings().weight
    num_questions, length = needles.input_ids.shape
    num_found = 0
    for start in tqdm(range(0, num_questions, batch_size), desc=f"retrieval {length}", unit="batch", leave=False):
        rows = slice(start, start + batch_size)
        hidden = model.model(needles.input_ids[rows].to(head.device), use_cache=False).last_hidden_state[:, -1]
        # Candidates alone, in fp32: bf16 logits of likely words are often equal.
        candidate_rows = head[needles.candidates[rows].to(head.device)].float()
        scores = torch.einsum("bh,bch->bc", hidden.float(), candidate_rows)
        true, others = scores[:, : needles.num_true], scores[:, needles.num_true :]
        # Strictly better: a model that gives every candidate the same score has found nothing.
        num_found += int((true > others.amax(dim=1, keepdim=True)).sum())
    return {"accuracy_frac": num_found / (num_questions * needles.num_true), "chance_frac": 1 / NUM_CANDIDATES}


def _key(rng: random.Random) -> str:
    return "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(4))


def _encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def _insert(text: list[int], needles: list[list[int]], depths: list[int]) -> list[int]:
    """``text`` with every needle before the token at its depth."""
    result: list[int] = []
    start = 0
    for depth, needle in sorted(zip(depths, needles, strict=True), key=lambda pair: pair[0]):
        result += [*text[start:depth], *needle]
        start = depth
    return [*result, *text[start:]]


def _most_question_tokens(dataset: TokenDataset, task: RetrievalTask) -> int:
    """Tokens that needles and cue take at most, however badly the tokenizer splits their keys: one per character."""
    tokenizer = load_tokenizer(dataset.directory)
    key_chars = len(_key(random.Random(0)))
    cue = len(_encode(tokenizer, _CUE.format(key=""))) + key_chars + 1
    return task.num_needles * (cue + 1 + len(_encode(tokenizer, _END))) + cue


def _word_tokens(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Ids of tokens that are words: those of four letters or more first, the earliest in the vocabulary first of all.

    Early means frequent, hence well trained. A vocabulary without so many words makes do with shorter ones.
    """
    special = set(tokenizer.all_special_ids)
    texts = {index: tokenizer.decode([index]) for index in sorted(set(tokenizer.get_vocab().values()) - special)}
    words = [index for index, text in texts.items() if text.isascii() and text.strip().isalnum()]
    # A leading space first: it makes natural text after the cue, and no pair of the same word with and without one.
    words.sort(key=lambda index: (-min(4, len(texts[index].strip())), not texts[index].startswith(" ")))
    num_needed = max(task.values_per_key for task in TASKS) + NUM_CANDIDATES - 1
    require(
        len(words) >= num_needed,
        f"retrieval needs {num_needed} tokens that are letters or words, the tokenizer in "
        f"{tokenizer.name_or_path} has {len(words)}; leave evaluate.lengths empty",
    )
    return words[:_NUM_WORDS]


def _stretch(split: TokenSplit, num_tokens: int, rng: random.Random, node: str) -> list[int]:
    """Token ids of a random stretch of ``num_tokens`` tokens."""
    require(
        num_tokens <= split.num_tokens,
        f"retrieval needs {num_tokens} tokens of {split.name} text in a row, the data has {split.num_tokens}; "
        f"raise data.{split.name}_tokens or lower {node}.lengths",
    )
    start = rng.randrange(split.num_tokens - num_tokens + 1)
    return [int(token) for token in split.tokens[start : start + num_tokens]]
