from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from distill import chunked_head
from distill.chunked_head import TopK
from distill.data.batch import IGNORE_INDEX
from distill.logits import Kind
from distill.losses import head_losses, hidden_cosine, hidden_mse, normalized_mse, token_metrics

NUM_TOKENS, HIDDEN, TEACHER_HIDDEN, VOCAB, TOP_K = 13, 8, 6, 31, 5
KINDS: tuple[Kind, ...] = ("forward", "reverse", "jsd")
BETA = 0.3
Tensors = dict[str, Tensor]


def _tensors(dtype: torch.dtype = torch.float64) -> Tensors:
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


def _logits(tensors: Tensors, name: str) -> Tensor:
    return tensors[f"{name}_hidden"].double() @ tensors[f"{name}_head"].double().T


def _plain_divergence(log_p: Tensor, log_q: Tensor, kind: Kind) -> Tensor:
    """Divergence [tokens] by its definition."""

    def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
        return (log_a.exp() * (log_a - log_b)).sum(-1)

    if kind == "forward":
        return kl(log_p, log_q)
    if kind == "reverse":
        return kl(log_q, log_p)
    log_m = (BETA * log_p.exp() + (1 - BETA) * log_q.exp()).log()
    return BETA * kl(log_p, log_m) + (1 - BETA) * kl(log_q, log_m)


def _plain_losses(tensors: Tensors, temperature: float = 1.0, kind: Kind = "forward") -> tuple[Tensor, Tensor]:
    """Divergence with T^2 and LM loss from whole logits in fp64: means over the positions with a label."""
    student, teacher = _logits(tensors, "student"), _logits(tensors, "teacher")
    log_p, log_q = (teacher / temperature).log_softmax(-1), (student / temperature).log_softmax(-1)
    values = _plain_divergence(log_p, log_q, kind)[tensors["labels"] != IGNORE_INDEX]
    lm_loss = functional.cross_entropy(student, tensors["labels"], ignore_index=IGNORE_INDEX)
    return values.mean() * temperature**2, lm_loss


def _top(tensors: Tensors, k: int = TOP_K) -> TopK:
    top = _logits(tensors, "teacher").log_softmax(-1).topk(k)
    return TopK(token_ids=top.indices, log_probs=top.values)


def _student(tensors: Tensors) -> Tensors:
    return {name: tensors[name] for name in ("student_hidden", "student_head", "labels")}


def _gradients(loss: Tensor, tensors: Tensors) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, [tensors["student_hidden"], tensors["student_head"]])


