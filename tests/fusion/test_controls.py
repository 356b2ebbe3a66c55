from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from distill.config import ObjectiveConfig
from fusion.config import FuseConfig
from fusion.controls import ffns_to_remove, remove_ffns, removed_architecture, reverse_groups
from fusion.group_table import FFNLatency, GroupTable, RemovalScore
from fusion.grouping import fused_architecture, fusion_groups
from launch.stages.distill import paired_blocks
from puzzle.model.checkpoint import TensorReader, load_model, read_architecture

A = (2, 256)
FFN = (None, 256)
WIDE = (None, 512)
BLOCKS = (A, FFN, (None, 768), WIDE, A, WIDE, FFN)
"""FFNs that differ in width, so that a block in the wrong place does not even load."""
INPUT_IDS = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(2))


def logits_in_order(model, order):
    """The model with its blocks called in ``order``, by hand."""
    hidden = model.model.embed(INPUT_IDS)
    shared = model.model.attention_inputs(hidden)
    for index in order:
        hidden = model.model.layers[index](hidden, **shared)
    return model.lm_head(model.model.norm(hidden))


def parents(architecture):
    return [block.parent_block_indices for block in architecture.blocks]


@pytest.mark.parametrize("fields", [{}, {"tie_embeddings": True}, {"qkv_bias": True, "family": "qwen2"}], ids=str)
@torch.inference_mode()
def test_reversed_groups(tmp_path, make_checkpoint, fields):
    make_checkpoint(tmp_path / "model", *BLOCKS, **fields)
    reordered = reverse_groups(tmp_path / "model", tmp_path / "out", ((1, 3), (5, 6)))
    assert read_architecture(tmp_path / "out") == reordered
    assert parents(reordered) == [(0,), (3,), (2,), (1,), (4,), (6,), (5,)]
    assert [block.ffn.ffn_dim for block in reordered.blocks] == [256, 512, 768, 256, 256, 256, 512]
    expected = logits_in_order(load_model(tmp_path / "model"), [0, 3, 2, 1, 4, 6, 5])
    # The same operations on the same weights in the same order.
    assert torch.equal(load_model(tmp_path / "out")(INPUT_IDS).logits, expected)


@torch.inference_mode()
def test_reversal_changes_the_model_and_undoes_itself(tmp_path, make_checkpoint):
    make_checkpoint(tmp_path / "model", *BLOCKS, dtype=torch.bfloat16)
    reverse_groups(tmp_path / "model", tmp_path / "once", ((1, 3),))
    reverse_groups(tmp_path / "once", tmp_path / "twice", ((1, 3),))
    logits = [load_model(tmp_path / name)(INPUT_IDS).logits for name in ("model", "once", "twice")]
    assert torch.equal(logits[0], logits[2])
    assert (logits[0] - logits[1]).abs().max() > 0.1
    assert load_model(tmp_path / "once").dtype == torch.bfloat16


@pytest.mark.parametrize("fields", [{}, {"tie_embeddings": True}, {"qk_norm": True, "family": "qwen3"}], ids=str)
@torch.inference_mode()
def test_removed_ffns(tmp_path, make_checkpoint, fields):
    make_checkpoint(tmp_path / "model", *BLOCKS, **fields)
    shortened = remove_ffns(tmp_path / "model", tmp_path / "out", (3, 1))
    assert read_architecture(tmp_path / "out") == shortened
    assert parents(shortened) == [(0, 1), (2, 3), (4,), (5,), (6,)]
    expected = logits_in_order(load_model(tmp_path / "model"), [0, 2, 4, 5, 6])
    assert torch.equal(load_model(tmp_path / "out")(INPUT_IDS).logits, expected)


@pytest.mark.parametrize(
    ("removed", "expected"),
    [
        ((1, 2, 3), [(0, 1, 2, 3), (4,), (5,), (6,)]),
        ((6,), [(0,), (1,), (2,), (3,), (4,), (5, 6)]),
        ((), [(0,), (1,), (2,), (3,), (4,), (5,), (6,)]),
    ],
)
def test_every_parent_block_is_still_stood_for(make_architecture, removed, expected):
    architecture = make_architecture(*BLOCKS)
    shortened = removed_architecture(architecture, removed)
    assert parents(shortened) == expected
    # Distillation from the unfused model pairs every block with the last one that it stands for.
    pairs = paired_blocks(shortened, architecture, ObjectiveConfig(kld=1.0, hidden_cosine=1.0))
    assert pairs == tuple(indices[-1] for indices in expected)


