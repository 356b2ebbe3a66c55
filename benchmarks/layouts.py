"""The layouts of the papers as architectures: Llama-3.1-405B to Ultra-253B, Llama-3.3-70B to Super-49B, SmolLM2-135M.

    python benchmarks/layouts.py

prints parameters, depth, attentions and all-reduces of each, and ends with an error if one of them is not what the
papers and the released configurations say. Torch-free.

Sources: FFN Fusion (arXiv 2503.18908), sections 4 and 5 and appendix D; the config.json files of
Llama-3_1-Nemotron-Ultra-253B-v1 and Llama-3_3-Nemotron-Super-49B-v1_5. What the released Ultra no longer says is which
member of a fused FFN had which width; the sums leave one multiset for three of the four groups and a likely one for the
fourth. The order inside a group is ours. It changes no latency.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from distill.config import RopeConfig
from fusion.grouping import Group, fused_architecture
from puzzle.model import stats
from puzzle.model.architecture import (
    NO_ATTENTION,
    Architecture,
    AttentionConfig,
    BlockConfig,
    FFNConfig,
    dense_blocks,
    round_up_ffn_dim,
)

ULTRA_GROUPS: tuple[Group, ...] = ((66, 73), (74, 85), (86, 100), (101, 114))
"""49 of the 50 last attention-free blocks; 115 stays as it is (paper, section 4)."""
ULTRA_FUSED_WIDTHS = (399_360, 425_984, 343_040, 301_056)
ULTRA_PERCENT = (
    *(10, 20, *(6 * [30]), *(4 * [40]), *(8 * [100]), 50, *(3 * [40]), 40, 100, 100, *(17 * [100])),
    *(*(3 * [70]), 60, *(3 * [50]), 50, 50, 50, *(7 * [50]), 50, 60, 100, 100, 100),
    *(*(7 * [100]), 50),
    *(*(4 * [100]), *(8 * [50])),
    *(*(11 * [40]), *(4 * [50])),
    *(14 * [40]),
    *(40, 40, *(3 * [50]), 70, *(4 * [100]), 50),
)
"""FFN width of every block of the parent, in percent of 53,248."""
ULTRA_ATTENTION_FREE = (24, 26, 51, 52, *range(54, 61), 64, *range(66, 116))

SUPER_WIDTHS = {
    **{0: 14_336, 6: 14_336, 7: 14_336, 11: 17_920},
    **{42: 7_168, 43: 14_336, 44: 14_336, 45: 7_168, 46: 28_672, 47: 7_168, 48: 14_336, 49: 7_168, 50: 7_168},
    **{51: 7_168, 53: 7_168, 54: 5_632, 55: 5_632, 56: 7_168, 57: 5_632, 58: 5_632, 59: 5_632, 60: 7_168},
    **{61: 7_168, 62: 2_816, 63: 2_816, 64: 5_632, 65: 5_632, 66: 2_816, 67: 2_816, 68: 5_632, 69: 2_816, 70: 2_816},
}
"""FFN width where it is not the parent's 28,672."""
SUPER_ATTENTION_FREE = (6, 7, 11, *range(42, 52), *range(53, 71))
SUPER_STEPS = {1: (4, 8), 2: (2, 4), 3: (1, 2), 4: (1, 1)}
"""Step -> number of groups in blocks 42-50 and in blocks 53-69: 26 FFNs become 12, 6, 3 and 2."""

SMOLLM2_ATTENTION_FREE = tuple(range(16, 26))
"""Of the SmolLM2 child of this file: one run, 10 of its 30 blocks, all fused but the last."""


def llama_405b() -> Architecture:
    """Llama-3.1-405B."""
    return _llama(dense_blocks(126, 8, 53_248), hidden_dim=16_384, num_heads=128)


def ultra_253b_unfused() -> Architecture:
    """Ultra-253B before fusion: 126 blocks, 64 of them with attention."""
    widths = [round_up_ffn_dim(53_248 * percent / 100) for percent in ULTRA_PERCENT]
    return llama_405b().with_blocks(_child_blocks(widths, ULTRA_ATTENTION_FREE, num_kv_heads=8))


def ultra_253b() -> Architecture:
    """Ultra-253B as released, without its dummy blocks: 81 blocks."""
    return fused_architecture(ultra_253b_unfused(), ULTRA_GROUPS)


def llama_70b() -> Architecture:
    """Llama-3.3-70B."""
    return _llama(dense_blocks(80, 8, 28_672), hidden_dim=8_192, num_heads=64)


def super_49b(step: int = 0) -> Architecture:
    """Super-49B after fusion ``step`` of the paper's Table 4: 0 (as released) to 4."""
    widths = [SUPER_WIDTHS.get(index, 28_672) for index in range(80)]
    unfused = llama_70b().with_blocks(_child_blocks(widths, SUPER_ATTENTION_FREE, num_kv_heads=8))
    return fused_architecture(unfused, super_groups(step)) if step else unfused


def super_groups(step: int) -> tuple[Group, ...]:
    """Groups of fusion ``step`` 1 to 4: as even as can be, larger ones first."""
    first, second = SUPER_STEPS[step]
    return (*_even_groups((42, 50), first), *_even_groups((53, 69), second))


def smollm2_135m() -> Architecture:
    """SmolLM2-135M."""
    return Architecture(
        vocab_size=49_152,
        hidden_dim=576,
        num_heads=9,
        head_dim=64,
        blocks=dense_blocks(30, 3, 1_536),
        max_positions=8_192,
        rope=RopeConfig(theta=100_000.0),
        tie_embeddings=True,
    )


