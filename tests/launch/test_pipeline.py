from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from launch import pipeline as pipeline_module
from launch.artifact import Artifact
from launch.config import PipelineConfig, StepConfig, compose_pipeline
from launch.pipeline import Listener, plan, run_steps
from launch.registry import STAGES, Stage
from launch.rundir import RunDirectory
from launch.single_step import run_step
from launch.stage import Inputs, StageContext, StageResult
from launch.store import Store
from puzzle.model.architecture import Architecture, dense_blocks
from puzzle.model.hf_config import hf_config


@dataclass(frozen=True, kw_only=True)
class SeedOnly:
    seed: int


CALLS: list[str] = []


def run(config: SeedOnly, inputs: Inputs, context: StageContext) -> StageResult:
    CALLS.append(context.step_name)
    (context.out / "value.txt").write_text(f"{config.seed} {sorted(inputs)}")
    return StageResult(headline=f"seed {config.seed}")


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two stages of test's own beside the real ones: `make` without inputs and `change` of a model."""
    CALLS.clear()
    body = {"config": SeedOnly, "body": f"{__name__}:run", "output": "model"}
    monkeypatch.setitem(STAGES, "make", Stage(inputs={}, **body))
    monkeypatch.setitem(STAGES, "change", Stage(inputs={"model": "model"}, **body))
    monkeypatch.setattr(Stage, "load_body", lambda self: run)


def two_steps(**changes: StepConfig) -> PipelineConfig:
    steps = {"first": StepConfig(stage="make"), "second": StepConfig(stage="change", inputs={"model": "first"})}
    return PipelineConfig(about="test", steps={**steps, **changes})


def execute(
    root: Path, overrides: list[str], pipeline: PipelineConfig | None = None
) -> tuple[dict[str, Artifact], list[str]]:
    run_directory = RunDirectory(root=root, name="run")
    said: list[str] = []
    listener = Listener(
        started=lambda step, stage, change: said.append(f"{step}: {change}") if change else None,
        waiting=said.append,
        finished=lambda step, artifact, cached: said.append(f"{step} {'cached' if cached else 'computed'}"),
    )
    with run_directory.held():
        artifacts = run_steps(
            plan(pipeline or two_steps(), overrides),
            store=Store(run_directory.store),
            run=run_directory,
            context=StageContext(out=root, resume=root, pool=root / "pool", run_name="run", step_name=""),
            listener=listener,
        )
    return artifacts, said


def test_second_run_computes_nothing(stages: None, tmp_path: Path) -> None:
    first, said = execute(tmp_path, [])
    assert said == ["first computed", "second computed"]
    again, said = execute(tmp_path, [])
    assert said == ["first cached", "second cached"]
    assert CALLS == ["first", "second"]
    assert again == first
    assert (tmp_path / "run" / "second" / "value.txt").read_text() == "0 ['model']"


def test_change_of_one_step_says_what_changed_and_shares_upstream(stages: None, tmp_path: Path) -> None:
    execute(tmp_path, [])
    artifacts, said = execute(tmp_path, ["steps.second.seed=5"])
    assert said == ["first cached", "second: seed 0 -> 5", "second computed"]
    assert artifacts["second"].manifest.config == {"seed": 5}
    # Nothing the user had is lost: going back is a cache hit.
    _, said = execute(tmp_path, [])
    assert said[-1] == "second cached"


def test_change_upstream_is_named_downstream(stages: None, tmp_path: Path) -> None:
    execute(tmp_path, [])
    _, said = execute(tmp_path, ["steps.first.seed=5"])
    assert said == ["first: seed 0 -> 5", "first computed", "second: input model changed", "second computed"]


def test_run_directory_remembers_its_steps(stages: None, tmp_path: Path) -> None:
    artifacts, _ = execute(tmp_path, [])
    read = RunDirectory(root=tmp_path, name="run").read_steps()
    assert {name: a.manifest for name, a in read.items()} == {name: a.manifest for name, a in artifacts.items()}


def test_run_that_was_started_again_is_not_mixed(stages: None, tmp_path: Path) -> None:
    execute(tmp_path, [])
    other, _ = execute(tmp_path / "other", ["seed=5"])
    run_directory = RunDirectory(root=tmp_path, name="run")
    run_directory.link("first", other["first"])
    with pytest.raises(ValueError, match="was started again and has not finished: step first"):
        run_directory.read_steps()


