from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from distill.losses import IGNORE_INDEX, head_losses, hidden_cosine, normalized_mse, token_metrics

NUM_TOKENS, HIDDEN, TEACHER_HIDDEN, VOCAB = 13, 8, 6, 31


def _tensors(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    labels = torch.randint(VOCAB, (NUM_TOKENS,), generator=generator)
    labels[[2, 7]] = IGNORE_INDEX
    return {
        "student_hidden": normal(NUM_TOKENS, HIDDEN).requires_grad_(),
        "student_head": normal(VOCAB, HIDDEN).requires_grad_(),
        "teacher_hidden": normal(NUM_TOKENS, TEACHER_HIDDEN),
        "teacher_head": normal(VOCAB, TEACHER_HIDDEN),
        "labels": labels,
    }


def _plain_losses(tensors: dict[str, Tensor], temperature: float) -> tuple[Tensor, Tensor]:
    """KL and LM loss by the textbook formulas, in fp64, with whole logits."""
    logits = tensors["student_hidden"].double() @ tensors["student_head"].double().T
    teacher_logits = tensors["teacher_hidden"].double() @ tensors["teacher_head"].double().T
    kld = functional.kl_div(
        (logits / temperature).log_softmax(-1),
        (teacher_logits / temperature).softmax(-1),
        reduction="batchmean",
    )
    return kld * temperature**2, functional.cross_entropy(logits, tensors["labels"], ignore_index=IGNORE_INDEX)


def _gradients(loss: Tensor, tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, [tensors["student_hidden"], tensors["student_head"]])


@pytest.mark.parametrize("chunk_tokens", [1, 5, NUM_TOKENS, 100])
@pytest.mark.parametrize(
    ("kld_weight", "lm_weight", "temperature"), [(1.0, 0.0, 1.0), (0.0, 1.0, 1.0), (0.7, 0.4, 1.0), (0.7, 0.4, 2.5)]
)
def test_head_losses_and_gradients_equal_the_plain_formula(
    kld_weight: float, lm_weight: float, temperature: float, chunk_tokens: int
) -> None:
    tensors = _tensors()
    kld, lm_loss = _plain_losses(tensors, temperature)
    expected = kld_weight * kld + lm_weight * lm_loss

    loss, metrics = head_losses(
        **tensors, kld_weight=kld_weight, lm_weight=lm_weight, temperature=temperature, chunk_tokens=chunk_tokens
    )

    # fp64 throughout: only the order of sums differs.
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(metrics["kld"], kld.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(metrics["lm_loss"], lm_loss.detach(), rtol=1e-12, atol=1e-12)
    assert not any(value.requires_grad for value in metrics.values())
    for actual, reference in zip(_gradients(3 * loss, tensors), _gradients(3 * expected, tensors), strict=True):
        torch.testing.assert_close(actual, reference, rtol=1e-10, atol=1e-12)


def test_terms_that_are_not_asked_for_are_left_out() -> None:
    tensors = _tensors()
    student = {name: tensors[name] for name in ("student_hidden", "student_head")}
    _, lm_only = head_losses(**student, labels=tensors["labels"], kld_weight=0, lm_weight=1, chunk_tokens=4)
    teacher = {name: tensors[name] for name in ("teacher_hidden", "teacher_head")}
    _, kld_only = head_losses(**student, **teacher, kld_weight=1, lm_weight=0, chunk_tokens=4)
    assert lm_only.keys() == {"lm_loss"}
    assert kld_only.keys() == {"kld"}


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_head_losses_are_close_to_fp64(autocast: bool) -> None:
    reference = _tensors()
    kld, lm_loss = _plain_losses(reference, temperature=1.0)
    tensors = _tensors(torch.float32 if autocast else torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss, _ = head_losses(**tensors, kld_weight=1.0, lm_weight=1.0, chunk_tokens=4)
    assert loss.dtype == torch.float32
    # bf16 keeps 8 bits: hidden states, heads and logits are each rounded by up to 2^-9.
    torch.testing.assert_close(loss.double(), kld + lm_loss, rtol=2e-2, atol=0)
    for actual, exact, tensor in zip(
        _gradients(loss, tensors),
        _gradients(kld + lm_loss, reference),
        (tensors["student_hidden"], tensors["student_head"]),
        strict=True,
    ):
        assert actual.dtype == tensor.dtype
        assert functional.cosine_similarity(actual.double().flatten(), exact.flatten(), dim=0) > 0.999


def test_a_tied_head_gets_both_gradients() -> None:
    generator = torch.Generator().manual_seed(1)
    embedding = nn.Parameter(torch.randn(VOCAB, HIDDEN, generator=generator, dtype=torch.float64))
    labels = torch.arange(NUM_TOKENS) % VOCAB

    def gradient(loss_of: object) -> Tensor:
        hidden = functional.embedding(torch.arange(NUM_TOKENS) + 3, embedding).tanh()
        return torch.autograd.grad(loss_of(hidden), embedding)[0]  # type: ignore[operator]

    chunked = gradient(
        lambda hidden: head_losses(hidden, embedding, labels=labels, kld_weight=0, lm_weight=1, chunk_tokens=4)[0]
    )
    plain = gradient(lambda hidden: functional.cross_entropy(hidden @ embedding.T, labels))
    torch.testing.assert_close(chunked, plain, rtol=1e-10, atol=1e-12)


def test_logits_of_all_tokens_never_exist_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = _tensors()
    widest = 0
    log_softmax = Tensor.log_softmax

    def recording(self: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
        nonlocal widest
        widest = max(widest, self.shape[0])
        return log_softmax(self, dim, dtype=dtype)

    monkeypatch.setattr(Tensor, "log_softmax", recording)
    loss, _ = head_losses(**tensors, kld_weight=1.0, lm_weight=1.0, chunk_tokens=4)
    loss.backward()
    assert widest == 4


def test_token_metrics_are_those_of_whole_logits() -> None:
    tensors = {name: tensor.detach() for name, tensor in _tensors().items()}
    metrics = token_metrics(**tensors, chunk_tokens=5)
    logits = tensors["student_hidden"] @ tensors["student_head"].T
    teacher_logits = tensors["teacher_hidden"] @ tensors["teacher_head"].T
    kld, lm_loss = _plain_losses(tensors, temperature=1.0)
    assert {name: tuple(values.shape) for name, values in metrics.items()} == dict.fromkeys(
        ("lm_loss", "kld", "top1_agreement"), (NUM_TOKENS,)
    )
    # The metrics are fp32.
    torch.testing.assert_close(metrics["kld"].mean().double(), kld, rtol=1e-5, atol=0)
    labelled = tensors["labels"] != IGNORE_INDEX
    torch.testing.assert_close(metrics["lm_loss"][labelled].mean().double(), lm_loss, rtol=1e-5, atol=0)
    assert metrics["lm_loss"][~labelled].tolist() == [0.0, 0.0]
    assert metrics["top1_agreement"].tolist() == (logits.argmax(-1) == teacher_logits.argmax(-1)).float().tolist()


def test_token_metrics_without_a_teacher() -> None:
    tensors = _tensors()
    metrics = token_metrics(tensors["student_hidden"], tensors["student_head"], None, None, tensors["labels"], 5)
    assert metrics.keys() == {"lm_loss"}
    assert not metrics["lm_loss"].requires_grad


def test_normalized_mse_is_relative_to_a_zero_child() -> None:
    parent = torch.tensor([[1.0, -2.0], [3.0, 0.5]], dtype=torch.bfloat16)
    assert normalized_mse(torch.zeros_like(parent), parent) == 1.0
    assert normalized_mse(parent, parent) == 0.0
    assert normalized_mse(1.5 * parent, parent) == 0.25
    assert normalized_mse(parent, parent).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_cosine_equals_the_library_formula(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    student = torch.randn(2, 5, 16, generator=generator).to(dtype).requires_grad_()
    teacher = torch.randn(2, 5, 16, generator=generator).to(dtype)
    expected = (1 - functional.cosine_similarity(student.float(), teacher.float(), dim=-1)).mean()
    actual = hidden_cosine(student, teacher)
    torch.testing.assert_close(actual, expected)
    gradient, reference = (torch.autograd.grad(loss, student)[0] for loss in (actual, expected))
    torch.testing.assert_close(gradient, reference)


def test_hidden_cosine_ignores_scale() -> None:
    hidden = torch.randn(3, 7, generator=torch.Generator().manual_seed(3))
    # fp32: 1 - cos of equal directions is zero up to rounding of the two norms.
    assert hidden_cosine(2 * hidden, hidden).abs() < 1e-6
    torch.testing.assert_close(hidden_cosine(-hidden, hidden), torch.tensor(2.0))
