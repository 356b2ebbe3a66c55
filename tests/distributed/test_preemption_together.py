from __future__ import annotations

import os
import signal

from distill import distributed
from launch import preemption
from tests.distributed.conftest import RunInProcesses


def _one_of_two_is_asked() -> list[bool]:
    distributed.join()
    preemption.install()
    with distributed.together():
        before = preemption.should_stop()
        if distributed.rank() == 1:
            os.kill(os.getpid(), signal.SIGUSR2)
        answers = [before, preemption.should_stop()]
    distributed.leave()
    return answers


def test_the_processes_agree(run_in_processes: RunInProcesses) -> None:
    assert run_in_processes(2, _one_of_two_is_asked) == [[False, True], [False, True]]
