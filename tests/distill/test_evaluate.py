from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional
from transformers import LlamaForCausalLM

from distill.evaluate import evaluate_model

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
