from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from distill.config import RopeConfig
from fusion.controls import removed_architecture
from fusion.grouping import fused_architecture
from launch.cost_section import compare_costs, latency_parts, latency_pictures, own_tables, parent_by_batch_size
from launch.finished_run import FinishedRun
from puzzle.config import WorkloadConfig
from puzzle.model.architecture import NO_ATTENTION, Architecture, AttentionConfig, BlockConfig, FFNConfig
from puzzle.tables import CostFile, CostTable, MergeSaving, OverheadCost, SubblockCost


def architecture(*blocks: BlockConfig) -> Architecture:
    return Architecture(
        vocab_size=64,
        hidden_dim=32,
        num_heads=4,
        head_dim=8,
        blocks=blocks,
        max_positions=64,
        rope=RopeConfig(theta=1e4),
    )


def merge_table() -> CostTable:
    """An attention of 0.14 ms, FFNs of 0.11 (w512) and 0.08 ms (w256), 0.03 ms saved by every merge."""
    sizes = {"params": 0, "weight_bytes": 0}
    costs = {("attention", "kv2"): 0.14, ("attention", "no_op"): 0.0, ("ffn", "w512"): 0.11, ("ffn", "w256"): 0.08}
    return CostTable(
        source="measured",
        hardware="a CPU",
        workload=WorkloadConfig(),
        kv_tokens=256,
        overhead=OverheadCost(prefill_ms=4.0, decode_ms=0.4, **sizes),
        subblocks=tuple(
            SubblockCost(
                subblock=subblock,  # type: ignore[arg-type]
                variant=variant,
                prefill_ms=9 * ms,
                decode_ms=ms,
                kv_bytes_per_token=0,
                **sizes,
            )
            for (subblock, variant), ms in costs.items()
        ),
        ffn_merge_saving=MergeSaving(prefill_ms=0.05, decode_ms=0.03),
    )


def unfused_model() -> Architecture:
    """One block that attends, three FFNs of 512, 256 and 256 channels."""
    attention = AttentionConfig(num_kv_heads=2)
    first = BlockConfig(attention=attention, ffn=FFNConfig(ffn_dim=512), parent_block_indices=(0,))
    free = [
        BlockConfig(attention=NO_ATTENTION, ffn=FFNConfig(ffn_dim=width), parent_block_indices=(index,))
        for index, width in enumerate((512, 256, 256), start=1)
    ]
    return architecture(first, *free)


def test_a_fused_ffn_costs_its_members_less_the_saving_of_every_merge() -> None:
    table, unfused = merge_table(), unfused_model()
    fused = fused_architecture(unfused, [(1, 3)])

    decode = latency_parts(unfused, unfused, table, "decode")

    assert decode == pytest.approx({"attention": 0.14, "FFN": 2 * 0.11 + 2 * 0.08, "embedding and head": 0.4})
    assert latency_parts(fused, unfused, table, "decode")["FFN"] == pytest.approx(decode["FFN"] - 2 * 0.03)
    assert latency_parts(fused, unfused, table, "prefill")["FFN"] == pytest.approx(9 * decode["FFN"] - 2 * 0.05)


def test_removed_ffns_cost_nothing_and_save_no_merge() -> None:
    table, unfused = merge_table(), unfused_model()
    removed = removed_architecture(unfused, (2,))

    # The same whichever model is taken for the one before fusion.
    for before in (unfused, removed):
        assert latency_parts(removed, before, table, "decode")["FFN"] == pytest.approx(2 * 0.11 + 0.08)
    fused = fused_architecture(removed, [(1, 2)])
    assert latency_parts(fused, removed, table, "decode")["FFN"] == pytest.approx(2 * 0.11 + 0.08 - 0.03)


def test_reversed_ffns_cost_what_they_did() -> None:
    table, unfused = merge_table(), unfused_model()
    reordered = unfused.with_blocks(tuple(unfused.blocks[index] for index in (0, 3, 2, 1)))

    assert latency_parts(reordered, reordered, table, "decode") == latency_parts(unfused, unfused, table, "decode")


