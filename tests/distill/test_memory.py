from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distill import memory
from distill.config import RopeConfig
from distill.engine.student_step import recompute_blocks
from distill.memory import PIECE_BYTES, HostBuffers, offload_block_inputs, tile_ffns
from puzzle.model.architecture import Architecture, dense_blocks
from puzzle.model.checkpoint import build_model
from puzzle.model.modeling_decilm import DeciLMForCausalLM

SEQ = 48
# fp32 sums of up to 96 tokens, in tiles and in one product: relative to the largest entry.
TOLERANCE = 2e-6

Change = Callable[[DeciLMForCausalLM], object]


def tile(model: DeciLMForCausalLM) -> None:
    tile_ffns(model, 20)


def offload(model: DeciLMForCausalLM) -> HostBuffers:
    recompute_blocks(model)
    return offload_block_inputs(model)


def everything(model: DeciLMForCausalLM) -> HostBuffers:
    tile_ffns(model, 20)
    return offload(model)


def loss_and_gradients(model: nn.Module, input_ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.train()
    hidden = model.model(input_ids, use_cache=False).last_hidden_state
    loss = nn.functional.cross_entropy(
        model.lm_head(hidden[:, :-1]).flatten(0, 1), input_ids[:, 1:].flatten(), reduction="sum"
    )
    loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    return loss.detach(), gradients


def input_ids(architecture: Architecture, seq: int = SEQ) -> Tensor:
    return torch.randint(architecture.vocab_size, (2, seq), generator=torch.Generator().manual_seed(1))


def assert_close(gradients: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        worst = (gradient - expected[name]).abs().max() / expected[name].abs().max()
        assert worst < TOLERANCE, f"{name}: {worst}"


@pytest.mark.parametrize("change", [recompute_blocks, offload])
def test_gradients_of_kept_inputs_are_the_same_bits(heterogeneous_architecture: Architecture, change: Change) -> None:
    tokens = input_ids(heterogeneous_architecture)
    loss, expected = loss_and_gradients(build_model(heterogeneous_architecture, seed=0), tokens)
    changed = build_model(heterogeneous_architecture, seed=0)
    change(changed)
    for _ in range(2):
        again, gradients = loss_and_gradients(changed, tokens)
        assert torch.equal(again, loss)
        assert all(torch.equal(gradients[name], expected[name]) for name in expected)


@pytest.mark.parametrize("change", [tile, everything])
def test_tiles_give_the_same_loss_and_gradients(heterogeneous_architecture: Architecture, change: Change) -> None:
    tokens = input_ids(heterogeneous_architecture)
    loss, expected = loss_and_gradients(build_model(heterogeneous_architecture, seed=0), tokens)
    changed = build_model(heterogeneous_architecture, seed=0)
    names = list(dict(changed.named_parameters()))
    change(changed)
    assert list(dict(changed.named_parameters())) == names
    tiled_loss, gradients = loss_and_gradients(changed, tokens)
    torch.testing.assert_close(tiled_loss, loss, rtol=TOLERANCE, atol=0)
    assert_close(gradients, expected)


def test_a_stock_model_can_be_changed_too(make_llama: Callable[..., nn.Module]) -> None:
    tokens = torch.randint(61, (2, 24), generator=torch.Generator().manual_seed(0))
    loss, expected = loss_and_gradients(make_llama(seed=0, tied=False), tokens)
    changed = make_llama(seed=0, tied=False)
    everything(changed)
    tiled_loss, gradients = loss_and_gradients(changed, tokens)
    torch.testing.assert_close(tiled_loss, loss, rtol=TOLERANCE, atol=0)
    assert_close(gradients, expected)


def test_narrow_ffns_take_more_tokens_at_once(heterogeneous_architecture: Architecture) -> None:
    """Widths 512 and 256 in tiles of 20 and 40 of 96 tokens: five of 20 at most, three of 32; norms (64) see all."""
    model = build_model(heterogeneous_architecture, seed=0)
    seen: dict[str, list[int]] = {}
    for index, block in enumerate(model.model.layers):
        for name, child in block.named_children():
            seen[f"{index}.{name}"] = record_tokens(child)
    tile_ffns(model, 20)
    with torch.no_grad():
        model.model(input_ids(heterogeneous_architecture), use_cache=False)
    assert seen["0.mlp"] == [20, 20, 20, 20, 16]
    assert seen["1.mlp"] == [32, 32, 32]
    assert seen["2.mlp"] == [20, 20, 20, 20, 16]
    assert seen["3.mlp"] == [96]  # one matrix in place of an FFN
    assert seen["0.input_layernorm"] == [96]  # 20 * 512 / 64 = 160 tokens would fit


def record_tokens(module: nn.Module) -> list[int]:
    tokens: list[int] = []
    run = module.forward

    def forward(hidden: Tensor, *rest: object) -> Tensor:
        tokens.append(hidden[..., 0].numel())
        return run(hidden, *rest)

    module.forward = forward
    return tokens


def saved_bytes(model: nn.Module, tokens: Tensor) -> int:
    """Of activations that the graph holds on to between forward and backward."""
    parameters = {parameter.data_ptr() for parameter in model.parameters()}
    held: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point() and tensor.data_ptr() not in parameters:
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = model.model(tokens, use_cache=False).last_hidden_state
    del output
    return sum(held.values())


def test_tiles_and_recomputation_keep_what_they_say(pico_architecture: Architecture) -> None:
    tokens = input_ids(pico_architecture, seq=128)
    hidden_bytes = tokens.numel() * pico_architecture.hidden_dim * 4
    plain = saved_bytes(build_model(pico_architecture, seed=0), tokens)
    recomputed = build_model(pico_architecture, seed=0)
    recompute_blocks(recomputed)
    # Four block inputs, and what the final norm keeps: its input, the scaled input and one number per token.
    assert saved_bytes(recomputed, tokens) <= 7 * hidden_bytes
    assert plain > 100 * hidden_bytes
    tiled = build_model(pico_architecture, seed=0)
    tile_ffns(tiled, 64)
    # An FFN here is eight times as wide as the hidden state, and kept its gate, its SiLU, its up and their product.
    ffn_bytes = pico_architecture.num_blocks * 8 * hidden_bytes
    assert saved_bytes(tiled, tokens) < plain - 3 * ffn_bytes


def test_host_memory_is_one_set_of_pieces_for_all_steps(
    pico_architecture: Architecture, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = input_ids(pico_architecture)
    hidden_bytes = tokens.numel() * pico_architecture.hidden_dim * 4
    monkeypatch.setattr(memory, "PIECE_BYTES", 1000)
    model = build_model(pico_architecture, seed=0)
    buffers = offload(model)
    assert buffers.allocated_bytes == 0
    expected = loss_and_gradients(model, tokens)[1]
    per_input = -(-hidden_bytes // 1000) * 1000
    assert buffers.allocated_bytes == pico_architecture.num_blocks * per_input
    assert_close(loss_and_gradients(model, tokens)[1], expected)
    with torch.no_grad():
        model.model(tokens, use_cache=False)
    assert buffers.allocated_bytes == pico_architecture.num_blocks * per_input


def test_a_graph_that_is_dropped_frees_its_pieces(pico_architecture: Architecture) -> None:
    tokens = input_ids(pico_architecture)
    model = build_model(pico_architecture, seed=0)
    buffers = offload(model)
    loss = model.model(tokens, use_cache=False).last_hidden_state.sum()
    del loss
    gc.collect()
    loss_and_gradients(model, tokens)
    assert buffers.allocated_bytes == pico_architecture.num_blocks * PIECE_BYTES


def test_backward_may_run_twice(pico_architecture: Architecture) -> None:
    tokens = input_ids(pico_architecture)
    model = build_model(pico_architecture, seed=0)
    offload(model)
    loss = model.model(tokens, use_cache=False).last_hidden_state.square().mean()
    parameters = list(model.model.parameters())
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    second = torch.autograd.grad(loss, parameters)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


class KeepsAnEmptyTensor(torch.autograd.Function):
    """As checkpoints of some versions of torch do, beside their inputs."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor) -> Tensor:
        ctx.save_for_backward(torch.empty(0))
        return hidden.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (empty,) = ctx.saved_tensors
        return gradient + empty.numel()


def test_an_empty_tensor_stays_where_it_is() -> None:
    buffers, hidden = HostBuffers(), torch.randn(2, 3, requires_grad=True)
    memory._offloaded(KeepsAnEmptyTensor.apply, buffers, hidden).sum().backward()
    assert torch.equal(hidden.grad, torch.ones(2, 3))
    assert buffers.allocated_bytes == 0


def test_offloading_without_recomputation_is_an_error(pico_architecture: Architecture) -> None:
    with pytest.raises(AssertionError, match="recomputation comes first"):
        offload_block_inputs(build_model(pico_architecture, seed=0))


def test_compiled_blocks_and_tiles_give_the_same_gradients(
    heterogeneous_architecture: Architecture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled inside of what is computed again; without code generation, which needs a C++ compiler here."""
    tokens = input_ids(heterogeneous_architecture)
    _, expected = loss_and_gradients(build_model(heterogeneous_architecture, seed=0), tokens)
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable:
        graphs.append(graph.code)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    changed = build_model(heterogeneous_architecture, seed=0)
    tile_ffns(changed, 20, compile=True)
    for block in changed.model.layers:
        block.forward = torch.compile(block.forward, dynamic=False)
    offload(changed)
    _, gradients = loss_and_gradients(changed, tokens)
    assert_close(gradients, expected)
    assert any("scaled_dot_product_attention" in code for code in graphs)
    # One for each width and number of tokens in a tile (512 in 20 and 16, 256 in 32), not one per tile.
    assert sum("silu" in code for code in graphs) == 3


@pytest.mark.gpu
@pytest.mark.parametrize("tile_tokens", [0, 2048])
@pytest.mark.parametrize("offloads", [False, True])
def test_on_a_gpu_gradients_stay_and_memory_falls(tile_tokens: int, offloads: bool) -> None:
    architecture = Architecture(
        vocab_size=512,
        hidden_dim=512,
        num_heads=8,
        head_dim=64,
        blocks=dense_blocks(8, num_kv_heads=8, ffn_dim=2048),
        max_positions=8192,
        rope=RopeConfig(theta=10_000.0),
    )
    tokens = input_ids(architecture, seq=8192).cuda()

    def measured(change: Change) -> tuple[dict[str, Tensor], int]:
        model = build_model(architecture, seed=0).cuda()
        change(model)
        loss_and_gradients(model, tokens)
        torch.cuda.reset_peak_memory_stats()
        return loss_and_gradients(model, tokens)[1], torch.cuda.max_memory_allocated()

    def change(model: DeciLMForCausalLM) -> None:
        if tile_tokens:
            tile_ffns(model, tile_tokens)
        if offloads:
            offload(model)

    expected, plain_bytes = measured(lambda _: None)
    gradients, peak_bytes = measured(change)
    for name, gradient in gradients.items():
        worst = (gradient - expected[name]).abs().max() / expected[name].abs().max()
        # fp32 attention on a GPU adds in an order that differs from run to run.
        assert worst < 1e-4, f"{name}: {worst}"
    if tile_tokens or offloads:
        assert peak_bytes < 0.8 * plain_bytes


@pytest.mark.gpu
def test_block_inputs_leave_the_gpu() -> None:
    """Between forward and backward the device holds less than one block's input of what it kept."""
    buffers = HostBuffers()
    values = [torch.full((3, 1024, 1024), float(number), device="cuda") for number in range(6)]
    before = torch.cuda.memory_allocated()
    kept = [buffers.keep(value) for value in values]
    values.clear()
    torch.cuda.synchronize()
    assert before - torch.cuda.memory_allocated() >= 5 * 3 * 2**20 * 4
    for number in reversed(range(6)):
        assert torch.equal(buffers.give_back(kept.pop()), torch.full((3, 1024, 1024), float(number), device="cuda"))
