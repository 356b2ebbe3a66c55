from __future__ import annotations

import copy
from collections import Counter
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from distill.memory import tile_ffns
from puzzle.model.architecture import Architecture
from puzzle.model.checkpoint import build_model
from puzzle.model.modeling_decilm import DeciLMForCausalLM

NUM_TOKENS = 4096
TILES = 256


@pytest.fixture
def model(pico_architecture: Architecture) -> DeciLMForCausalLM:
    """All values can be written in bf16, so that its rounding is that of the products and sums alone."""
    return build_model(pico_architecture, seed=0).to(torch.bfloat16).float()


def ffn_gradients(
    model: DeciLMForCausalLM,
    dtype: torch.dtype,
    *,
    tile: int = 0,
    autocast: bool = False,
    compile: bool = False,
    device: str = "cpu",
) -> dict[str, Tensor]:
    """Gradients of the first FFN and its norm on ``NUM_TOKENS`` random tokens, by name, on the CPU."""
    model = copy.deepcopy(model).to(device, dtype)
    block = model.model.layers[0]
    if tile:
        tile_ffns(model, tile, compile=compile)
    generator = torch.Generator().manual_seed(1)
    hidden, weight = (
        torch.randn(1, NUM_TOKENS, model.config.hidden_size, generator=generator).bfloat16().to(device, dtype)
        for _ in range(2)
    )
    with torch.autocast(device, dtype=torch.bfloat16, enabled=autocast):
        output = block.mlp(hidden) + block.post_attention_layernorm(hidden)
    (output.double() * weight.double()).sum().backward()
    return {name: p.grad.cpu() for name, p in block.named_parameters() if p.grad is not None}


def errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    assert found.keys() == expected.keys()
    return {name: float((g - expected[name]).norm() / expected[name].norm()) for name, g in found.items()}


@pytest.mark.parametrize(
    ("dtype", "autocast"), [(torch.bfloat16, False), (torch.float32, True)], ids=["bf16 weights", "autocast"]
)
def test_many_tiles_in_bf16_are_as_exact_as_one(model: DeciLMForCausalLM, dtype: torch.dtype, autocast: bool) -> None:
    exact = ffn_gradients(model, torch.float64)
    whole = errors(ffn_gradients(model, dtype, autocast=autocast), exact)
    tiled = ffn_gradients(model, dtype, autocast=autocast, tile=NUM_TOKENS // TILES)
    assert all(gradient.dtype == dtype for gradient in tiled.values())
    for name, error in errors(tiled, exact).items():
        # Sums in bf16 would have five times the error of one tile.
        assert error < 1.25 * whole[name], name


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize(
    ("dtype", "autocast"), [(torch.bfloat16, False), (torch.float32, True)], ids=["bf16 weights", "autocast"]
)
def test_many_tiles_on_a_gpu_are_as_exact_as_one(
    model: DeciLMForCausalLM, dtype: torch.dtype, autocast: bool, compile: bool
) -> None:
    exact = ffn_gradients(model, torch.float64)
    whole = errors(ffn_gradients(model, dtype, autocast=autocast, device="cuda"), exact)
    tiled = ffn_gradients(model, dtype, autocast=autocast, tile=NUM_TOKENS // TILES, compile=compile, device="cuda")
    for name, error in errors(tiled, exact).items():
        # The gradient of the norm alone is exact to the rounding of fp32, in whatever order a kernel adds.
        assert error < max(1.25 * whole[name], 4 * torch.finfo(torch.float32).eps), name


def test_a_weight_has_one_gradient_per_backward_pass(model: DeciLMForCausalLM) -> None:
    """As hooks see it, those of data parallelism among them; a second backward pass starts a sum of its own."""
    expected = ffn_gradients(model, torch.float32, tile=64)
    tile_ffns(model, 64)
    block, seen, accumulated = model.model.layers[0], Counter[str](), Counter[str]()

    def count(counter: Counter[str], name: str, _: Tensor) -> None:
        counter[name] += 1

    for name, parameter in block.mlp.named_parameters(prefix="mlp"):
        parameter.register_hook(partial(count, seen, name))
        parameter.register_post_accumulate_grad_hook(partial(count, accumulated, name))
    generator = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(1, NUM_TOKENS, 64, generator=generator).bfloat16().float() for _ in range(2))
    loss = (block.mlp(hidden) * weight).sum()
    for passes in (1, 2):
        loss.backward(retain_graph=True)
        assert set(seen.values()) == set(accumulated.values()) == {passes}
        for name, parameter in block.mlp.named_parameters(prefix="mlp"):
            # Twice the same is exact.
            torch.testing.assert_close(parameter.grad, passes * expected[name], rtol=1e-5, atol=1e-4)


def test_parameters_are_found_in_their_place_between_tiles(model: DeciLMForCausalLM) -> None:
    tile_ffns(model, 64)
    mlp = model.model.layers[0].mlp
    weight = mlp.gate_proj.weight
    mlp(torch.randn(1, 256, 64)).sum().backward()
    assert mlp.gate_proj.weight is weight
    assert not mlp.gate_proj._forward_pre_hooks
    with pytest.raises(RuntimeError, match="shape"):
        mlp(torch.randn(1, 256, 32))
    assert mlp.gate_proj.weight is weight
    assert not mlp.gate_proj._forward_pre_hooks


def test_frozen_weights_and_inputs_alone(model: DeciLMForCausalLM) -> None:
    mlp = model.model.layers[0].mlp.requires_grad_(False)
    hidden = torch.randn(1, 256, 64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    (expected,) = torch.autograd.grad(mlp(hidden).square().sum(), [hidden])
    tile_ffns(model, 64)
    (found,) = torch.autograd.grad(mlp(hidden).square().sum(), [hidden])
    torch.testing.assert_close(found, expected)
    mlp.requires_grad_()
    (found,) = torch.autograd.grad(mlp(hidden).square().sum(), [hidden])
    torch.testing.assert_close(found, expected)


def test_modules_of_one_tile_are_left_alone(model: DeciLMForCausalLM) -> None:
    mlp: nn.Module = model.model.layers[0].mlp
    hidden = torch.randn(1, 64, 64, generator=torch.Generator().manual_seed(1))
    expected = mlp(hidden)
    tile_ffns(model, 64)
    assert torch.equal(mlp(hidden), expected)
