"""The serving and training engines that a model can be exported for, and how its weights are stored.

Torch-free.
"""

from __future__ import annotations

from typing import Literal, get_args

Target = Literal["transformers", "vllm", "sglang", "llama_cpp", "mlx", "megatron"]
TARGETS: tuple[Target, ...] = get_args(Target)

Quantization = Literal["none", "fp8"]
"""How the matrices of attentions and FFNs are stored: as they are, or as in :mod:`puzzle.model.fp8`."""
