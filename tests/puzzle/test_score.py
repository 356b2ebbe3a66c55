from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from distill.evaluate import evaluate_model
from puzzle.assemble import assemble
from puzzle.child_init import checkpoint_init
from puzzle.config import SpaceConfig
from puzzle.library import BlockLibrary, space_replacements
from puzzle.model.architecture import Architecture
from puzzle.model.checkpoint import TensorReader, load_model
from puzzle.model.modeling_decilm import DeciLMForCausalLM
from puzzle.score import score_variants
from puzzle.space import block_variants
from puzzle.tables import ScoreTable


@pytest.fixture
def library(
    tmp_path: Path, lively_parent_dir: Path, pico_architecture: Architecture, space: SpaceConfig
) -> BlockLibrary:
    """Untrained replacements."""
    library = BlockLibrary.create(tmp_path / "library", pico_architecture, dtype=torch.float32)
    with TensorReader(lively_parent_dir) as reader:
        init = checkpoint_init(reader, pico_architecture, dict.fromkeys(range(4), torch.arange(512)))
        for replacement in space_replacements(pico_architecture, space):
            library.add(replacement, init(replacement), bld_nmse_init=1.0, bld_nmse=1.0)
    return library


def score(
    parent: DeciLMForCausalLM, library: BlockLibrary, space: SpaceConfig, sequences: Tensor, *, batch_size: int = 4
) -> ScoreTable:
    variants = [block_variants(library.parent, index, space) for index in range(library.parent.num_blocks)]
    return score_variants(parent, library.parent, variants, library.tensors, sequences, batch_size=batch_size)


def test_scores_equal_assembling_and_evaluating_every_child(
    tmp_path: Path,
    lively_parent: DeciLMForCausalLM,
    lively_parent_dir: Path,
    library: BlockLibrary,
    space: SpaceConfig,
    sequences: Tensor,
) -> None:
    table = score(lively_parent, library, space, sequences)
    assert len(table.rows) == 2 * 4 + 3 * 16
    parent_loss = evaluate_model(lively_parent, sequences, batch_size=6, chunk_tokens=64)["lm_loss"]
    assert table.parent["lm_loss"] == pytest.approx(parent_loss, rel=1e-6)
    own = "kv2+w512"
    for number, row in enumerate(table.rows):
        variants = [own] * row.block + [row.variant] + [own] * (3 - row.block)
        assemble(lively_parent_dir, library, variants, tmp_path / str(number))
        child = load_model(tmp_path / str(number))
        # fp32 sums of means over tokens in another order: 1e-5 of values up to 1
        whole = evaluate_model(child, sequences, teacher=lively_parent, batch_size=6, chunk_tokens=64)
        assert row.kld == pytest.approx(whole["kld"], rel=1e-4, abs=1e-6), row
        assert row.lm_loss == pytest.approx(whole["lm_loss"] - parent_loss, rel=1e-4, abs=1e-5), row
        klds = [
            evaluate_model(child, sequence[None], teacher=lively_parent, batch_size=1, chunk_tokens=64)["kld"]
            for sequence in sequences
        ]
        assert row.kld_stderr == pytest.approx(torch.tensor(klds).std().item() / math.sqrt(6), rel=1e-3, abs=1e-6)
        states = [model.model(sequences).last_hidden_state[:, :-1] for model in (child, lively_parent)]
        cosine = 1 - torch.cosine_similarity(*states, dim=-1).mean().item()
        assert row.hidden_cosine == pytest.approx(cosine, rel=1e-4, abs=1e-6), row


def test_the_parents_own_block_scores_zero(
    lively_parent: DeciLMForCausalLM, library: BlockLibrary, space: SpaceConfig, sequences: Tensor
) -> None:
    rows = [row for row in score(lively_parent, library, space, sequences).rows if row.variant == "kv2+w512"]
    assert [row.block for row in rows] == [0, 1, 2, 3]
    assert all((row.kld, row.lm_loss, row.hidden_cosine, row.kld_stderr) == (0, 0, 0, 0) for row in rows)


def test_scores_do_not_depend_on_the_batch_size(
    lively_parent: DeciLMForCausalLM, library: BlockLibrary, space: SpaceConfig, sequences: Tensor
) -> None:
    one, all_at_once = (score(lively_parent, library, space, sequences, batch_size=size).rows for size in (1, 6))
    for first, second in zip(one, all_at_once, strict=True):
        assert first.kld == pytest.approx(second.kld, rel=1e-4, abs=1e-6)
        assert first.hidden_cosine == pytest.approx(second.hidden_cosine, rel=1e-4, abs=1e-6)


def test_bf16_scores_are_near_those_of_fp32(
    lively_parent: DeciLMForCausalLM,
    lively_parent_dir: Path,
    library: BlockLibrary,
    space: SpaceConfig,
    sequences: Tensor,
) -> None:
    full = score(lively_parent, library, space, sequences)
    half = score(load_model(lively_parent_dir, dtype=torch.bfloat16), library, space, sequences)
    # weights of 8 bits: 1% of a loss near log(320), and of KLDs far above the rounding noise of 1e-4
    assert half.parent["lm_loss"] == pytest.approx(full.parent["lm_loss"], rel=1e-2)
    for row, row_half in zip(full.rows, half.rows, strict=True):
        assert row_half.kld == pytest.approx(row.kld, rel=0.05, abs=1e-3)


def test_one_sequence_has_no_standard_error(
    lively_parent: DeciLMForCausalLM, library: BlockLibrary, space: SpaceConfig, sequences: Tensor
) -> None:
    with pytest.raises(ValueError, match="num_sequences >= 2"):
        score(lively_parent, library, space, sequences[:1])


@pytest.mark.gpu
def test_scores_on_a_gpu_are_those_on_a_cpu(
    lively_parent: DeciLMForCausalLM, library: BlockLibrary, space: SpaceConfig, sequences: Tensor
) -> None:
    on_cpu = score(lively_parent, library, space, sequences).rows
    on_gpu = score(lively_parent.to("cuda"), library, space, sequences).rows
    for first, second in zip(on_cpu, on_gpu, strict=True):
        # fp32 on both, sums in another order
        assert first.kld == pytest.approx(second.kld, rel=1e-3, abs=1e-6)
        assert first.lm_loss == pytest.approx(second.lm_loss, rel=1e-3, abs=1e-5)
        assert first.hidden_cosine == pytest.approx(second.hidden_cosine, rel=1e-3, abs=1e-6)
