"""What both scorers score: one parent, one library and one set of samples, in our files and in Puzzletron's."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from distill.config import require
from distill.data.dataset import TokenDataset
from puzzle.library import BlockLibrary, subblock_of
from puzzle.model.architecture import Architecture, BlockConfig
from puzzle.model.checkpoint import read_architecture

LAYER = "model.layers."
SUBBLOCKS = "subblocks_safetensors"
SAME_IN_LLAMA = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "hidden_act", "rope_theta"),
    *("max_position_embeddings", "rope_scaling", "rms_norm_eps", "attention_bias", "mlp_bias", "torch_dtype"),
    *("tie_word_embeddings", "bos_token_id", "eos_token_id"),
)
"""Keys of config.json that the nemotron-nas format and transformers' Llama share."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is scored."""

    parent: Path
    data: Path
    library: Path
    puzzle_dir: Path
    candidates: tuple[tuple[int, str], ...]
    """Block and variant, in the order of Puzzletron's solutions."""


def prepare(work: Path, *, model: list[str], blocks: list[int], num_sequences: int, seq_len: int) -> Subject:
    """Run our stages up to the library, whose weights stay as initialised, and write the same for Puzzletron.

    Every block of ``blocks`` gets five candidates: attention kept, with one KV head or removed, beside the FFN at full
    or half width. ``seq_len`` counts the last token, which is a label only. Committed artifacts are found again.
    """
    parent = _stage(work, "import_parent", model)
    tokens = num_sequences * seq_len
    splits = {"train": 200_000, "validation": 20_000, "calibration": max(20_000, tokens)}
    data = _stage(
        work,
        "prepare_data",
        [f"inputs.parent={parent}", *(f"data.{name}_tokens={number}" for name, number in splits.items())],
    )
    num_blocks = read_architecture(parent).num_blocks
    require(
        all(0 <= index < num_blocks for index in blocks),
        f"--blocks {' '.join(map(str, blocks))}: the parent has blocks 0..{num_blocks - 1}",
    )
    kept = [index for index in range(num_blocks) if index not in blocks]
    library = _stage(
        work,
        "build_library",
        [
            f"inputs.parent={parent}",
            f"inputs.data={data}",
            "library.train=false",
            "library.importance_sequences=4",
            "library.bld.seq_len=256",
            "library.bld.eval_sequences=2",
            "space.kv_heads=[1]",
            "space.ffn_fracs=[0.5]",
            f"space.keep_attention={kept}",
            f"space.keep_ffn={kept}",
        ],
    )
    sequences = TokenDataset.open(data).split("calibration").first(num_sequences, seq_len)
    puzzle_dir = work / "puzzle_dir"
    candidates = write_for_peer(parent, BlockLibrary.open(library), sequences, puzzle_dir)
    return Subject(parent=parent, data=data, library=library, puzzle_dir=puzzle_dir, candidates=candidates)


def _stage(work: Path, name: str, overrides: list[str]) -> Path:
    """Run a stage, or find its artifact again."""
    command = [sys.executable, "-m", "launch", name, *overrides, f"run.root={work / 'artifacts'}"]
    # Wide, so that no path is broken over two lines.
    done = subprocess.run(command, env={**os.environ, "COLUMNS": "4000"}, stdout=subprocess.PIPE, text=True, check=True)
    return Path(done.stdout.rsplit("artifact: ", 1)[1].strip())


