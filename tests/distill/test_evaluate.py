from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch.nn import functional
from transformers import LlamaForCausalLM

from distill.data.batch import Batch
from distill.data.dataset import documents_apart
from distill.evaluate import add_sums, equal_shares, evaluate_model, held_out_sums, means
from distill.teacher import Teacher

SEQUENCES = torch.randint(61, (5, 8), generator=torch.Generator().manual_seed(0))
MakeLlama = Callable[..., LlamaForCausalLM]


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_metrics_are_token_weighted_means(make_llama: MakeLlama, batch_size: int) -> None:
    model, teacher = make_llama(seed=0).eval(), make_llama(seed=0).eval()
    with torch.no_grad():  # near enough that the two agree on some tokens
        for parameter in teacher.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    metrics = evaluate_model(model, SEQUENCES, teacher=teacher, batch_size=batch_size, chunk_tokens=3)
    with torch.no_grad():
        log_q, log_p = (m(SEQUENCES).logits[:, :-1].flatten(0, 1).log_softmax(-1) for m in (model, teacher))
    expected = {
        "lm_loss": functional.nll_loss(log_q, SEQUENCES[:, 1:].flatten()).item(),
        "kld": functional.kl_div(log_q, log_p, log_target=True, reduction="batchmean").item(),
        "top1_agreement_frac": (log_q.argmax(-1) == log_p.argmax(-1)).double().mean().item(),
        "teacher_lm_loss": functional.nll_loss(log_p, SEQUENCES[:, 1:].flatten()).item(),
    }
    assert metrics == pytest.approx(expected, rel=1e-5)  # fp32 sums in another order
    assert 0 < metrics["top1_agreement_frac"] < 1


def test_a_model_agrees_with_itself(make_llama: MakeLlama) -> None:
    model = make_llama(seed=0)
    metrics = evaluate_model(model, SEQUENCES, teacher=model, batch_size=2, chunk_tokens=4)
    assert metrics["kld"] == pytest.approx(0, abs=1e-6)
    assert metrics["top1_agreement_frac"] == 1.0


def test_without_a_teacher_there_is_only_the_lm_loss(make_llama: MakeLlama) -> None:
    assert evaluate_model(make_llama(seed=0), SEQUENCES, batch_size=2, chunk_tokens=4).keys() == {"lm_loss"}


@pytest.mark.parametrize("training", [True, False])
def test_the_model_comes_back_in_the_mode_it_went_in(make_llama: MakeLlama, training: bool) -> None:
    model = make_llama(seed=0).train(training)
    evaluate_model(model, SEQUENCES, batch_size=2, chunk_tokens=4)
    assert model.training == training


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 7])
def test_equal_shares_add_up_to_the_whole(make_llama: MakeLlama, num_ranks: int) -> None:
    """Every rank gets as many sequences, and what fills the last ones up counts nothing."""
    model, teacher = make_llama(seed=0).eval(), make_llama(seed=1)
    shares = [equal_shares(SEQUENCES, rank=rank, num_ranks=num_ranks) for rank in range(num_ranks)]
    assert len({len(share) for share in shares}) == 1
    sums: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for share in shares:
            add_sums(sums, held_out_sums(model, share, teacher=Teacher(teacher), chunk_tokens=4))
    expected = evaluate_model(model, SEQUENCES, teacher=teacher, batch_size=5, chunk_tokens=64)
    assert means(sums) == pytest.approx(expected, rel=1e-5)  # fp32 sums in another order
    numbers = [number for share in shares for number in share.sequence_ids.tolist()]
    assert numbers[: len(SEQUENCES)] == list(range(len(SEQUENCES)))


def test_shares_of_a_batch_keep_its_documents_apart() -> None:
    eos = int(SEQUENCES[1, 2])
    batch = documents_apart(replace(Batch.of(SEQUENCES), sequence_ids=torch.arange(5) + 10), eos_token_id=eos)
    shares = [equal_shares(batch, rank=rank, num_ranks=3) for rank in range(3)]
    assert all(share.separate_documents for share in shares)
    for name in ("input_ids", "labels", "position_ids", "sequence_ids"):
        whole = torch.cat([getattr(share, name) for share in shares])
        assert torch.equal(whole[:5], getattr(batch, name))
    assert len(whole) == 6
    assert shares[2].sequence_ids.tolist() == [14, 10]
    assert (shares[2].labels[1] == -100).all()
    assert (batch.labels[0] != -100).any()


def test_positions_without_a_label_do_not_count(make_llama: MakeLlama) -> None:
    model = make_llama(seed=0).eval()
    batch = Batch.of(SEQUENCES)
    batch.labels[:, :4] = -100
    with torch.no_grad():
        metrics = means(held_out_sums(model, batch, teacher=None, chunk_tokens=4))
        log_q = model(SEQUENCES).logits[:, 4:-1].flatten(0, 1).log_softmax(-1)
    expected = functional.nll_loss(log_q, SEQUENCES[:, 5:].flatten()).item()
    assert metrics == pytest.approx({"lm_loss": expected}, rel=1e-5)  # fp32 sums in another order
