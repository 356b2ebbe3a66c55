"""AdamW and its learning rate."""

from __future__ import annotations

import math

import torch
from torch import nn

from distill.config import OptimConfig


def build_optimizer(model: nn.Module, config: OptimConfig, *, eps: float = 1e-8) -> torch.optim.AdamW:
    """AdamW over the trainable parameters, with decoupled weight decay on matrices only (never on norms and biases).

    ``eps`` is AdamW's, to be far below the gradients' size.
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    matrices = [(name, parameter) for name, parameter in named if parameter.ndim > 1]
    vectors = [(name, parameter) for name, parameter in named if parameter.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    on_cuda = all(parameter.is_cuda for _, parameter in named)
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=eps,
        fused=on_cuda,
        foreach=not on_cuda,
    )


def learning_rate(config: OptimConfig, spent_frac: float) -> float:
    """Learning rate at ``spent_frac`` of the token budget (0..1): linear warm-up, then the configured decay."""
    warmup = config.warmup_frac
    if spent_frac < warmup:
        return config.lr * spent_frac / warmup
    decayed_frac = (spent_frac - warmup) / (1 - warmup) if warmup < 1 else 0.0
    remaining = {
        "cosine": 0.5 * (1 + math.cos(math.pi * decayed_frac)),
        "linear": 1 - decayed_frac,
        "constant": 1.0,
    }[config.schedule]
    return config.lr * (config.min_lr_frac + (1 - config.min_lr_frac) * remaining)
