"""Readers are started once for all children."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from puzzle.model.targets import Target
from tests.readers.children import build
from tests.readers.reading import PROMPT, Session, python_of, run_reader

SessionOf = Callable[[Target], Session]


@pytest.fixture(scope="session")
def children(tmp_path_factory: pytest.TempPathFactory, pico_parent_dir: Path) -> dict[str, Path]:
    """Model directories of :mod:`tests.readers.children` by name."""
    return build(tmp_path_factory.mktemp("children"), pico_parent_dir)


@pytest.fixture(scope="session")
def session_of(children: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> SessionOf:
    """What a target makes of all children; skips the test where its reader is not installed."""
    known: dict[Target, Session] = {}

    def of(target: Target) -> Session:
        require_reader(target)
        if target not in known:
            known[target] = run_reader(target, children, tmp_path_factory.mktemp(target) / "work", prompt=PROMPT)
        return known[target]

    return of


def require_reader(target: Target) -> None:
    if python_of(target) is None:
        pytest.skip(f"the reader {target} is not installed: make readers READERS={target}")