@pytest.mark.parametrize("chunk_tokens", [0, 1, 5, NUM_TOKENS, 100])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("kld_weight", "lm_weight", "temperature"), [(1.0, 0.0, 1.0), (0.0, 1.0, 1.0), (0.7, 0.4, 1.0), (0.7, 0.4, 2.5)]
)
def test_head_losses_and_gradients_equal_the_plain_formula(
    kld_weight: float, lm_weight: float, temperature: float, kind: Kind, chunk_tokens: int
) -> None:
    tensors = _tensors()
    divergence, lm_loss = _plain_losses(tensors, temperature, kind)
    expected = kld_weight * divergence + lm_weight * lm_loss

    loss, metrics = head_losses(
        **tensors,
        kld_weight=kld_weight,
        lm_weight=lm_weight,
        divergence=kind,
        jsd_beta=BETA,
        temperature=temperature,
        chunk_tokens=chunk_tokens,
    )

    # fp64 throughout: only the order of sums differs.
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    name = {"forward": "kld", "reverse": "reverse_kld", "jsd": "jsd"}[kind]
    assert metrics.keys() == {name, "lm_loss"}
    torch.testing.assert_close(metrics[name], divergence.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(metrics["lm_loss"], lm_loss.detach(), rtol=1e-12, atol=1e-12)
    assert not any(value.requires_grad for value in metrics.values())
    for actual, reference in zip(_gradients(3 * loss, tensors), _gradients(3 * expected, tensors), strict=True):
        torch.testing.assert_close(actual, reference, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("lm_weight", [0.0, 0.4])
@pytest.mark.parametrize("kind", KINDS)
def test_a_cached_teacher_is_compared_on_its_tokens_and_the_rest(kind: Kind, lm_weight: float) -> None:
    tensors = _tensors()
    top = _top(tensors)
    token_ids, log_p = top.token_ids, top.log_probs
    # One label among the likeliest tokens, one in the rest: both ways to its gradient.
    tensors["labels"][0] = token_ids[0, 2]
    tensors["labels"][1] = (set(range(VOCAB)) - set(token_ids[1].tolist())).pop()
    log_q = _logits(tensors, "student").log_softmax(-1)
    kept = log_q.gather(1, token_ids)
    outcomes = (torch.cat((x, (1 - x.exp().sum(-1, keepdim=True)).log()), dim=-1) for x in (log_p, kept))
    values = _plain_divergence(*outcomes, kind)
    lm_loss = functional.nll_loss(log_q, tensors["labels"], ignore_index=IGNORE_INDEX)
    divergence = values[tensors["labels"] != IGNORE_INDEX].mean()
    expected = 0.7 * divergence + lm_weight * lm_loss

    loss, metrics = head_losses(
        **_student(tensors),
        teacher_top=top,
        kld_weight=0.7,
        lm_weight=lm_weight,
        divergence=kind,
        jsd_beta=BETA,
        chunk_tokens=4,
    )

    # fp64; the rest's mass comes from a difference in one and from a sum in the other.
    torch.testing.assert_close(loss, expected, rtol=1e-11, atol=1e-12)
    name = {"forward": "kld_top_k", "reverse": "reverse_kld_top_k", "jsd": "jsd_top_k"}[kind]
    assert metrics.keys() == {name, "lm_loss"}
    torch.testing.assert_close(metrics[name], divergence.detach(), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(metrics["lm_loss"], lm_loss.detach(), rtol=1e-11, atol=1e-12)
    for actual, reference in zip(_gradients(loss, tensors), _gradients(expected, tensors), strict=True):
        torch.testing.assert_close(actual, reference, rtol=1e-9, atol=1e-12)


def test_more_cached_tokens_come_closer_to_the_full_vocabulary_from_below() -> None:
    tensors = _tensors()
    full, _ = _plain_losses(tensors)
    cached = [
        head_losses(**_student(tensors), teacher_top=_top(tensors, k), kld_weight=1.0, lm_weight=0.0)[0].item()
        for k in (1, 4, 16, VOCAB - 1)
    ]
    assert cached == sorted(cached)
    # With one token left over the outcomes are the vocabulary's, but for the least mass of that token.
    assert math.isclose(cached[-1], full.item(), rel_tol=chunked_head.MIN_REST)


def test_a_cache_that_leaves_nothing_out_gives_finite_numbers() -> None:
    tensors = _tensors(torch.float32)
    token_ids = _top(tensors).token_ids
    # Rounded up by the cache: the tokens' mass is 1.0005.
    log_p = torch.full_like(token_ids, -20.0, dtype=torch.float32)
    log_p[:, 0] = math.log(1.0005)
    top = TopK(token_ids=token_ids, log_probs=log_p)
    for kind in KINDS:
        loss, _ = head_losses(**_student(tensors), teacher_top=top, kld_weight=1.0, lm_weight=0.0, divergence=kind)
        assert loss.isfinite()
        assert loss > 0
        assert all(gradient.isfinite().all() for gradient in _gradients(loss, tensors))


def test_terms_that_are_not_asked_for_are_left_out() -> None:
    tensors = _tensors()
    loss, lm_only = head_losses(**_student(tensors), kld_weight=0, lm_weight=1, chunk_tokens=4)
    assert lm_only.keys() == {"lm_loss"}
    torch.testing.assert_close(loss.detach(), lm_only["lm_loss"])


def test_micro_batches_add_up_to_the_step() -> None:
    tensors = _tensors()
    options = {"kld_weight": 0.7, "lm_weight": 0.4, "temperature": 2.0, "chunk_tokens": 4}
    whole, whole_metrics = head_losses(**tensors, **options)
    num_targets = (tensors["labels"] != IGNORE_INDEX).sum()
    heads = {name: tensors[name] for name in ("student_head", "teacher_head")}
    parts, gradients = [], []
    # The third part has no label at all.
    for rows in (slice(0, 2), slice(3, 7), slice(7, 8), slice(8, NUM_TOKENS), slice(2, 3)):
        part = {name: tensors[name][rows] for name in tensors.keys() - heads.keys()}
        parts.append(head_losses(**part, **heads, **options, num_targets=num_targets))
        gradients.append(_gradients(parts[-1][0], tensors))
    # fp64: only the order of sums differs.
    torch.testing.assert_close(sum(loss for loss, _ in parts), whole, rtol=1e-12, atol=0)
    for name, value in whole_metrics.items():
        torch.testing.assert_close(sum(metrics[name] for _, metrics in parts), value, rtol=1e-12, atol=0)
    for total, reference in zip(map(sum, zip(*gradients, strict=True)), _gradients(whole, tensors), strict=True):
        torch.testing.assert_close(total, reference, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("teacher", ["runs", "cached", "none"])
def test_no_label_means_no_loss_and_no_gradient(teacher: str) -> None:
    tensors = _tensors()
    tensors["labels"].fill_(IGNORE_INDEX)
    signals = {"runs": {name: tensors[name] for name in ("teacher_hidden", "teacher_head")}, "none": {}}
    signals["cached"] = {"teacher_top": _top(tensors)}  # type: ignore[dict-item]
    loss, _ = head_losses(
        **_student(tensors), **signals[teacher], kld_weight=float(teacher != "none"), lm_weight=1.0, chunk_tokens=4
    )
    assert loss == 0
    assert all(gradient.count_nonzero() == 0 for gradient in _gradients(loss, tensors))


@pytest.mark.parametrize("teacher", ["runs", "cached", "none"])
def test_no_tokens_mean_no_loss_and_no_gradient(teacher: str) -> None:
    tensors = _tensors()
    empty = {name: tensor if name.endswith("head") else tensor[:0] for name, tensor in tensors.items()}
    signals = {"runs": {name: empty[name] for name in ("teacher_hidden", "teacher_head")}, "none": {}}
    signals["cached"] = {"teacher_top": _top(tensors).map(lambda tensor: tensor[:0])}  # type: ignore[dict-item]
    loss, metrics = head_losses(
        **_student(empty), **signals[teacher], kld_weight=float(teacher != "none"), lm_weight=1.0
    )
    assert loss == 0
    assert all(value == 0 for value in metrics.values())
    grad_hidden, grad_head = _gradients(loss, empty)
    assert grad_hidden.shape == (0, HIDDEN)
    assert grad_head.count_nonzero() == 0
    found = token_metrics(**_student(empty), **{"teacher_hidden": None, "teacher_head": None, **signals[teacher]})
    names = {"runs": {"kld", "top1_agreement", "teacher_lm_loss"}, "cached": {"kld_top_k", "top1_agreement"}}
    assert found.keys() == {"lm_loss"} | names.get(teacher, set())
    assert all(len(values) == 0 for values in found.values())


def test_a_frozen_head_gets_no_gradient_and_the_hidden_states_the_same() -> None:
    tensors = _tensors()
    options = {"kld_weight": 0.7, "lm_weight": 0.4, "chunk_tokens": 4}
    expected, _ = _gradients(head_losses(**tensors, **options)[0], tensors)
    tensors["student_head"].requires_grad_(False)
    loss, _ = head_losses(**tensors, **options)
    torch.testing.assert_close(torch.autograd.grad(loss, tensors["student_hidden"])[0], expected, rtol=0, atol=0)
    with torch.no_grad():
        without_gradient, _ = head_losses(**tensors, **options)
    torch.testing.assert_close(without_gradient, loss.detach(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_bf16_head_losses_are_close_to_fp64(kind: Kind, autocast: bool) -> None:
    reference = _tensors()
    divergence, lm_loss = _plain_losses(reference, kind=kind)
    tensors = _tensors(torch.float32 if autocast else torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss, _ = head_losses(**tensors, kld_weight=1.0, lm_weight=1.0, divergence=kind, jsd_beta=BETA, chunk_tokens=4)
    assert loss.dtype == torch.float32
    # bf16 keeps 8 bits: hidden states, heads and logits are each rounded by up to 2^-9.
    torch.testing.assert_close(loss.double(), divergence + lm_loss, rtol=2e-2, atol=0)
    for actual, exact, tensor in zip(
        _gradients(loss, tensors),
        _gradients(divergence + lm_loss, reference),
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


def test_a_second_backward_is_refused() -> None:
    loss, _ = head_losses(**_tensors(), kld_weight=1.0, lm_weight=1.0)
    loss.backward(retain_graph=True)
    with pytest.raises(AssertionError, match="backward of head_losses runs once"):
        loss.backward()


class _LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """Elements of the largest tensor that an operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(
        self, function: object, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        result = function(*args, **(kwargs or {}))  # type: ignore[operator]
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk_tokens", [0, 16])
def test_logits_of_all_tokens_never_exist_at_once(
    kind: Kind, chunk_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocab, hidden, num_tokens = 512, 4, 64
    # Left to itself, a chunk is as large as CHUNK_BYTES allow: 16 tokens of fp32 logits too.
    monkeypatch.setitem(chunked_head.CHUNK_BYTES, "cpu", 16 * vocab * 4)
    generator = torch.Generator().manual_seed(4)
    states, teacher = (torch.randn(num_tokens, hidden, generator=generator) for _ in range(2))
    head, teacher_head = (torch.randn(vocab, hidden, generator=generator) for _ in range(2))
    with _LargestTensor() as largest:
        loss, _ = head_losses(
            states.requires_grad_(),
            head.requires_grad_(),
            labels=torch.arange(num_tokens),
            teacher_hidden=teacher,
            teacher_head=teacher_head,
            kld_weight=1.0,
            lm_weight=1.0,
            divergence=kind,
            temperature=2.0,
            chunk_tokens=chunk_tokens,
        )
        loss.backward()
    assert largest.elements == 16 * vocab


def test_token_metrics_are_those_of_whole_logits() -> None:
    tensors = {name: tensor.detach() for name, tensor in _tensors().items()}
    metrics = token_metrics(**tensors, chunk_tokens=5)
    student, teacher = _logits(tensors, "student"), _logits(tensors, "teacher")
    labelled = tensors["labels"] != IGNORE_INDEX
    expected = {
        "kld": _plain_divergence(teacher.log_softmax(-1), student.log_softmax(-1), "forward"),
        "lm_loss": functional.cross_entropy(student, tensors["labels"], reduction="none"),
        "teacher_lm_loss": functional.cross_entropy(teacher, tensors["labels"], reduction="none"),
        "top1_agreement": (student.argmax(-1) == teacher.argmax(-1)).double(),
    }
    assert metrics.keys() == expected.keys()
    for name, values in expected.items():
        # The metrics are fp32.
        torch.testing.assert_close(metrics[name].double(), values * labelled, rtol=1e-5, atol=1e-7)


def test_token_metrics_beside_a_cached_teacher() -> None:
    tensors = {name: tensor.detach() for name, tensor in _tensors().items()}
    full = token_metrics(**tensors, chunk_tokens=5)
    student = (tensors["student_hidden"], tensors["student_head"], None, None, tensors["labels"], 5)
    cached = token_metrics(*student, teacher_top=_top(tensors, VOCAB - 1))
    assert cached.keys() == {"lm_loss", "kld_top_k", "top1_agreement"}
    for name, values in cached.items():
        torch.testing.assert_close(
            values, full[name.removesuffix("_top_k")], rtol=1e-5, atol=1e-7
        )  # fp32, summed in another order


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


def _hidden_pair(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    student, teacher = (torch.randn(2, 5, 16, generator=generator).to(dtype) for _ in range(2))
    return student.requires_grad_(), teacher


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_hidden_distances_equal_the_library_formulas(dtype: torch.dtype) -> None:
    student, teacher = _hidden_pair(dtype)
    high = (student.double(), teacher.double())
    pairs = (
        (hidden_cosine(student, teacher), (1 - functional.cosine_similarity(*high, dim=-1)).mean()),
        (hidden_mse(student, teacher), ((high[0] - high[1]).norm(dim=-1) / high[1].norm(dim=-1)).square().mean()),
    )
    # The gradient is rounded to the data type of the hidden states, of 53, 24 and 8 bits; the value is at least fp32.
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    for actual, expected in pairs:
        torch.testing.assert_close(actual.double(), expected, rtol=max(1e-12, min(tolerance, 1e-5)), atol=0)
        gradient, reference = (
            torch.autograd.grad(2 * loss, student, retain_graph=True)[0] for loss in (actual, expected)
        )
        assert gradient.dtype == dtype
        torch.testing.assert_close(gradient, reference, rtol=tolerance, atol=tolerance / 10)


@pytest.mark.parametrize("distance", [hidden_cosine, hidden_mse])
def test_hidden_distances_of_parts_add_up_to_the_step(distance: Callable[..., Tensor]) -> None:
    student, teacher = _hidden_pair(torch.float64)
    teacher[:, 0] *= 100  # as the first tokens of trained models have it
    parts = sum(distance(student[:, s], teacher[:, s], 10) for s in (slice(0, 2), slice(2, 5)))
    whole = distance(student, teacher)
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(loss, student)[0] for loss in (parts, whole)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=0)


def test_hidden_mse_of_a_zero_target_counts_nothing() -> None:
    student, teacher = torch.ones(2, 4, requires_grad=True), torch.ones(2, 4)
    teacher[1] = 0
    loss = hidden_mse(student + 1, teacher)
    loss.backward()
    assert loss == 0.5  # |2 - 1|^2 / |1|^2 of one of two positions
    assert student.grad is not None
    assert torch.equal(student.grad, torch.tensor([[0.25], [0.0]]).expand(2, 4))


def test_hidden_cosine_ignores_scale() -> None:
    hidden = torch.randn(3, 7, generator=torch.Generator().manual_seed(3))
    # fp32: 1 - cos of equal directions is zero up to rounding of the two norms.
    assert hidden_cosine(2 * hidden, hidden).abs() < 1e-6
    torch.testing.assert_close(hidden_cosine(-hidden, hidden), torch.tensor(2.0))


def test_hidden_cosine_of_a_zero_state_is_one_without_gradient() -> None:
    student = torch.zeros(2, 4, requires_grad=True)
    loss = hidden_cosine(student, torch.ones(2, 4))
    loss.backward()
    assert loss == 1
    assert student.grad is not None
    assert student.grad.count_nonzero() == 0


@pytest.mark.gpu
@pytest.mark.parametrize("distance", [hidden_cosine, hidden_mse])
def test_compiled_on_a_gpu_hidden_distances_are_those_of_fp64(distance: Callable[[Tensor, Tensor], Tensor]) -> None:
    student, teacher = _hidden_pair(torch.bfloat16)
    loss = distance(student.cuda(), teacher.cuda())
    expected = distance(student.double(), teacher.double())
    torch.testing.assert_close(loss.cpu().double(), expected, rtol=1e-5, atol=0)  # sums in fp32
    actual, reference = (torch.autograd.grad(value, student)[0] for value in (loss, expected))
    torch.testing.assert_close(actual, reference, rtol=1e-2, atol=1e-3)  # bf16 gradients


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "teacher"), [*product(KINDS, ("runs", "cached")), ("forward", "none")])
def test_compiled_on_a_gpu_the_numbers_are_those_of_fp64(kind: Kind, teacher: str) -> None:
    generator = torch.Generator().manual_seed(5)
    states, teacher_states = (torch.randn(96, 64, generator=generator, dtype=torch.float64) for _ in range(2))
    heads = [torch.randn(1000, 64, generator=generator, dtype=torch.float64) / 4 for _ in range(2)]
    labels = torch.randint(1000, (96,), generator=generator)
    labels[::7] = IGNORE_INDEX

    def run(device: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
        # Both start from the same bf16 numbers.
        hidden, head, other, other_head = (
            x.bfloat16().to(device, dtype) for x in (states, heads[0], teacher_states, heads[1])
        )
        signals = {"runs": {"teacher_hidden": other, "teacher_head": other_head}, "none": {}}
        top = (other.double() @ other_head.double().T).log_softmax(-1).topk(8)
        signals["cached"] = {"teacher_top": TopK(token_ids=top.indices, log_probs=top.values.float())}
        loss, _ = head_losses(
            hidden.requires_grad_(),
            head.requires_grad_(),
            labels=labels.to(device),
            **signals[teacher],
            kld_weight=float(teacher != "none"),
            lm_weight=0.5,
            divergence=kind,
            temperature=2.0 if teacher == "runs" else 1.0,
            chunk_tokens=32,
        )
        return loss, *torch.autograd.grad(loss, (hidden, head))

    loss, *gradients = run("cuda", torch.bfloat16)
    expected, *references = run("cpu", torch.float64)
    torch.testing.assert_close(loss.cpu().double(), expected, rtol=1e-2, atol=0)  # logits are rounded to bf16
    for actual, reference in zip(gradients, references, strict=True):
        assert functional.cosine_similarity(actual.cpu().double().flatten(), reference.flatten(), dim=0) > 0.999
