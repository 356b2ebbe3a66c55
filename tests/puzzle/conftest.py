"""A pico parent whose blocks do something: with small random weights every replacement would be near perfect."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from puzzle.config import SpaceConfig
from puzzle.model.architecture import Architecture
from puzzle.model.checkpoint import build_model, load_model, save_model
from puzzle.model.modeling_decilm import DeciLMForCausalLM


@pytest.fixture(scope="session")
def lively_parent_dir(
    pico_architecture: Architecture, pico_parent_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The pico parent with larger weights and uneven norms and channels. Not to be written to."""
    model = build_model(pico_architecture, seed=1)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5, generator=generator)
            elif "layers" in name:
                parameter.normal_(0.0, 0.1, generator=generator)
            if "gate_proj" in name:
                parameter *= torch.linspace(0.05, 2, len(parameter))[:, None]
    directory = tmp_path_factory.mktemp("lively") / "parent"
    save_model(model, directory, architecture=pico_architecture, tokenizer_from=pico_parent_dir)
    return directory


@pytest.fixture
def lively_parent(lively_parent_dir: Path) -> DeciLMForCausalLM:
    return load_model(lively_parent_dir)


@pytest.fixture(scope="session")
def space() -> SpaceConfig:
    """Every kind of variant: 2 attentions in block 0, 4 elsewhere; 4 FFNs everywhere."""
    return SpaceConfig(
        kv_heads=(1,), attention_linear=True, attention_no_op=True, ffn_fracs=(0.5,), ffn_linear=True, ffn_no_op=True
    )


@pytest.fixture
def sequences() -> Tensor:
    """Token ids [6, 24]."""
    return torch.randint(0, 320, (6, 24), generator=torch.Generator().manual_seed(2))
