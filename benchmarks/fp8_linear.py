"""Linear layers as engines compute them on an FP8 checkpoint: FP8 weights and inputs, a scale per channel and token."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from puzzle.model.fp8 import quantize
from puzzle.model.modeling_decilm import DeciLMForCausalLM


class Fp8Linear(nn.Module):
    """A linear layer without gradient whose weight is quantised once and whose inputs are quantised per token.

    Products are summed in fp32 and scaled then, so that nothing but the two quantisations and the output is rounded.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear, *, scaled_mm: bool = False) -> None:
        """Quantise the weight of ``linear``, which may be on any device.

        Args:
            linear: its weight is [out, in]; a bias is kept as it is.
            scaled_mm: multiply in FP8 with ``torch._scaled_mm``, which needs a GPU of compute capability 8.9 or more,
                both dimensions divisible by 16, and bf16 outputs; False: multiply the same values in fp32.
        """
        super().__init__()
        weight, scale = quantize(linear.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.bias = linear.bias
        self.scaled_mm = scaled_mm

    def forward(self, inputs: Tensor) -> Tensor:
        """``inputs [..., in]`` -> [..., out], in the same data type."""
        values, scale = quantize(inputs.flatten(0, -2))
        return self.multiply(values, scale, inputs.dtype).unflatten(0, inputs.shape[:-1])

    def multiply(self, values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """Quantised inputs [tokens, in] with scales [tokens, 1] -> [tokens, out] of ``dtype``, rounded once."""
        if self.scaled_mm:
            return torch._scaled_mm(
                values,
                self.weight.t(),
                scale_a=scale,
                scale_b=self.scale.t().contiguous(),
                bias=None if self.bias is None else self.bias.to(dtype),
                out_dtype=dtype,
            )
        outputs = F.linear(values.float(), self.weight.float()) * scale * self.scale.t()
        return (outputs if self.bias is None else outputs + self.bias).to(dtype)


def with_fp8_linears(model: DeciLMForCausalLM, *, scaled_mm: bool = False) -> DeciLMForCausalLM:
    """``model`` with an :class:`Fp8Linear` in place of every linear layer within its blocks, changed in place.

    Those are the layers that an FP8 export quantises.
    """
    assert model.model.layers is not None
    for block in model.model.layers:
        names = [name for name, module in block.named_modules() if isinstance(module, nn.Linear)]
        for name in names:
            owner, _, leaf = name.rpartition(".")
            setattr(block.get_submodule(owner), leaf, Fp8Linear(block.get_submodule(name), scaled_mm=scaled_mm))
    return model
