from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from puzzle.child_init import LibraryInit
from puzzle.config import SpaceConfig
from puzzle.library import (
    BlockLibrary,
    LibraryEntry,
    Mode,
    Replacement,
    Variants,
    block_replacements,
    crossed_variants,
    file_of,
    inherited_names,
    library_replacements,
)
from puzzle.model.architecture import NO_ATTENTION, NO_FFN, Architecture, AttentionConfig, BlockConfig, FFNConfig
from puzzle.model.checkpoint import TensorReader
from puzzle.space import block_variants
from tests.puzzle.libraries import add

KV1, KV2 = AttentionConfig(num_kv_heads=1), AttentionConfig(num_kv_heads=2)
W256, W512 = FFNConfig(ffn_dim=256), FFNConfig(ffn_dim=512)


def block(parent: Architecture, index: int, **subblocks: AttentionConfig | FFNConfig) -> BlockConfig:
    return replace(parent.blocks[index], **subblocks)


def space_variants(parent: Architecture, space: SpaceConfig) -> Variants:
    return tuple(block_variants(parent, index, space) for index in range(parent.num_blocks))


def fill(library: BlockLibrary) -> BlockLibrary:
    """Every replacement that the library's variants need, each tensor full of the replacement's ordinal."""
    for mark, item in enumerate(library_replacements(library.parent, library.variants, library.mode)):
        tensors = {name: torch.full(shape, float(mark)) for name, shape in item.shapes(library.parent).items()}
        add(library, item, tensors, bld_nmse_init=0.5, bld_nmse=0.25)
    library.write_index()
    return BlockLibrary.open(library.directory)


@pytest.fixture
def library(tmp_path: Path, pico_architecture: Architecture) -> BlockLibrary:
    own = pico_architecture.blocks
    at_1 = (own[1], block(pico_architecture, 1, attention=KV1, ffn=W256), replace(own[1], attention=NO_ATTENTION))
    variants = ((own[0],), at_1, (own[2],), (own[3],))
    return fill(BlockLibrary.create(tmp_path / "library", pico_architecture, variants, dtype=torch.bfloat16))


def test_decoupled_replacements_of_a_space(pico_architecture: Architecture) -> None:
    space = SpaceConfig(kv_heads=(1,), ffn_fracs=(0.5, 0.25), ffn_no_op=True)
    replacements = library_replacements(pico_architecture, space_variants(pico_architecture, space))
    names = [replacement.name for replacement in replacements]
    assert names[:1] == ["0.ffn.w256"]  # the first block keeps its attention; 0.25 is 256 wide too
    assert names[1:5] == ["1.ffn.w256", "1.attention.kv1", "1.ffn.w512.beside_no_op", "1.ffn.w256.beside_no_op"]
    assert len(names) == 1 + 3 * 4


def test_coupled_every_block_but_the_parents_and_the_empty_one_is_a_replacement(
    pico_architecture: Architecture,
) -> None:
    space = SpaceConfig(kv_heads=(1,), ffn_fracs=(0.5,), ffn_no_op=True)
    variants = space_variants(pico_architecture, space)
    replacements = library_replacements(pico_architecture, variants, "coupled")
    assert [item.name for item in replacements if item.block == 1] == [
        "1.block.kv2+w256",
        "1.attention.kv2.beside_no_op",
        "1.block.kv1+w512",
        "1.block.kv1+w256",
        "1.attention.kv1.beside_no_op",
        "1.ffn.w512.beside_no_op",
        "1.ffn.w256.beside_no_op",
    ]
    needing = [one for one in variants[1] if one != pico_architecture.blocks[1] and one.name != "no_op+no_op"]
    stands_in = [item.block_in(pico_architecture) for item in replacements if item.block == 1]
    assert stands_in == needing


