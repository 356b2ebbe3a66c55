from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from puzzle.model.architecture import NO_ATTENTION, Architecture
from puzzle.model.checkpoint import has_tokenizer, load_model, read_architecture
from puzzle.model.modeling_decilm import DeciLMForCausalLM
from puzzle.prune_attention import (
    removable_attentions,
    removal_klds,
    remove_attentions,
    score_removals,
    select_removals,
)


def without_attention(architecture: Architecture, index: int) -> Architecture:
    block = architecture.blocks[index]
    return architecture.with_block(
        index, type(block)(attention=NO_ATTENTION, ffn=block.ffn, parent_block_indices=block.parent_block_indices)
    )


def test_removable_are_the_attentions_of_blocks_that_are_not_kept(pico_architecture: Architecture) -> None:
    pruned = without_attention(pico_architecture, 2)
    assert removable_attentions(pico_architecture, num_attentions=3, keep_attention=(0,)) == (1, 2, 3)
    assert removable_attentions(pico_architecture, num_attentions=1, keep_attention=("0..1", -1)) == (2,)
    assert removable_attentions(pruned, num_attentions=1, keep_attention=()) == (0, 1, 3)


def test_more_attentions_than_there_are_is_an_error(pico_architecture: Architecture) -> None:
    with pytest.raises(ValueError, match=r"num_attentions=4, but only 3 attentions .*keep_attention=\[0\] of 4 blocks"):
        removable_attentions(pico_architecture, num_attentions=4, keep_attention=(0,))


def test_blocks_to_keep_that_are_not_there_are_an_error(pico_architecture: Architecture) -> None:
    with pytest.raises(ValueError, match=r"prune_attention\.keep_attention: 4"):
        removable_attentions(pico_architecture, num_attentions=1, keep_attention=(4,))


def test_the_cheapest_go_first() -> None:
    klds = {1: 0.3, 2: 0.1, 3: 0.5, 4: 0.2}
    assert select_removals(klds, 2, contiguous=False) == (2, 4)
    assert select_removals(klds, 4, contiguous=False) == (2, 4, 1, 3)


def test_contiguous_takes_the_cheapest_run() -> None:
    klds = {1: 0.3, 2: 0.1, 3: 0.5, 4: 0.2, 5: 0.15}
    assert select_removals(klds, 2, contiguous=True) == (5, 4)
    assert select_removals(klds, 3, contiguous=True) == (2, 4, 3)


def test_a_block_without_attention_does_not_interrupt_a_run() -> None:
    assert select_removals({1: 0.9, 2: 0.1, 4: 0.1, 5: 0.9}, 2, contiguous=True) == (2, 4)


def test_scores_are_those_of_the_model_with_one_attention_silenced(
    lively_parent: DeciLMForCausalLM, lively_parent_dir: Path, pico_architecture: Architecture, sequences: Tensor
) -> None:
    scores = score_removals(lively_parent, pico_architecture, (1, 3), sequences, batch_size=4)
    klds = removal_klds(scores.table, pico_architecture)
    assert klds.keys() == {1, 3}
    assert scores.removals == ()
    with torch.no_grad():
        log_p = lively_parent(sequences).logits[:, :-1].log_softmax(-1)
        for index, kld in klds.items():
            silenced = load_model(lively_parent_dir)
            silenced.model.layers[index].self_attn.o_proj.weight.zero_()
            log_q = silenced(sequences).logits[:, :-1].log_softmax(-1)
            expected = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
            assert kld == pytest.approx(expected, rel=1e-4)  # fp32 means in another order


def test_iterative_removal_is_greedy_beside_what_is_gone(
    lively_parent: DeciLMForCausalLM, lively_parent_dir: Path, pico_architecture: Architecture, sequences: Tensor
) -> None:
    scores = score_removals(
        lively_parent, pico_architecture, (0, 1, 2, 3), sequences, batch_size=4, iterative_removals=3
    )

    @torch.no_grad()
    def kld_without(indices: tuple[int, ...]) -> float:
        silenced = load_model(lively_parent_dir)
        for index in indices:
            silenced.model.layers[index].self_attn.o_proj.weight.zero_()
        log_p, log_q = (model(sequences).logits[:, :-1].log_softmax(-1) for model in (lively_parent, silenced))
        return (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()

    gone: tuple[int, ...] = ()
    for _ in range(3):
        gone += (min(set(range(4)) - set(gone), key=lambda index: kld_without((*gone, index))),)
    assert scores.removals == gone
    klds = removal_klds(scores.table, pico_architecture)
    assert sum(klds[index] for index in gone) == pytest.approx(kld_without(gone), rel=1e-4)  # fp32 in another order


def test_removal_changes_nothing_but_the_attentions(
    tmp_path: Path, lively_parent_dir: Path, pico_architecture: Architecture, sequences: Tensor
) -> None:
    out = tmp_path / "pruned"
    pruned = remove_attentions(lively_parent_dir, pico_architecture, (3, 1), out)
    assert pruned == read_architecture(out)
    assert [block.name for block in pruned.blocks] == ["kv2+w512", "no_op+w512", "kv2+w512", "no_op+w512"]
    assert [block.parent_block_indices for block in pruned.blocks] == [(0,), (1,), (2,), (3,)]
    assert has_tokenizer(out)
    silenced = load_model(lively_parent_dir)
    with torch.no_grad():
        for index in (1, 3):
            silenced.model.layers[index].self_attn.o_proj.weight.zero_()
        assert torch.equal(load_model(out)(sequences).logits, silenced(sequences).logits)
