"""The seeds that lm-eval's own command sets, for tasks that draw: of examples, prompts or answers."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

SEEDS = {"random_seed": 0, "numpy_seed": 1234, "torch_seed": 1234, "fewshot_seed": 1234}
"""By the names of lm-eval's results. The draw of worked examples has a generator of its own."""


@contextmanager
def seeded() -> Iterator[None]:
    """Seeds set anew, of every device; afterwards the generators are as they were. Imports torch."""
    import numpy
    import torch

    of_python, of_numpy = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        random.seed(SEEDS["random_seed"])
        numpy.random.seed(SEEDS["numpy_seed"])
        torch.manual_seed(SEEDS["torch_seed"])
        try:
            yield
        finally:
            random.setstate(of_python)
            numpy.random.set_state(of_numpy)