def test_own_and_absent_subblocks_need_no_replacement(pico_architecture: Architecture) -> None:
    own = pico_architecture.blocks[1]
    assert block_replacements(pico_architecture, 1, own) == ()
    assert block_replacements(pico_architecture, 1, replace(own, ffn=NO_FFN)) == ()
    for mode in ("decoupled", "coupled"):
        nothing = replace(own, attention=NO_ATTENTION, ffn=NO_FFN)
        assert block_replacements(pico_architecture, 1, nothing, mode) == ()


@pytest.mark.parametrize("mode", ["decoupled", "coupled"])
def test_ffn_of_a_parent_without_attention_stays_beside_its_parent(pico_architecture: Architecture, mode: Mode) -> None:
    pruned = pico_architecture.with_block(1, block(pico_architecture, 1, attention=NO_ATTENTION))
    assert block_replacements(pruned, 1, pruned.blocks[1], mode) == ()
    (narrower,) = block_replacements(pruned, 1, block(pruned, 1, ffn=W256), mode)
    assert narrower.beside == "parent"


def test_index_format(library: BlockLibrary) -> None:
    index = json.loads((library.directory / "library.json").read_text())
    assert index["parent_architecture"]["model_type"] == "nemotron-nas"
    assert index["mode"] == "decoupled"
    assert index["variants"][1] == ["kv2+w512", "kv1+w256", "no_op+w512"]
    assert index["replacements"][2] == {
        "block": 1,
        "attention": None,
        "ffn": "w512",
        "beside": "no_op",
        "file": "replacements/1.ffn.w512.beside_no_op.safetensors",
        "bld_nmse_init": 0.5,
        "bld_nmse": 0.25,
        "trained": True,
    }


@pytest.mark.parametrize("mode", ["decoupled", "coupled"])
def test_index_round_trip(tmp_path: Path, pico_architecture: Architecture, space: SpaceConfig, mode: Mode) -> None:
    variants = space_variants(pico_architecture, space)
    written = BlockLibrary.create(tmp_path, pico_architecture, variants, dtype=torch.float32, mode=mode)
    read = fill(written)
    assert (read.mode, read.variants, read.entries) == (mode, variants, written.entries)
    read.require_parent(pico_architecture)
    read.require_variants(variants)


def test_tensors_of_a_block_are_those_of_its_replacements(library: BlockLibrary) -> None:
    parent = library.parent
    both = library.tensors(1, block(parent, 1, attention=KV1, ffn=W256))
    assert both["self_attn.k_proj.weight"].shape == (16, 64)
    assert both["mlp.up_proj.weight"].shape == (256, 64)
    assert all(tensor.dtype == torch.bfloat16 for tensor in both.values())
    alone = library.tensors(1, block(parent, 1, attention=NO_ATTENTION))
    assert alone["mlp.up_proj.weight"].shape == (512, 64)
    assert not any(name.startswith("self_attn.") for name in alone)
    assert library.tensors(1, parent.blocks[1]) == {}


def test_missing_replacement_is_named(library: BlockLibrary) -> None:
    wanted = block(library.parent, 2, attention=KV1)
    with pytest.raises(ValueError, match=r"no replacement 2\.attention\.kv1, which block 2 = kv1\+w512 needs"):
        library.tensors(2, wanted)
    with pytest.raises(ValueError, match="search space"):
        library.require_variants([(), (), (wanted,)])


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"mlp.up_proj.weight": torch.zeros(512, 64)}, r"up_proj.weight has shape \[512, 64\], the .* shape \[256, 64"),
        ({"mlp.up_proj.weight": None}, r"up_proj.weight has no place, the .* shape \[256, 64\]"),
        ({"mlp.up_proj.bias": torch.zeros(256)}, r"up_proj.bias has shape \[256\], the .* has no place"),
    ],
)
def test_file_of_the_wrong_shape_is_one_clear_error(
    library: BlockLibrary, tensors: dict[str, torch.Tensor | None], message: str
) -> None:
    item, wanted = Replacement(block=1, ffn=W256), block(library.parent, 1, ffn=W256)
    content = {name: torch.zeros(shape) for name, shape in item.shapes(library.parent).items()} | tensors
    path = library.directory / file_of(item)
    save_file({name: tensor for name, tensor in content.items() if tensor is not None}, path)
    message = rf"1\.ffn\.w256\.safetensors: tensor mlp\.{message}"
    with pytest.raises(ValueError, match=message):
        library.require_variants([(), (wanted,)])
    with pytest.raises(ValueError, match=message):
        library.tensors(1, wanted)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="is no readable safetensors file"):
        library.require_variants([(), (wanted,)])