def smollm2_child() -> Architecture:
    """SmolLM2-135M with the attention of one run of blocks removed."""
    return smollm2_135m().with_blocks(_child_blocks([1_536] * 30, SMOLLM2_ATTENTION_FREE, num_kv_heads=3))


def smollm2_child_fused() -> Architecture:
    """That child with its run fused, the last FFN left out."""
    return fused_architecture(smollm2_child(), [(SMOLLM2_ATTENTION_FREE[0], SMOLLM2_ATTENTION_FREE[-2])])


def layouts() -> dict[str, Architecture]:
    """Every layout by its name on the command line."""
    steps = {f"super-49b-step{step}": super_49b(step) for step in SUPER_STEPS}
    return {
        "llama-405b": llama_405b(),
        "ultra-253b-unfused": ultra_253b_unfused(),
        "ultra-253b": ultra_253b(),
        "llama-70b": llama_70b(),
        "super-49b": super_49b(),
        **steps,
        "smollm2-135m": smollm2_135m(),
        "smollm2-child": smollm2_child(),
        "smollm2-child-fused": smollm2_child_fused(),
    }


def num_attentions(architecture: Architecture) -> int:
    """Blocks with attention."""
    return sum(not block.attention.is_no_op for block in architecture.blocks)


def num_all_reduces(architecture: Architecture) -> int:
    """All-reduces of one decoded token under tensor parallelism, one behind every subblock; the embedding's aside."""
    return sum((not block.attention.is_no_op) + (not block.ffn.is_no_op) for block in architecture.blocks)


def check(known: dict[str, Architecture]) -> None:
    """Hold the layouts against what the papers and the released configurations say.

    Raises:
        AssertionError: a layout differs.
    """
    billions = {
        "llama-405b": 405.853,
        "ultra-253b-unfused": 253.401,
        "ultra-253b": 253.401,
        "llama-70b": 70.554,
        "super-49b": 49.867,
    }
    for name, expected in billions.items():
        found = stats.num_params(known[name]) / 1e9
        assert abs(found - expected) < 0.0015, f"{name}: {found:.4f}B parameters, expected {expected}B"
    num_norm_values = (126 - 81) * 16_384
    unfused, fused = (stats.num_params(known[name]) for name in ("ultra-253b-unfused", "ultra-253b"))
    assert unfused - fused == num_norm_values, "fusion keeps every weight but the norms of all members but one"
    expected_all_reduces = {"llama-405b": 252, "ultra-253b-unfused": 190, "ultra-253b": 145, "llama-70b": 160}
    for name, expected_count in expected_all_reduces.items():
        assert num_all_reduces(known[name]) == expected_count, name
    assert [num_attentions(known[name]) for name in ("ultra-253b-unfused", "ultra-253b", "super-49b")] == [64, 64, 49]
    assert known["ultra-253b"].num_blocks == 81
    assert _fused_widths(known["ultra-253b"]) == ULTRA_FUSED_WIDTHS
    assert _fused_widths(known["super-49b-step4"]) == (107_520, 87_808)
    assert [len(_fused_widths(known[f"super-49b-step{step}"])) for step in SUPER_STEPS] == [12, 6, 3, 2]
    assert abs(stats.num_params(known["smollm2-135m"]) / 1e6 - 134.515) < 0.001


def _fused_widths(architecture: Architecture) -> tuple[int, ...]:
    return tuple(block.ffn.ffn_dim or 0 for block in architecture.blocks if block.is_fused)


def _even_groups(span: Group, num_groups: int) -> tuple[Group, ...]:
    first, last = span
    size, num_larger = divmod(last - first + 1, num_groups)
    groups = []
    for index in range(num_groups):
        end = first + size + (index < num_larger)
        groups.append((first, end - 1))
        first = end
    return tuple(groups)


def _child_blocks(
    widths: Sequence[int], attention_free: Sequence[int], *, num_kv_heads: int
) -> tuple[BlockConfig, ...]:
    attention = AttentionConfig(num_kv_heads=num_kv_heads)
    return tuple(
        BlockConfig(
            attention=NO_ATTENTION if index in attention_free else attention,
            ffn=FFNConfig(ffn_dim=width),
            parent_block_indices=(index,),
        )
        for index, width in enumerate(widths)
    )


def _llama(blocks: tuple[BlockConfig, ...], *, hidden_dim: int, num_heads: int) -> Architecture:
    return Architecture(
        vocab_size=128_256,
        hidden_dim=hidden_dim,
        num_heads=num_heads,
        head_dim=128,
        blocks=blocks,
        max_positions=131_072,
        rope=RopeConfig(
            theta=500_000.0,
            kind="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_positions=8_192,
        ),
    )


def main() -> int:
    known = layouts()
    check(known)
    print(f"{'layout':<22}{'params':>12}{'blocks':>8}{'attention':>11}{'all-reduces':>13}  fused widths")
    for name, architecture in known.items():
        counts = (architecture.num_blocks, num_attentions(architecture), num_all_reduces(architecture))
        widths = ", ".join(map(str, _fused_widths(architecture)))
        billions = stats.num_params(architecture) / 1e9
        print(f"{name:<22}{billions:>11.3f}B{counts[0]:>8}{counts[1]:>11}{counts[2]:>13}  {widths}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
