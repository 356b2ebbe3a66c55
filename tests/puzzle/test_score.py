"""Scores against a plain definition: the whole child built anew, both models run, every formula in fp64."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from puzzle import replacement_runs
from puzzle.config import SpaceConfig
from puzzle.model.architecture import NO_ATTENTION, NO_FFN, Architecture, BlockConfig, FFNConfig
from puzzle.model.checkpoint import build_model, load_model
from puzzle.model.modeling_decilm import DeciLMDecoderLayer, DeciLMForCausalLM
from puzzle.model.tensor_layout import block_shapes
from puzzle.score import Scores, at_depth, score_variants
from puzzle.score_metrics import CHUNK_VALUES, METRICS, sequence_metrics
from puzzle.slices import ParentSlice
from puzzle.space import block_variants
from puzzle.tables import ScoreRow

OWN = "kv2+w512"
Replaced = Callable[[int, BlockConfig], dict[str, Tensor]]


@pytest.fixture
def replaced(pico_architecture: Architecture) -> Replaced:
    """Random weights for what differs from the parent, and for every FFN whose attention is gone."""

    def tensors(index: int, variant: BlockConfig) -> dict[str, Tensor]:
        own = pico_architecture.blocks[index]
        prefixes: tuple[str, ...] = ()
        if variant.attention != own.attention:
            prefixes += ("self_attn.", "input_layernorm.")
        if variant.ffn != own.ffn or variant.attention == NO_ATTENTION:
            prefixes += ("mlp.", "post_attention_layernorm.")
        generator = torch.Generator().manual_seed(1000 * index + sum(map(ord, variant.name)))
        return {
            name: torch.randn(shape, generator=generator) * 0.1
            for name, shape in block_shapes(pico_architecture, variant).items()
            if name.startswith(prefixes)
        }

    return tensors


@pytest.fixture
def variants(pico_architecture: Architecture, space: SpaceConfig) -> list[tuple[BlockConfig, ...]]:
    return [block_variants(pico_architecture, index, space) for index in range(4)]


def child_of(
    parent: DeciLMForCausalLM, architecture: Architecture, blocks: Mapping[int, BlockConfig], replaced: Replaced
) -> DeciLMForCausalLM:
    """A whole model with ``blocks`` in place of the parent's."""
    for index, block in blocks.items():
        architecture = architecture.with_block(index, block)
    child = build_model(architecture, seed=0)
    state = {name: tensor for name, tensor in parent.state_dict().items() if name in child.state_dict()}
    for index, block in blocks.items():
        state |= {f"model.layers.{index}.{name}": tensor for name, tensor in replaced(index, block).items()}
    child.load_state_dict(state | {"lm_head.weight": parent.lm_head.weight}, strict=True)
    return child.eval()


@torch.no_grad()
def plain_metrics(child: DeciLMForCausalLM, parent: DeciLMForCausalLM, sequences: Tensor) -> dict[str, Tensor]:
    """Every metric of every sequence."""
    states, teacher_states = (model.model(sequences).last_hidden_state[:, :-1].double() for model in (child, parent))
    log_q = (states @ child.lm_head.weight.double().T).log_softmax(-1)
    log_p = (teacher_states @ parent.lm_head.weight.double().T).log_softmax(-1)
    return {
        "kld": (log_p.exp() * (log_p - log_q)).sum(-1).mean(1),
        "lm_loss": -log_q.gather(-1, sequences[:, 1:, None])[..., 0].mean(1),
        "top1_disagreement": (log_q.argmax(-1) != log_p.argmax(-1)).double().mean(1),
        "hidden_cosine": 1 - torch.cosine_similarity(states, teacher_states, dim=-1).mean(1),
    }


def score(
    parent: DeciLMForCausalLM,
    architecture: Architecture,
    variants: Sequence[Sequence[BlockConfig]],
    replaced: Replaced,
    sequences: Tensor,
    *,
    batch_size: int = 4,
    **options: object,
) -> Scores:
    options = {"batch_size": batch_size, **options}
    return score_variants(ParentSlice.whole(parent), architecture, variants, replaced, sequences, **options)


def without_attention(architecture: Architecture, index: int) -> BlockConfig:
    return replace(architecture.blocks[index], attention=NO_ATTENTION)