def test_another_parent_is_refused(library: BlockLibrary, pico_architecture: Architecture) -> None:
    library.require_parent(pico_architecture)
    with pytest.raises(ValueError, match=r"4 blocks like kv2.w512, the model given has 3"):
        library.require_parent(pico_architecture.with_blocks(pico_architecture.blocks[:3]))


def test_crossed_variants_are_what_was_chosen_anywhere_and_the_parents(pico_architecture: Architecture) -> None:
    space = SpaceConfig(kv_heads=(1,), attention_linear=True, ffn_fracs=(0.5,), ffn_linear=True, ffn_no_op=True)
    variants = space_variants(pico_architecture, space)
    left = crossed_variants(variants, ["no_op+w512", "kv2+w256"])
    assert [one.name for one in left[0]] == ["kv2+w512", "kv2+w256"]  # the first attention is never removed
    assert [one.name for one in left[3]] == ["kv2+w512", "kv2+w256", "no_op+w512", "no_op+w256"]
    assert [one.name for one in crossed_variants(variants, ["linear+no_op"])[1]] == [
        "kv2+w512",
        "kv2+no_op",
        "linear+w512",
        "linear+no_op",
    ]


def test_crossed_variants_of_the_most_used_subblocks(pico_architecture: Architecture) -> None:
    """Uses are counted over all blocks; the parent's own subblock stays, however rarely it is used."""
    space = SpaceConfig(kv_heads=(1,), attention_linear=True, ffn_fracs=(0.5,), ffn_linear=True, ffn_no_op=True)
    variants = space_variants(pico_architecture, space)
    chosen = [*["linear+w256"] * 2, *["no_op+no_op"] * 3, "kv2+w256", "kv1+linear", "kv1+w256"]

    def left(**limits: int) -> list[str]:
        return [one.name for one in crossed_variants(variants, chosen, **limits)[1]]

    def crossed(attentions: list[str], ffns: list[str]) -> list[str]:
        return [f"{attention}+{ffn}" for attention in attentions for ffn in ffns]

    # no_op 3 uses, linear and kv1 2 each, of which linear comes first; w256 4 uses, no_op 3, linear 1
    all_attentions, all_ffns = ["kv2", "kv1", "linear", "no_op"], ["w512", "w256", "linear", "no_op"]
    assert left() == left(max_attentions=4, max_ffns=9) == crossed(all_attentions, all_ffns)
    assert left(max_attentions=3) == crossed(["kv2", "linear", "no_op"], all_ffns)
    assert left(max_attentions=2, max_ffns=3) == crossed(["kv2", "no_op"], ["w512", "w256", "no_op"])
    assert left(max_attentions=1, max_ffns=1) == ["kv2+w512"]
    # A block whose own attention is gone already offers as many as the others.
    pruned = pico_architecture.with_block(1, block(pico_architecture, 1, attention=NO_ATTENTION))
    at_1, at_2 = crossed_variants(space_variants(pruned, space), chosen, max_attentions=2, max_ffns=2)[1:3]
    assert [one.name for one in at_1] == ["no_op+w512", "no_op+w256"]
    assert [one.name for one in at_2] == crossed(["kv2", "no_op"], ["w512", "w256"])


