"""build_library, assemble and prune_attention through their bodies, on a pico parent."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from distill.config import EngineConfig, OptimConfig, TrainConfig
from distill.data.tokenizer import tokenizer_sha256
from launch.stage import StageContext, StageResult
from launch.stage_configs import AssembleStage, BuildLibraryStage, PruneAttentionStage
from launch.stages import assemble, build_library, prune_attention
from puzzle.config import AssembleConfig, LibraryConfig, PruneAttentionConfig, SpaceConfig
from puzzle.importance import Rankings
from puzzle.library import BlockLibrary
from puzzle.model.checkpoint import load_model, read_architecture
from puzzle.tables import ScoreTable
from puzzle.trainees import Trainees

SPACE = SpaceConfig(kv_heads=(1,), ffn_fracs=(0.5,))
ENGINE = EngineConfig(device="cpu")
SEQ_LEN = 24
BLD = TrainConfig(max_tokens=192, seq_len=SEQ_LEN, batch_size=2, eval_sequences=4)
LIBRARY = LibraryConfig(importance_sequences=4, bld=BLD, optim=OptimConfig(lr=1e-3))


def artifact(path: Path, fingerprint: str = "a" * 64, **inputs: str) -> SimpleNamespace:
    records = {name: SimpleNamespace(fingerprint=value) for name, value in inputs.items()}
    return SimpleNamespace(path=path, manifest=SimpleNamespace(fingerprint=fingerprint, inputs=records))


def context(out: Path) -> StageContext:
    out.mkdir()
    resume, pool = out.with_name(f"{out.name}_resume"), out.with_name("pool")
    return StageContext(out=out, resume=resume, pool=pool, run_name="run", step_name=out.name)


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


def build(
    out: Path,
    parent: SimpleNamespace,
    data: SimpleNamespace,
    settings: LibraryConfig = LIBRARY,
    space: SpaceConfig = SPACE,
    engine: EngineConfig = ENGINE,
    **further_inputs: SimpleNamespace,
) -> StageResult:
    config = BuildLibraryStage(space=space, library=settings, engine=engine, seed=0)
    return build_library.run(config, {"parent": parent, "data": data, **further_inputs}, context(out))


def names(library: Path) -> list[str]:
    return sorted(item.name for item in BlockLibrary.open(library).entries)


def test_from_parent_to_child(tmp_path: Path, parent: SimpleNamespace, data: SimpleNamespace) -> None:
    built = build(tmp_path / "library", parent, data)
    assert built.headline.startswith("13 replacements, median held-out NMSE ")
    assert built.tokens == 192
    assert built.metrics["num_block_variants"] == 2 + 3 * 6
    files = {path.name for path in (tmp_path / "library/replacements").iterdir()}
    assert {f"{name}.safetensors" for name in names(tmp_path / "library")} == files
    assert (tmp_path / "library" / "metrics.jsonl").read_text().count("train/nmse") == 4

    library = artifact(tmp_path / "library", parent="a" * 64)
    variants = ["kv2+w512", "no_op+w512", "no_op+w256", "kv1+w512"]
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


def test_library_that_the_pool_has_consumes_no_tokens(
    tmp_path: Path, parent: SimpleNamespace, data: SimpleNamespace
) -> None:
    first = build(tmp_path / "first", parent, data)
    again = build(tmp_path / "again", parent, data)
    assert (again.headline, again.metrics, again.tokens) == (first.headline, first.metrics, 0)
    assert (tmp_path / "again/library.json").read_bytes() == (tmp_path / "first/library.json").read_bytes()
    one_more_width = build(tmp_path / "wider", parent, data, space=replace(SPACE, ffn_linear=True))
    assert one_more_width.tokens == 192
    assert (tmp_path / "wider/metrics.jsonl").read_text().count("train/nmse") == 4
    for name in names(tmp_path / "first"):
        file = f"replacements/{name}.safetensors"
        assert (tmp_path / "wider" / file).samefile(tmp_path / "first" / file)
    looked_at_more_often = replace(LIBRARY, bld=replace(BLD, eval_every_tokens=48))
    assert build(tmp_path / "curve", parent, data, looked_at_more_often).tokens == 0
    other_settings = [
        replace(LIBRARY, nmse="token"),
        replace(LIBRARY, optim=OptimConfig(lr=2e-3)),
        replace(LIBRARY, bld=replace(BLD, max_tokens=240)),
        replace(LIBRARY, ffn_importance="iterative", importance_rounds=2),
    ]
    for number, library in enumerate(other_settings):
        assert build(tmp_path / f"other_{number}", parent, data, library).tokens > 0
    other_data = artifact(data.path, "d" * 64)
    assert build(tmp_path / "other_data", parent, other_data).tokens == 192


def test_killed_library_goes_on_in_other_micro_batches_and_with_another_rounding(
    tmp_path: Path, parent: SimpleNamespace, data: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device that sums in another order ranks two channels the other way round; what was begun goes on all the same,
    and no finished replacement is learnt again."""
    settings = replace(LIBRARY, kv_init="select", bld=replace(BLD, resume_every_tokens=96))
    build(tmp_path / "whole", parent, data, settings)
    steps, step = list[int](), Trainees.step

    def dying_step(trainees: Trainees, *args: Any, **options: Any) -> Any:
        if len(steps) == 3:
            raise KeyboardInterrupt
        steps.append(options["micro_batch"])
        return step(trainees, *args, **options)

    def elsewhere(*_: object, **__: object) -> Rankings:
        """What a second measurement would find."""
        reverse = torch.arange(512).flip(0)
        return Rankings(
            channels=dict.fromkeys(range(4), reverse),
            kv_heads=dict.fromkeys(range(4), torch.tensor([1, 0])),
            criterion="independent",
        )

    one_place = tmp_path / "one_place"
    one_place.mkdir()
    with monkeypatch.context() as patched:
        patched.setattr(Trainees, "step", dying_step)
        with pytest.raises(KeyboardInterrupt):
            build(one_place / "library", parent, data, settings)
    shutil.rmtree(one_place / "library")
    steps.clear()
    with monkeypatch.context() as patched:
        patched.setattr(Trainees, "step", dying_step)
        patched.setattr(build_library, "measure_rankings", elsewhere)
        engine = replace(ENGINE, micro_batch_tokens=SEQ_LEN)
        build(one_place / "library", parent, data, settings, engine=engine)
    assert steps == [1, 1]  # from the resume point at step 2 of 4, one sequence at a time
    for name in names(tmp_path / "whole"):
        one, other = (
            load_file(directory / f"replacements/{name}.safetensors")
            for directory in (tmp_path / "whole", one_place / "library")
        )
        for key, tensor in one.items():
            # Gradients of a batch in two sums instead of one, fp32; other channels would differ by the weights, 0.1.
            torch.testing.assert_close(other[key], tensor, rtol=0, atol=1e-5)
    with monkeypatch.context() as patched:
        patched.setattr(build_library, "measure_rankings", elsewhere)
        shutil.rmtree(one_place / "library_resume")
        assert build(one_place / "again", parent, data, settings).tokens == 0


