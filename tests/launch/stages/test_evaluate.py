"""lm-eval tasks of stage evaluate, on task files of a user's own and pico models."""

from __future__ import annotations

import gc
import json
import sys
import weakref
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.config import EngineConfig, EvaluateConfig
from distill.data.tokenizer import load_tokenizer
from launch.artifact import Artifact
from launch.pipeline import make_recipe
from launch.stage import StageContext, StageResult
from launch.stage_configs import EvaluateStage
from launch.stages import evaluate
from puzzle.lm_eval_tasks import COMPARING, WHOLE_MODEL, Harness, TaskChoice, Tasks
from puzzle.model.checkpoint import load_model
from tests.launch.training_inputs import write_data, write_student, write_teacher
from tests.lm_eval_files import EXAMPLES, right_answers, write_task, write_tasks

needs_lm_eval = pytest.mark.slow

GROUP = """
group: {name}
task: [four_words, again]
{aggregate}
"""
WEIGHED = "aggregate_metric_list: [{metric: acc, weight_by_size: true}]"
SHORT = "generation_kwargs: {until: ['.'], max_gen_toks: 4, do_sample: false}\n"
FILTERS = (
    "filter_list: [{name: strict, filter: [{function: take_first}]}, {name: loose, filter: [{function: take_first}]}]\n"
)
OWN_EXAMPLES = "fewshot_split: test\nnum_fewshot: 2\n"


