"""What of sequence parallelism needs one process; several are in tests/distributed/test_ulysses.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import distributed
from torch.distributed import ProcessGroup
from torch.testing._internal.distributed.fake_pg import FakeStore

from distill.sequence_parallel import ULYSSES, use_ulysses
from puzzle.model.architecture import Architecture
from puzzle.model.checkpoint import build_model


@pytest.fixture
def three_ranks() -> Iterator[ProcessGroup]:
    """A group of three of which this process is the only one: good for what sends nothing."""
    distributed.init_process_group("fake", rank=0, world_size=3, store=FakeStore())
    yield distributed.group.WORLD
    distributed.destroy_process_group()


@pytest.fixture
def one_rank() -> Iterator[ProcessGroup]:
    distributed.init_process_group("gloo", rank=0, world_size=1, store=distributed.HashStore())
    yield distributed.group.WORLD
    distributed.destroy_process_group()


def test_heads_that_cannot_be_dealt_name_the_nearest_number_of_ranks(
    pico_architecture: Architecture, three_ranks: ProcessGroup
) -> None:
    model = build_model(pico_architecture, seed=0)
    before = model.config._attn_implementation
    with pytest.raises(
        ValueError,
        match=r"engine\.sequence_parallel=3 does not divide the 4 attention heads; the nearest that does is 2",
    ):
        use_ulysses(model, three_ranks)
    assert model.config._attn_implementation == before


def test_sliding_windows_are_refused(pico_architecture: Architecture, one_rank: ProcessGroup) -> None:
    model = build_model(replace(pico_architecture, sliding_window=16), seed=0)
    with pytest.raises(ValueError, match=r"looks back 16 tokens; set engine\.sequence_parallel=1"):
        use_ulysses(model, one_rank)


def test_one_rank_has_the_plain_models_output(heterogeneous_architecture: Architecture, one_rank: ProcessGroup) -> None:
    tokens = torch.randint(320, (2, 32), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(32).expand(2, 32)
    model = build_model(heterogeneous_architecture, seed=0)
    with torch.no_grad():
        expected = model.model(tokens, position_ids=positions, use_cache=False).last_hidden_state
        use_ulysses(model, one_rank)
        assert model.config._attn_implementation == ULYSSES
        found = model.model(tokens, position_ids=positions, use_cache=False).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_compiled_blocks_attend_the_same(heterogeneous_architecture: Architecture, one_rank: ProcessGroup) -> None:
    tokens = torch.randint(320, (2, 32), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(32).expand(2, 32)
    model = build_model(heterogeneous_architecture, seed=0)
    use_ulysses(model, one_rank)
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable:
        graphs.append(graph.code)
        return graph.forward

    expected = model.model(tokens, position_ids=positions, use_cache=False).last_hidden_state
    expected.sum().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.model.named_parameters()}
    model.zero_grad()
    for block in model.model.layers:
        block.forward = torch.compile(block.forward, dynamic=False, backend=backend)
    found = model.model(tokens, position_ids=positions, use_cache=False).last_hidden_state
    found.sum().backward()
    # The same operators in the same order.
    assert torch.equal(found, expected)
    assert all(torch.equal(p.grad, gradients[name]) for name, p in model.model.named_parameters())
    assert any("silu" in code for code in graphs)
    assert not any("all_to_all" in code for code in graphs)