@pytest.mark.parametrize("name", ["report", "store", "a b"])
def test_step_names_that_stand_for_something_else_are_refused(stages: None, name: str) -> None:
    with pytest.raises(ValueError, match="is taken or not a plain word"):
        plan(two_steps(**{name: StepConfig(stage="make")}), [])


def test_two_runs_of_one_name_at_once_are_refused(tmp_path: Path) -> None:
    first, second = RunDirectory(root=tmp_path, name="run"), RunDirectory(root=tmp_path, name="run")
    with first.held(), pytest.raises(ValueError, match=r"a run named 'run' is going on"), second.held():
        pass
    with RunDirectory(root=tmp_path, name="run").held():
        assert (tmp_path / "run").is_dir()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"second": StepConfig(stage="fuze")}, "step second: unknown stage 'fuze'"),
        ({"second": StepConfig(stage="change")}, "step second: input 'model' of kind model is missing"),
        ({"second": StepConfig(stage="change", inputs={"model": "third"})}, "'third' is not an earlier step"),
        ({"second": StepConfig(stage="change", inputs={"model": "first", "x": "first"})}, "input 'x' is not taken"),
        (
            {"second": StepConfig(stage="search", inputs={"scores": "first", "costs": "first"})},
            "input 'scores' must be of kind scores, the artifact given is of kind model",
        ),
        (
            {"second": StepConfig(stage="change", inputs={"model": "first"}, overrides=("sed=1",))},
            "did you mean 'seed'?",
        ),
    ],
)
def test_wrong_pipeline_is_refused_before_anything_runs(stages: None, changes: dict, message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is compared below
        plan(two_steps(**changes), [])
    assert message in str(caught.value)
    assert CALLS == []


def test_step_prefix_of_no_step_is_refused(stages: None) -> None:
    with pytest.raises(ValueError, match=r"no step 'secnod'; did you mean 'second'"):
        plan(two_steps(), ["steps.secnod.seed=1"])


def test_every_stage_of_the_registry_has_a_body() -> None:
    assert set(STAGES) >= {"import_parent", "build_library", "fuse", "distill", "export"}
    for name, stage in STAGES.items():
        module = Path(pipeline_module.__file__).parent / "stages" / f"{name}.py"
        assert stage.body == f"launch.stages.{name}:run"
        assert module.is_file(), name


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps.extended.objective=kld", "step extended: objective.kld=1.0 .* need the input `teacher`"),
        ("steps.data.data.tokenizer=parent", "step data: data.tokenizer=parent needs the input `parent`"),
    ],
)
def test_inputs_that_a_setting_needs_are_missed_before_anything_runs(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(compose_pipeline("demo", [override]), [override])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["steps.fused.fuse.leave_last_out=false"],
            r"leave_last_out differs between steps \(search: True, fused: False\)",
        ),
        (["steps.fused.fuse.min_length=4"], r"fuse\.min_length differs between steps \(search: 2, fused: 4\)"),
        (
            ["steps.fused.fuse.group_size=2"],
            r"step fused: fuse\.group_size=2 is not in the search's fusion-aware cost;",
        ),
        (["fuse.max_dependency=0.1"], r"fuse\.max_dependency=0\.1 is not in .*, or set search\.fusion_aware=false"),
        (["steps.search.fuse.max_ffn_dim=512"], r"step search: fuse\.max_ffn_dim=512 is not in"),
        # The control fuses nothing.
        (
            ["steps.fused.fuse.treatment=reverse"],
            r"step search: .* no fuse step goes on from its solution; add one, or",
        ),
    ],
)
def test_a_fusion_aware_search_must_mean_the_fusion_that_follows(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(compose_pipeline("demo", overrides), overrides)
    overrides = [*overrides, "steps.search.search.fusion_aware=false"]
    assert plan(compose_pipeline("demo", overrides), overrides)


def test_search_and_fusion_may_change_together() -> None:
    assert plan(compose_pipeline("demo", []), ["fuse.leave_last_out=false", "fuse.min_length=3", "fuse.norm=last"])


def test_only_fusions_in_the_line_of_a_search_are_compared_with_it() -> None:
    """The last FFN in or out (Table 5) is one pipeline: another model is fused otherwise than the search counts on."""
    demo = compose_pipeline("demo", [])
    other = {
        "pruned": StepConfig(stage="prune_attention", inputs={"model": "parent", "data": "data"}),
        "with_last": StepConfig(stage="fuse", inputs={"model": "pruned"}, overrides=("fuse.leave_last_out=false",)),
        "in_pairs": StepConfig(stage="fuse", inputs={"model": "pruned"}, overrides=("fuse=step_1",)),
    }
    assert plan(replace(demo, steps={**demo.steps, **other}), [])
    beside = {
        "with_last": StepConfig(stage="fuse", inputs={"model": "child"}, overrides=("fuse.leave_last_out=false",))
    }
    with pytest.raises(ValueError, match=r"differs between steps \(search: True, with_last: False\)"):
        plan(replace(demo, steps={**demo.steps, **beside}), [])


def test_without_a_fusion_no_search_may_count_on_one() -> None:
    puzzle = compose_pipeline("puzzle", [])
    # A parent that needs no weights.
    start = {
        "data": StepConfig(
            stage="prepare_data",
            overrides=(
                "data=python_stdlib",
                "data.tokenizer=train",
                "data.train_tokens=10_000_000",
                "data.validation_tokens=1_000_000",
                "data.calibration_tokens=1_000_000",
            ),
        ),
        "parent": StepConfig(stage="pretrain", inputs={"data": "data"}),
    }
    rest = {name: step for name, step in puzzle.steps.items() if name not in start}
    puzzle = replace(puzzle, steps={**start, **rest})
    assert not any(step.config.search.fusion_aware for step in plan(puzzle, []) if step.recipe.stage == "search")
    aware = ["steps.search.search.fusion_aware=true"]
    with pytest.raises(
        ValueError, match=r"step search: search\.fusion_aware=true counts on a fusion, but no fuse step"
    ):
        plan(puzzle, aware)
    assert plan(puzzle, aware, is_fused_elsewhere=True)


@pytest.mark.usefixtures("stages")
def test_private_state_that_a_kill_left_behind_the_commit_is_removed_also_by_a_single_step(tmp_path: Path) -> None:
    artifacts, _ = execute(tmp_path, ["seed=1"])
    run_directory = RunDirectory(root=tmp_path, name="run")
    store = Store(run_directory.store)
    left = store.resume_path(artifacts["second"].manifest.recipe)
    left.mkdir(parents=True)
    (left / "point.txt").write_text("step 3")
    context = StageContext(out=tmp_path, resume=tmp_path, pool=store.pool, run_name="run", step_name="run")
    listener = Listener(started=lambda *_: None, waiting=lambda _: None, finished=lambda *_: None)
    steps = plan(two_steps(), ["seed=1"])
    assert run_step(steps, "second", store=store, run=run_directory, context=context, listener=listener) == artifacts
    assert not left.exists()
    assert CALLS == ["first", "second"]


def _training_behind() -> PipelineConfig:
    """A parent, something slow, and its distillation against itself with two ranks to a sequence."""
    steps = {
        "parent": StepConfig(stage="make"),
        "data": StepConfig(stage="gather"),
        "slow": StepConfig(stage="change", inputs={"model": "parent"}),
        "gkd": StepConfig(
            stage="distill",
            inputs={"student": "slow", "teacher": "parent", "data": "data"},
            overrides=("engine=torch", "engine.device=cpu", "engine.sequence_parallel=2", "distill.batch_size=7"),
        ),
    }
    return PipelineConfig(about="test", steps=steps)


def test_a_model_that_cannot_be_dealt_is_refused_as_soon_as_it_is_there(
    stages: None, tmp_path: Path, pico_architecture: Architecture, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = replace(pico_architecture, num_heads=3, blocks=dense_blocks(2, 1, 512))

    def write_model(config: SeedOnly, inputs: Inputs, context: StageContext) -> StageResult:
        CALLS.append(context.step_name)
        (context.out / "config.json").write_text(json.dumps(hf_config(odd, "bfloat16")))
        return StageResult(headline="three heads")

    monkeypatch.setitem(STAGES, "gather", Stage(inputs={}, config=SeedOnly, body="", output="data"))
    monkeypatch.setattr(Stage, "load_body", lambda self: write_model)
    monkeypatch.setattr(pipeline_module.processes, "count", lambda: 2)
    pipeline = _training_behind()
    refusal = (
        r"step gkd: engine.sequence_parallel=2: it does not divide the 3 attention heads of the teacher; "
        r"set engine.sequence_parallel=1 distill.batch_size=6$"
    )
    with pytest.raises(ValueError, match=refusal):
        execute(tmp_path, [], pipeline)
    assert CALLS == ["parent"]
    # Now the teacher is known before anything runs.
    with pytest.raises(ValueError, match=refusal):
        execute(tmp_path, [], pipeline)
    assert CALLS == ["parent"]
