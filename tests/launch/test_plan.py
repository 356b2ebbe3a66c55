"""Plans of whole pipelines: what fits, what does not and what would, without torch and without a hub."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from launch import plan_table
from launch.config import compose_stage
from launch.plan import PipelinePlan, StepPlan, plan_pipeline
from launch.plan_models import (
    KNOWN,
    PlannedModel,
    fused_model,
    given_architecture,
    known_architecture,
    parent_model,
    pruned_model,
    searched_child,
)
from launch.stage_configs import FuseStage, ImportParentStage, PruneAttentionStage, SearchStage
from puzzle.config import WorkloadConfig
from puzzle.model.architecture import Architecture
from puzzle.model.hf_config import hf_config
from puzzle.model.stats import num_params

ROOT = Path(__file__).parents[2]
SLURM = ("cluster=slurm", "plan.parent=llama-3.1-8b")
DISTILL = ("steps.distilled.engine=torch_fsdp", "steps.distilled.distill.batch_size=64")


def rows(plan: PipelinePlan) -> dict[str, StepPlan]:
    return {row.step: row for row in plan.steps}


def planned(*overrides: str) -> dict[str, StepPlan]:
    """Pipeline attention_fusion."""
    return rows(plan_pipeline("attention_fusion", ["model.source=meta-llama/Llama-3.1-8B-Instruct", *overrides]))


def test_the_demo_fits_on_a_cpu_and_its_time_is_left_open() -> None:
    plan = plan_pipeline("demo", [])
    assert plan.problems == []
    steps = rows(plan)
    assert {"parent", "distilled", "extended phase 0", "extended phase 1"} <= steps.keys()
    assert steps["distilled"].hours is None
    assert steps["distilled"].limit_gib == 128
    # 2,620,000 tokens of 2 bytes, the vocabulary being small.
    assert steps["data"].artifact_gib * 2**30 == 2 * 2_620_000


@pytest.mark.parametrize(
    ("name", "billions"), [("llama-3.1-405b", 405.85), ("llama-3.1-70b", 70.55), ("smollm2-135m", 0.134515)]
)
def test_known_shapes_have_the_published_numbers_of_parameters(name: str, billions: float) -> None:
    architecture = known_architecture(name)
    assert architecture is not None
    assert num_params(architecture) / 1e9 == pytest.approx(billions, rel=1e-4)


@pytest.mark.parametrize(
    ("source", "blocks"),
    [
        ("meta-llama/Llama-3.1-405B-Instruct", 126),
        ("meta-llama/Meta-Llama-3.1-8B", 32),
        ("meta-llama/Llama-3.3-70B-Instruct", 80),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", 30),
    ],
)
def test_hub_ids_mean_known_shapes(source: str, blocks: int) -> None:
    config = compose_stage(ImportParentStage, [f"model.source={source}"])
    assert parent_model(config).architecture.num_blocks == blocks


def test_an_unknown_parent_is_refused_with_the_way_out() -> None:
    with pytest.raises(ValueError, match=r"step parent: the shape of owner/model is not known.*plan\.parent="):
        plan_pipeline("attention_fusion", ["model.source=owner/model"])


def test_a_config_file_is_read(tmp_path: Path, heterogeneous_architecture: Architecture) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(hf_config(heterogeneous_architecture, "bfloat16")))
    assert num_params(given_architecture(str(tmp_path))) == num_params(heterogeneous_architecture)
    dense = {"model_type": "llama", "vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 2}
    file.write_text(json.dumps({**dense, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 300}))
    read = given_architecture(str(file))
    assert [block.name for block in read.blocks] == ["kv2+w512", "kv2+w512"]
    assert not read.tie_embeddings


def search(*overrides: str) -> SearchStage:
    return compose_stage(SearchStage, list(overrides))


def test_a_child_is_bounded_by_its_parent_or_by_the_budget() -> None:
    parent = PlannedModel(architecture=_known("llama-3.1-405b"))
    whole = num_params(parent.architecture)
    assert num_params(searched_child(parent, search()).architecture) == whole
    half = searched_child(parent, search("search.constraint.params_frac=0.5"))
    assert num_params(half.architecture) == pytest.approx(0.5 * whole, rel=0.01)
    assert "estimate" in half.note
    workload = WorkloadConfig(dtype="bfloat16", tensor_parallel=8)
    by_memory = searched_child(parent, search("search.constraint.memory_gib=62.0"), workload)
    # 62 GiB on each of 8 ranks, 2 bytes per parameter.
    assert num_params(by_memory.architecture) == pytest.approx(62 * 2**30 * 8 / 2, rel=0.01)


def test_groups_by_hand_are_fused_and_have_no_attention() -> None:
    parent = PlannedModel(architecture=_known("llama-3.1-405b"))
    config = compose_stage(FuseStage, ["fuse.groups=[[66,73],[74,85],[86,100],[101,114]]"])
    fused = fused_model(parent, config).architecture
    assert fused.num_blocks == 126 - 49 + 4
    assert [fused.blocks[index].ffn.ffn_dim for index in (66, 67)] == [8 * 53_248, 12 * 53_248]
    assert fused.blocks[66].attention.is_no_op


def test_pruned_attentions_are_gone_and_fused() -> None:
    parent = PlannedModel(architecture=_known("llama-3.1-8b"))
    prune = compose_stage(PruneAttentionStage, ["prune_attention.num_attentions=6"])
    pruned = pruned_model(parent, prune)
    assert sum(block.attention.is_no_op for block in pruned.architecture.blocks) == 6
    fused = fused_model(pruned, compose_stage(FuseStage, [])).architecture
    # The last FFN of the run stays.
    assert fused.num_blocks == 32 - 4
    assert max(block.ffn.ffn_dim or 0 for block in fused.blocks) == 5 * 14_336


def test_what_does_not_fit_names_the_nearest_setting_that_does() -> None:
    step = planned(*SLURM, "steps.distilled.engine=torch_bf16", "steps.distilled.distill.batch_size=64")["distilled"]
    assert step.problem is not None
    assert "GiB needed per GPU" in step.problem
    advice = step.problem.rpartition("the nearest that fits: ")[2].split()
    assert advice
    changed = [f"steps.distilled.{setting}" for setting in advice]
    repaired = planned(*SLURM, "steps.distilled.engine=torch_bf16", "steps.distilled.distill.batch_size=64", *changed)
    assert repaired["distilled"].problem is None


def test_more_nodes_are_faster_and_hold_less() -> None:
    long = "steps.distilled.distill.seq_len=8192"
    one = planned(*SLURM, *DISTILL, long)["distilled"]
    four = planned(*SLURM, *DISTILL, long, "cluster.nodes=4")["distilled"]
    assert (one.gpus, four.gpus) == (8, 32)
    assert one.step_s is not None
    assert four.step_s is not None
    assert four.step_s < one.step_s
    assert four.memory_bytes["optimizer"] == one.memory_bytes["optimizer"] / 4
    assert four.problem is None


def test_a_batch_that_cannot_be_dealt_is_a_problem() -> None:
    step = planned(*SLURM, "steps.distilled.engine=torch_fsdp", "steps.distilled.distill.batch_size=4")["distilled"]
    assert step.problem is not None
    assert "distill.batch_size=4 cannot be dealt evenly over 8 data ranks" in step.problem


def test_disk_follows_the_resume_points_that_stay() -> None:
    def points(*overrides: str) -> float:
        return planned(*SLURM, *DISTILL, *overrides)["distilled"].resume_gib

    two = points()
    assert points("steps.distilled.distill.resume_points.newest=5") == pytest.approx(2 * two)
    # Of ten points, when the last is written: numbers 4, 8 and 9.
    assert points("steps.distilled.distill.resume_points.every=4") == pytest.approx(two / 3 * 4)


def test_finished_phases_keep_their_points() -> None:
    phase = rows(plan_pipeline("demo", []))["extended phase 1"]
    distilled = rows(plan_pipeline("demo", []))["distilled"]
    # Two phases: the first one's two points and its fp32 model beside the three of the second.
    assert phase.resume_gib == pytest.approx(distilled.resume_gib / 36 * (12 * 5 + 4))


def test_a_copy_that_cpu_memory_lacks_is_a_problem_and_can_be_left_out() -> None:
    small = "cluster.cpu_memory_gib=64"
    step = planned(*SLURM, *DISTILL, small)["distilled"]
    assert step.problem is not None
    assert "GiB of CPU memory per node (of each process: resume point's copy" in step.problem
    advice = step.problem.rpartition("the nearest that fits: ")[2]
    assert advice == "distill.resume_points.background=false"
    repaired = planned(*SLURM, *DISTILL, small, f"steps.distilled.{advice}")["distilled"]
    assert repaired.problem is None
    assert repaired.host_bytes == {}


def test_a_save_that_takes_longer_than_the_signal_is_a_problem() -> None:
    step = planned(*SLURM, *DISTILL, "cluster.signal_seconds=20")["distilled"]
    assert step.problem is not None
    assert "signal_seconds=20 that a job has before its time limit" in step.problem


@pytest.mark.parametrize("name", ["ultra", "super_49b", "llama_8b", "smollm2", "long_context"])
def test_the_shipped_pipelines_fit_the_machines_that_they_ask_for(name: str) -> None:
    plan = plan_pipeline(name, ["cluster=slurm"])
    assert plan.problems == []
    trained = [row for row in plan.steps if row.step_s is not None]
    assert trained
    assert all(row.needed_gib is not None and row.needed_gib < row.limit_gib for row in trained)


def test_a_step_may_ask_for_its_own_nodes_and_grace() -> None:
    steps = rows(plan_pipeline("ultra", ["cluster=slurm"]))
    assert (steps["library"].nodes, steps["distilled"].nodes, steps["fused"].nodes) == (32, 64, 1)
    assert rows(plan_pipeline("smollm2", ["cluster=slurm"]))["extended phase 0"].gpus == 2


def test_utilization_and_memory_can_be_given() -> None:
    plain = planned(*SLURM, *DISTILL)["distilled"]
    slow = planned(*SLURM, *DISTILL, "plan.utilization=0.3", "plan.gpu_memory_gib=20")["distilled"]
    assert slow.step_s == pytest.approx(2 * (plain.step_s or 0), rel=0.01)
    assert slow.limit_gib == pytest.approx(20)
    assert slow.problem is not None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("plan.speed=1", "plan.speed is no setting of the plan; there are parent, child"),
        ("plan.utilization=2", "plan.utilization must be in 0..1"),
        ("plan.utilization=fast", "plan.utilization=fast is no number"),
        ("cluster.hardware=here", "memory of cluster.hardware=here is not known; give plan.gpu_memory_gib"),
        ("plan.parent=/nowhere", r"does not exist; give a model directory, a config.json or one of " + KNOWN[0]),
    ],
)
def test_bad_settings_are_refused(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        planned(*SLURM[:1], override)


def test_the_command_prints_a_table_or_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan_table.run(["demo"]) == 0
    table = capsys.readouterr().out
    assert "distilled" in table
    assert "GPU hours" in table
    assert plan_table.run(["demo", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["problems"] == []
    assert {row["step"] for row in document["steps"]} >= {"library", "search", "exported"}


@pytest.mark.parametrize("arguments", [[], ["demo", "smollm2"], ["demo", "--yaml"]])
def test_the_command_says_what_it_takes(arguments: Sequence[str]) -> None:
    with pytest.raises(ValueError, match="plan takes one pipeline, overrides and --json"):
        plan_table.run(arguments)


def test_a_plan_needs_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from launch.plan import plan_pipeline; plan_pipeline('demo', []); "
        "print([name for name in ('torch', 'transformers', 'deepspeed', 'megatron') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def _known(name: str) -> Architecture:
    architecture = known_architecture(name)
    assert architecture is not None
    return replace(architecture)
