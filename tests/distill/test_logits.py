from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from distill import logits
from distill.logits import Divergence, Kind

TOKENS, VOCAB = 6, 40
KINDS: tuple[Kind, ...] = ("forward", "reverse", "jsd")


def _arguments() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits of student and teacher, columns of labels and weights."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(TOKENS, VOCAB, generator=generator, dtype=torch.float64) for _ in range(2))
    columns = torch.tensor([3, -100, 0, 39, 40, 7])  # of one that is ignored, and of one in the next shard
    return student, teacher, columns, torch.rand(TOKENS, generator=generator, dtype=torch.float64)


def _whole(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` as one graph: any operation that torch cannot compile beside the others is an error."""
    return torch.compile(function.__wrapped__, backend="eager", fullgraph=True)  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch.compiler.reset()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("with_lm", [False, True])
def test_divergences_compile_to_one_graph(kind: Kind, with_lm: bool) -> None:
    student, teacher, columns, scale = _arguments()
    divergence = Divergence(kind=kind, beta=0.3, temperature=2.0)
    both = _whole(logits.normalizers)(student, (1.0, 2.0))
    torch.testing.assert_close(both, torch.stack((student.logsumexp(-1), (student / 2).logsumexp(-1))))
    log_z = (both[1], logits.normalizers(teacher, (2.0,))[0])
    slope = None if kind == "forward" else _whole(logits.mean_slope)(student, teacher, log_z, divergence)
    lm = (both[0], columns, scale) if with_lm else None
    arguments = (student, teacher, log_z, slope, scale, divergence, lm, torch.float64)
    value, gradient = _whole(logits.divergence_and_gradient)(*arguments)
    torch.testing.assert_close((value, gradient), logits.divergence_and_gradient(*arguments))
    torch.testing.assert_close(_whole(logits.divergence_value)(*arguments[:3], divergence), value)


def test_the_softmax_gradient_compiles_to_one_graph_and_has_no_label_elsewhere() -> None:
    student, _, columns, scale = _arguments()
    log_z = student.logsumexp(-1)
    gradient = _whole(logits.softmax_gradient)(student, log_z, columns, scale, 2 * scale, torch.float64)
    expected = student.softmax(-1) * scale[:, None]
    for row in (0, 2, 3, 5):
        expected[row, columns[row]] -= 2 * scale[row]
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_divergence_of_equal_distributions_is_zero_with_its_gradient(kind: Kind) -> None:
    log_p = _arguments()[0].log_softmax(-1)
    value, gradient = logits.whole_divergence(log_p, log_p, Divergence(kind=kind, beta=0.3))
    # fp64: logaddexp rounds.
    assert value.abs().max() < 1e-15
    assert gradient.abs().max() < 1e-15


@pytest.mark.parametrize("kind", KINDS)
def test_distributions_without_common_support_give_finite_numbers(kind: Kind) -> None:
    student, teacher = torch.full((2, 1, VOCAB), -200.0).unbind()
    student[0, 0], teacher[0, 1] = 200.0, 200.0
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    value, gradient = logits.whole_divergence(log_p, log_q, Divergence(kind=kind))
    expected = {"forward": 400.0, "reverse": 400.0, "jsd": torch.tensor(2.0).log().item()}[kind]
    assert value.item() == pytest.approx(expected, rel=1e-6)  # fp32
    assert gradient.isfinite().all()
