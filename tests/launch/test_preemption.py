from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch import preemption

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _handlers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR2, signal.SIGTERM)}
    monkeypatch.setattr(preemption, "_is_asked", False)
    preemption.install()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_the_flag_is_set_by_the_signal_alone() -> None:
    assert not preemption.should_stop()
    os.kill(os.getpid(), signal.SIGUSR2)
    assert preemption.should_stop()
    assert preemption.should_stop()


def test_a_term_is_a_wish_while_somebody_polls() -> None:
    with preemption.polled():
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.should_stop()


PROCESS = """
import os, signal, sys
from launch import preemption
preemption.install()
assert "torch" not in sys.modules
{body}
"""


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ("os.kill(os.getpid(), signal.SIGUSR2); sys.exit(preemption.EXIT_STATUS)", 75),
        ("os.kill(os.getpid(), signal.SIGTERM); sys.exit(0)", -signal.SIGTERM),
        (
            "with preemption.polled():\n"
            "    os.kill(os.getpid(), signal.SIGTERM)\n"
            "    os.kill(os.getpid(), signal.SIGTERM)\n"
            "    sys.exit(0)",
            -signal.SIGTERM,
        ),
        ("with preemption.polled():\n    os.kill(os.getpid(), signal.SIGTERM)\nsys.exit(75)", 75),
    ],
    ids=["usr2", "term elsewhere", "second term", "term while polled"],
)
def test_how_a_process_ends(body: str, status: int) -> None:
    done = subprocess.run([sys.executable, "-c", PROCESS.format(body=body)], cwd=ROOT, check=False)
    assert done.returncode == status