@pytest.fixture(scope="module")
def inputs(pico_parent_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    root = tmp_path_factory.mktemp("evaluate")
    parent = write_teacher(root / "parent", pico_parent_dir)
    child = write_student(root / "child", parent.path, dtype=torch.float32)
    return {"parent": parent, "child": child, "data": write_data(root / "data", pico_parent_dir)}


@pytest.fixture
def task_dir(tmp_path: Path) -> Path:
    return write_tasks(tmp_path / "tasks")


def stage(task_dir: Path | None, *tasks: str, **further: Any) -> EvaluateStage:
    config = EvaluateConfig(
        seq_len=16, num_sequences=4, tasks=tasks, task_dir=str(task_dir) if task_dir else None, **further
    )
    return EvaluateStage(evaluate=config, engine=EngineConfig(device="cpu"), seed=0)


def run(out: Path, config: EvaluateStage, inputs: dict[str, Artifact]) -> tuple[StageResult, dict[str, Any]]:
    out.mkdir()
    context = StageContext(out=out, resume=out, pool=out, run_name="run", step_name="evaluation")
    result = evaluate.run(config, inputs, context)
    return result, json.loads((out / "evaluate.json").read_text())["models"]


def test_without_tasks_there_is_no_word_of_them_and_no_lm_eval(
    tmp_path: Path, inputs: dict[str, Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    config = stage(None)
    assert make_recipe("evaluate", config, {}).externals == {}
    result, models = run(tmp_path / "out", config, inputs)
    assert "recovered" not in result.headline
    assert not any(key.startswith("tasks") for row in models.values() for key in row)


@needs_lm_eval
def test_accuracy_is_that_of_plain_sums_of_log_probabilities(
    tmp_path: Path, inputs: dict[str, Artifact], task_dir: Path
) -> None:
    pytest.importorskip("lm_eval")
    result, models = run(tmp_path / "out", stage(task_dir, "four_words"), inputs)
    own = {
        name: torch.tensor(right_answers(load_model(inputs[name].path), inputs[name].path))
        for name in ("parent", "child")
    }
    assert own["parent"].mean() != own["child"].mean()
    for name, row in models.items():
        task = row["tasks"]["four_words"]
        assert task.keys() == {"metric", "value", "stderr", "n", "recovery_frac"}
        assert (task["metric"], task["n"]) == ("acc", len(EXAMPLES))
        # fp32 likelihoods in padded batches: an example may tip over where two choices are as likely
        assert task["value"] == pytest.approx(own[name].mean().item(), abs=1 / len(EXAMPLES))
        assert task["stderr"] == pytest.approx(own[name].std().item() / len(EXAMPLES) ** 0.5, rel=0.1)
    assert models["parent"]["tasks"]["four_words"]["recovery_frac"] == 1
    kept = models["child"]["tasks"]["four_words"]["value"] / models["parent"]["tasks"]["four_words"]["value"]
    assert models["child"]["tasks"]["four_words"]["recovery_frac"] == pytest.approx(kept)
    assert models["child"]["tasks_recovery_frac"] == pytest.approx(kept)
    assert result.headline.endswith(f"; 1 task recovered: child {kept:.1%}")


@needs_lm_eval
def test_a_group_counts_by_its_own_value_and_a_limit_holds_for_each_member(
    tmp_path: Path, inputs: dict[str, Artifact], task_dir: Path
) -> None:
    pytest.importorskip("lm_eval")
    write_task(task_dir, "again")
    (task_dir / "both.yaml").write_text(GROUP.format(name="both", aggregate=WEIGHED))
    _, models = run(tmp_path / "out", stage(task_dir, "both", "four_words", task_limit=20), inputs)
    for row in models.values():
        both, one = row["tasks"]["both"], row["tasks"]["four_words"]
        assert both["metric"] == "acc"
        assert (both["n"], one["n"]) == (40, 20)
        assert both["value"] == pytest.approx(one["value"])
        assert 0 < both["stderr"] < one["stderr"]
    fracs = [task["recovery_frac"] for task in models["child"]["tasks"].values()]
    assert models["child"]["tasks_recovery_frac"] == pytest.approx(sum(fracs) / 2)


@needs_lm_eval
def test_answers_are_generated_with_a_cache_as_without(
    tmp_path: Path, inputs: dict[str, Artifact], task_dir: Path
) -> None:
    pytest.importorskip("lm_eval")
    model, tokenizer = load_model(inputs["child"].path), load_tokenizer(inputs["child"].path)
    texts = []
    for example in EXAMPLES:
        ids = tokenizer(example["text"], return_tensors="pt")["input_ids"]
        answer = model.generate(ids, max_new_tokens=4, do_sample=False, use_cache=False)[0, ids.shape[1] :]
        texts.append(tokenizer.decode(answer, skip_special_tokens=True).partition(".")[0])
    # Half of what the child says is right.
    rows = [{**example, "answer": texts[n] if n % 2 else "?"} for n, example in enumerate(EXAMPLES)]
    (task_dir / "examples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, further in {"spoken": SHORT, "filtered": SHORT + FILTERS}.items():
        write_task(task_dir, name, output_type="generate_until", metric="exact_match", further=further)
        file = task_dir / f"{name}.yaml"
        file.write_text(file.read_text().replace("doc_to_choice: choices\n", "").replace("label", "answer"))
    _, models = run(tmp_path / "out", stage(task_dir, "spoken", "filtered"), inputs)
    spoken, filtered = (models["child"]["tasks"][name] for name in ("spoken", "filtered"))
    assert spoken["value"] == pytest.approx(0.5, abs=2 / len(EXAMPLES))
    assert spoken["stderr"] > 0
    assert spoken["metric"] == "exact_match"
    assert filtered == {**spoken, "metric": "exact_match,strict"}


@needs_lm_eval
def test_every_model_sees_the_same_worked_examples(inputs: dict[str, Artifact], task_dir: Path) -> None:
    pytest.importorskip("lm_eval")
    write_task(task_dir, "worked", further=OWN_EXAMPLES)
    choice = TaskChoice(node="evaluate", tasks=("worked",), directory=str(task_dir), limit=6, num_fewshot=3)
    tasks = Tasks.read(choice, output_types=COMPARING)
    seen = []
    for name in ("parent", "child"):
        model, tokenizer = load_model(inputs[name].path), load_tokenizer(inputs[name].path)
        Harness.around(model, tokenizer, tasks, batch_size=4, max_positions=256, progress=False).results()
        (task,) = tasks.members.values()
        seen.append([instance.args[0] for instance in task.instances])
    assert seen[0] == seen[1]
    assert all(question.count("The ") == 4 for question in seen[0])
    assert len(set(seen[0])) == 6


@needs_lm_eval
def test_a_model_is_let_go_before_the_next_one(inputs: dict[str, Artifact], task_dir: Path) -> None:
    pytest.importorskip("lm_eval")
    write_task(task_dir, "spoken", output_type="generate_until", metric="exact_match", further=SHORT)
    choice = TaskChoice(node="evaluate", tasks=("four_words", "spoken"), directory=str(task_dir), limit=2)
    tasks = Tasks.read(choice, output_types=WHOLE_MODEL)
    model, tokenizer = load_model(inputs["parent"].path), load_tokenizer(inputs["parent"].path)
    gone = weakref.ref(model)
    gc.collect()
    gc.disable()
    try:
        Harness.around(model, tokenizer, tasks, batch_size=4, max_positions=256, progress=True).results()
        del model
        assert gone() is None
    finally:
        gc.enable()


@needs_lm_eval
def test_nothing_is_recovered_of_nothing(tmp_path: Path, inputs: dict[str, Artifact], task_dir: Path) -> None:
    pytest.importorskip("lm_eval")
    write_task(task_dir, "never", output_type="generate_until", metric="exact_match", further=SHORT)
    result, models = run(tmp_path / "out", stage(task_dir, "never", task_limit=4), inputs)
    assert models["parent"]["tasks"]["never"]["value"] == 0
    assert models["child"]["tasks"]["never"]["recovery_frac"] is None
    assert models["child"]["tasks_recovery_frac"] is None
    assert "recovered" not in result.headline


@needs_lm_eval
@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("four_word", r"lm-eval knows no four_word; near names are four_words.*evaluate\.task_dir"),
        ("written", "written generates up to 256 tokens, beyond the 256 positions of parent"),
        ("unlikely", "unlikely is measured by acc, where less is better"),
        ("loose", "loose is a group without a value of the whole .*name its members: four_words, again"),
        ("tagged", "tagged stands for several tasks without a value of the whole; name them: again"),
        ("mistaken", "the first question of mistaken cannot be put with 64 worked examples"),
        ("gone", "gone cannot be loaded: .*; hub tasks need a network"),
        ("coded", "coded runs code that the model writes"),
    ],
)
def test_a_task_that_cannot_be_told_is_refused_by_name_before_a_model_is_loaded(
    tmp_path: Path,
    inputs: dict[str, Artifact],
    task_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    task: str,
    message: str,
) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setattr(evaluate, "load_model", lambda *_, **__: pytest.fail("weights were loaded"))
    write_task(task_dir, "again", further="tag: tagged\n")
    write_task(task_dir, "unlikely", more_is_better=False)
    write_task(task_dir, "mistaken", further="num_fewshot: 64\nfewshot_split: test\n")
    write_task(task_dir, "coded", further="unsafe_code: true\n")
    write_task(task_dir, "gone")
    (task_dir / "gone.yaml").write_text((task_dir / "gone.yaml").read_text().replace("examples.jsonl", "gone.jsonl"))
    (task_dir / "loose.yaml").write_text(GROUP.format(name="loose", aggregate=""))
    with pytest.raises(ValueError, match=rf"evaluate\.tasks: .*{message}"):
        run(tmp_path / "out", stage(task_dir, task), inputs)


@needs_lm_eval
def test_the_key_follows_task_files_and_their_examples(task_dir: Path) -> None:
    pytest.importorskip("lm_eval")

    def fingerprint() -> str:
        return make_recipe("evaluate", stage(task_dir, "four_words"), {}).fingerprint

    seen = [fingerprint(), fingerprint()]
    assert seen[0] == seen[1]
    write_task(task_dir, "four_words", further="num_fewshot: 1\n")
    seen.append(fingerprint())
    (task_dir / "examples.jsonl").write_text(json.dumps(EXAMPLES[0]) + "\n")
    seen.append(fingerprint())
    assert len({*seen}) == 3
    with pytest.raises(ValueError, match=r"evaluate\.tasks: lm-eval knows no arc_eazy; near names are arc_easy"):
        make_recipe("evaluate", stage(task_dir, "arc_eazy"), {})


def test_tasks_without_lm_eval_are_refused_when_they_are_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    with pytest.raises(ValueError, match=r"evaluate\.tasks=\['mmlu'\] needs .*pip install 'lm-eval\[hf\]>=0\.4\.13'"):
        make_recipe("evaluate", stage(None, "mmlu"), {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task_limit": 0}, r"evaluate\.task_limit must be > 0, got 0; null takes all"),
        ({"num_fewshot": -1}, r"evaluate\.num_fewshot must be >= 0, got -1"),
        ({"tasks": ("mmlu", "mmlu")}, r"evaluate\.tasks has one twice"),
    ],
)
def test_impossible_values_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(stage(None).evaluate, **change)
