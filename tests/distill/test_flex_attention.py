from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from distill import flex_attention as module
from distill.flex_attention import attend, block_mask

SEQ = 256


def first_keys(lengths: list[int]) -> Tensor:
    """Of one sequence of documents of these lengths."""
    starts = torch.tensor([0, *lengths]).cumsum(0)[:-1]
    return starts.repeat_interleave(torch.tensor(lengths))[None]


@pytest.mark.parametrize("lengths", [[640], [37, 300, 1, 302], [128, 128, 256, 128], [90] * 7, [1] * 300, [5, 1000]])
def test_both_sides_of_the_mask_list_the_same_blocks(lengths: list[int]) -> None:
    """By keys for the forward pass, by queries for the backward pass; the expected one is torch's transposition."""
    together = torch.cat((first_keys(lengths), first_keys([sum(lengths)])))
    mask = block_mask(together)
    expected = BlockMask.from_kv_blocks(
        mask.kv_num_blocks, mask.kv_indices, mask.full_kv_num_blocks, mask.full_kv_indices, BLOCK_SIZE=128
    )
    for name in ("q", "full_q"):
        counts = getattr(mask, f"{name}_num_blocks")
        assert torch.equal(counts, getattr(expected, f"{name}_num_blocks"))
        listed = torch.arange(counts.shape[-1]) < counts[..., None]
        assert torch.equal(
            getattr(mask, f"{name}_indices")[listed], getattr(expected, f"{name}_indices")[listed].to(torch.int32)
        )
    for name in ("kv", "full_kv", "q", "full_q"):
        indices = getattr(mask, f"{name}_indices")
        assert indices.is_contiguous()
        assert indices.dtype == getattr(mask, f"{name}_num_blocks").dtype == torch.int32
        assert indices.min() >= 0
        assert indices.max() < counts.shape[-1]


class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """Bytes of the largest tensor that an operator made."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.num_bytes = max(self.num_bytes, result.untyped_storage().nbytes())
        return result


def test_a_long_mask_is_four_lists_and_nothing_larger() -> None:
    with LargestTensor() as largest:
        mask = block_mask(first_keys([5_000] * 26 + [1_072]))
    lists = [mask.kv_indices, mask.full_kv_indices, mask.q_indices, mask.full_q_indices]
    assert [indices.untyped_storage().nbytes() for indices in lists] == [4 * 1024**2] * 4
    assert largest.num_bytes == 4 * 1024**2


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Graphs that were compiled: one for each shape. Without code generation, which needs a C++ compiler here."""
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable:
        graphs.append(graph.code)
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(
        module, "_compiled", torch.compile(flex_attention, dynamic=False, fullgraph=True, backend=backend)
    )
    monkeypatch.setattr(module, "_seen", set())
    with torch._dynamo.config.patch(recompile_limit=2):
        yield graphs
    torch._dynamo.reset()


def heads(num_heads: int, batch: int, seed: int) -> Tensor:
    return torch.randn(batch, num_heads, SEQ, 16, generator=torch.Generator().manual_seed(seed))


def test_every_shape_is_compiled_once(compilations: list[str]) -> None:
    """Heterogeneous blocks: more pairs of heads and KV heads, with and without gradient, than torch would compile."""
    keys = first_keys([37, 200, 19])
    dense = (torch.arange(SEQ) >= keys[..., None]) & (torch.arange(SEQ) <= torch.arange(SEQ)[:, None])
    mask, shapes = block_mask(keys), [(8, 8), (8, 4), (8, 2), (8, 1), (4, 2), (6, 2), (12, 4)]
    for _ in range(2):
        for num_heads, num_kv_heads in shapes:
            query, key, value = heads(num_heads, 1, 0), heads(num_kv_heads, 1, 1), heads(num_kv_heads, 1, 2)
            for with_gradient in (True, False):
                with torch.set_grad_enabled(with_gradient):
                    found = attend(query, key, value, mask)
                expected = scaled_dot_product_attention(query, key, value, attn_mask=dense[:, None], enable_gqa=True)
                # fp32; the two differ in the order of their sums.
                torch.testing.assert_close(found, expected.transpose(1, 2), atol=1e-5, rtol=1e-5)
    assert len(compilations) == 2 * len(shapes)


def test_one_shape_too_many_is_an_error(compilations: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "expect_shapes", lambda number: None)
    mask = block_mask(first_keys([SEQ]))
    for num_kv_heads in (1, 2):
        attend(heads(2, 1, 0), heads(num_kv_heads, 1, 1), heads(num_kv_heads, 1, 2), mask)
    with pytest.raises(FailOnRecompileLimitHit):
        attend(heads(4, 1, 0), heads(4, 1, 1), heads(4, 1, 2), mask)


def test_dropout_is_refused() -> None:
    with pytest.raises(ValueError, match=r"attention_dropout is 0\.1; set it to 0"):
        attend(heads(2, 1, 0), heads(2, 1, 1), heads(2, 1, 2), block_mask(first_keys([SEQ])), dropout=0.1)
