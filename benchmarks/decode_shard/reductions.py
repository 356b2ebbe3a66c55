"""The all-reduce behind every subblock: none, NCCL's, or one shot over symmetric memory.

In the one shot every rank reads the addends of all others by itself, which is what serving engines do for the few
kilobytes of a decode step. Multicast (NVLS) is not used.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, distributed

Method = Literal["none", "nccl", "one_shot"]


class Reduction:
    """Sums ``addend`` [M, H] over the ranks into ``total``; both keep their addresses.

    Without communication both are one tensor. ``one_shot`` needs all ranks to make their reductions in one order.
    """

    def __init__(self, method: Method, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
        self.method = method
        if method == "one_shot":
            from torch.distributed import _symmetric_memory as symmetric_memory

            self._group_name = distributed.group.WORLD.group_name
            self.addend: Tensor = symmetric_memory.empty(shape, dtype=dtype, device=device)
            self.addend.zero_()
            symmetric_memory.rendezvous(self.addend, self._group_name)
            self.total: Tensor = torch.zeros(shape, dtype=dtype, device=device)
        else:
            self.addend = torch.zeros(shape, dtype=dtype, device=device)
            self.total = self.addend

    def __call__(self) -> None:
        if self.method == "nccl":
            distributed.all_reduce(self.addend)
        elif self.method == "one_shot":
            torch.ops.symm_mem.one_shot_all_reduce_out(self.addend, "sum", self._group_name, self.total)


def check_reduction(method: Method, device: torch.device) -> None:
    """Raise ``RuntimeError`` unless the ranks get the sum they should."""
    reduction = Reduction(method, (4, 1024), torch.bfloat16, device)
    rank, num_ranks = distributed.get_rank(), distributed.get_world_size()
    reduction.addend.fill_(rank + 1)
    distributed.barrier()
    reduction()
    found, expected = reduction.total.float().mean().item(), num_ranks * (num_ranks + 1) / 2
    if found != expected:
        raise RuntimeError(f"all-reduce {method} over {num_ranks} ranks gave {found}, expected {expected}")
