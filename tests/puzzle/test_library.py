from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from puzzle.config import SpaceConfig
from puzzle.library import BlockLibrary, Replacement, block_replacements, inherited_names, space_replacements
from puzzle.model.architecture import NO_ATTENTION, NO_FFN, Architecture, AttentionConfig, BlockConfig, FFNConfig

KV1 = AttentionConfig(num_kv_heads=1)
W256, W512 = FFNConfig(ffn_dim=256), FFNConfig(ffn_dim=512)


def block(parent: Architecture, index: int, **subblocks: AttentionConfig | FFNConfig) -> BlockConfig:
    return replace(parent.blocks[index], **subblocks)


@pytest.fixture
def library(tmp_path: Path, pico_architecture: Architecture) -> BlockLibrary:
    library = BlockLibrary.create(tmp_path / "library", pico_architecture, dtype=torch.bfloat16)
    contents = {
        Replacement(block=1, subblock="attention", variant=KV1): {"self_attn.k_proj.weight": torch.ones(16, 64)},
        Replacement(block=1, subblock="ffn", variant=W256): {"mlp.up_proj.weight": torch.ones(256, 64)},
        Replacement(block=1, subblock="ffn", variant=W512, beside="no_op"): {
            "mlp.up_proj.weight": torch.zeros(512, 64)
        },
    }
    for replacement, tensors in contents.items():
        library.add(replacement, tensors, bld_nmse_init=0.5, bld_nmse=0.25)
    library.write_index()
    return BlockLibrary.open(tmp_path / "library")


def test_replacements_of_a_space(pico_architecture: Architecture) -> None:
    space = SpaceConfig(kv_heads=(1,), ffn_fracs=(0.5, 0.25), ffn_no_op=True)
    names = [replacement.name for replacement in space_replacements(pico_architecture, space)]
    assert names[:2] == ["0.ffn.w256", "0.attention.kv1"]  # the first block keeps its attention; 0.25 is 256 wide too
    assert names[2:6] == ["1.ffn.w256", "1.attention.kv1", "1.ffn.w512.beside_no_op", "1.ffn.w256.beside_no_op"]
    assert len(names) == 2 + 3 * 4


def test_own_and_absent_subblocks_need_no_replacement(pico_architecture: Architecture) -> None:
    own = pico_architecture.blocks[1]
    assert block_replacements(pico_architecture, 1, own) == ()
    assert block_replacements(pico_architecture, 1, replace(own, ffn=NO_FFN)) == ()
    assert block_replacements(pico_architecture, 1, replace(own, attention=NO_ATTENTION, ffn=NO_FFN)) == ()


def test_ffn_of_a_parent_without_attention_stays_beside_its_parent(pico_architecture: Architecture) -> None:
    pruned = pico_architecture.with_block(1, block(pico_architecture, 1, attention=NO_ATTENTION))
    assert block_replacements(pruned, 1, pruned.blocks[1]) == ()
    (narrower,) = block_replacements(pruned, 1, block(pruned, 1, ffn=W256))
    assert narrower.beside == "parent"


def test_index_format(library: BlockLibrary) -> None:
    index = json.loads((library.directory / "library.json").read_text())
    assert index["parent_architecture"]["model_type"] == "nemotron-nas"
    assert index["replacements"][2] == {
        "block": 1,
        "subblock": "ffn",
        "variant": "w512",
        "beside": "no_op",
        "file": "replacements/1.ffn.w512.beside_no_op.safetensors",
        "bld_nmse_init": 0.5,
        "bld_nmse": 0.25,
    }


def test_tensors_of_a_block_are_those_of_its_replacements(library: BlockLibrary) -> None:
    parent = library.parent
    both = library.tensors(1, block(parent, 1, attention=KV1, ffn=W256))
    assert {name: tuple(tensor.shape) for name, tensor in both.items()} == {
        "self_attn.k_proj.weight": (16, 64),
        "mlp.up_proj.weight": (256, 64),
    }
    assert all(tensor.dtype == torch.bfloat16 for tensor in both.values())
    alone = library.tensors(1, block(parent, 1, attention=NO_ATTENTION))
    assert alone["mlp.up_proj.weight"].shape == (512, 64)
    assert library.tensors(1, parent.blocks[1]) == {}


def test_missing_replacement_is_named(library: BlockLibrary) -> None:
    wanted = block(library.parent, 2, attention=KV1)
    with pytest.raises(ValueError, match=r"no replacement 2\.attention\.kv1, which block 2 = kv1\+w512 needs"):
        library.tensors(2, wanted)
    with pytest.raises(ValueError, match="search space"):
        library.require_variants([(), (), (wanted,)])


def test_another_parent_is_refused(library: BlockLibrary, pico_architecture: Architecture) -> None:
    library.require_parent(pico_architecture)
    with pytest.raises(ValueError, match=r"4 blocks like kv2.w512, the model given has 3"):
        library.require_parent(pico_architecture.with_blocks(pico_architecture.blocks[:3]))


def test_inherited_names(pico_architecture: Architecture) -> None:
    names = [
        "input_layernorm.weight",
        "self_attn.q_proj.weight",
        "post_attention_layernorm.weight",
        "mlp.up_proj.weight",
    ]
    own = pico_architecture.blocks[1]
    without_attention = replace(own, attention=NO_ATTENTION)
    assert inherited_names(names, own, own, ()) == names
    assert inherited_names(names, own, without_attention, ()) == names[2:]
    assert inherited_names(names, own, without_attention, ["mlp.up_proj.weight"]) == []
    assert inherited_names(names, own, replace(own, ffn=NO_FFN), ()) == names[:2]