def test_library_without_training(tmp_path: Path, parent: SimpleNamespace, data: SimpleNamespace) -> None:
    untrained = build(tmp_path / "library", parent, data, replace(LIBRARY, train=False))
    assert untrained.tokens == 0
    assert untrained.metrics["num_kept_as_initialised"] == untrained.metrics["num_replacements"] == 13
    assert untrained.metrics["median_nmse"] == untrained.metrics["median_nmse_init"]


def test_decoupled_then_coupled_over_what_a_search_has_chosen(
    tmp_path: Path, parent: SimpleNamespace, data: SimpleNamespace
) -> None:
    wide = replace(SPACE, attention_linear=True, ffn_linear=True)
    build(tmp_path / "decoupled", parent, data, space=wide)
    own = ["kv2+w512"] * 3
    solution = {
        "parent": parent.manifest.fingerprint,
        "solutions": [{"blocks": [*own, "no_op+w512"]}],
        "pareto": [{"blocks": [*own, "no_op+w512"]}, {"blocks": [*own, "kv2+w256"]}],
    }
    (tmp_path / "solution.json").write_text(json.dumps(solution))
    further = {
        "library": artifact(tmp_path / "decoupled", parent="a" * 64),
        "solution": artifact(tmp_path),
    }
    coupled = replace(LIBRARY, mode="coupled")
    built = build(tmp_path / "coupled", parent, data, coupled, wide, **further)
    assert built.metrics["num_block_variants"] == 2 + 3 * 4
    assert names(tmp_path / "coupled") == [
        "0.block.kv2+w256",
        *(
            f"{index}.{name}"
            for index in (1, 2, 3)
            for name in ("block.kv2+w256", "ffn.w256.beside_no_op", "ffn.w512.beside_no_op")
        ),
    ]
    again = build(tmp_path / "again", parent, data, coupled, wide, **further)
    assert again.tokens == 0
    fewer = replace(coupled, max_attentions=1, max_ffns=2)
    assert build(tmp_path / "fewer", parent, data, fewer, wide, **further).metrics["num_block_variants"] == 4 * 2
    assert names(tmp_path / "fewer") == [f"{index}.block.kv2+w256" for index in range(4)]
    # the coupled training begins where the decoupled one ended
    decoupled, further_on = (
        {item.name: entry for item, entry in BlockLibrary.open(tmp_path / mode).entries.items()}
        for mode in ("decoupled", "coupled")
    )
    name = "1.ffn.w256.beside_no_op"
    assert further_on[name].bld_nmse_init == pytest.approx(decoupled[name].bld_nmse, rel=1e-6)