def test_a_fused_parent_costs_what_its_own_variant_does() -> None:
    """Costs of a model that came fused know its wide FFN itself."""
    table = merge_table()
    fused = fused_architecture(unfused_model(), [(2, 3)])
    assert fused.blocks[2].ffn.ffn_dim == 512

    assert latency_parts(fused, fused, table, "decode")["FFN"] == pytest.approx(3 * 0.11)


def table(
    source: str, *, scale: float = 1.0, batch_size: int = 1, variants: tuple[str, ...] = ("w512", "w256")
) -> CostTable:
    def cost(subblock: Any, variant: str, ms: float) -> SubblockCost:
        return SubblockCost(
            subblock=subblock,
            variant=variant,
            prefill_ms=2 * ms,
            decode_ms=ms,
            params=10,
            weight_bytes=40,
            kv_bytes_per_token=8,
        )

    times = {"w768": 0.6, "w512": 0.4, "w256": 0.2, "no_op": 0.0}
    return CostTable(
        source=source,
        hardware=f"device of {source}",
        workload=WorkloadConfig(batch_size=batch_size),
        kv_tokens=256,
        overhead=OverheadCost(prefill_ms=3.0, decode_ms=0.1, params=5, weight_bytes=20),
        subblocks=(
            cost("attention", "kv2", 0.3 * scale),
            *(cost("ffn", name, times[name] * scale) for name in variants),
        ),
        ffn_merge_saving=MergeSaving(prefill_ms=0.0, decode_ms=0.0),
    )


def file(*tables: CostTable) -> CostFile:
    return CostFile(architecture={}, workload=WorkloadConfig(), tables=tables)


def test_all_sources_are_compared_with_the_first_at_the_workload_of_the_file() -> None:
    measured = table("measured", variants=("w512", "w256"))
    costs = file(measured, table("measured", batch_size=8), table("analytic", scale=1.5), table("vllm", scale=0.5))

    compared = compare_costs(costs)

    assert compared is not None
    assert compared.sources == ("measured", "analytic", "vllm")
    assert compared.hardware == ("device of measured", "device of analytic", "device of vllm")
    rows = {row.variant: row for row in compared.rows}
    assert sorted(rows) == ["embedding and head", "kv2", "w256", "w512"]
    assert rows["w512"].ms["decode"] == pytest.approx((0.4, 0.6, 0.2))
    assert rows["w512"].relative_difference["prefill"] == pytest.approx((0.5, -0.5))
    assert compared.median_error["decode"] == pytest.approx((0.5, 0.5)), "what stands outside is no variant"
    assert rows["embedding and head"].relative_difference["decode"] == pytest.approx((0.0, 0.0))


def test_one_source_has_nothing_to_be_compared_with() -> None:
    assert compare_costs(file(table("measured"), table("measured", batch_size=8))) is None


def test_the_parent_is_shown_by_batch_size_where_there_are_several() -> None:
    attention = AttentionConfig(num_kv_heads=2)
    parent = architecture(BlockConfig(attention=attention, ffn=FFNConfig(ffn_dim=512), parent_block_indices=(0,)))
    one, eight = table("measured"), table("measured", scale=2.0, batch_size=8)

    rows = parent_by_batch_size(file(one, eight), parent)

    assert [row.batch_size for row in rows] == [1, 8]
    # Decode 0.1 + 2 (0.3 + 0.4) for 127 tokens after a prefill of 3 + 4 (0.3 + 0.4).
    assert rows[1].tokens_per_s == pytest.approx(1000 * 8 * 128 / (5.8 + 127 * 1.5))
    assert rows[1].memory_bytes == 20 + 80 + 8 * 256 * 16, "the cache of the whole batch"
    assert parent_by_batch_size(file(one), parent) == []
    assert own_tables(file(replace(eight, source="analytic"), one)).keys() == {"analytic", "measured"}


def test_a_child_whose_variants_the_costs_lack_is_left_out(short: Any) -> None:
    costs = file(table("measured", variants=("w768", "w512")))
    subblocks = tuple(
        replace(row, variant="kv4") if row.subblock == "attention" else row for row in costs.tables[0].subblocks
    )

    (picture,) = latency_pictures(FinishedRun(short.steps), file(replace(costs.tables[0], subblocks=subblocks)))

    assert "parent, measured" in picture.svg
    assert "child, measured" not in picture.svg, "its removed attentions cost nothing known"
