from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from puzzle.assemble import assemble, child_architecture
from puzzle.child_init import CheckpointInit
from puzzle.config import SpaceConfig
from puzzle.importance import Rankings
from puzzle.library import BlockLibrary, Mode, library_replacements
from puzzle.model.checkpoint import TensorReader, load_model, read_architecture
from puzzle.model.tensor_layout import block_prefix
from puzzle.space import block_variants
from tests.puzzle.libraries import add


def make_library(directory: Path, parent_dir: Path, space: SpaceConfig, mode: Mode) -> BlockLibrary:
    """Untrained replacements, each with a mark of its own in its norm."""
    parent = read_architecture(parent_dir)
    variants = tuple(block_variants(parent, index, space) for index in range(parent.num_blocks))
    library = BlockLibrary.create(directory, parent, variants, dtype=torch.float32, mode=mode)
    rankings = Rankings(channels=dict.fromkeys(range(4), torch.arange(512)), kv_heads={}, criterion="independent")
    with TensorReader(parent_dir) as reader:
        init = CheckpointInit(reader, parent, rankings, "mean_pool")
        for mark, replacement in enumerate(library_replacements(parent, variants, mode)):
            tensors = {name: tensor + mark * name.endswith("norm.weight") for name, tensor in init(replacement).items()}
            add(library, replacement, tensors, bld_nmse_init=1.0, bld_nmse=1.0)
    library.write_index()
    return library


@pytest.fixture
def library(tmp_path: Path, lively_parent_dir: Path, space: SpaceConfig) -> BlockLibrary:
    return make_library(tmp_path / "library", lively_parent_dir, space, "decoupled")


def test_child_of_all_parent_variants_is_the_parent(
    tmp_path: Path, lively_parent_dir: Path, library: BlockLibrary
) -> None:
    child = assemble(lively_parent_dir, library, ["kv2+w512"] * 4, tmp_path / "child")
    assert child == read_architecture(lively_parent_dir) == read_architecture(tmp_path / "child")
    for name in ("config.json", "tokenizer.json"):
        assert (tmp_path / "child" / name).read_bytes() == (lively_parent_dir / name).read_bytes()
    with TensorReader(lively_parent_dir) as parent, TensorReader(tmp_path / "child") as reader:
        assert reader.names() == parent.names()
        assert all(torch.equal(reader.read(name), parent.read(name)) for name in parent.names())


def test_a_block_that_stands_for_removed_ones_still_does_in_the_child(
    lively_parent_dir: Path, space: SpaceConfig
) -> None:
    parent = read_architecture(lively_parent_dir)
    first = replace(parent.blocks[0], parent_block_indices=(0, 1), dropped_parent_indices=(1,))
    shortened = parent.with_blocks((first, *parent.blocks[2:]))

    child = child_architecture(shortened, ["no_op+w512", "kv2+w512", "kv2+w512"])

    assert (child.blocks[0].parent_block_indices, child.blocks[0].dropped_parent_indices) == ((0, 1), (1,))
    assert not child.blocks[0].is_fused
    assert not any(block.is_fused for block in block_variants(shortened, 0, space))


@pytest.mark.parametrize("mode", ["decoupled", "coupled"])
def test_every_tensor_of_a_child_comes_from_its_place(
    tmp_path: Path, lively_parent_dir: Path, space: SpaceConfig, sequences: Tensor, mode: Mode
) -> None:
    library = make_library(tmp_path / "library", lively_parent_dir, space, mode)
    variants = ["kv2+w256", "no_op+w512", "linear+w256", "kv1+no_op"]
    child = assemble(lively_parent_dir, library, variants, tmp_path / "child")
    assert [block.name for block in child.blocks] == variants
    assert [block.parent_block_indices for block in child.blocks] == [(0,), (1,), (2,), (3,)]
    with TensorReader(lively_parent_dir) as parent, TensorReader(tmp_path / "child") as reader:
        for index, block in enumerate(child.blocks):
            prefix = block_prefix(index)
            expected = library.tensors(index, block)
            found = {name.removeprefix(prefix): name for name in reader.names() if name.startswith(prefix)}
            for name, full_name in found.items():
                source = expected[name] if name in expected else parent.read(full_name)
                assert torch.equal(reader.read(full_name), source), full_name
            assert expected.keys() <= found.keys()
        assert not any(".self_attn." in name for name in reader.names() if name.startswith(block_prefix(1)))
        assert not any(".mlp." in name for name in reader.names() if name.startswith(block_prefix(3)))
    logits = load_model(tmp_path / "child")(sequences).logits
    assert torch.isfinite(logits).all()


def test_child_is_written_in_the_parents_data_type(
    tmp_path: Path, lively_parent_dir: Path, library: BlockLibrary
) -> None:
    assemble(lively_parent_dir, library, ["kv2+w256", *["kv1+w256"] * 3], tmp_path / "child")
    with TensorReader(tmp_path / "child") as reader:
        assert {reader.dtype(name) for name in reader.names()} == {torch.float32}


@pytest.mark.parametrize(
    ("variants", "message"),
    [
        (["kv2+w512"] * 3, "the solution has 3 blocks, the parent 4"),
        (["kv2+w512"] * 3 + ["kv2"], "is not <attention>"),
        (["no_op+w512"] + ["kv2+w512"] * 3, r"no replacement 0\.ffn\.w512\.beside_no_op"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    tmp_path: Path, lively_parent_dir: Path, library: BlockLibrary, variants: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        assemble(lively_parent_dir, library, variants, tmp_path / "child")
    assert not (tmp_path / "child").exists()


def test_replacement_of_the_wrong_shape_is_refused_before_anything_is_written(
    tmp_path: Path, lively_parent_dir: Path, library: BlockLibrary
) -> None:
    shutil.copyfile(
        library.directory / "replacements/2.ffn.w512.beside_no_op.safetensors",
        library.directory / "replacements/2.ffn.w256.safetensors",
    )
    with pytest.raises(
        ValueError, match=r"2\.ffn\.w256\.safetensors: tensor mlp\.down_proj.* \[64, 512\].* \[64, 256\]"
    ):
        assemble(lively_parent_dir, library, ["kv2+w256"] * 4, tmp_path / "child")
    assert not (tmp_path / "child").exists()


def test_child_architecture_keeps_everything_but_the_blocks(lively_parent_dir: Path) -> None:
    parent = read_architecture(lively_parent_dir)
    child = child_architecture(parent, ["no_op+w256"] * 4)
    assert child.with_blocks(parent.blocks) == parent
    assert all(block.is_attention_free for block in child.blocks)
