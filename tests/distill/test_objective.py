from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaForCausalLM

from distill.config import ObjectiveConfig
from distill.objective import Objective, next_token_labels
from distill.teacher import Teacher

INPUT_IDS = torch.randint(61, (4, 9), generator=torch.Generator().manual_seed(0))
MakeLlama = Callable[..., LlamaForCausalLM]


@pytest.fixture
def student(make_llama: MakeLlama) -> LlamaForCausalLM:
    return make_llama(seed=1, num_blocks=2)


@pytest.fixture
def teacher(make_llama: MakeLlama) -> Teacher:
    return Teacher(make_llama(seed=2, num_blocks=3, tied=False))


def _plain_terms(student: LlamaForCausalLM, teacher: Teacher, layer_map: tuple[int, ...]) -> dict[str, Tensor]:
    """The three terms from whole logits, as in the paper's equations."""
    outputs = student(INPUT_IDS, output_hidden_states=True)
    with torch.no_grad():
        targets = teacher.model(INPUT_IDS, output_hidden_states=True)
    log_q, log_p = (logits[:, :-1].flatten(0, 1).log_softmax(-1) for logits in (outputs.logits, targets.logits))
    distances = [
        1 - functional.cosine_similarity(outputs.hidden_states[i + 1], targets.hidden_states[j + 1], dim=-1).mean()
        for i, j in enumerate(layer_map)
    ]
    return {
        "kld": functional.kl_div(log_q, log_p, log_target=True, reduction="batchmean"),
        "hidden_cosine": torch.stack(distances).mean(),
        "lm_loss": functional.nll_loss(log_q, next_token_labels(INPUT_IDS)),
    }


def test_loss_is_the_weighted_sum_of_its_terms(student: LlamaForCausalLM, teacher: Teacher) -> None:
    config = ObjectiveConfig(kld=0.5, hidden_cosine=2.0, lm=0.25, chunk_tokens=5)
    loss, metrics = Objective(config=config, teacher=teacher, layer_map=(0, 2))(student, INPUT_IDS)
    terms = _plain_terms(student, teacher, (0, 2))
    expected = 0.5 * terms["kld"] + 2.0 * terms["hidden_cosine"] + 0.25 * terms["lm_loss"]
    # fp32 sums in another order.
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for name, term in terms.items():
        torch.testing.assert_close(metrics[name], term.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(metrics["loss"], loss.detach())

    parameters = list(student.parameters())
    actual, reference = (torch.autograd.grad(value, parameters) for value in (loss, expected))
    for gradient, wanted in zip(actual, reference, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("weights", "names"),
    [
        ({"lm": 1.0}, {"loss", "lm_loss"}),
        ({"kld": 1.0}, {"loss", "kld", "lm_loss"}),
        ({"hidden_cosine": 1.0}, {"loss", "hidden_cosine"}),
    ],
)
def test_terms_of_weight_zero_are_left_out(
    student: LlamaForCausalLM, teacher: Teacher, weights: dict[str, float], names: set[str]
) -> None:
    loss, metrics = Objective(config=ObjectiveConfig(**weights), teacher=teacher, layer_map=(0, 2))(student, INPUT_IDS)
    assert metrics.keys() == names
    loss.backward()


def test_a_model_is_at_no_distance_from_itself(student: LlamaForCausalLM) -> None:
    objective = Objective(
        config=ObjectiveConfig(kld=1.0, hidden_cosine=1.0), teacher=Teacher(student), layer_map=(0, 1)
    )
    loss, _ = objective(student, INPUT_IDS)
    assert loss.abs() < 1e-6  # fp32 rounding of the cosine


def test_micro_batches_weighted_by_sequences_give_the_whole_loss(student: LlamaForCausalLM, teacher: Teacher) -> None:
    objective = Objective(config=ObjectiveConfig(kld=1.0, hidden_cosine=1.0, lm=1.0), teacher=teacher, layer_map=(0, 2))
    whole, _ = objective(student, INPUT_IDS)
    parts = sum(objective(student, part)[0] * len(part) / len(INPUT_IDS) for part in INPUT_IDS.split(3))
    torch.testing.assert_close(whole, parts, rtol=1e-5, atol=1e-6)


def test_lm_alone_never_runs_the_teacher(
    student: LlamaForCausalLM, teacher: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Teacher, "signal", lambda *_: pytest.fail("the teacher ran"))
    loss, _ = Objective(config=ObjectiveConfig(lm=1.0), teacher=teacher)(student, INPUT_IDS)
    assert loss > 0


def test_a_missing_teacher_is_refused() -> None:
    with pytest.raises(ValueError, match=r"objective.kld=1.0 .* need a teacher"):
        Objective(config=ObjectiveConfig(kld=1.0))
