from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from puzzle.additivity import (
    Child,
    RealisedChild,
    median_ratio,
    random_children,
    rank_correlation,
    realise,
    search_children,
    sum_of_scores,
)
from puzzle.model.architecture import NO_ATTENTION, NO_FFN, Architecture, BlockConfig
from puzzle.model.modeling_decilm import DeciLMForCausalLM
from puzzle.score import score_variants
from puzzle.slices import ParentSlice
from puzzle.tables import ScoreRow, ScoreTable

OWN = "kv2+w512"
BARE = "no_op+w512"


def table(klds: dict[tuple[int, str], float], **options: object) -> ScoreTable:
    rows = tuple(
        ScoreRow(block=block, variant=variant, values={"kld": kld}, stderr={})
        for (block, variant), kld in sorted(klds.items())
    )
    return ScoreTable(parent={"lm_loss": 1.0}, num_tokens=100, rows=rows, **options)


def four_blocks() -> ScoreTable:
    variants = {OWN: 0.0, BARE: 0.2, "kv2+w256": 0.1}
    return table({(block, name): kld * (block + 1) for block in range(4) for name, kld in variants.items()})


def realised(promised: float, kld: float, num_replaced: int = 1) -> RealisedChild:
    return RealisedChild(
        name="child",
        blocks=(OWN,),
        num_replaced=num_replaced,
        sum_of_scores=promised,
        realised_kld=kld,
        realised_lm_loss_difference=kld,
    )


def nothing_replaced(_: int, __: BlockConfig) -> dict[str, Tensor]:
    return {}


def test_the_sum_starts_at_what_the_base_has_lost() -> None:
    assert sum_of_scores(four_blocks(), (OWN, BARE, OWN, "kv2+w256")) == pytest.approx(0.4 + 0.4)
    conditional = table(
        {(0, OWN): 0.0, (1, BARE): 0.0, (1, "no_op+w256"): 0.3}, base=(OWN, BARE), base_values={"kld": 0.5}
    )
    assert sum_of_scores(conditional, (OWN, "no_op+w256")) == pytest.approx(0.8)


def test_a_variant_without_a_score_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"block 2 of the child is kv1\+w512, which has no score"):
        sum_of_scores(four_blocks(), (OWN, OWN, "kv1+w512", OWN))


def test_every_choice_of_the_search_once() -> None:
    found = {
        "solutions": [{"blocks": ["a", "b"]}, {"blocks": ["a", "c"]}],
        "pareto": [{"blocks": ["a", "b"]}, {"blocks": ["d", "d"]}],
    }
    children = search_children(found)
    assert [child.name for child in children] == ["solution 0", "solution 1", "pareto 1"]
    assert children[0].blocks == ("a", "b")


def test_random_children_rise_from_one_block_to_all(pico_architecture: Architecture) -> None:
    children = random_children(four_blocks(), pico_architecture, 7, seed=3)
    sizes = [sum(block != OWN for block in child.blocks) for child in children]
    assert sizes == sorted(sizes)
    assert (sizes[0], sizes[-1]) == (1, 4)
    assert children == random_children(four_blocks(), pico_architecture, 7, seed=3)
    assert children != random_children(four_blocks(), pico_architecture, 7, seed=4)


def test_random_children_keep_the_depth_of_a_conditional_base(pico_architecture: Architecture) -> None:
    rows = {(0, OWN): 0.0, (1, BARE): 0.0, (1, "no_op+w256"): 0.1, (2, OWN): 0.0, (2, "kv2+w256"): 0.1, (3, OWN): 0.0}
    scores = table(rows, base=(OWN, BARE, OWN, OWN), base_values={"kld": 0.1})
    children = random_children(scores, pico_architecture, 20, seed=0)
    assert {child.blocks[1] for child in children} == {BARE, "no_op+w256"}
    assert {child.blocks[3] for child in children} == {OWN}


def test_nothing_to_choose_from_gives_no_random_children(pico_architecture: Architecture) -> None:
    assert random_children(table({(b, OWN): 0.0 for b in range(4)}), pico_architecture, 5, seed=0) == []


def test_rank_correlation_and_ratio() -> None:
    rows = [realised(promised, promised**2) for promised in (0.1, 0.5, 2.0, 4.0)]
    assert rank_correlation(rows) == pytest.approx(1.0)
    assert rank_correlation([*rows[:3], realised(9.0, 0.001)]) == pytest.approx(-0.2)
    assert median_ratio(rows) == pytest.approx((2.0 + 0.5) / 2)


def test_too_few_or_equal_children_have_no_correlation() -> None:
    assert rank_correlation([realised(1.0, 1.0), realised(2.0, 2.0)]) is None
    assert rank_correlation([realised(1.0, 2.0)] * 4) is None
    assert median_ratio([realised(0.0, 0.0, num_replaced=0)]) is None


def test_children_are_realised_as_whole_models(
    lively_parent: DeciLMForCausalLM, pico_architecture: Architecture, sequences: Tensor
) -> None:
    """A child with one replacement has its score as KLD; one with several has what silencing them all costs."""
    removals = {
        "no_op+w512": {"attention": NO_ATTENTION},
        "kv2+no_op": {"ffn": NO_FFN},
        "no_op+no_op": {"attention": NO_ATTENTION, "ffn": NO_FFN},
    }
    variants = [[block, *(replace(block, **what) for what in removals.values())] for block in pico_architecture.blocks]
    parent = ParentSlice.whole(lively_parent)
    scores = score_variants(parent, pico_architecture, variants, nothing_replaced, sequences, batch_size=4).table
    children = [
        Child(name=f"{index} {name}", blocks=tuple(name if index == block else OWN for block in range(4)))
        for index, name in itertools.product(range(4), removals)
    ]
    several = Child(name="several", blocks=("kv2+no_op", "no_op+w512", OWN, "no_op+no_op"))
    rows = realise(parent, pico_architecture, [*children, several], scores, nothing_replaced, sequences, batch_size=4)
    for child, row in zip(children, rows, strict=False):
        assert (row.name, row.blocks, row.num_replaced) == (child.name, child.blocks, 1)
        assert row.realised_kld == pytest.approx(row.sum_of_scores, abs=1e-6)  # the same sums in another batch
    assert rows[-1].num_replaced == 3
    with torch.no_grad():
        log_p = lively_parent(sequences).logits[:, :-1].log_softmax(-1)
        for index, block in enumerate(lively_parent.model.layers):
            if "no_op+" in several.blocks[index]:
                block.self_attn.o_proj.weight.zero_()
            if "+no_op" in several.blocks[index]:
                block.mlp.down_proj.weight.zero_()
        log_q = lively_parent(sequences).logits[:, :-1].log_softmax(-1)
    expected = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
    assert rows[-1].realised_kld == pytest.approx(expected, abs=1e-6)
    labels = sequences[:, 1:, None]
    lm_loss = (log_p.gather(-1, labels) - log_q.gather(-1, labels)).mean().item()
    assert rows[-1].realised_lm_loss_difference == pytest.approx(lm_loss, abs=1e-6)
    assert rows[-1].sum_of_scores != pytest.approx(expected, rel=1e-3)
