from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from distill.config import RopeConfig
from fusion.grouping import fused_architecture
from launch.artifact import Artifact
from launch.canvas import ROLES
from launch.page import latency_parts
from launch.report import write_report
from puzzle.config import WorkloadConfig
from puzzle.model.architecture import NO_ATTENTION, Architecture, AttentionConfig, BlockConfig, FFNConfig
from puzzle.tables import CostTable, MergeSaving, OverheadCost, SubblockCost

FIGURES = {
    "quality against latency",
    "Pareto front",
    "recovery of KLD",
    "recovery of LM loss",
    "dependency matrix",
    "direction change",
    "replace-1-block scores",
    "latency breakdown",
}


def figures_of(page: str) -> list[str]:
    return re.findall(r'<svg class="figure" role="img" aria-label="([^"]+)"', page)


def headings_of(page: str) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", page)


@pytest.fixture(scope="module")
def page(full_steps: dict[str, Artifact], tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_report(tmp_path_factory.mktemp("page"), "demo", full_steps).read_text()


def test_every_figure_and_section_is_there(page: str) -> None:
    assert sorted(figures_of(page)) == sorted(FIGURES)
    assert headings_of(page) == [
        "Models",
        "What became of every block",
        "Recovery with tokens",
        "By context length",
        "Can blocks run side by side?",
        "Scores and costs",
        "Steps",
        "Provenance",
    ]


def test_nothing_is_needed_from_outside(page: str) -> None:
    assert not re.search(r"https?:|\bsrc=|@import|<script|<link|<iframe", page)
    references = re.findall(r'href="([^"]{0,22})', page) + re.findall(r"url\(([^)]*)\)", page)
    assert references
    assert all(reference.startswith(("#", "data:image/png;base64,")) for reference in references)


def test_pictures_do_not_reach_into_each_other(page: str) -> None:
    ids = re.findall(r' id="([^"]+)"', page)
    used = set(re.findall(r'href="#([^"]+)"', page)) | set(re.findall(r"url\(#([^)]+)\)", page))

    assert len(ids) == len(set(ids))
    assert used <= set(ids)
    assert page.count("<style") == 1


def test_every_colour_of_a_picture_follows_the_scheme_of_the_page(page: str) -> None:
    dark = page[page.index("prefers-color-scheme: dark") :]

    assert all(f"--{role}:" in dark[: dark.index("}")] for role in ROLES)
    for svg in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL):
        fixed = set(re.findall(r"(?:fill|stroke): (#\w+)", svg))
        # What the search chose is ringed in black and white, to stand out on any colour of the map.
        assert fixed == ({"#ffffff", "#000000"} if "replace-1-block" in svg else set())


def test_headlines_cannot_write_html(page: str) -> None:
    assert "child &lt;done&gt; &amp; dusted" in page
    assert "<done>" not in page


def test_the_command_can_be_typed_again(page: str) -> None:
    assert "python -m launch demo &#39;run.name=a b&#39;" in page


def test_recovery_is_defined_by_the_models_that_it_compares(page: str) -> None:
    words = re.sub(r"<[^>]+>", "", page).replace("\N{MINUS SIGN}", "-").split()

    assert "Recovery = (Lfused - L) / (Lfused - Lparent)" in " ".join(words)


def test_what_was_not_part_of_the_run_is_left_out(short: Any, tmp_path: Path) -> None:
    text = write_report(tmp_path / "short", "short", short.steps).read_text()

    assert figures_of(text) == ["replace-1-block scores"]
    assert headings_of(text) == ["Models", "What became of every block", "Scores and costs", "Steps", "Provenance"]
    for absent in ("Decode latency", "LM loss", "Gap closed", "agreement"):
        assert absent not in text


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


def test_a_fused_ffn_costs_its_members_less_the_saving_of_every_merge() -> None:
    sizes = {"params": 0, "weight_bytes": 0}
    costs = {("attention", "kv2"): 0.14, ("attention", "no_op"): 0.0, ("ffn", "w512"): 0.11, ("ffn", "w256"): 0.08}
    table = CostTable(
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
    attention = AttentionConfig(num_kv_heads=2)
    first = BlockConfig(attention=attention, ffn=FFNConfig(ffn_dim=512), parent_block_indices=(0,))
    free = [
        BlockConfig(attention=NO_ATTENTION, ffn=FFNConfig(ffn_dim=width), parent_block_indices=(index,))
        for index, width in enumerate((512, 256, 256), start=1)
    ]
    unfused = architecture(first, *free)
    fused = fused_architecture(unfused, [(1, 3)])

    decode = latency_parts(unfused, unfused, table, "decode")

    assert decode == pytest.approx({"attention": 0.14, "FFN": 2 * 0.11 + 2 * 0.08, "embedding and head": 0.4})
    assert latency_parts(fused, unfused, table, "decode")["FFN"] == pytest.approx(decode["FFN"] - 2 * 0.03)
    assert latency_parts(fused, unfused, table, "prefill")["FFN"] == pytest.approx(9 * decode["FFN"] - 2 * 0.05)
