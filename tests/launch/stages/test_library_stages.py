"""build_library, score_library, assemble and prune_attention through their bodies, on a pico parent."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from distill.config import EngineConfig, OptimConfig, TrainConfig
from distill.data.tokenizer import tokenizer_sha256
from launch.registry import AssembleStage, BuildLibraryStage, PruneAttentionStage, ScoreLibraryStage
from launch.stage import StageContext, StageResult
from launch.stages import assemble, build_library, prune_attention, score_library
from puzzle.config import AssembleConfig, LibraryConfig, PruneAttentionConfig, ScoreConfig, SpaceConfig
from puzzle.library import BlockLibrary
from puzzle.model.checkpoint import load_model, read_architecture
from puzzle.tables import ScoreTable

SPACE = SpaceConfig(kv_heads=(1,), ffn_fracs=(0.5,))
ENGINE = EngineConfig(device="cpu")
SEQ_LEN = 24
BLD = TrainConfig(max_tokens=192, seq_len=SEQ_LEN, batch_size=2, eval_sequences=4)


def artifact(path: Path, fingerprint: str = "a" * 64, **inputs: str) -> SimpleNamespace:
    records = {name: SimpleNamespace(fingerprint=value) for name, value in inputs.items()}
    return SimpleNamespace(path=path, manifest=SimpleNamespace(fingerprint=fingerprint, inputs=records))


def context(out: Path) -> StageContext:
    out.mkdir()
    return StageContext(out=out, resume=out.with_name(f"{out.name}_resume"), run_name="run", step_name=out.name)


@pytest.fixture
def data(tmp_path: Path, pico_parent_dir: Path) -> SimpleNamespace:
    directory = tmp_path / "data"
    directory.mkdir()
    generator = np.random.default_rng(0)
    for name in ("train", "validation", "calibration"):
        np.save(directory / f"{name}.npy", generator.integers(0, 320, 20 * SEQ_LEN).astype(np.uint16))
    summary = {
        "vocab_size": 320,
        "eos_token_id": 0,
        "unigram_entropy_nats": 5.0,
        "tokenizer_sha256": tokenizer_sha256(pico_parent_dir),
    }
    (directory / "data.json").write_text(json.dumps(summary))
    return artifact(directory)


@pytest.fixture
def parent(pico_parent_dir: Path) -> SimpleNamespace:
    return artifact(pico_parent_dir)


def build(out: Path, parent: SimpleNamespace, data: SimpleNamespace, bld: TrainConfig = BLD) -> StageResult:
    config = BuildLibraryStage(
        space=SPACE,
        library=LibraryConfig(importance_sequences=4, bld=bld, optim=OptimConfig(lr=1e-3)),
        engine=ENGINE,
        seed=0,
    )
    return build_library.run(config, {"parent": parent, "data": data}, context(out))


def test_from_parent_to_child(tmp_path: Path, parent: SimpleNamespace, data: SimpleNamespace) -> None:
    built = build(tmp_path / "library", parent, data)
    assert built.headline.startswith("14 replacements, median held-out NMSE ")
    assert built.tokens == 192
    assert len(BlockLibrary.open(tmp_path / "library").entries) == len(
        list((tmp_path / "library/replacements").iterdir())
    )
    assert (tmp_path / "library" / "metrics.jsonl").read_text().count("train/nmse") == 4

    library = artifact(tmp_path / "library", parent="a" * 64)
    scoring = ScoreLibraryStage(space=SPACE, scores=ScoreConfig(num_sequences=4, seq_len=SEQ_LEN), engine=ENGINE)
    scored = score_library.run(
        scoring, {"parent": parent, "library": library, "data": data}, context(tmp_path / "scores")
    )
    table = ScoreTable.read(tmp_path / "scores" / "scores.json")
    assert scored.headline.startswith("22 scores; dearest block ")
    assert sorted(scored.metrics["cheapest_attention_removals"]) == [1, 2, 3]
    assert table.num_blocks == 4
    assert set(table.by_block("kld")[0]) == {"kv2+w512", "kv2+w256", "kv1+w512", "kv1+w256"}

    variants = ["kv1+w512", "no_op+w512", "no_op+w256", "kv2+w512"]
    (tmp_path / "solution").mkdir()
    (tmp_path / "solution" / "solution.json").write_text(
        json.dumps({"parent": "a" * 64, "solutions": [{"blocks": variants}]})
    )
    inputs = {"parent": parent, "library": library, "solution": artifact(tmp_path / "solution")}
    assembled = assemble.run(AssembleStage(assemble=AssembleConfig()), inputs, context(tmp_path / "child"))
    assert assembled.headline.startswith("3 of 4 blocks replaced, 2 without attention")
    assert [block.name for block in read_architecture(tmp_path / "child").blocks] == variants
    assert load_model(tmp_path / "child").num_parameters() == assembled.metrics["params"]


@pytest.mark.parametrize(
    ("parent_of", "index", "message"),
    [
        ("b" * 64, 0, "the solution is for model bbbbbbbbbbbb"),
        ("a" * 64, 1, "assemble.solution=1, but the search found 1"),
    ],
)
def test_solution_that_does_not_fit_is_refused(
    tmp_path: Path, parent: SimpleNamespace, parent_of: str, index: int, message: str
) -> None:
    solution = {"parent": parent_of, "solutions": [{"blocks": ["kv2+w512"] * 4}]}
    (tmp_path / "solution.json").write_text(json.dumps(solution))
    inputs = {"parent": parent, "library": artifact(tmp_path, parent="a" * 64), "solution": artifact(tmp_path)}
    with pytest.raises(ValueError, match=message):
        assemble.run(AssembleStage(assemble=AssembleConfig(solution=index)), inputs, context(tmp_path / "child"))


def test_library_of_another_parent_is_refused(tmp_path: Path, parent: SimpleNamespace, data: SimpleNamespace) -> None:
    inputs = {"parent": parent, "library": artifact(tmp_path, parent="b" * 64), "data": data}
    scoring = ScoreLibraryStage(space=SPACE, scores=ScoreConfig(num_sequences=4, seq_len=SEQ_LEN), engine=ENGINE)
    with pytest.raises(ValueError, match="library was made from parent bbbbbbbbbbbb, the parent given is aaaaaaaaaaaa"):
        score_library.run(scoring, inputs, context(tmp_path / "scores"))


def test_sequences_beyond_the_parents_positions_are_refused(
    tmp_path: Path, parent: SimpleNamespace, data: SimpleNamespace
) -> None:
    with pytest.raises(ValueError, match=r"library\.bld\.seq_len=512 is beyond the parent's 256 positions"):
        build(tmp_path / "library", parent, data, TrainConfig(max_tokens=512, seq_len=512, batch_size=1))


@pytest.mark.parametrize(("contiguous", "longest"), [(True, 2), (False, None)])
def test_prune_attention(
    tmp_path: Path, parent: SimpleNamespace, data: SimpleNamespace, contiguous: bool, longest: int | None
) -> None:
    prune = PruneAttentionConfig(num_attentions=2, num_sequences=4, seq_len=SEQ_LEN, contiguous=contiguous)
    config = PruneAttentionStage(prune_attention=prune, engine=ENGINE)
    result = prune_attention.run(config, {"model": parent, "data": data}, context(tmp_path / "pruned"))
    pruned = read_architecture(tmp_path / "pruned")
    removed = [index for index, block in enumerate(pruned.blocks) if block.attention.is_no_op]
    assert removed == result.metrics["removed_blocks"]
    assert len(removed) == 2
    klds = {int(index): kld for index, kld in result.metrics["removal_kld"].items()}
    if contiguous:
        assert removed in ([1, 2], [2, 3])
        assert result.metrics["longest_attention_free_run"] == longest
    else:
        assert removed == sorted(sorted(klds, key=klds.__getitem__)[:2])
    assert result.headline.startswith("2 of 4 attentions removed, cheapest first: blocks ")
    assert len(ScoreTable.read(tmp_path / "pruned" / "scores.json").rows) == 4 + 3