def assert_same(rows: Sequence[ScoreRow], others: Sequence[ScoreRow], *, rel: float, abs: float) -> None:
    for row, other in zip(rows, others, strict=True):
        assert (row.block, row.variant) == (other.block, other.variant)
        assert row.values == pytest.approx(other.values, rel=rel, abs=abs), row


def test_scores_equal_building_every_child(
    lively_parent: DeciLMForCausalLM,
    pico_architecture: Architecture,
    variants: list[tuple[BlockConfig, ...]],
    replaced: Replaced,
    sequences: Tensor,
) -> None:
    scores = score(lively_parent, pico_architecture, variants, replaced, sequences)
    assert len(scores.table.rows) == 4 + 3 * 16
    assert scores.table.num_tokens == sequences.numel()
    assert scores.table.base is None
    assert scores.table.base_values is None
    own = plain_metrics(lively_parent, lively_parent, sequences)
    assert scores.table.parent["lm_loss"] == pytest.approx(own["lm_loss"].mean().item(), abs=1e-6)
    flat = [(index, variant) for index in range(4) for variant in variants[index]]
    for number, ((index, variant), row) in enumerate(zip(flat, scores.table.rows, strict=True)):
        assert (row.block, row.variant) == (index, variant.name)
        child = child_of(lively_parent, pico_architecture, {index: variant}, replaced)
        plain = plain_metrics(child, lively_parent, sequences)
        for name in METRICS:
            differences = plain[name] - own[name]
            # Both run the blocks in fp32: values up to 5, rounded at 1e-7 in every step.
            torch.testing.assert_close(scores.per_sequence[name][number], differences, rtol=1e-6, atol=1e-6)
            assert row.values[name] == pytest.approx(differences.mean().item(), rel=1e-6, abs=1e-6), (row, name)
            stderr = differences.std().item() / math.sqrt(6)
            assert row.stderr[name] == pytest.approx(stderr, rel=1e-4, abs=1e-6), (row, name)


def test_the_parents_own_block_scores_zero(
    lively_parent: DeciLMForCausalLM,
    pico_architecture: Architecture,
    variants: list[tuple[BlockConfig, ...]],
    replaced: Replaced,
    sequences: Tensor,
) -> None:
    table = score(lively_parent, pico_architecture, variants, replaced, sequences).table
    rows = [row for row in table.rows if row.variant == OWN]
    assert [row.block for row in rows] == [0, 1, 2, 3]
    for row in rows:
        assert set(row.values.values()) == set(row.stderr.values()) == {0.0}


@pytest.mark.parametrize("batch_size", [1, 5, 13, 200])
def test_scores_do_not_depend_on_the_batch_size(
    lively_parent: DeciLMForCausalLM,
    pico_architecture: Architecture,
    variants: list[tuple[BlockConfig, ...]],
    replaced: Replaced,
    sequences: Tensor,
    batch_size: int,
) -> None:
    """From one sequence of one variant to all variants of a block in one forward."""
    first = score(lively_parent, pico_architecture, variants, replaced, sequences, batch_size=4).table.rows
    second = score(lively_parent, pico_architecture, variants, replaced, sequences, batch_size=batch_size).table.rows
    # fp32 matrix products of another shape add up in another order
    assert_same(first, second, rel=1e-5, abs=1e-6)


def test_scores_do_not_depend_on_how_much_fits_memory(
    monkeypatch: pytest.MonkeyPatch,
    lively_parent: DeciLMForCausalLM,
    pico_architecture: Architecture,
    variants: list[tuple[BlockConfig, ...]],
    replaced: Replaced,
    sequences: Tensor,
) -> None:
    whole = score(lively_parent, pico_architecture, variants, replaced, sequences, batch_size=20).table.rows
    monkeypatch.setattr(replacement_runs, "GROUP_BYTES", 500_000)
    monkeypatch.setitem(CHUNK_VALUES, "cpu", 7 * 320)
    parts = score(lively_parent, pico_architecture, variants, replaced, sequences, batch_size=20).table.rows
    assert_same(whole, parts, rel=1e-5, abs=1e-6)  # as above


