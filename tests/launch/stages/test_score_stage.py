"""score_library and check_additivity through their bodies, and prune_attention's iterative way, on a pico parent."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from distill.config import EngineConfig
from distill.data.tokenizer import tokenizer_sha256
from launch.artifact import fingerprinted_config
from launch.stage import StageContext, StageResult
from launch.stage_configs import CheckAdditivityStage, PruneAttentionStage, ScoreLibraryStage
from launch.stages import check_additivity, prune_attention, score_library
from puzzle.config import AdditivityConfig, PruneAttentionConfig, ScoreConfig, SpaceConfig
from puzzle.library import BlockLibrary, library_replacements
from puzzle.model.architecture import Architecture
from puzzle.score_metrics import METRICS
from puzzle.space import block_variants
from puzzle.tables import ScoreTable
from tests.puzzle.libraries import add

OWN, BARE = "kv2+w512", "no_op+w512"
SPACE = SpaceConfig(kv_heads=(1,), ffn_fracs=(0.5,), ffn_no_op=True)
ENGINE = EngineConfig(device="cpu")
SEQ_LEN = 24
SCORES = ScoreConfig(num_sequences=4, seq_len=SEQ_LEN)


def artifact(path: Path, fingerprint: str = "a" * 64, **inputs: str) -> SimpleNamespace:
    records = {name: SimpleNamespace(fingerprint=value) for name, value in inputs.items()}
    return SimpleNamespace(path=path, manifest=SimpleNamespace(fingerprint=fingerprint, inputs=records))


def context(out: Path) -> StageContext:
    out.mkdir()
    resume, pool = out.with_name(f"{out.name}_resume"), out.with_name("pool")
    return StageContext(out=out, resume=resume, pool=pool, run_name="run", step_name=out.name)


@pytest.fixture
def inputs(tmp_path: Path, pico_parent_dir: Path, pico_architecture: Architecture) -> dict[str, Any]:
    """Parent, data, and an untrained library with random weights."""
    data = tmp_path / "data"
    data.mkdir()
    np.save(data / "calibration.npy", np.random.default_rng(0).integers(0, 320, 20 * SEQ_LEN).astype(np.uint16))
    summary = {
        "vocab_size": 320,
        "eos_token_id": 0,
        "unigram_entropy_nats": 5.0,
        "tokenizer_sha256": tokenizer_sha256(pico_parent_dir),
    }
    (data / "data.json").write_text(json.dumps(summary))
    variants = tuple(block_variants(pico_architecture, index, SPACE) for index in range(4))
    library = BlockLibrary.create(tmp_path / "library", pico_architecture, variants, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    for item in library_replacements(pico_architecture, variants):
        tensors = {
            name: 0.3 * torch.randn(shape, generator=generator)
            for name, shape in item.shapes(pico_architecture).items()
        }
        add(library, item, tensors, bld_nmse_init=1.0, bld_nmse=1.0)
    library.write_index()
    return {
        "parent": artifact(pico_parent_dir),
        "library": artifact(tmp_path / "library", "b" * 64, parent="a" * 64),
        "data": artifact(data, "d" * 64),
    }


def score(out: Path, inputs: dict[str, Any], scores: ScoreConfig = SCORES) -> StageResult:
    return score_library.run(ScoreLibraryStage(scores=scores, engine=ENGINE), inputs, context(out))


def solution(directory: Path, *choices: list[str], parent: str | None = "a" * 64) -> SimpleNamespace:
    directory.mkdir()
    rows = [{"blocks": blocks} for blocks in choices]
    (directory / "solution.json").write_text(json.dumps({"parent": parent, "solutions": rows, "pareto": rows[1:]}))
    return artifact(directory, "c" * 64)


def test_scores_of_what_the_library_serves(tmp_path: Path, inputs: dict[str, Any]) -> None:
    result = score(tmp_path / "scores", inputs)
    table = ScoreTable.read(tmp_path / "scores" / "scores.json")
    assert table.num_blocks == 4
    assert table.metrics == METRICS
    assert table.num_tokens == result.metrics["num_tokens"] == 4 * SEQ_LEN
    assert set(table.by_block("kld")[0]) == {OWN, "kv2+w256", "kv2+no_op"}
    assert len(table.rows) == result.metrics["num_scores"] == 3 + 3 * 9
    assert sorted(result.metrics["cheapest_attention_removals"]) == [1, 2, 3]
    assert result.headline.startswith("30 scores; dearest block ")
    per_sequence = load_file(tmp_path / "scores" / "scores.safetensors")
    assert set(per_sequence) == set(METRICS)
    for name, values in per_sequence.items():
        assert values.shape == (30, 4)
        # the table holds means of these very numbers
        assert [row.values[name] for row in table.rows] == pytest.approx(values.mean(1).tolist(), abs=1e-15)


def test_scores_beside_what_a_solution_removes(tmp_path: Path, inputs: dict[str, Any]) -> None:
    chosen = ["kv2+w256", "no_op+w256", "kv1+no_op", OWN]
    further = {**inputs, "solution": solution(tmp_path / "solution", chosen, [OWN] * 4)}
    result = score(tmp_path / "scores", further)
    table = ScoreTable.read(tmp_path / "scores" / "scores.json")
    assert table.base == (OWN, BARE, "kv2+no_op", OWN)
    assert table.base_values is not None
    assert table.base_values["kld"] > 0
    assert "beside a base of KLD " in result.headline
    klds = table.by_block("kld")
    assert [set(block) for block in klds] == [
        {OWN, "kv2+w256"},
        {BARE, "no_op+w256"},
        {"kv2+no_op", "kv1+no_op"},
        {OWN, "kv2+w256", "kv1+w512", "kv1+w256"},
    ]
    assert [klds[index][name] for index, name in enumerate(table.base)] == [0.0] * 4


def test_iterative_removals_are_reported(tmp_path: Path, inputs: dict[str, Any]) -> None:
    result = score(tmp_path / "scores", inputs, replace(SCORES, iterative_removals=2))
    klds = ScoreTable.read(tmp_path / "scores" / "scores.json").by_block("kld")
    removed = result.metrics["iterative_removals"]
    assert len(set(removed)) == 2
    assert result.metrics["iterative_removal_kld"] == pytest.approx(sum(klds[index][BARE] for index in removed))
    assert "; 2 attentions removed one after another cost KLD " in result.headline
    base = [BARE if index in removed else OWN for index in range(4)]
    further = {**inputs, "solution": solution(tmp_path / "settled", base)}
    score(tmp_path / "conditional", further)
    table = ScoreTable.read(tmp_path / "conditional" / "scores.json")
    assert table.base_values is not None
    # Two roads to one model, in batches of another shape: fp32 sums in another order.
    assert result.metrics["iterative_removal_kld"] == pytest.approx(table.base_values["kld"], abs=1e-6)


def test_iterative_removals_beside_a_solution_are_refused(tmp_path: Path, inputs: dict[str, Any]) -> None:
    further = {**inputs, "solution": solution(tmp_path / "solution", [OWN] * 4)}
    with pytest.raises(ValueError, match=r"iterative_removals=1 beside the input `solution`"):
        score(tmp_path / "scores", further, replace(SCORES, iterative_removals=1))


@pytest.mark.parametrize(
    ("blocks", "parent", "message"),
    [
        ([OWN] * 4, "f" * 64, "the solution is for model ffffffffffff, parent is aaaaaaaaaaaa"),
        ([OWN] * 3, "a" * 64, "the solution has 3 blocks, the parent 4"),
        (["no_op+linear", OWN, OWN, OWN], "a" * 64, r"no replacement 0\.ffn\.linear\.beside_no_op"),
    ],
)
def test_a_solution_that_does_not_fit_is_refused(
    tmp_path: Path, inputs: dict[str, Any], blocks: list[str], parent: str, message: str
) -> None:
    further = {**inputs, "solution": solution(tmp_path / "solution", blocks, parent=parent)}
    with pytest.raises(ValueError, match=message):
        score(tmp_path / "scores", further)


def test_a_library_of_another_parent_is_refused(tmp_path: Path, inputs: dict[str, Any]) -> None:
    inputs["library"].manifest.inputs["parent"].fingerprint = "e" * 64
    with pytest.raises(ValueError, match="library was made from parent eeeeeeeeeeee, the parent given is aaaaaaaaaaaa"):
        score(tmp_path / "scores", inputs)


def test_more_calibration_than_there_is_is_an_error(tmp_path: Path, inputs: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="21 sequences of 24 tokens asked of the calibration split, which has 20"):
        score(tmp_path / "scores", inputs, replace(SCORES, num_sequences=21))
    with pytest.raises(ValueError, match=r"scores\.seq_len=512 is beyond the 256 positions"):
        score(tmp_path / "long", inputs, replace(SCORES, seq_len=512))


def check(out: Path, inputs: dict[str, Any], scores: ScoreConfig = SCORES, number: int = 6) -> StageResult:
    config = CheckAdditivityStage(
        additivity=AdditivityConfig(num_random_children=number), scores=scores, engine=ENGINE, seed=0
    )
    return check_additivity.run(config, inputs, context(out))


@pytest.fixture
def scored(tmp_path: Path, inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs of check_additivity."""
    score(tmp_path / "scores", inputs)
    made_from = {"parent": "a" * 64, "library": "b" * 64, "data": "d" * 64}
    scores = artifact(tmp_path / "scores", **made_from)
    scores.manifest.config = fingerprinted_config(ScoreLibraryStage(scores=SCORES, engine=ENGINE))
    return {
        **inputs,
        "scores": scores,
        "solution": solution(tmp_path / "solution", [OWN, BARE, OWN, OWN], [OWN, "kv1+no_op", OWN, "no_op+w256"]),
    }