def write_for_peer(parent: Path, library: BlockLibrary, sequences: Tensor, out: Path) -> tuple[tuple[int, str], ...]:
    """Write what Puzzletron's scoring stage reads; block and variant of its solutions, in their order.

    Its stage takes subblocks from checkpoints that are cut into one file per subblock: the teacher, and one directory
    per variant with the subblocks that the library replaces.
    """
    shutil.rmtree(out, ignore_errors=True)
    architecture = read_architecture(parent)
    config = _llama_config(parent, architecture)
    _write_teacher(parent, config, out / "ckpts/teacher")
    of_teacher = [_replacement(index, block, {}, out, architecture) for index, block in enumerate(architecture.blocks)]
    candidates, solutions = [], []
    for index, block in _candidates(library):
        tensors = library.tensors(index, block)
        subblocks: dict[str, dict[str, Tensor]] = {subblock_of(name): {} for name in tensors}
        for name, tensor in tensors.items():
            subblocks[subblock_of(name)][f"{LAYER}{index}.{name}"] = tensor
        directory = out / "ckpts" / block.name
        for subblock, own in subblocks.items():
            _save(own, directory / SUBBLOCKS / f"block_{index}_{subblock}.safetensors")
        _write_json(directory / "config.json", config)
        replaced = _replacement(index, block, subblocks, out, architecture)
        candidates.append((index, block.name))
        chosen = [*of_teacher[:index], replaced, *of_teacher[index + 1 :]]
        solutions.append({"single_sequence_replacement": replaced, "chosen_replacements": chosen})
    replaced_only = [solution["single_sequence_replacement"] for solution in solutions]
    _write_json(out / "replacement_library.json", [*of_teacher, *replaced_only])
    _write_json(out / "single_sequence_replacement_solutions.json", solutions)
    _write_json(out / "samples.json", sequences.tolist())
    return tuple(candidates)


def _candidates(library: BlockLibrary) -> Iterator[tuple[int, BlockConfig]]:
    for index, blocks in enumerate(library.variants):
        for block in blocks:
            if block != library.parent.blocks[index]:
                yield index, block


def _write_teacher(parent: Path, config: dict[str, Any], out: Path) -> None:
    for path in parent.glob("*token*.json"):
        out.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, out)
    _write_json(out / "config.json", config)
    groups: dict[str, dict[str, Tensor]] = {}
    for path in sorted(parent.glob("model*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                groups.setdefault(_group_of(name), {})[name] = file.get_tensor(name)
    for group, tensors in groups.items():
        _save(tensors, out / SUBBLOCKS / f"{group}.safetensors")
    files = {name: f"{SUBBLOCKS}/{group}.safetensors" for group, tensors in groups.items() for name in tensors}
    _write_json(out / "model.safetensors.index.json", {"metadata": {"format": "pt"}, "weight_map": files})


def _group_of(name: str) -> str:
    """The file that holds a tensor of the whole model."""
    if name.startswith(LAYER):
        index, tensor = name.removeprefix(LAYER).split(".", 1)
        return f"block_{index}_{subblock_of(tensor)}"
    return "embeddings" if "embed_tokens" in name else "lm_head"


def _replacement(
    index: int, block: BlockConfig, replaced: Collection[str], out: Path, architecture: Architecture
) -> dict[str, Any]:
    present = {"attention": not block.attention.is_no_op, "ffn": not block.ffn.is_no_op}
    paths = [
        out / "ckpts" / (block.name if subblock in replaced else "teacher") / SUBBLOCKS / f"block_{index}_{subblock}"
        for subblock, is_present in present.items()
        if is_present
    ]
    return {
        "parent_layer_indices": [index],
        "child_block_configs": [_block_config(block)],
        "weight_paths": [f"{path}.safetensors" for path in paths],
    }


def _block_config(block: BlockConfig) -> dict[str, Any]:
    return {
        "attention": {"no_op": block.attention.is_no_op, "num_key_value_heads": block.attention.num_kv_heads},
        "ffn": {"no_op": block.ffn.is_no_op, "intermediate_size": block.ffn.ffn_dim},
    }


def _llama_config(parent: Path, architecture: Architecture) -> dict[str, Any]:
    """The parent as Puzzletron wants it: a Llama of transformers with the blocks beside."""
    require(architecture.family == "llama", f"the comparison takes a Llama, not a {architecture.family}")
    own = json.loads((parent / "config.json").read_text())
    first = architecture.blocks[0]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{name: own[name] for name in SAME_IN_LLAMA},
        "head_dim": architecture.head_dim,
        "num_key_value_heads": first.attention.num_kv_heads,
        "intermediate_size": first.ffn.ffn_dim,
        "block_configs": [_block_config(block) for block in architecture.blocks],
    }


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata={"format": "pt"})


def _write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
