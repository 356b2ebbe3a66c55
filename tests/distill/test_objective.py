from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaForCausalLM

from distill.chunked_head import TopK
from distill.config import ObjectiveConfig
from distill.data.batch import IGNORE_INDEX, Batch
from distill.objective import Objective, Totals
from distill.teacher import CachedTeacher, Teacher

INPUT_IDS = torch.randint(61, (4, 9), generator=torch.Generator().manual_seed(0))
LAYER_MAP = (0, 2)
MakeLlama = Callable[..., LlamaForCausalLM]


@pytest.fixture
def student(make_llama: MakeLlama) -> LlamaForCausalLM:
    return make_llama(seed=1, num_blocks=2)


@pytest.fixture
def teacher(make_llama: MakeLlama) -> Teacher:
    return Teacher(make_llama(seed=2, num_blocks=3, tied=False))


@pytest.fixture
def batch() -> Batch:
    return Batch.of(INPUT_IDS)


class TopStore:
    """The whole distribution but one token, in place of files."""

    def __init__(self, teacher: Teacher) -> None:
        with torch.no_grad():
            self._log_p = teacher.model(INPUT_IDS).logits.log_softmax(-1)

    def signal(self, sequence_ids: Tensor, positions: slice, *, device: torch.device) -> TopK:
        log_p = self._log_p[sequence_ids, positions].to(device)
        token_ids, log_probs = reversed(log_p.topk(log_p.shape[-1] - 1))
        return TopK(token_ids=token_ids, log_probs=log_probs)


def _plain_terms(student: LlamaForCausalLM, teacher: Teacher) -> dict[str, Tensor]:
    """The terms from whole logits, as in the paper's equations."""
    outputs = student(INPUT_IDS, output_hidden_states=True)
    with torch.no_grad():
        targets = teacher.model(INPUT_IDS, output_hidden_states=True)
    log_q, log_p = (logits[:, :-1].flatten(0, 1).log_softmax(-1) for logits in (outputs.logits, targets.logits))
    pairs = [(outputs.hidden_states[i + 1], targets.hidden_states[j + 1]) for i, j in enumerate(LAYER_MAP)]
    cosines = [1 - functional.cosine_similarity(s, t, dim=-1).mean() for s, t in pairs]
    errors = [((s - t).square().sum(-1) / t.square().sum(-1)).mean() for s, t in pairs]
    return {
        "kld": functional.kl_div(log_q, log_p, log_target=True, reduction="batchmean"),
        "hidden_cosine": torch.stack(cosines).mean(),
        "hidden_mse": torch.stack(errors).mean(),
        "lm_loss": functional.nll_loss(log_q, INPUT_IDS[:, 1:].flatten()),
    }


def test_loss_is_the_weighted_sum_of_its_terms(student: LlamaForCausalLM, teacher: Teacher, batch: Batch) -> None:
    config = ObjectiveConfig(kld=0.5, hidden_cosine=2.0, hidden_mse=1.5, lm=0.25, chunk_tokens=5)
    loss, metrics = Objective(config=config, teacher=teacher, layer_map=LAYER_MAP)(student, batch)
    terms = _plain_terms(student, teacher)
    expected = 0.5 * terms["kld"] + 2 * terms["hidden_cosine"] + 1.5 * terms["hidden_mse"] + 0.25 * terms["lm_loss"]
    # fp32 sums in another order.
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    assert metrics.keys() == {"loss", *terms}
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
        ({"kld": 1.0, "divergence": "reverse"}, {"loss", "reverse_kld", "lm_loss"}),
        ({"kld": 1.0, "divergence": "jsd"}, {"loss", "jsd", "lm_loss"}),
        ({"hidden_cosine": 1.0}, {"loss", "hidden_cosine"}),
        ({"hidden_mse": 1.0}, {"loss", "hidden_mse"}),
        ({"hidden_cosine": 1.0, "lm": 1.0}, {"loss", "hidden_cosine", "lm_loss"}),
    ],
)
def test_terms_of_weight_zero_are_left_out(
    student: LlamaForCausalLM, teacher: Teacher, batch: Batch, weights: dict, names: set[str]
) -> None:
    loss, metrics = Objective(config=ObjectiveConfig(**weights), teacher=teacher, layer_map=LAYER_MAP)(student, batch)
    assert metrics.keys() == names
    loss.backward()
    assert all(p.grad is not None for p in student.model.layers.parameters())