def test_additivity_of_solutions_and_random_children(tmp_path: Path, scored: dict[str, Any]) -> None:
    result = check(tmp_path / "report", scored)
    found = json.loads((tmp_path / "report" / "additivity.json").read_text())
    rows = {row["name"]: row for row in found["rows"]}
    assert list(rows) == ["solution 0", "solution 1", *(f"random {number}" for number in range(6))]
    single = rows["solution 0"]
    assert single["num_replaced"] == 1
    # One replacement is its own score, in batches of another shape.
    assert single["realised_kld"] == pytest.approx(single["sum_of_scores"], abs=1e-6)
    klds = ScoreTable.read(tmp_path / "scores" / "scores.json").by_block("kld")
    assert rows["solution 1"]["sum_of_scores"] == pytest.approx(klds[1]["kv1+no_op"] + klds[3]["no_op+w256"])
    assert set(single) == {
        "name",
        "blocks",
        "num_replaced",
        "sum_of_scores",
        "realised_kld",
        "realised_lm_loss_difference",
    }
    assert found["rank_correlation"] == result.metrics["rank_correlation"]
    assert -1 <= result.metrics["rank_correlation"] <= 1
    assert result.headline.startswith(
        f"sum of scores / realised KLD: median {result.metrics['median_ratio']:.2f} over 8"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_sequences": 5}, r"scores\.num_sequences=5 is another sample .* measured with scores\.num_sequences=4;"),
        # As many tokens, and as long sequences, are not the same text.
        ({"num_sequences": 8, "seq_len": 12}, r"with scores\.num_sequences=4, scores\.seq_len=24; give the values of"),
        ({"skip_sequences": 4}, r"scores\.skip_sequences=4 is another sample .* with scores\.skip_sequences=0; give"),
    ],
)
def test_additivity_on_other_tokens_is_refused(
    tmp_path: Path, scored: dict[str, Any], changes: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check(tmp_path / "report", scored, replace(SCORES, **changes))


def test_additivity_on_the_sample_that_was_scored(
    tmp_path: Path, inputs: dict[str, Any], scored: dict[str, Any]
) -> None:
    """Another batch size is no other sample."""
    sample = replace(SCORES, skip_sequences=4)
    score(tmp_path / "further_scores", inputs, sample)
    scored["scores"].path = tmp_path / "further_scores"
    scored["scores"].manifest.config = fingerprinted_config(ScoreLibraryStage(scores=sample, engine=ENGINE))
    check(tmp_path / "report", scored, replace(sample, batch_size=3))
    found = json.loads((tmp_path / "report" / "additivity.json").read_text())
    single = found["rows"][0]
    assert single["realised_kld"] == pytest.approx(single["sum_of_scores"], abs=1e-6)


def test_additivity_needs_the_artifacts_that_belong_together(tmp_path: Path, scored: dict[str, Any]) -> None:
    scored["scores"].manifest.inputs["data"].fingerprint = "e" * 64
    with pytest.raises(ValueError, match="scores was made from data eeeeeeeeeeee, the data given is dddddddddddd"):
        check(tmp_path / "report", scored)


def test_attentions_are_pruned_one_after_another(tmp_path: Path, inputs: dict[str, Any]) -> None:
    prune = PruneAttentionConfig(
        num_attentions=2, num_sequences=4, seq_len=SEQ_LEN, keep_attention=("0..1",), iterative=True
    )
    config = PruneAttentionStage(prune_attention=prune, engine=ENGINE)
    result = prune_attention.run(config, {"model": inputs["parent"], "data": inputs["data"]}, context(tmp_path / "out"))
    assert result.metrics["removed_blocks"] == [2, 3]
    assert set(result.metrics["removal_kld"]) == {"2", "3"}
    assert result.headline.startswith("2 of 4 attentions removed, cheapest first: blocks ")
