from __future__ import annotations

import pytest
import torch
from torch import nn

from distill.config import OptimConfig
from distill.optim import build_optimizer, init_optimizer_state, optimizer_tensors
from distill.schedule import learning_rate


def test_weight_decay_spares_norms_and_biases() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Embedding(8, 4))
    model[0].weight.requires_grad_(False)
    optimizer = build_optimizer(model, OptimConfig(lr=1e-3, weight_decay=0.1, beta1=0.8, beta2=0.9))
    decay = {name: group["weight_decay"] for group in optimizer.param_groups for name in group["param_names"]}
    assert decay == {"2.weight": 0.1, "0.bias": 0.0, "1.weight": 0.0, "1.bias": 0.0}
    assert optimizer.defaults["betas"] == (0.8, 0.9)
    assert optimizer.defaults["foreach"]


def test_tied_parameters_are_optimised_once() -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(8, 4), "head": nn.Linear(4, 8, bias=False)})
    model["head"].weight = model["embedding"].weight
    optimizer = build_optimizer(model, OptimConfig(lr=1e-3))
    assert [group["param_names"] for group in optimizer.param_groups] == [["embedding.weight"]]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_learning_rate_warms_up_and_decays(schedule: str) -> None:
    config = OptimConfig(lr=2e-3, min_lr_frac=0.1, warmup_frac=0.2, schedule=schedule)
    assert learning_rate(config, 0.05) == pytest.approx(0.5e-3)
    assert learning_rate(config, 0.2) == pytest.approx(2e-3)
    middle, end = {"cosine": (1.1e-3, 2e-4), "linear": (1.1e-3, 2e-4), "constant": (2e-3, 2e-3)}[schedule]
    assert learning_rate(config, 0.6) == pytest.approx(middle)
    assert learning_rate(config, 1.0) == pytest.approx(end)
    rates = [learning_rate(config, step / 50) for step in range(10, 51)]
    assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize(("warmup_frac", "at_start"), [(0.0, 1e-3), (1.0, 0.0)])
def test_learning_rate_with_extreme_warm_up(warmup_frac: float, at_start: float) -> None:
    config = OptimConfig(lr=1e-3, min_lr_frac=1.0, warmup_frac=warmup_frac)
    assert learning_rate(config, 0.0) == pytest.approx(at_start)
    assert learning_rate(config, 1.0) == pytest.approx(1e-3)


def test_zero_gradients_leave_zero_padding_at_zero() -> None:
    """Channels that pad an FFN to the format's width must stay exactly zero in training."""
    weight = nn.Parameter(torch.zeros(2, 2))
    model = nn.Module()
    model.weight = weight
    optimizer = build_optimizer(model, OptimConfig(lr=1.0, weight_decay=0.1))
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert torch.equal(weight, torch.zeros(2, 2))


@pytest.mark.parametrize("fused", [None, True])
def test_a_step_from_initialised_state_is_the_first_step(fused: bool | None) -> None:
    """State to load into is the state that AdamW starts from, in the same names and shapes."""
    results = []
    for initialise in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))
        optimizer = build_optimizer(model, OptimConfig(lr=1e-2, weight_decay=0.1), fused=fused)
        if initialise:
            init_optimizer_state(optimizer)
            assert all(not value.any() for value in optimizer_tensors(optimizer).values())
        model(torch.ones(2, 4)).square().sum().backward()
        optimizer.step()
        results.append({**optimizer_tensors(optimizer), **dict(model.named_parameters())})
    first, initialised = results
    assert first.keys() == initialised.keys()
    assert all(torch.equal(first[name], initialised[name]) for name in first)
