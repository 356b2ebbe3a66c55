"""Functions in several processes that meet through gloo, as torchrun's would."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

RunInProcesses = Callable[..., list[Any]]
TIMEOUT_SECONDS = 120
PRELOADED = ["torch", "transformers", "tests.distributed.conftest", "launch.__main__", "puzzle.slices"]
"""Imported once for all processes of a test run."""


def _process(connection: Connection, rank: int, num: int, port: int, function: Callable, arguments: tuple) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    torch.set_num_threads(1)
    try:
        connection.send(("returned", function(*arguments)))
    except BaseException:
        connection.send(("raised", traceback.format_exc()))


def _outcome(receiver: Connection) -> tuple[str, Any]:
    try:
        return receiver.recv()
    except EOFError:
        return "returned", None


@pytest.fixture
def run_in_processes(monkeypatch: pytest.MonkeyPatch) -> RunInProcesses:
    """``run_in_processes(num, function, *arguments)`` -> what the function returned, by rank; None where it died."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2])
    # Not forked from this process: autograd's threads, once started here, would not follow.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)

    def run(num: int, function: Callable, *arguments: Any) -> list[Any]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        pipes = [context.Pipe(duplex=False) for _ in range(num)]
        processes = [
            context.Process(target=_process, args=(sender, rank, num, port, function, arguments))
            for rank, (_, sender) in enumerate(pipes)
        ]
        for process, (_, sender) in zip(processes, pipes, strict=True):
            process.start()
            sender.close()
        outcomes: list[tuple[str, Any]] = []
        try:
            for receiver, _ in pipes:
                assert receiver.poll(TIMEOUT_SECONDS), f"process {len(outcomes)} hangs; before it: {outcomes}"
                outcomes.append(_outcome(receiver))
        finally:
            for process in processes:
                process.kill()
                process.join()
        for outcome, value in outcomes:
            assert outcome == "returned", value
        return [value for _, value in outcomes]

    return run
