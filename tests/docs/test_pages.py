"""What README and docs say must be there and work."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from launch.__main__ import main

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "benchmarks").rglob("*.md"))]


def commands() -> list[str]:
    """Every command line of the blocks that runs the pipeline which needs neither weights nor artifacts."""
    text = "\n".join(page.read_text().replace("\\\n", " ") for page in PAGES)
    lines = re.findall(r"^\s*(python -m launch .+?)(?:\s+#.*)?$", text, flags=re.MULTILINE)
    return sorted({line for line in lines if " demo" in line})


def test_there_are_commands() -> None:
    assert len(commands()) >= 2


@pytest.mark.parametrize("command", commands())
def test_command_of_a_page_runs_dry(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["launch"])
    monkeypatch.setenv("WANDB_MODE", "offline")  # as where nobody has logged in
    arguments = shlex.split(command)[3:]
    assert main([*arguments, "--dry-run", f"run.root={tmp_path}"]) == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text())
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert missing == []