def test_pairs_start_from_what_was_trained_apart(
    tmp_path: Path, pico_architecture: Architecture, pico_parent_dir: Path, space: SpaceConfig
) -> None:
    variants = space_variants(pico_architecture, space)
    earlier = fill(BlockLibrary.create(tmp_path, pico_architecture, variants, dtype=torch.float32))
    with TensorReader(pico_parent_dir) as reader:
        init = LibraryInit(earlier, reader)
        pair = init(Replacement(block=1, attention=KV1, ffn=W256))
        parents_attention = init(Replacement(block=1, attention=KV2, ffn=W256))
        alone = init(Replacement(block=1, ffn=W512, beside="no_op"))
        q_proj = reader.read("model.layers.1.self_attn.q_proj.weight")
    trained_apart = earlier.tensors(1, block(pico_architecture, 1, attention=KV1, ffn=W256))
    assert pair.keys() == trained_apart.keys()
    assert all(torch.equal(tensor, trained_apart[name]) for name, tensor in pair.items())
    assert torch.equal(parents_attention["self_attn.q_proj.weight"], q_proj)
    assert torch.equal(parents_attention["mlp.up_proj.weight"], pair["mlp.up_proj.weight"])
    removed = earlier.tensors(1, block(pico_architecture, 1, attention=NO_ATTENTION))
    assert alone.keys() == removed.keys()
    assert torch.equal(alone["mlp.up_proj.weight"], removed["mlp.up_proj.weight"])


def test_files_and_tensors_of_a_block_are_read_once_for_all_its_pairs(
    tmp_path: Path,
    pico_architecture: Architecture,
    pico_parent_dir: Path,
    space: SpaceConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    variants = space_variants(pico_architecture, space)
    earlier = fill(BlockLibrary.create(tmp_path, pico_architecture, variants, dtype=torch.float32))
    read = Counter[str]()

    def counting_load(library: BlockLibrary, entry: LibraryEntry, plain: Any = BlockLibrary.load) -> Any:
        read[entry.file] += 1
        return plain(library, entry)

    def counting_read(reader: TensorReader, name: str, plain: Any = TensorReader.read) -> Any:
        read[name] += 1
        return plain(reader, name)

    monkeypatch.setattr(BlockLibrary, "load", counting_load)
    monkeypatch.setattr(TensorReader, "read", counting_read)
    with TensorReader(pico_parent_dir) as reader:
        init = LibraryInit(earlier, reader)
        for replacement in library_replacements(pico_architecture, variants, "coupled"):
            init.origin(replacement)
            init(replacement)
    assert set(read.values()) == {1}
    assert {file for file in read if file.endswith(".safetensors")} == {one.file for one in earlier.entries.values()}


def test_origin_of_what_starts_from_an_earlier_library_is_the_content_of_its_files(
    tmp_path: Path, pico_architecture: Architecture, pico_parent_dir: Path, space: SpaceConfig
) -> None:
    variants = space_variants(pico_architecture, space)
    earlier = fill(BlockLibrary.create(tmp_path, pico_architecture, variants, dtype=torch.float32))
    pair, ffn = Replacement(block=1, attention=KV1, ffn=W256), Replacement(block=1, attention=KV2, ffn=W256)
    with TensorReader(pico_parent_dir) as reader:
        init = LibraryInit(earlier, reader)
        first = init.origin(pair)
        assert first == LibraryInit(BlockLibrary.open(tmp_path), reader).origin(pair)
        assert len(first["library"]) == 2
        assert init.origin(ffn) == {"library": first["library"][1:]}
        trained = earlier.tensors(1, block(pico_architecture, 1, ffn=W256))
        trained["mlp.up_proj.weight"] += 1e-3
        add(earlier, Replacement(block=1, ffn=W256), trained, bld_nmse_init=0.5, bld_nmse=0.25)
        assert init.origin(pair)["library"][0] == first["library"][0]
        assert init.origin(pair)["library"][1] != first["library"][1]
        save_file(trained, earlier.directory / file_of(Replacement(block=1, ffn=W256)))
        with pytest.raises(ValueError, match=r"1\.ffn\.w256\.safetensors is no file of a library .* build the library"):
            init.origin(pair)


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
