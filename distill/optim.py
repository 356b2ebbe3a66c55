"""AdamW and its learning rate."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from distill.config import OptimConfig


def build_optimizer(
    model: nn.Module, config: OptimConfig, *, eps: float = 1e-8, fused: bool | None = None
) -> torch.optim.AdamW:
    """AdamW over the trainable parameters, with decoupled weight decay on matrices only (never on norms and biases).

    Args:
        model: its parameters, in their names.
        config: settings.
        eps: AdamW's, to be far below the gradients' size.
        fused: make the step in one pass over the state; None: on GPUs alone. On the CPU it is several times faster for
            large models, and another rounding.
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    matrices = [(name, parameter) for name, parameter in named if parameter.ndim > 1]
    vectors = [(name, parameter) for name, parameter in named if parameter.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    fused = all(parameter.is_cuda for _, parameter in named) if fused is None else fused
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=eps,
        fused=fused,
        foreach=not fused,
    )


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """State of an optimizer of :func:`build_optimizer` as ``<parameter>/<key>``; what has not been stepped has none."""
    names = _parameter_names(optimizer)
    state = optimizer.state_dict()["state"]
    return {f"{names[index]}/{key}": value for index, values in state.items() for key, value in values.items()}


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Undo of :func:`optimizer_tensors`; learning rate and the like stay as they are."""
    names = _parameter_names(optimizer)
    by_parameter: dict[str, dict[str, Tensor]] = {name: {} for name in names}
    for path, value in tensors.items():
        name, _, key = path.rpartition("/")
        by_parameter[name][key] = value
    state = {index: by_parameter[name] for index, name in enumerate(names)}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def init_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
    """Give AdamW the state of no step, which it otherwise has from its first step on: tensors to load into."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            # As AdamW does: the count stands on the device only where the fused kernel increments it.
            state["step"] = torch.zeros((), device=parameter.device if group["fused"] else "cpu")
            state["exp_avg"] = torch.zeros_like(parameter.detach())
            state["exp_avg_sq"] = torch.zeros_like(parameter.detach())


def _parameter_names(optimizer: torch.optim.Optimizer) -> list[str]:
    return [name for group in optimizer.param_groups for name in group["param_names"]]
