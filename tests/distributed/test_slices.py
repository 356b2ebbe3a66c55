"""A parent that is dealt over processes computes what it computes in one."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from distill import distributed
from distill.config import EngineConfig
from puzzle.model import checkpoint
from puzzle.model.architecture import NO_ATTENTION, NO_FFN, Architecture, BlockConfig, dense_blocks
from puzzle.model.checkpoint import build_model, save_model
from puzzle.model.modeling_decilm import DeciLMForCausalLM
from puzzle.slices import MAX_SENDS, ParentSlice, load_slice, parent_activations, slice_blocks
from tests.distributed.conftest import RunInProcesses

CPU = EngineConfig(device="cpu")
NUM_BATCHES = MAX_SENDS + 3
"""More than may be on their way at once."""


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 320, (2, 5 + n), generator=generator) for n in range(NUM_BATCHES)]


def final_logits(parent: ParentSlice, hidden: torch.Tensor) -> torch.Tensor:
    return parent.model.lm_head(parent.model.model.norm(hidden))


@torch.no_grad()
def outputs(parent: ParentSlice) -> dict[Any, torch.Tensor]:
    """Output of every own block for every batch, and the logits where the head is."""
    found = {}
    for number, input_ids in enumerate(batches()):
        for activations in parent_activations(parent, input_ids):
            found[number, activations.index] = activations.output
        if parent.is_last:
            found[number, "logits"] = final_logits(parent, activations.output)
    return found


def outputs_of_slices(directory: Path, engine: EngineConfig) -> dict[str, Any]:
    names: list[str] = []
    read = checkpoint.TensorReader.read

    def noted(self: checkpoint.TensorReader, name: str) -> torch.Tensor:
        names.append(name)
        return read(self, name)

    checkpoint.TensorReader.read = noted  # type: ignore[method-assign]
    distributed.join()
    with distributed.together():
        parent = load_slice(directory, engine)
        found = outputs(parent)
    return {
        "found": {key: tensor.cpu().numpy() for key, tensor in found.items()},
        "read": names,
        "blocks": parent.blocks,
        "place": (parent.slice_index, parent.num_slices, parent.replica, parent.num_replicas),
        "share": list(parent.share(range(5))),
        "num_parameters": sum(parameter.numel() for parameter in parent.model.parameters()),
    }


@pytest.mark.parametrize(("slices", "tied"), [(2, False), (3, True)])
def test_slices_compute_what_the_whole_computes(
    tmp_path: Path, pico_architecture: Architecture, run_in_processes: RunInProcesses, slices: int, tied: bool
) -> None:
    architecture = replace(pico_architecture, tie_embeddings=tied)
    model = build_model(architecture, seed=0)
    save_model(model, tmp_path / "parent", architecture=architecture, tokenizer_from=None)
    results = run_in_processes(slices, outputs_of_slices, tmp_path / "parent", replace(CPU, slices=slices))

    whole = outputs(ParentSlice.whole(model))
    found = {key: value for result in results for key, value in result["found"].items()}
    assert found.keys() == whole.keys()
    # The same kernels on the same numbers, which travel as they are: equal to the last bit.
    assert all(torch.equal(torch.from_numpy(found[key]), whole[key]) for key in whole)

    assert [index for result in results for index in result["blocks"]] == list(range(4))
    assert [result["place"] for result in results] == [(rank, slices, 0, 1) for rank in range(slices)]
    read = [set(result["read"]) for result in results]
    shared = {"model.embed_tokens.weight"} if tied else set()
    assert all(first & second <= shared for first, second in itertools.pairwise(read))
    largest = max(result["num_parameters"] for result in results)
    assert largest < 0.65 * sum(result["num_parameters"] for result in results)


def test_replicas_hold_the_whole_and_share_the_work(pico_parent_dir: Path, run_in_processes: RunInProcesses) -> None:
    first, second = run_in_processes(2, outputs_of_slices, pico_parent_dir, CPU)
    assert (first["place"], second["place"]) == ((0, 1, 0, 2), (0, 1, 1, 2))
    assert first["blocks"] == second["blocks"] == range(4)
    assert (first["share"], second["share"]) == ([0, 2, 4], [1, 3])
    assert all((first["found"][key] == value).all() for key, value in second["found"].items())


def test_replicas_of_slices(pico_parent_dir: Path, run_in_processes: RunInProcesses) -> None:
    results = run_in_processes(4, outputs_of_slices, pico_parent_dir, replace(CPU, slices=2))
    assert [result["place"] for result in results] == [(0, 2, 0, 2), (1, 2, 0, 2), (0, 2, 1, 2), (1, 2, 1, 2)]
    for one, other in ((0, 2), (1, 3)):
        found = results[other]["found"]
        assert all((found[key] == value).all() for key, value in results[one]["found"].items())


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_slices_on_gpus_compute_what_the_whole_computes(
    pico_parent_dir: Path, pico_model: DeciLMForCausalLM, run_in_processes: RunInProcesses
) -> None:
    results = run_in_processes(2, outputs_of_slices, pico_parent_dir, EngineConfig(device="cuda", slices=2))
    found = {key: value for result in results for key, value in result["found"].items()}
    for key, expected in outputs(ParentSlice.whole(pico_model.to("cuda"))).items():
        # The kernels may be chosen otherwise in another process.
        torch.testing.assert_close(torch.from_numpy(found[key]), expected.cpu(), rtol=1e-5, atol=1e-5)


def alone_and_together() -> list[Any]:
    distributed.join()
    alone = [distributed.rank(), distributed.world_size(), distributed.gather_objects("alone")]
    told = distributed.from_first({"from": "first"} if distributed.local_rank() == 0 else None)
    with distributed.together():
        shared = [distributed.rank(), distributed.world_size(), distributed.gather_objects(distributed.rank() * 10)]
    claimed = distributed.claim("prize")
    with distributed.together():
        claims = distributed.gather_objects(claimed)
        known = [distributed.is_claimed("prize"), distributed.is_claimed("other")]
    return [alone, told, shared, claims.count(True), *known]


def test_outside_of_together_every_process_is_the_only_one(run_in_processes: RunInProcesses) -> None:
    for rank, result in enumerate(run_in_processes(2, alone_and_together)):
        assert result == [[0, 1, ["alone"]], {"from": "first"}, [rank, 2, [0, 10]], 1, True, False]


def test_one_process_has_no_use_for_slices(pico_parent_dir: Path) -> None:
    with pytest.raises(ValueError, match=r"engine\.slices=2 does not divide the 1 processes .* --nproc-per-node 2"):
        load_slice(pico_parent_dir, replace(CPU, slices=2))
    parent = load_slice(pico_parent_dir, CPU)
    assert parent.is_first
    assert parent.is_last
    assert len(parent.model.model.layers) == parent.num_blocks == 4


def architecture_of(pico: Architecture, num_blocks: int, vocab_size: int) -> Architecture:
    return replace(pico, blocks=dense_blocks(num_blocks, 2, 512), vocab_size=vocab_size)


def test_slices_are_even_in_weights(pico_architecture: Architecture) -> None:
    assert sorted(map(len, slice_blocks(architecture_of(pico_architecture, 7, 1), 3))) == [2, 2, 3]
    # Embedding and head are as large as many blocks of this size: they stand alone.
    assert slice_blocks(architecture_of(pico_architecture, 7, 100_000), 3) == [range(1), range(1, 6), range(6, 7)]
    assert slice_blocks(pico_architecture, 1) == [range(4)]


def test_no_slice_is_without_weights(pico_architecture: Architecture) -> None:
    nothing = BlockConfig(attention=NO_ATTENTION, ffn=NO_FFN, parent_block_indices=(1,))
    architecture = pico_architecture.with_block(1, nothing)
    assert slice_blocks(architecture, 3)[0] in (range(1), range(2))
    assert range(1, 2) not in slice_blocks(architecture, 3)
    with pytest.raises(ValueError, match=r"engine\.slices=4 is more than the 3 blocks"):
        slice_blocks(architecture, 4)