def test_one_variants_error_does_not_reach_another(
    lively_parent: DeciLMForCausalLM, pico_architecture: Architecture, replaced: Replaced, sequences: Tensor
) -> None:
    """Alone or beside others in one forward."""
    narrow = replace(pico_architecture.blocks[2], ffn=FFNConfig(ffn_dim=256))
    candidates = [[block] for block in pico_architecture.blocks]
    candidates[2] = [narrow]
    alone = score(lively_parent, pico_architecture, candidates, replaced, sequences, batch_size=100).table.rows
    candidates[2] = [narrow, without_attention(pico_architecture, 2)]
    beside = score(lively_parent, pico_architecture, candidates, replaced, sequences, batch_size=100).table.rows
    assert_same(alone, [row for row in beside if row.variant != "no_op+w512"], rel=1e-5, abs=1e-6)


def test_bf16_scores_are_near_those_of_fp32(
    lively_parent: DeciLMForCausalLM,
    lively_parent_dir: Path,
    pico_architecture: Architecture,
    variants: list[tuple[BlockConfig, ...]],
    replaced: Replaced,
    sequences: Tensor,
) -> None:
    full = score(lively_parent, pico_architecture, variants, replaced, sequences).table
    half_parent = load_model(lively_parent_dir, dtype=torch.bfloat16)
    half = score(half_parent, pico_architecture, variants, replaced, sequences).table
    # weights of 8 bits: 1% of a loss near log(320), and of KLDs far above the rounding noise of 1e-4
    assert half.parent["lm_loss"] == pytest.approx(full.parent["lm_loss"], rel=1e-2)
    # Losses are taken in fp32: in bf16 each would be a multiple of 1/32.
    losses = [half.parent["lm_loss"], *(half.parent["lm_loss"] + row.values["lm_loss"] for row in half.rows)]
    assert all(abs(32 * loss - round(32 * loss)) > 1e-4 for loss in losses)
    for row, row_half in zip(full.rows, half.rows, strict=True):
        assert row_half.values["kld"] == pytest.approx(row.values["kld"], rel=0.05, abs=1e-3)


def test_one_sequence_has_no_standard_error(
    lively_parent: DeciLMForCausalLM,
    pico_architecture: Architecture,
    variants: list[tuple[BlockConfig, ...]],
    replaced: Replaced,
    sequences: Tensor,
) -> None:
    with pytest.raises(ValueError, match="num_sequences >= 2"):
        score(lively_parent, pico_architecture, variants, replaced, sequences[:1])


def test_conditional_scores_are_differences_to_the_base(
    lively_parent: DeciLMForCausalLM, pico_architecture: Architecture, replaced: Replaced, sequences: Tensor
) -> None:
    gone, no_ffn = without_attention(pico_architecture, 1), replace(pico_architecture.blocks[3], ffn=NO_FFN)
    base = {1: gone, 3: no_ffn}
    narrow = replace(gone, ffn=FFNConfig(ffn_dim=256))
    candidates = [[block] for block in pico_architecture.blocks]
    candidates[0].append(replace(candidates[0][0], ffn=FFNConfig(ffn_dim=256)))
    candidates[1], candidates[3] = [gone, narrow], [no_ffn]
    blocks = [base.get(index, block) for index, block in enumerate(pico_architecture.blocks)]
    table = score(lively_parent, pico_architecture, candidates, replaced, sequences, base=blocks).table
    assert table.base == (OWN, "no_op+w512", OWN, "kv2+no_op")

    def plain(further: Mapping[int, BlockConfig]) -> dict[str, float]:
        child = child_of(lively_parent, pico_architecture, {**base, **further}, replaced)
        return {name: v.mean().item() for name, v in plain_metrics(child, lively_parent, sequences).items()}

    own = {n: v.mean().item() for n, v in plain_metrics(lively_parent, lively_parent, sequences).items()}
    at_base = plain({})
    # fp32 against the same models in another batch
    assert table.base_values == pytest.approx({name: at_base[name] - own[name] for name in METRICS}, abs=1e-6)
    by_name = {(row.block, row.variant): row.values for row in table.rows}
    for block, variant in ((0, candidates[0][1]), (1, narrow)):
        expected = {name: value - at_base[name] for name, value in plain({block: variant}).items()}
        assert by_name[block, variant.name] == pytest.approx(expected, abs=1e-6)
    assert set(by_name[1, "no_op+w512"].values()) == {0.0}
    # Beside what is gone already the same narrowing costs something else.
    alone = score(lively_parent, pico_architecture, [candidates[0], *candidates[1:]], replaced, sequences).table
    assert alone.by_block("kld")[0]["kv2+w256"] != pytest.approx(by_name[0, "kv2+w256"]["kld"], rel=1e-3)


