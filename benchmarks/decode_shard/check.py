"""Every Triton kernel of this directory against plain torch, on the GPU or, with TRITON_INTERPRET=1, on the CPU.

    python benchmarks/decode_shard/check.py

Before that a whole decode step against the model file of the project. Prints one line per case, and ends with status 1
if one of them is off.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from self_check import Finding, self_check
from step_check import step_check


def main() -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    failed = 0
    for finding in _findings(device):
        error = "none" if finding.error is None else f"{finding.error:.2e}"
        verdict = "ok" if finding.passed else "FAILED"
        print(f"{verdict:<8}{error:>10} <= {finding.tolerance:<6}{finding.name} {finding.message}", flush=True)
        failed += not finding.passed
    return 1 if failed else 0


def _findings(device: torch.device) -> Iterator[Finding]:
    for fp8 in (False, True):
        for triton in (False, True):
            yield step_check(device, fp8=fp8, triton=triton)
    yield from self_check(device)


if __name__ == "__main__":
    sys.exit(main())
