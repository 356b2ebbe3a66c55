"""The serving and training engines that a model can be exported for, and how its weights are stored.

Torch-free.
"""

from __future__ import annotations

from typing import Literal, get_args

Target = Literal["transformers", "vllm", "sglang", "llama_cpp", "mlx", "megatron"]
TARGETS: tuple[Target, ...] = get_args(Target)

Quantization = Literal["none", "fp8_dynamic"]
"""How the matrices of attentions and FFNs are stored: as they are, or as in :mod:`puzzle.model.fp8`.

``fp8_dynamic`` is the scheme FP8_DYNAMIC of llm-compressor: a scale per channel of a weight, and one per token of its
inputs, found as the model runs.
"""

NO_FP8: dict[Target, str] = {
    "llama_cpp": "a GGUF file has no FP8 (export it with export.quantization=none and let llama-quantize make Q8_0)",
    "mlx": "MLX-LM takes all compressed-tensors for 4-bit integers (export with export.quantization=none and let "
    "mlx_lm.convert quantise)",
    "megatron": "Megatron-LM starts from unquantised weights and casts to FP8 itself (export with "
    "export.quantization=none and pass --fp8-format)",
}
"""Engines that read no FP8 checkpoint: why, and the way out."""