def test_a_model_is_at_no_distance_from_itself(student: LlamaForCausalLM, batch: Batch) -> None:
    config = ObjectiveConfig(kld=1.0, hidden_cosine=1.0, hidden_mse=1.0)
    loss, _ = Objective(config=config, teacher=Teacher(student), layer_map=(0, 1))(student, batch)
    assert loss.abs() < 1e-6  # fp32 rounding of the cosine


def test_micro_batches_with_any_number_of_labels_add_up_to_the_step(
    student: LlamaForCausalLM, teacher: Teacher, batch: Batch
) -> None:
    batch.labels[0, 1:6] = IGNORE_INDEX
    batch.labels[3] = IGNORE_INDEX
    config = ObjectiveConfig(kld=1.0, hidden_cosine=1.0, hidden_mse=1.0, lm=1.0)
    objective = Objective(config=config, teacher=teacher, layer_map=LAYER_MAP)
    whole, whole_metrics = objective(student, batch)
    totals = Totals(num_positions=36, num_targets=torch.tensor(4 * 8 - 5 - 8))
    parts = [objective(student, part, totals) for part in batch.split(3)]
    # fp32 sums in another order.
    torch.testing.assert_close(sum(loss for loss, _ in parts), whole, rtol=1e-5, atol=1e-6)
    for name, value in whole_metrics.items():
        torch.testing.assert_close(sum(metrics[name] for _, metrics in parts), value, rtol=1e-5, atol=1e-6)


def test_positions_without_a_label_do_not_count_in_the_divergence(
    student: LlamaForCausalLM, teacher: Teacher, batch: Batch
) -> None:
    objective = Objective(config=ObjectiveConfig(kld=1.0), teacher=teacher)
    batch.labels[:, 4:] = IGNORE_INDEX
    masked, _ = objective(student, batch)
    short = Batch.of(INPUT_IDS[:, :5])
    torch.testing.assert_close(masked, objective(student, short)[0], rtol=1e-5, atol=1e-6)  # fp32, other shapes


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
def test_a_cache_of_nearly_everything_teaches_the_same(
    student: LlamaForCausalLM, teacher: Teacher, batch: Batch, divergence: str
) -> None:
    config = ObjectiveConfig(kld=1.0, lm=0.5, divergence=divergence)  # type: ignore[arg-type]
    online = Objective(config=config, teacher=teacher)(student, batch)
    cached = Objective(config=config, teacher=CachedTeacher(TopStore(teacher)))(student, batch)
    name = {"forward": "kld", "reverse": "reverse_kld", "jsd": "jsd"}[divergence]
    assert online[1].keys() == {"loss", name, "lm_loss"}
    assert cached[1].keys() == {"loss", f"{name}_top_k", "lm_loss"}
    parameters = list(student.parameters())
    actual, reference = (torch.autograd.grad(loss, parameters) for loss, _ in (cached, online))
    # The least likely token, which is the rest, counts for at least 1e-6.
    torch.testing.assert_close(cached[0], online[0], rtol=1e-4, atol=1e-5)
    for gradient, wanted in zip(actual, reference, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-4)


def test_lm_alone_never_runs_the_teacher(
    student: LlamaForCausalLM, teacher: Teacher, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher.model, "forward", lambda *_: pytest.fail("the teacher ran"))
    loss, _ = Objective(config=ObjectiveConfig(lm=1.0), teacher=teacher)(student, batch)
    assert loss > 0


@pytest.mark.parametrize("name", ["kld", "hidden_cosine", "hidden_mse"])
def test_a_missing_teacher_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}=1.0.* need a teacher"):
        Objective(config=ObjectiveConfig(**{name: 1.0}))


def test_a_cache_is_refused_what_it_does_not_hold(teacher: Teacher) -> None:
    cache = CachedTeacher(TopStore(teacher))
    with pytest.raises(ValueError, match="hidden states are not cached"):
        Objective(config=ObjectiveConfig(kld=1.0, hidden_mse=1.0), teacher=cache)
    with pytest.raises(ValueError, match=r"objective.temperature=2.0.* set it to 1"):
        Objective(config=ObjectiveConfig(kld=1.0, temperature=2.0), teacher=cache)


def test_the_paired_last_blocks_have_to_be_the_last(teacher: Teacher) -> None:
    with pytest.raises(AssertionError, match="the last student block is paired with 1, not 2"):
        Objective(config=ObjectiveConfig(hidden_mse=1.0), teacher=teacher, layer_map=(0, 1))
