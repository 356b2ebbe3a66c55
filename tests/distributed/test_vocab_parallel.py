"""Heads that are dealt over the ranks by vocabulary give the numbers of whole heads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed

from distill.chunked_head import TopK
from distill.data.batch import IGNORE_INDEX
from distill.distributed import join, leave, together
from distill.losses import head_losses, token_metrics
from tests.distributed.conftest import RunInProcesses

NUM_TOKENS, HIDDEN, VOCAB, TOP_K, NUM_RANKS = 13, 8, 32, 5, 2
OPTIONS: dict[str, dict[str, Any]] = {
    kind: {"divergence": kind, "jsd_beta": 0.3, "temperature": 2.0, "kld_weight": 0.7, "lm_weight": 0.4}
    for kind in ("forward", "reverse", "jsd")
} | {"lm": {"kld_weight": 0.0, "lm_weight": 1.0}}


def _tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    labels = torch.randint(VOCAB, (NUM_TOKENS,), generator=generator)
    labels[[2, 7]] = IGNORE_INDEX
    states, heads = (NUM_TOKENS, HIDDEN), (VOCAB, HIDDEN)
    return {
        "student_hidden": normal(*states),
        "student_head": normal(*heads),
        "teacher_hidden": normal(*states),
        "teacher_head": normal(*heads),
        "labels": labels,
    }


def _top(tensors: dict[str, Tensor]) -> TopK:
    top = (tensors["teacher_hidden"] @ tensors["teacher_head"].T).log_softmax(-1).topk(TOP_K)
    return TopK(token_ids=top.indices, log_probs=top.values)


def _train(tensors: dict[str, Tensor], group: Any, options: dict[str, Any], cached: bool) -> tuple[Any, ...]:
    """Loss, metrics and both gradients, with the heads in ``tensors``."""
    tensors = dict(tensors)
    trained = [tensors[name].requires_grad_() for name in ("student_hidden", "student_head")]
    if cached:
        tensors["teacher_top"] = tensors.pop("top")  # type: ignore[assignment]
    if cached or options["kld_weight"] == 0:
        del tensors["teacher_hidden"], tensors["teacher_head"]
    tensors.pop("top", None)
    if cached:
        options = options | {"temperature": 1.0}
    loss, metrics = head_losses(**tensors, **options, vocab_group=group, chunk_tokens=4)
    return loss.detach(), metrics, *torch.autograd.grad(loss, trained)


def _shard(tensors: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
    size = VOCAB // NUM_RANKS
    rows = slice(rank * size, (rank + 1) * size)
    return {name: tensor[rows].clone() if name.endswith("head") else tensor for name, tensor in tensors.items()}


def _on_rank(cases: list[tuple[str, bool]], directory: Path) -> None:
    join()
    with together():
        group = distributed.group.WORLD
        tensors = _shard(_tensors(), distributed.get_rank())
        top = _top(_tensors())
        results = [_train({**tensors, "top": top}, group, OPTIONS[name], cached) for name, cached in cases]
        running = token_metrics(**tensors, chunk_tokens=5, vocab_group=group)
        student = [tensors["student_hidden"], tensors["student_head"], None, None, tensors["labels"], 5]
        beside_cache = token_metrics(*student, teacher_top=top, vocab_group=group)
        torch.save((results, running, beside_cache), directory / f"{distributed.get_rank()}.pt")
    leave()


@pytest.fixture
def cases() -> list[tuple[str, bool]]:
    """Objective, and whether the teacher is cached."""
    return [(name, False) for name in OPTIONS] + [(name, True) for name in OPTIONS if name != "lm"]


def test_a_dealt_vocabulary_gives_the_losses_and_gradients_of_the_whole_one(
    run_in_processes: RunInProcesses, cases: list[tuple[str, bool]], tmp_path: Path
) -> None:
    run_in_processes(NUM_RANKS, _on_rank, cases, tmp_path)
    by_rank = [torch.load(tmp_path / f"{rank}.pt") for rank in range(NUM_RANKS)]
    whole, top = _tensors(), _top(_tensors())
    for index, (name, cached) in enumerate(cases):
        loss, metrics, grad_hidden, grad_head = _train({**whole, "top": top}, None, OPTIONS[name], cached)
        results = [results[index] for results, _, _ in by_rank]
        for rank_loss, rank_metrics, rank_grad_hidden, _ in results:
            # fp64: only the order of sums differs.
            torch.testing.assert_close(rank_loss, loss, rtol=1e-12, atol=0)
            torch.testing.assert_close(rank_metrics, metrics, rtol=1e-12, atol=1e-14)
            torch.testing.assert_close(rank_grad_hidden, grad_hidden, rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(torch.cat([result[3] for result in results]), grad_head, rtol=1e-10, atol=1e-13)

    running = token_metrics(**whole, chunk_tokens=5)
    student = [whole["student_hidden"], whole["student_head"], None, None, whole["labels"], 5]
    cached_metrics = token_metrics(*student, teacher_top=top)
    for _, rank_running, rank_cached in by_rank:
        # Metrics are rounded to fp32.
        torch.testing.assert_close(rank_running, running, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(rank_cached, cached_metrics, rtol=1e-6, atol=1e-7)
