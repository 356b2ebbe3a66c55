from __future__ import annotations

from dataclasses import fields, replace

import pytest
import yaml

from distill.config import EngineConfig
from launch.config import (
    CONF,
    PipelineConfig,
    RunConfig,
    RunSettings,
    check_step_prefixes,
    compose_pipeline,
    compose_stage,
    pipeline_names,
    run_name,
    run_settings,
    step_overrides,
    sweep_points,
)
from launch.registry import STAGES
from launch.stage_configs import (
    BuildLibraryStage,
    DistillStage,
    EvaluateStage,
    ExportStage,
    ExtendContextStage,
    FuseStage,
    ImportParentStage,
    MeasureCostsStage,
    PrepareDataStage,
    PretrainStage,
    SearchStage,
)
from puzzle.model.architecture import Architecture, dense_blocks


def test_every_stage_composes_into_its_typed_config() -> None:
    for name, stage in STAGES.items():
        config = compose_stage(stage.config, ["model.source=somewhere"])
        assert isinstance(config, stage.config), name


@pytest.mark.parametrize("group", ["model", "data", "space", "objective", "optim", "engine", "tracking", "workload"])
def test_every_option_of_every_group_composes(group: str) -> None:
    for file in sorted((CONF / group).glob("*.yaml")):
        config = compose_stage(
            DistillStage, [f"{group}={file.stem}", *(["data.sources.0.path=x"] if file.stem == "text" else [])]
        )
        assert config.distill.max_tokens > 0


TRAINING_STAGES = (DistillStage, ExtendContextStage, PretrainStage)


@pytest.mark.parametrize("config_class", TRAINING_STAGES)
def test_every_engine_trains_on_two_processes(config_class: type) -> None:
    names = [file.stem for file in sorted((CONF / "engine").glob("*.yaml"))]
    assert names == ["deepspeed_zero2", "deepspeed_zero3", "megatron", "torch", "torch_bf16", "torch_fsdp"]
    for name in names:
        compose_stage(config_class, [f"engine={name}"]).check_processes(2)


@pytest.mark.parametrize("name", [file.stem for file in sorted((CONF / "engine").glob("*.yaml"))])
def test_an_engine_names_every_setting(name: str) -> None:
    """A setting that it leaves out could not be given on the command line."""
    content = yaml.safe_load((CONF / "engine" / f"{name}.yaml").read_text())
    assert content.keys() == {field.name for field in fields(EngineConfig)}