def test_an_heir_of_removed_ffns_is_not_fused_and_fuses_like_any_other(make_architecture):
    shortened = removed_architecture(make_architecture(*BLOCKS), (2, 6))
    assert [block.dropped_parent_indices for block in shortened.blocks] == [(), (2,), (), (), (6,)]
    assert [block.member_indices for block in shortened.blocks] == [(0,), (1,), (3,), (4,), (5,)]
    assert not any(block.is_fused for block in shortened.blocks)
    assert fusion_groups(shortened, FuseConfig(leave_last_out=False)) == ((1, 2),)

    fused = fused_architecture(shortened, ((1, 2),))
    assert fused.blocks[1].is_fused
    assert fused.blocks[1].parent_block_indices == (1, 2, 3)
    assert fused.blocks[1].member_indices == (1, 3)
    assert removed_architecture(fused, (3,)).blocks[1] == fused.blocks[1], "a further removal beside it adds nothing"


def test_a_fused_ffn_that_is_removed_leaves_all_its_members_places(make_architecture):
    fused = fused_architecture(make_architecture(*BLOCKS), ((1, 2),))
    shortened = removed_architecture(fused, (1,))
    assert shortened.blocks[0].parent_block_indices == (0, 1, 2)
    assert shortened.blocks[0].dropped_parent_indices == (1, 2)


def test_blocks_before_the_first_that_is_left_go_to_it(make_architecture):
    shortened = removed_architecture(make_architecture(FFN, FFN, A, FFN), (0, 1))
    assert parents(shortened) == [(0, 1, 2), (3,)]
    assert shortened.blocks[0].member_indices == (2,)


def test_reversed_blocks_can_be_distilled_unless_the_last_one_moved(make_architecture):
    architecture = make_architecture(*BLOCKS)
    objective = ObjectiveConfig(kld=1.0, hidden_cosine=1.0)
    order = [0, 3, 2, 1, 4, 5, 6]
    reordered = architecture.with_blocks(tuple(architecture.blocks[index] for index in order))
    assert paired_blocks(reordered, architecture, objective) == tuple(order)
    moved = architecture.with_blocks(tuple(architecture.blocks[index] for index in (0, 1, 2, 3, 4, 6, 5)))
    with pytest.raises(ValueError, match=r"do not have in the same place; .* set objective.hidden_cosine=0"):
        paired_blocks(moved, architecture, objective)


KLDS = {1: 0.3, 2: 0.1, 3: 0.2, 5: 0.05, 6: 0.4}


def removal_table(klds=KLDS, latencies=((256, 1.0), (512, 1.1), (768, 1.2), (1536, 1.5))):
    return GroupTable(
        num_tokens=1,
        norm="folded",
        lm_loss=3.0,
        groups=(),
        removals=tuple(RemovalScore(block=block, kld=kld, kld_stderr=0.0, lm_loss=3.0) for block, kld in klds.items()),
        latencies=tuple(FFNLatency(ffn_dim=width, prefill_ms=5 * ms, decode_ms=ms) for width, ms in latencies),
        hardware="none",
        workload={"generated_tokens": 3},
    )


@pytest.mark.parametrize(
    ("groups", "fields", "expected"),
    [
        # 1.0 + 1.2 + 1.1 - 1.5 = 1.8 ms are saved; the cheapest removal saves 1.2 ms, the next 1.1 ms.
        (((1, 3),), {}, (2, 3)),
        # 1.1 + 1.0 - 1.2 = 0.9 ms: the cheapest, of 1.1 ms, is enough.
        (((5, 6),), {}, (5,)),
        # 2.7 ms over both groups: 1.1 + 1.2 + 1.1.
        (((1, 3), (5, 6)), {}, (5, 2, 3)),
        (((1, 3), (5, 6)), {"latency": "prefill"}, (5, 2, 3)),
        (((1, 3), (5, 6)), {"latency": "request"}, (5, 2, 3)),
        (((1, 3), (5, 6)), {"num_removed": 1}, (5,)),
        (((1, 3), (5, 6)), {"num_removed": 5}, (5, 2, 3, 1, 6)),
    ],
)
def test_the_cheapest_removals_that_save_as_much_as_fusion(make_architecture, groups, fields, expected):
    config = FuseConfig(treatment="remove", **fields)
    assert ffns_to_remove(make_architecture(*BLOCKS), groups, removal_table(), config) == expected


def test_a_removal_that_saves_exactly_as_much_is_enough(make_architecture):
    """Latency in proportion to nothing: 1 ms per FFN of any width, so two FFNs fused save one."""
    table = removal_table(latencies=((256, 1.0), (1536, 1.0)))
    config = FuseConfig(treatment="remove")
    assert ffns_to_remove(make_architecture(*BLOCKS), ((5, 6),), table, config) == (5,)
    assert ffns_to_remove(make_architecture(*BLOCKS), ((1, 3),), table, config) == (2, 3)