def test_increments_of_removals_add_up_to_the_realised_child(
    lively_parent: DeciLMForCausalLM,
    pico_architecture: Architecture,
    variants: list[tuple[BlockConfig, ...]],
    replaced: Replaced,
    sequences: Tensor,
) -> None:
    alone = score(lively_parent, pico_architecture, variants, replaced, sequences).table
    scores = score(lively_parent, pico_architecture, variants, replaced, sequences, iterative_removals=2)
    assert len(scores.removals) == 2
    removed = {index: without_attention(pico_architecture, index) for index in scores.removals}
    realised = plain_metrics(child_of(lively_parent, pico_architecture, removed, replaced), lively_parent, sequences)
    own = plain_metrics(lively_parent, lively_parent, sequences)
    row_of = {(row.block, row.variant): number for number, row in enumerate(scores.table.rows)}
    for name in METRICS:
        summed = sum(scores.per_sequence[name][row_of[index, "no_op+w512"]] for index in removed)
        # The sum telescopes exactly; what is left is fp32 against another order of the same sums.
        torch.testing.assert_close(summed, realised[name] - own[name], rtol=1e-6, atol=1e-6)
    first, second = scores.removals
    plain = [alone.by_block("kld")[block] for block in range(4)]
    conditional = [scores.table.by_block("kld")[block] for block in range(4)]
    assert first == min((1, 2, 3), key=lambda block: plain[block]["no_op+w512"])
    assert conditional[first]["no_op+w512"] == pytest.approx(plain[first]["no_op+w512"], abs=1e-12)
    correction = conditional[second]["no_op+w512"] - plain[second]["no_op+w512"]
    assert abs(correction) > 1e-4
    for variant in ("no_op+w256", "no_op+linear", "no_op+no_op"):
        assert conditional[second][variant] == pytest.approx(plain[second][variant] + correction, abs=1e-9)
    for variant in (OWN, "kv1+w256", "linear+w512"):
        assert conditional[second][variant] == pytest.approx(plain[second][variant], abs=1e-12)


def test_the_attention_that_stays_has_its_score_of_the_last_round(
    lively_parent: DeciLMForCausalLM,
    pico_architecture: Architecture,
    replaced: Replaced,
    sequences: Tensor,
) -> None:
    variants = [[block] for block in pico_architecture.blocks]
    for index in (1, 2, 3):
        variants[index].append(without_attention(pico_architecture, index))
    scores = score(lively_parent, pico_architecture, variants, replaced, sequences, iterative_removals=2)
    (left,) = {1, 2, 3} - set(scores.removals)
    first = {scores.removals[0]: without_attention(pico_architecture, scores.removals[0])}
    both = {**first, left: without_attention(pico_architecture, left)}
    klds = [
        plain_metrics(child_of(lively_parent, pico_architecture, blocks, replaced), lively_parent, sequences)["kld"]
        for blocks in (first, both)
    ]
    expected = (klds[1] - klds[0]).mean().item()
    assert scores.table.by_block("kld")[left]["no_op+w512"] == pytest.approx(expected, abs=1e-6)


def test_more_removals_than_there_are_is_an_error(
    lively_parent: DeciLMForCausalLM,
    pico_architecture: Architecture,
    variants: list[tuple[BlockConfig, ...]],
    replaced: Replaced,
    sequences: Tensor,
) -> None:
    with pytest.raises(ValueError, match="removal of 4 attentions, but only 3 blocks"):
        score(lively_parent, pico_architecture, variants, replaced, sequences, iterative_removals=4)


def test_at_depth_keeps_what_lacks_the_same(pico_architecture: Architecture) -> None:
    own = pico_architecture.blocks[0]
    gone, narrow = replace(own, attention=NO_ATTENTION), replace(own, ffn=FFNConfig(ffn_dim=256))
    both, bare = replace(gone, ffn=FFNConfig(ffn_dim=256)), replace(own, ffn=NO_FFN)
    variants = [(own, narrow, gone, both, bare)] * 3 + [(own, narrow, both)]
    base, left = at_depth(variants, (narrow, both, bare, both))
    # The last block has no variant that lacks the attention alone: the base takes what was chosen.
    assert base == (own, gone, bare, both)
    assert left == ((own, narrow), (gone, both), (bare,), (both,))


