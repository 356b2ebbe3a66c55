"""Sequences dealt over processes against the whole sequence in one process."""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, distributed, nn

from distill import sequence_parallel
from distill.data.batch import IGNORE_INDEX, Batch
from distill.forward import document_mask
from distill.sequence_parallel import use_ulysses, whole_sequence
from puzzle.model.architecture import NO_ATTENTION, Architecture, AttentionConfig, BlockConfig, FFNConfig
from puzzle.model.checkpoint import build_model
from puzzle.model.modeling_decilm import DeciLMForCausalLM
from tests.distributed.conftest import RunInProcesses

# fp32: attention over other heads at once and sums over ranks add in another order. Relative to the largest entry.
TOLERANCE = 5e-6
BATCH, SEQ = 2, 24

Gradients = dict[str, np.ndarray]
"""And the loss. A tensor would not outlive the process that it comes from."""


def sequences(vocab_size: int, *, separate: bool = False) -> Batch:
    batch = Batch.of(torch.randint(vocab_size, (BATCH, SEQ), generator=torch.Generator().manual_seed(5)))
    if not separate:
        return batch
    # Documents that end within the parts and cross their borders.
    starts = torch.tensor([[0, 7, 7, 20], [0, 3, 14, 15]])
    positions = torch.arange(SEQ).expand(BATCH, SEQ)
    begins = (positions[..., None] >= starts[:, None]).long().mul(starts[:, None]).amax(-1)
    return replace(batch, position_ids=positions - begins, separate_documents=True)


def summed_loss(model: DeciLMForCausalLM, batch: Batch, mask: Tensor | None) -> Tensor:
    hidden = model.model(
        batch.input_ids, position_ids=batch.position_ids, attention_mask=mask, use_cache=False
    ).last_hidden_state
    logits = model.lm_head(hidden).flatten(0, 1)
    return nn.functional.cross_entropy(logits, batch.labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")


def gradients(model: DeciLMForCausalLM, batch: Batch, mask: Tensor | None) -> dict[str, Tensor]:
    model.train()
    loss = summed_loss(model, batch, mask)
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad.detach() for name, p in model.named_parameters()}}


def summed_over_parts(
    architecture: Architecture, separate: bool, engine_changes: bool = False, device: str = "cpu"
) -> Gradients:
    """In one of several processes: loss and gradients of its part, summed over all of them."""
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["RANK"]))
    distributed.init_process_group("gloo" if device == "cpu" else "nccl")
    group = distributed.group.WORLD
    model = build_model(architecture, seed=0).to(device)
    use_ulysses(model, group)
    if engine_changes:
        from distill.engine.student_step import recompute_blocks
        from distill.memory import offload_block_inputs, tile_ffns

        tile_ffns(model, 7)
        recompute_blocks(model)
        offload_block_inputs(model)
    batch = sequences(architecture.vocab_size, separate=separate)
    part = batch.sequence_part(group.rank(), group.size()).to(torch.device(device))
    mask = None
    if separate:
        positions = whole_sequence(part.position_ids)
        assert torch.equal(positions.cpu(), batch.position_ids)
        mask = document_mask(positions, flex=device == "cuda")
    found = gradients(model, part, mask)
    for tensor in found.values():
        distributed.all_reduce(tensor)
    distributed.destroy_process_group()
    return {name: tensor.cpu().numpy() for name, tensor in found.items()}


def assert_equal_to_one_process(
    architecture: Architecture, by_rank: list[Gradients], *, separate: bool = False, tolerance: float
) -> None:
    batch = sequences(architecture.vocab_size, separate=separate)
    mask = document_mask(batch.position_ids) if separate else None
    expected = gradients(build_model(architecture, seed=0), batch, mask)
    for found in by_rank:
        assert found.keys() == expected.keys()
        for name, values in found.items():
            worst = (torch.from_numpy(values) - expected[name]).abs().max() / expected[name].abs().max()
            assert worst < tolerance, f"{name}: {worst}"


