"""lm-eval tasks as scores, on a task that is a local file."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from distill.data.tokenizer import load_tokenizer
from puzzle.config import ScoreConfig
from puzzle.model.architecture import NO_ATTENTION, NO_FFN, Architecture, BlockConfig
from puzzle.model.modeling_decilm import DeciLMForCausalLM
from puzzle.slices import ParentSlice
from puzzle.tables import ScoreRow, ScoreTable
from puzzle.task_scores import add_task_scores
from tests.lm_eval_files import EXAMPLES, right_answers, write_tasks


@pytest.fixture
def task_dir(tmp_path: Path) -> Path:
    return write_tasks(tmp_path / "tasks")


@pytest.fixture
def variants(pico_architecture: Architecture) -> list[list[BlockConfig]]:
    variants = [[block] for block in pico_architecture.blocks]
    # Block 0 too: what replaces the first attention must not take its place in a cache.
    variants[0].append(replace(pico_architecture.blocks[0], attention=NO_ATTENTION))
    variants[2] += [replace(pico_architecture.blocks[2], ffn=NO_FFN)]
    return variants


def scores_of(variants: list[list[BlockConfig]]) -> ScoreTable:
    rows = tuple(
        ScoreRow(block=index, variant=variant.name, values={"kld": 0.0}, stderr={})
        for index, at_block in enumerate(variants)
        for variant in at_block
    )
    return ScoreTable(parent={"lm_loss": 1.0}, num_tokens=1, rows=rows)


def config(task_dir: Path | None, *tasks: str) -> ScoreConfig:
    return ScoreConfig(num_sequences=2, seq_len=8, tasks=tasks, task_dir=str(task_dir) if task_dir else None)


def nothing_replaced(_: int, __: BlockConfig) -> dict[str, Tensor]:
    return {}


@pytest.mark.slow  # needs lm-eval
def test_a_task_is_scored_as_the_drop_in_accuracy(
    lively_parent: DeciLMForCausalLM,
    lively_parent_dir: Path,
    pico_architecture: Architecture,
    variants: list[list[BlockConfig]],
    task_dir: Path,
) -> None:
    pytest.importorskip("lm_eval")
    table = add_task_scores(
        scores_of(variants),
        ParentSlice.whole(lively_parent),
        pico_architecture,
        variants,
        nothing_replaced,
        load_tokenizer(lively_parent_dir),
        config(task_dir, "four_words"),
    )
    own = torch.tensor(right_answers(lively_parent, lively_parent_dir))
    assert table.metrics == ("kld", "four_words")
    assert table.parent["four_words"] == pytest.approx(own.mean().item())
    drops = table.by_block("four_words")
    assert {drops[block]["kv2+w512"] for block in range(4)} == {0.0}
    silenced = {(0, "no_op+w512"): "self_attn.o_proj", (2, "kv2+no_op"): "mlp.down_proj"}
    for (index, variant), matrix in silenced.items():
        weight = lively_parent.model.layers[index].get_submodule(matrix).weight.data
        kept = weight.clone()
        weight.zero_()
        differences = own - torch.tensor(right_answers(lively_parent, lively_parent_dir))
        weight.copy_(kept)
        assert differences.abs().sum() > 0
        # fp32 likelihoods in padded batches: an example may tip over where two choices are as likely
        assert drops[index][variant] == pytest.approx(differences.mean().item(), abs=1 / len(EXAMPLES))
        (row,) = (row for row in table.rows if (row.block, row.variant) == (index, variant))
        stderr = differences.std().item() / math.sqrt(len(EXAMPLES))
        assert row.stderr["four_words"] == pytest.approx(stderr, rel=0.1)


@pytest.mark.slow  # needs lm-eval
@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("no_such_task", "lm-eval knows no no_such_task; .*scores.task_dir"),
        ("written", "written is of type generate_until"),
    ],
)
def test_a_task_that_cannot_be_scored_is_an_error(
    lively_parent: DeciLMForCausalLM,
    lively_parent_dir: Path,
    pico_architecture: Architecture,
    variants: list[list[BlockConfig]],
    task_dir: Path,
    task: str,
    message: str,
) -> None:
    pytest.importorskip("lm_eval")
    with pytest.raises(ValueError, match=message):
        add_task_scores(
            scores_of(variants),
            ParentSlice.whole(lively_parent),
            pico_architecture,
            variants,
            nothing_replaced,
            load_tokenizer(lively_parent_dir),
            config(task_dir, task),
        )


def test_without_lm_eval_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
    lively_parent: DeciLMForCausalLM,
    lively_parent_dir: Path,
    pico_architecture: Architecture,
    variants: list[list[BlockConfig]],
) -> None:
    for module in ("lm_eval", "lm_eval.tasks", "lm_eval.models.huggingface"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=r"needs the package lm-eval .*pip install 'lm-eval\[hf\]>=0\.4\.13'"):
        add_task_scores(
            scores_of(variants),
            ParentSlice.whole(lively_parent),
            pico_architecture,
            variants,
            nothing_replaced,
            load_tokenizer(lively_parent_dir),
            config(None, "arc_easy"),
        )


def test_a_sliced_parent_is_refused(
    lively_parent: DeciLMForCausalLM,
    lively_parent_dir: Path,
    pico_architecture: Architecture,
    variants: list[list[BlockConfig]],
) -> None:
    with pytest.raises(ValueError, match=r"lm-eval runs whole models, engine\.slices=2"):
        add_task_scores(
            scores_of(variants),
            replace(ParentSlice.whole(lively_parent), num_slices=2),
            pico_architecture,
            variants,
            nothing_replaced,
            load_tokenizer(lively_parent_dir),
            config(None, "arc_easy"),
        )