@pytest.mark.parametrize(
    ("library_parent", "solution_parent", "message"),
    [
        ("b", "a", "library was made from parent bbbbbbbbbbbb, the parent given is aaaaaaaaaaaa"),
        ("a", "b", "the solution is for model bbbbbbbbbbbb, parent is aaaaaaaaaaaa"),
    ],
)
def test_further_inputs_that_do_not_fit_are_refused(
    tmp_path: Path,
    parent: SimpleNamespace,
    data: SimpleNamespace,
    library_parent: str,
    solution_parent: str,
    message: str,
) -> None:
    blocks = [{"blocks": ["no_op+w512"] * 4}]
    solution = {"parent": solution_parent * 64, "solutions": blocks, "pareto": []}
    (tmp_path / "solution.json").write_text(json.dumps(solution))
    library = artifact(tmp_path, parent=library_parent * 64)
    config = replace(LIBRARY, mode="coupled")
    with pytest.raises(ValueError, match=message):
        build(tmp_path / "library", parent, data, config, library=library, solution=artifact(tmp_path))


@pytest.mark.parametrize("name", ["max_attentions", "max_ffns"])
def test_most_used_subblocks_without_a_solution_are_refused(
    tmp_path: Path, parent: SimpleNamespace, data: SimpleNamespace, name: str
) -> None:
    with pytest.raises(
        ValueError, match=rf"library\.{name}=2 keeps .* give the input `solution`, or set library\.{name}"
    ):
        build(tmp_path / "library", parent, data, replace(LIBRARY, **{name: 2}))
    with pytest.raises(ValueError, match=rf"library\.{name} must be >= 1 .* got 0"):
        replace(LIBRARY, **{name: 0})


def test_sequences_beyond_the_parents_positions_are_refused(
    tmp_path: Path, parent: SimpleNamespace, data: SimpleNamespace
) -> None:
    too_long = replace(LIBRARY, bld=TrainConfig(max_tokens=512, seq_len=512, batch_size=1))
    with pytest.raises(ValueError, match=r"library\.bld\.seq_len=512 is beyond the parent's 256 positions"):
        build(tmp_path / "library", parent, data, too_long)


def test_calibration_data_shorter_than_asked_is_refused(
    tmp_path: Path, parent: SimpleNamespace, data: SimpleNamespace
) -> None:
    with pytest.raises(ValueError, match="calibration"):
        build(tmp_path / "library", parent, data, replace(LIBRARY, importance_sequences=40))


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