def test_metrics_of_a_flat_parent_are_those_of_its_definition() -> None:
    """A parent that knows nothing and a child that is sure: KL = -log V - mean log q."""
    head = torch.eye(4) * 3
    parent, child = torch.zeros(1, 3, 4), torch.zeros(1, 1, 3, 4)
    child[..., 0] = 1.0
    found = sequence_metrics(child, parent, head, torch.tensor([[1, 0, 2]]))
    log_q = torch.tensor([3.0, 0, 0, 0]).log_softmax(0)
    assert found["kld"].item() == pytest.approx(-math.log(4) - log_q.mean().item(), abs=1e-6)
    assert found["lm_loss"].item() == pytest.approx(-(log_q[0] + log_q[2]).item() / 2, abs=1e-6)
    assert found["hidden_cosine"].item() == 1.0  # a zero vector has no direction
    assert found["top1_disagreement"].item() == 0.0


@pytest.mark.slow  # compiles
def test_compiled_scores_are_those_of_eager(
    lively_parent: DeciLMForCausalLM,
    pico_architecture: Architecture,
    variants: list[tuple[BlockConfig, ...]],
    replaced: Replaced,
    sequences: Tensor,
) -> None:
    eager = score(lively_parent, pico_architecture, variants, replaced, sequences).table.rows
    compiled = score(lively_parent, pico_architecture, variants, replaced, sequences, compile=True).table.rows
    assert_same(eager, compiled, rel=1e-4, abs=1e-5)  # fused fp32, rounded in other places


@pytest.mark.parametrize("batch_size", [4, 13])
def test_no_shape_of_a_block_is_left_uncompiled(
    lively_parent: DeciLMForCausalLM,
    pico_architecture: Architecture,
    variants: list[tuple[BlockConfig, ...]],
    replaced: Replaced,
    sequences: Tensor,
    monkeypatch: pytest.MonkeyPatch,
    batch_size: int,
) -> None:
    """Blocks of four shapes in batches of several sizes, before and after a removal. torch.compile would go on without
    compiling at the first one beyond its limit; here that is an error. Graphs run as they are: no code is generated."""

    def compile_as_it_is(block: DeciLMDecoderLayer, **options: Any) -> None:
        nn.Module.compile(block, backend="eager", **options)

    def eager_metrics(*arguments: Any, compile: bool) -> dict[str, Tensor]:
        return sequence_metrics(*arguments)

    monkeypatch.setattr(DeciLMDecoderLayer, "compile", compile_as_it_is)
    monkeypatch.setattr(replacement_runs, "sequence_metrics", eager_metrics)
    names = ("kv2+w512", "kv1+w256", "linear+linear", "kv2+linear")
    base = tuple(
        next(one for one in at_block if one.name == name) for at_block, name in zip(variants, names, strict=True)
    )
    options = {"base": base, "batch_size": batch_size, "iterative_removals": 2}
    eager = score(lively_parent, pico_architecture, variants, replaced, sequences, **options).table.rows
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=1, accumulated_recompile_limit=1, fail_on_recompile_limit_hit=True):
        compiled = score(lively_parent, pico_architecture, variants, replaced, sequences, compile=True, **options)
    assert_same(eager, compiled.table.rows, rel=1e-5, abs=1e-6)  # the same kernels


@pytest.mark.gpu
def test_scores_on_a_gpu_are_those_on_a_cpu(
    lively_parent: DeciLMForCausalLM,
    pico_architecture: Architecture,
    variants: list[tuple[BlockConfig, ...]],
    replaced: Replaced,
    sequences: Tensor,
) -> None:
    on_cpu = score(lively_parent, pico_architecture, variants, replaced, sequences).table.rows
    on_gpu = score(lively_parent.to("cuda"), pico_architecture, variants, replaced, sequences).table.rows
    assert_same(on_cpu, on_gpu, rel=1e-3, abs=1e-5)  # fp32 on both, sums in another order