@pytest.mark.parametrize(
    ("fields", "table", "message"),
    [
        ({"num_removed": 6}, removal_table(), "num_removed=6, but the groups have only 5 FFNs"),
        (
            {},
            removal_table(latencies=((256, 1.0), (512, 1.0), (768, 1.0), (1536, 5.0))),
            "fusing the groups saves -1 ms of decode latency, so there is nothing to match",
        ),
        ({}, removal_table({1: 0.3, 2: 0.1}), "removal of block 3 was not scored"),
        ({}, removal_table(latencies=((256, 1.0), (768, 1.2))), "no latency of an FFN of 1536 channels"),
    ],
    ids=["too many", "no gain", "not scored", "not timed"],
)
def test_what_cannot_be_chosen(make_architecture, fields, table, message):
    config = FuseConfig(treatment="remove", **fields)
    with pytest.raises(ValueError, match=message):
        ffns_to_remove(make_architecture(*BLOCKS), ((1, 3), (5, 6)), table, config)


@pytest.mark.parametrize("latencies", [((256, 0.1), (768, 0.3), (1536, 0.0)), ((256, 1 / 3), (768, 0.7), (1536, 0.0))])
def test_a_fused_ffn_that_took_no_time_is_matched_by_removing_all(make_architecture, latencies):
    """A latency that was clamped to 0, and sums whose order, and so rounding, differs."""
    removed = ffns_to_remove(
        make_architecture(*BLOCKS), ((1, 3),), removal_table(latencies=latencies), FuseConfig(treatment="remove")
    )
    assert removed == (2, 3, 1)


def test_refused_controls_write_nothing(tmp_path, make_checkpoint):
    make_checkpoint(tmp_path / "model", *BLOCKS)
    with pytest.raises(ValueError, match="block 4 is not one of SwiGLU FFN alone"):
        remove_ffns(tmp_path / "model", tmp_path / "out", (1, 4))
    with pytest.raises(ValueError, match="block 7 is not one of SwiGLU FFN alone"):
        remove_ffns(tmp_path / "model", tmp_path / "out", (7,))
    with pytest.raises(ValueError, match=r"block 0 of group \[0, 2\] has attention kv2"):
        reverse_groups(tmp_path / "model", tmp_path / "out", ((0, 2),))
    make_checkpoint(tmp_path / "ffns", FFN, FFN)
    with pytest.raises(ValueError, match="leaves no block of the model"):
        remove_ffns(tmp_path / "ffns", tmp_path / "out", (0, 1))
    assert not (tmp_path / "out").exists()


def drop(tensors):
    del tensors["model.layers.5.mlp.up_proj.weight"]


def narrow(tensors):
    tensors["model.layers.5.mlp.up_proj.weight"] = tensors["model.layers.5.mlp.up_proj.weight"][:128].clone()


def quantise(tensors):
    name = "model.layers.5.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)


def add_bias(tensors):
    tensors["model.layers.5.mlp.up_proj.bias"] = torch.zeros(512)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop, r"it lacks \['model.layers.5.mlp.up_proj.weight'\]"),
        (narrow, r"model.layers.5.mlp.up_proj.weight is \[128, 32\], config.json says \[512, 32\]"),
        (quantise, r"model.layers.5.mlp.up_proj.weight is stored as F8_E4M3, not as one of"),
        (add_bias, r"it lacks \[\] and has \['model.layers.5.mlp.up_proj.bias'\] besides"),
    ],
)
@pytest.mark.parametrize(
    "control",
    [lambda source, out: reverse_groups(source, out, ((1, 3),)), lambda source, out: remove_ffns(source, out, (1,))],
    ids=["reverse", "remove"],
)
def test_checkpoint_that_does_not_fit_is_refused_before_anything_is_written(
    tmp_path, make_checkpoint, control, damage, message
):
    make_checkpoint(tmp_path / "model", *BLOCKS)
    file = next((tmp_path / "model").glob("*.safetensors"))
    tensors = load_file(file)
    damage(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        control(tmp_path / "model", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_untouched_tensors_are_copied_bit_for_bit(tmp_path, make_checkpoint):
    make_checkpoint(tmp_path / "model", *BLOCKS, dtype=torch.bfloat16)
    remove_ffns(tmp_path / "model", tmp_path / "out", (2,))
    places = {0: 0, 1: 1, 2: 3, 3: 4, 4: 5, 5: 6}
    with TensorReader(tmp_path / "model") as before, TensorReader(tmp_path / "out") as after:
        assert len(after.names()) == len(before.names()) - 4
        for name in after.names():
            parts = name.split(".")
            if parts[1] == "layers":
                parts[2] = str(places[int(parts[2])])
            assert torch.equal(after.read(name), before.read(".".join(parts))), name
