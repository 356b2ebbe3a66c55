"""The serving and training engines that a model can be exported for. Torch-free."""

from __future__ import annotations

from typing import Literal, get_args

Target = Literal["transformers", "vllm", "sglang", "llama_cpp", "mlx", "megatron"]
TARGETS: tuple[Target, ...] = get_args(Target)