@pytest.mark.parametrize(
    ("config_class", "overrides", "message"),
    [
        (DistillStage, ["distill.batch_size=15"], r"distill.batch_size=15 .* set distill.batch_size=14 or 16"),
        (PretrainStage, ["pretrain.train.batch_size=1"], r"pretrain.train.batch_size=1 .*=2, or start 1 process$"),
        (
            ExtendContextStage,
            ["engine.sequence_parallel=2", "extend_context.phases=[{seq_len: 1023, max_tokens: 9999, batch_size: 1}]"],
            r"extend_context.phases.0.seq_len=1023 does not divide; .*seq_len=1022 or 1024",
        ),
        (DistillStage, ["engine=megatron", "engine.pipeline_parallel=2"], r"needs a multiple of 4 processes, got 2"),
    ],
)
def test_what_two_processes_cannot_deal(config_class: type, overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compose_stage(config_class, overrides).check_processes(2)


def test_models_and_phases_bound_what_two_processes_are_told(pico_architecture: Architecture) -> None:
    """Positions and measured lengths are kept, every phase and both models suited."""
    short = ["engine.sequence_parallel=2", "distill.seq_len=511", "distill.max_tokens=1_000_000"]
    distill = compose_stage(DistillStage, short)
    with pytest.raises(ValueError, match=r"set distill.seq_len=510 or 512, or engine.sequence_parallel=1$"):
        distill.check_processes(2, {"student": replace(pico_architecture, max_positions=512)})
    with pytest.raises(ValueError, match=r"set distill.seq_len=510, or engine.sequence_parallel=1$"):
        distill.check_processes(2, {"student": replace(pico_architecture, max_positions=511)})
    # Cached signals are of one length.
    with pytest.raises(ValueError, match=r"does not divide; set engine.sequence_parallel=1$"):
        distill.check_processes(2, {"student": pico_architecture}, {"student", "signals", "data"})
    phases = "extend_context.phases=[{seq_len: 511, max_tokens: 9999, batch_size: 2}]"
    lengths = "extend_context.lengths=[511]"
    extend = compose_stage(ExtendContextStage, ["engine.sequence_parallel=2", phases, lengths])
    with pytest.raises(ValueError, match=r"set extend_context.phases.0.seq_len=512, or engine.sequence_parallel=1$"):
        extend.check_processes(2, {"student": replace(pico_architecture, max_positions=64)})
    with pytest.raises(ValueError, match=r"does not divide the 3 attention heads of the teacher; set .*parallel=1$"):
        extend.check_processes(2, {"teacher": replace(pico_architecture, num_heads=3, blocks=dense_blocks(2, 1, 512))})


def test_distill_has_one_teacher() -> None:
    config = compose_stage(DistillStage, [])
    config.check_inputs({"student", "teacher", "data"})
    for names in ({"student", "data"}, {"student", "teacher", "signals", "data"}):
        with pytest.raises(ValueError, match=r"either inputs.teacher=<model>.* or inputs.signals="):
            config.check_inputs(names)
    with pytest.raises(ValueError, match=r"objective.hidden_cosine=1.0 compares hidden states"):
        config.check_inputs({"student", "signals", "data"})
    compose_stage(DistillStage, ["objective=kld"]).check_inputs({"student", "signals", "data"})


def test_generated_text_needs_its_source_and_its_input() -> None:
    generated = compose_stage(PrepareDataStage, ["data.sources=[{kind: generated}]"])
    generated.check_inputs({"parent", "generated"})
    with pytest.raises(ValueError, match=r"a source of kind=generated, and the input `generated` .* is not given"):
        generated.check_inputs({"parent"})
    with pytest.raises(ValueError, match=r"no source of kind=generated, and the input `generated` .* is given"):
        compose_stage(PrepareDataStage, []).check_inputs({"parent", "generated"})


def test_stage_and_pipeline_names_are_disjoint() -> None:
    assert not set(pipeline_names()) & set(STAGES)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["distill.max_tokns=3"], "unknown key or group 'distill.max_tokns'; did you mean 'distill.max_tokens'?"),
        (["engin=torch"], "unknown key or group 'engin'; did you mean 'engine'?"),
        (
            ["engine=torhc"],
            "unknown option 'torhc' of group 'engine'; did you mean 'torch'?; options are deepspeed_zero2, ",
        ),
        (["optim.lr=fast"], 'wrong value type for field "optim.lr"'),
        (["optim.lr=-1"], "optim.lr must be > 0, got -1.0"),
        (["distill.seq_len=1"], "seq_len must be >= 2"),
        (["distill.max_tokens=10"], "max_tokens=10 is less than one step"),
        (["engine.tensor_parallel=2"], "engine.tensor_parallel=2 and engine.pipeline_parallel=1 are megatron's"),
        (["engine=megatron", "engine.compile=true"], "engine.compile=true is no option of engine.name=megatron"),
        (["engine=deepspeed_zero2", "engine.offload_activations=true"], "set engine.recompute=true"),
        (
            ["engine=torch_fsdp", "engine.recompute=true", "engine.offload_activations=true"],
            "engine.offload_activations=true moves the blocks' inputs to CPU memory, but to compare hidden states",
        ),
        (["engine.name=torhc"], "engine.name=torhc is unknown; choose one of torch, deepspeed, megatron"),
        (["objective.kld=0", "objective.hidden_cosine=0"], "objective has no term"),
    ],
)
def test_bad_configuration_is_one_line(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is compared below
        compose_stage(DistillStage, overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_value_is_named() -> None:
    with pytest.raises(ValueError, match=r"model\.source has no value; set model\.source=<value>"):
        compose_stage(ImportParentStage, [])


def test_values_arrive_typed() -> None:
    config = compose_stage(FuseStage, ["fuse.groups=[[1,3],[5,7]]", "fuse.max_dependency=1"])
    assert config.fuse.groups == ((1, 3), (5, 7))
    assert isinstance(config.fuse.max_dependency, float)
    assert compose_stage(PretrainStage, []).pretrain.rope.theta == 10_000.0


def test_precedence_is_common_then_step_then_command_line_then_step_prefix() -> None:
    pipeline = compose_pipeline("demo", [])
    command_line = ["optim.lr=5e-5", "steps.distilled.optim.lr=7e-5", "steps.distilled.objective=kld"]
    config = compose_stage(DistillStage, step_overrides(pipeline, "distilled", command_line))
    assert config.optim.lr == 7e-5
    assert config.objective.hidden_cosine == 0.0
    assert compose_stage(DistillStage, step_overrides(pipeline, "extended", command_line)).optim.lr == 5e-5
    assert compose_stage(DistillStage, step_overrides(pipeline, "distilled", [])).optim.lr == 1e-3


def test_a_group_at_a_node_reaches_every_step() -> None:
    pipeline = compose_pipeline("demo", [])
    named = ["hardware@costs.hardware=h200_sxm"]
    config = compose_stage(MeasureCostsStage, step_overrides(pipeline, "costs", named))
    assert config.costs.hardware.name == "NVIDIA H200 SXM"
    own = [*named, "steps.costs.hardware@costs.hardware=b200"]
    config = compose_stage(MeasureCostsStage, step_overrides(pipeline, "costs", own))
    assert config.costs.hardware.name == "NVIDIA B200"
    # What is no node of the tree still does not reach a stage, wherever its package is.
    assert "budget@budget=small" not in step_overrides(pipeline, "costs", ["budget@budget=small"])
    assert run_name("demo", named) == "demo,hardware_costs.hardware=h200_sxm"


def test_a_group_at_a_node_of_the_run_is_set_for_the_run() -> None:
    pipeline = compose_pipeline("demo", [])
    assert run_name("demo", ["tracking@tracking=wandb"]) == "demo"
    with pytest.raises(ValueError, match="tracking cannot be set for one step"):
        check_step_prefixes(pipeline, ["steps.distilled.tracking@tracking=wandb"])


def test_pipeline_group_chooses_the_budget() -> None:
    large, small = (compose_pipeline("smollm2", [f"budget={name}"]) for name in ("gpu", "small"))
    tokens = [next(o for o in p.steps["distilled"].overrides if "max_tokens" in o) for p in (large, small)]
    assert tokens[0] != tokens[1]
    # A pipeline's own group is not a node of the tree and must not reach a stage.
    assert not any(text.startswith("budget") for text in step_overrides(small, "distilled", ["budget=small"]))


def test_run_name_is_a_function_of_names() -> None:
    assert run_name("demo", []) == "demo"
    assert run_name("demo", ["seed=1", "optim.lr=1e-3"]) == run_name("demo", ["optim.lr=1e-3", "seed=1"])
    assert run_name("demo", ["run.root=/x", "tracking=wandb"]) == "demo"
    assert "/" not in run_name("demo", ["data.path=/a/b c"])


def test_run_settings() -> None:
    settings = compose_stage(RunSettings, ["run.root=/tmp/x", "tracking.wandb=offline"])
    assert settings.run.root == "/tmp/x"
    assert settings.tracking.wandb == "offline"


@pytest.mark.parametrize(
    "override",
    ["space.ffn_fracs=0.5", "space.kv_heads=4", "evaluate.lengths=128", "export.targets=vllm", "fuse.groups=3"],
)
def test_a_lone_value_is_not_taken_for_a_list(override: str) -> None:
    stages = {"space": BuildLibraryStage, "evaluate": EvaluateStage, "export": ExportStage, "fuse": FuseStage}
    with pytest.raises(ValueError, match=override.partition("=")[0]):
        compose_stage(stages[override.partition(".")[0]], [override])


@pytest.mark.parametrize("override", ["export.targets=vllm", "export.targets=[vllm,tensorrt]", "search.targets=[x]"])
def test_choices_of_a_list_are_named(override: str) -> None:
    config_class = {"export": ExportStage, "search": SearchStage}[override.partition(".")[0]]
    with pytest.raises(ValueError, match=r"targets.* must be a list, in brackets, of transformers, vllm, sglang"):
        compose_stage(config_class, [override])


@pytest.mark.parametrize(
    "override",
    [
        "costs.hardware.flops_per_s=0",
        "library.importance_sequences=0",
        "export.max_shard_gib=-1",
        "search.pareto_latency_fracs=[0]",
        "fuse.max_ffn_dim=-5",
        "scores.skip_sequences=-3",
        "evaluate.lengths=[-5]",
    ],
)
def test_out_of_range_is_refused_when_it_is_read(override: str) -> None:
    key = override.partition("=")[0]
    config_class = next(s.config for s in STAGES.values() if key.partition(".")[0] in s.config.__annotations__)
    with pytest.raises(ValueError, match=key.replace(".", r"\.")):
        compose_stage(config_class, [override])


def test_run_settings_come_from_the_pipeline_then_the_command_line() -> None:
    pipeline = PipelineConfig(about="", common=("run.root=/a", "tracking=wandb", "seed=3"), steps={})
    settings = run_settings(pipeline, ["+run.root=/b", "seed=4"])
    assert (settings.run.root, settings.tracking.wandb) == ("/b", "online")


@pytest.mark.parametrize("name", ["../x", "a/b", "store", ".hidden", ""])
def test_run_name_is_one_file_name(name: str) -> None:
    with pytest.raises(ValueError, match=r"run\.name"):
        RunConfig(name=name)


def test_long_run_names_stay_apart() -> None:
    overrides = [f"optim.lr={n}e-4" for n in range(1, 40)]
    names = {run_name("demo", [*overrides, f"seed={seed}"]) for seed in (0, 1)}
    assert len(names) == 2
    assert all(len(name) <= 120 for name in names)


def test_sweep_points() -> None:
    assert sweep_points(["seed=0,1", "optim.lr=0.001", "hydra/launcher=joblib"]) == [
        ["seed=0", "optim.lr=0.001"],
        ["seed=1", "optim.lr=0.001"],
    ]
    with pytest.raises(ValueError, match=r"run\.name=x would give 2 runs one directory"):
        sweep_points(["seed=0,1", "run.name=x"])
    with pytest.raises(ValueError, match=r"cannot read 'seed=\['"):
        sweep_points(["seed=["])


@pytest.mark.parametrize("key", ["inputs.teacher", "run.root", "tracking.wandb"])
def test_what_belongs_to_the_run_is_not_set_for_a_step(key: str) -> None:
    with pytest.raises(ValueError, match="cannot be set for one step"):
        check_step_prefixes(compose_pipeline("demo", []), [f"steps.distilled.{key}=x"])
