from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from launch.artifact import Artifact
from launch.canvas import ROLES
from launch.report import write_report

FIGURES = {
    "quality against latency",
    "Pareto front",
    "recovery of KLD",
    "recovery of LM loss",
    "recovery of agreement",
    "forecast of distilled",
    "dependency matrix",
    "direction change",
    "replace-1-block scores",
    "replace-1-block scores by lm_loss",
    "replace-1-block scores by top1_disagreement",
    "additivity",
    "latency breakdown",
}


def figures_of(page: str) -> list[str]:
    return re.findall(r'<svg class="figure" role="img" aria-label="([^"]+)"', page)


def headings_of(page: str) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", page)


def text_of(page: str) -> str:
    return " ".join(re.sub(r"<[^>]+>", " ", page[page.index("</style>") :]).split())


@pytest.fixture(scope="module")
def page(full_steps: dict[str, Artifact], tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_report(tmp_path_factory.mktemp("page"), "demo", full_steps).read_text()


def test_every_figure_and_section_is_there(page: str) -> None:
    assert sorted(figures_of(page)) == sorted(FIGURES)
    assert headings_of(page) == [
        "Models",
        "What became of every block",
        "Recovery with tokens",
        "Tasks",
        "By context length",
        "Can blocks run side by side?",
        "Scores and searches",
        "Costs",
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
        assert fixed == ({"#ffffff", "#000000"} if 'aria-label="replace-1-block' in svg else set())


def test_headlines_cannot_write_html(page: str) -> None:
    assert "child &lt;done&gt; &amp; dusted" in page
    assert "<done>" not in page


def test_the_command_can_be_typed_again(page: str) -> None:
    assert "python -m launch demo &#39;run.name=a b&#39;" in page


def test_every_latency_and_memory_says_what_it_is_stated_for(page: str) -> None:
    words = text_of(page)

    assert "Latency and memory: batch 1, prompt of 128 tokens, 128 generated, float32, on Synthetic CPU" in words
    assert "KV cache in float32" in words
    assert "parent 12 12 9.97M 12.0 KiB 38.1 MiB 32.00 4.00" in words
    assert "Every variant by measured and analytic (Synthetic CPU), in milliseconds: batch 1, prompt of 128" in words
    assert "measured on Synthetic CPU, analytic on Synthetic CPU; batch 1, prompt of 128" in words


def test_searches_stand_side_by_side_and_costs_by_source(page: str) -> None:
    words = text_of(page)

    assert "solution mip kld 0.0830 decode 0.72\N{MULTIPLICATION SIGN} 0.70\N{MULTIPLICATION SIGN} 1 5 optimal" in words
    assert "baseline greedy kld" in words
    assert "ffn w256 0.0500 0.0400 \N{MINUS SIGN}20% 0.450 0.360 \N{MINUS SIGN}20%" in words
    assert "Difference from measured, median over variants: analytic 20.0% in decode, 20.0% in prefill." in words


def test_every_phase_of_a_context_extension_has_its_row(page: str) -> None:
    words = text_of(page)

    assert "What each phase of extended brought." in words
    for row in (
        "before 3.700 3.700 3.700 75.0% 12.5% 12.5%",
        "phase 1, 512 tokens 3.700 3.700 3.700 75.0% 75.0% 12.5%",
    ):
        assert row in words
    assert "phase 2, 1,024 tokens 3.700 3.700 3.700 75.0% 75.0% 75.0%" in words


def test_recovery_is_defined_by_the_models_that_it_compares(page: str) -> None:
    words = " ".join(re.sub(r"<[^>]+>", "", page).replace("\N{MINUS SIGN}", "-").split())

    assert "Recovery = (Lfused - L) / (Lfused - Lparent)" in words


def test_what_was_not_part_of_the_run_is_left_out(short: Any, tmp_path: Path) -> None:
    text = write_report(tmp_path / "short", "short", short.steps).read_text()

    assert figures_of(text) == ["replace-1-block scores"]
    assert headings_of(text) == ["Models", "What became of every block", "Scores and searches", "Steps", "Provenance"]
    for absent in ("Decode latency", "LM loss", "Gap closed", "agreement"):
        assert absent not in text