@pytest.mark.parametrize("separate", [False, True])
def test_two_parts_have_the_gradients_of_the_whole(
    heterogeneous_architecture: Architecture, run_in_processes: RunInProcesses, separate: bool
) -> None:
    """KV heads 2 and 1 (fewer than the ranks), linear attention, no attention, linear FFN, no FFN."""
    by_rank = run_in_processes(2, summed_over_parts, heterogeneous_architecture, separate)
    assert_equal_to_one_process(heterogeneous_architecture, by_rank, separate=separate, tolerance=TOLERANCE)


def test_with_tiles_recomputation_and_offload(
    heterogeneous_architecture: Architecture, run_in_processes: RunInProcesses
) -> None:
    by_rank = run_in_processes(2, summed_over_parts, heterogeneous_architecture, False, True)
    assert_equal_to_one_process(heterogeneous_architecture, by_rank, tolerance=TOLERANCE)


def test_kv_heads_that_the_ranks_do_not_divide(
    heterogeneous_architecture: Architecture, run_in_processes: RunInProcesses
) -> None:
    """Three ranks with two query heads each; layers of 6, 3, 2 and 1 KV heads, of which one rank's may be two."""
    ffn = FFNConfig(ffn_dim=256)
    blocks = [
        BlockConfig(attention=AttentionConfig(num_kv_heads=n), ffn=ffn, parent_block_indices=()) for n in (6, 3, 2)
    ]
    blocks += [BlockConfig(attention=NO_ATTENTION, ffn=ffn, parent_block_indices=())]
    blocks += [BlockConfig(attention=AttentionConfig(num_kv_heads=1), ffn=ffn, parent_block_indices=())]
    architecture = replace(heterogeneous_architecture, num_heads=6, blocks=tuple(blocks))
    by_rank = run_in_processes(3, summed_over_parts, architecture, False)
    assert_equal_to_one_process(architecture, by_rank, tolerance=TOLERANCE)


def under_autocast(architecture: Architecture) -> tuple[Gradients, set[torch.dtype]]:
    """In one of two processes: loss and gradients summed over both, and what travelled between them."""
    distributed.init_process_group("gloo")
    group = distributed.group.WORLD
    model = build_model(architecture, seed=0)
    use_ulysses(model, group)
    part = sequences(architecture.vocab_size).sequence_part(group.rank(), group.size())
    sent, exchange = set[torch.dtype](), distributed.all_to_all_single

    def noted(received: Tensor, tensor: Tensor, **options: object) -> None:
        sent.add(tensor.dtype)
        exchange(received, tensor, **options)

    sequence_parallel.distributed.all_to_all_single = noted
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = gradients(model, part, None)
    finally:
        sequence_parallel.distributed.all_to_all_single = exchange
    for tensor in found.values():
        distributed.all_reduce(tensor)
    distributed.destroy_process_group()
    return {name: tensor.numpy() for name, tensor in found.items()}, sent


def test_under_autocast_heads_travel_in_bf16(
    heterogeneous_architecture: Architecture, run_in_processes: RunInProcesses
) -> None:
    """The rotated ones are fp32 before. Attention would cast them: the result is that of one process."""
    model = build_model(heterogeneous_architecture, seed=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = gradients(model, sequences(heterogeneous_architecture.vocab_size), None)
    for found, sent in run_in_processes(2, under_autocast, heterogeneous_architecture):
        assert sent == {torch.bfloat16}
        assert found["loss"] == pytest.approx(float(expected["loss"]), rel=1e-3)
        for name, values in found.items():
            error = (torch.from_numpy(values) - expected[name]).norm() / expected[name].norm()
            # Each product of a part is rounded to bf16, eight bits, before the sum over the parts.
            assert error < 2e-2, f"{name}: {error}"


@pytest.mark.gpu
@pytest.mark.parametrize("separate", [False, True])
def test_two_gpus_have_the_gradients_of_the_whole(
    heterogeneous_architecture: Architecture, run_in_processes: RunInProcesses, separate: bool
) -> None:
    """Documents are kept apart by FlexAttention there."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    by_rank = run_in_processes(2, summed_over_parts, heterogeneous_architecture, separate, True, "cuda")
    # Against a CPU: other kernels, fp32, in FlexAttention with products in TF32.
    tolerance = 5e-3 if separate else 1e-4
    assert_equal_to_one_process(heterogeneous_architecture, by_rank, separate=separate, tolerance=tolerance)
