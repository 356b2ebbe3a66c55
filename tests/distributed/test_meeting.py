"""What processes do not wait for: one that hangs, and a GPU that is another one's."""

from __future__ import annotations

from datetime import timedelta

import torch
from torch import distributed as torch_distributed

from distill import distributed
from distill.config import EngineConfig
from distill.engine.base import resolve_device
from tests.distributed.conftest import RunInProcesses


def _wait_for_one_that_hangs() -> str:
    distributed.join()
    try:
        with distributed.together():
            _hang_until_the_first_has_failed()
    except RuntimeError as error:
        return str(error)
    return "nobody failed"


def _hang_until_the_first_has_failed() -> None:
    store = torch_distributed.distributed_c10d._get_default_store()
    if not distributed.is_main():
        store.wait(["over"])
        raise RuntimeError("hung")
    try:
        with distributed.limited(timedelta(seconds=1)):
            distributed.all_reduce_sum(torch.zeros(1))
    finally:
        store.set("over", "")


def test_the_others_do_not_wait_for_one_that_hangs(run_in_processes: RunInProcesses) -> None:
    first, _ = run_in_processes(2, _wait_for_one_that_hangs)
    assert "imed out waiting 1000ms" in first


def _meet_slowly() -> list[timedelta]:
    distributed.join()

    def timeout() -> timedelta:
        backend = torch_distributed.group.WORLD._get_backend(torch.device("cpu"))
        return backend.options._timeout

    with distributed.together():
        seen = [timeout()]
        with distributed.limited(distributed.TIMEOUT):
            seen.append(timeout())
            with distributed.limited(distributed.STORAGE_TIMEOUT):
                seen.append(timeout())
            seen.append(timeout())
        return [*seen, timeout()]


def test_a_limit_holds_inside_of_it_alone(run_in_processes: RunInProcesses) -> None:
    limits = [distributed.PATIENCE, distributed.TIMEOUT, distributed.STORAGE_TIMEOUT]
    expected = [*limits, distributed.TIMEOUT, distributed.PATIENCE]
    assert run_in_processes(2, _meet_slowly) == [expected, expected]


def _choose_device(same: bool) -> tuple[str, str]:
    """Under a CUDA that there is not: two processes find the same device, or each its own."""
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 1
    torch.cuda.set_device = lambda _index: None
    torch.cuda.current_device = lambda: 0
    distributed._gpu = lambda: "GPU-0" if same else f"GPU-{distributed.local_rank()}"
    init = torch_distributed.init_process_group
    torch_distributed.init_process_group = lambda _backend, **settings: init("gloo", **settings)
    distributed.join()
    with distributed.together():
        assert resolve_device(EngineConfig(device="cpu")).type == "cpu"
        try:
            return "chosen", str(resolve_device(EngineConfig(device="auto")))
        except ValueError as error:
            return "refused", str(error)


def test_two_processes_on_one_gpu_are_refused(run_in_processes: RunInProcesses) -> None:
    for outcome, said in run_in_processes(2, _choose_device, True):
        assert outcome == "refused"
        assert "1 CUDA device, and each process needs one of its own" in said
        assert "--nproc-per-node 1, or set engine.device=cpu" in said


def test_processes_that_see_one_gpu_each_are_not(run_in_processes: RunInProcesses) -> None:
    assert run_in_processes(2, _choose_device, False) == [("chosen", "cuda:0")] * 2
