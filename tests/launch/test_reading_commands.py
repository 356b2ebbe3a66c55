from __future__ import annotations

import importlib
import inspect

import pytest

from launch.__main__ import READING_COMMANDS


@pytest.mark.parametrize("module", READING_COMMANDS.values())
def test_every_reading_command_takes_arguments_and_gives_a_status(module: str) -> None:
    run = importlib.import_module(module).run
    signature = inspect.signature(run)
    assert len(signature.parameters) == 1
    assert signature.return_annotation == "int"
