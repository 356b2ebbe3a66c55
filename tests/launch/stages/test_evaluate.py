"""lm-eval tasks of stage evaluate, on task files of a user's own and pico models."""

from __future__ import annotations

import gc
import json
import random
import sys
import weakref
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from distill.config import EngineConfig, EvaluateConfig
from distill.data.tokenizer import load_tokenizer
from launch.artifact import Artifact
from launch.config import compose_stage
from launch.pipeline import make_recipe
from launch.stage import StageContext, StageResult
from launch.stage_configs import EvaluateStage
from launch.stages import evaluate
from puzzle.lm_eval_index import TaskChoice
from puzzle.lm_eval_tasks import Harness, Tasks
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
METRICS = """
metric_list:
  - {metric: brier_score, higher_is_better: false}
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
DRAWING = """
import random
import numpy
import torch

def shuffled(examples):
    return examples.shuffle(seed=random.randrange(2**31))

def text(example):
    return f"{example['text']} {random.random()} {numpy.random.random()} {torch.rand(1).item()}"
"""
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
    resume = out.with_name("resume")
    out.mkdir(parents=True)
    resume.mkdir(exist_ok=True)
    context = StageContext(out=out, resume=resume, pool=out, run_name="run", step_name="evaluation")
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


def test_a_killed_attempt_leaves_the_models_that_it_finished(
    tmp_path: Path, inputs: dict[str, Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, expected = run(tmp_path / "unbroken" / "out", stage(None), inputs)
    measured = []
    own = evaluate.evaluate_model

    def killed_at_the_child(*args: Any, **options: Any) -> Any:
        measured.append("parent" if options["teacher"] is None else "child")
        if measured == ["parent", "child"]:
            raise KeyboardInterrupt
        return own(*args, **options)

    monkeypatch.setattr(evaluate, "evaluate_model", killed_at_the_child)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", stage(None), inputs)
    _, models = run(tmp_path / "again", stage(None), inputs)
    assert measured == ["parent", "child", "child"]
    assert models == expected


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
        assert task.keys() == {
            "metric",
            "value",
            "stderr",
            "n",
            "metrics",
            "num_truncated",
            "recovery_frac",
        }
        assert task["metrics"] == {"acc": {"value": task["value"], "stderr": task["stderr"]}}
        assert task["num_truncated"] == 0
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
    assert {**filtered, "metrics": {}} == {**spoken, "metric": "exact_match,strict", "metrics": {}}
    assert filtered["metrics"].keys() == {"exact_match,strict", "exact_match,loose"}


@needs_lm_eval
def test_every_model_sees_the_same_worked_examples(inputs: dict[str, Artifact], task_dir: Path) -> None:
    pytest.importorskip("lm_eval")
    write_task(task_dir, "worked", further=OWN_EXAMPLES)
    choice = TaskChoice(node="evaluate", tasks=("worked",), directory=str(task_dir), limit=6, num_fewshot=3)
    tasks = Tasks.read(choice)
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
    tasks = Tasks.read(choice)
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
        ("written", "written generates up to 256 tokens, beyond the 256 positions that all models have"),
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
def test_one_task_with_two_settings_is_refused(tmp_path: Path, inputs: dict[str, Artifact], task_dir: Path) -> None:
    pytest.importorskip("lm_eval")
    write_task(task_dir, "four_words", further="fewshot_split: test\n")
    text = GROUP.format(name="both", aggregate=WEIGHED)
    changed = text.replace("[four_words, again]", "[{task: four_words, num_fewshot: 3}]")
    (task_dir / "both.yaml").write_text(changed)
    message = r"both and four_words have four_words with different settings \(num_fewshot\).*in two steps"
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "out", stage(task_dir, "both", "four_words"), inputs)


@needs_lm_eval
def test_likelihoods_of_a_bf16_model_are_summed_in_fp32(inputs: dict[str, Artifact], task_dir: Path) -> None:
    pytest.importorskip("lm_eval")
    choice = TaskChoice(node="evaluate", tasks=("four_words",), directory=str(task_dir), limit=8)
    tasks = Tasks.read(choice)
    model = load_model(inputs["parent"].path, dtype=torch.bfloat16)
    tokenizer = load_tokenizer(inputs["parent"].path)
    Harness.around(model, tokenizer, tasks, batch_size=1, max_positions=256, progress=False).results()
    for request in tasks.members["four_words"].instances:
        question, whole = (tokenizer(text)["input_ids"] for text in (request.args[0], "".join(request.args)))
        with torch.no_grad():
            log_p = model(torch.tensor([whole[:-1]])).logits[0].float().log_softmax(-1)
        own = sum(log_p[i - 1, whole[i]].item() for i in range(len(question), len(whole)))
        assert request.resps[0][0] == pytest.approx(own, abs=1e-4)


@needs_lm_eval
def test_cut_questions_are_counted_in_the_positions_that_all_models_have(
    tmp_path: Path, inputs: dict[str, Artifact], task_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")
    rows = [{**example, "text": "The block reads. " * (20 if n < 3 else 1)} for n, example in enumerate(EXAMPLES)]
    (task_dir / "examples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = evaluate.read_architecture

    def shorter_child(path: Path) -> Any:
        architecture = own(path)
        return replace(architecture, max_positions=48) if path == inputs["child"].path else architecture

    monkeypatch.setattr(evaluate, "read_architecture", shorter_child)
    seen = []
    around = Harness.around

    def note(*args: Any, **options: Any) -> Harness:
        seen.append(options["max_positions"])
        return around(*args, **options)

    monkeypatch.setattr(Harness, "around", note)
    _, models = run(tmp_path / "out", stage(task_dir, "four_words", task_limit=8), inputs)
    assert seen == [48, 48]
    assert [row["tasks"]["four_words"]["num_truncated"] for row in models.values()] == [3, 3]


@needs_lm_eval
def test_questions_of_which_none_fits_are_refused(
    tmp_path: Path, inputs: dict[str, Artifact], task_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setattr(evaluate, "load_model", lambda *_, **__: pytest.fail("weights were loaded"))
    write_task(task_dir, "worked", further="fewshot_split: test\nnum_fewshot: 60\n")
    with pytest.raises(ValueError, match=r"with 60 worked examples, none of the 2 questions of worked fits the 256"):
        run(tmp_path / "out", stage(task_dir, "worked", task_limit=2), inputs)


@needs_lm_eval
def test_tasks_that_draw_are_seeded_and_leave_generators_as_they_were(
    inputs: dict[str, Artifact], task_dir: Path
) -> None:
    pytest.importorskip("lm_eval")
    (task_dir / "drawing.py").write_text(DRAWING)
    functions = "process_docs: !function drawing.shuffled\n"
    write_task(task_dir, "drawn", further=functions)
    file = task_dir / "drawn.yaml"
    file.write_text(file.read_text().replace("doc_to_text: text", "doc_to_text: !function drawing.text"))
    choice = TaskChoice(node="evaluate", tasks=("drawn",), directory=str(task_dir), limit=6)
    model, tokenizer = load_model(inputs["parent"].path), load_tokenizer(inputs["parent"].path)
    seen = []
    for seed in (5, 6):
        random.seed(seed)
        numpy.random.seed(seed)
        torch.manual_seed(seed)
        tasks = Tasks.read(choice)
        Harness.around(model, tokenizer, tasks, batch_size=4, max_positions=256, progress=False).results()
        seen.append([instance.args for instance in tasks.members["drawn"].instances])
        after = random.random(), numpy.random.random(), torch.rand(1).item()
        random.seed(seed)
        numpy.random.seed(seed)
        torch.manual_seed(seed)
        assert after == (random.random(), numpy.random.random(), torch.rand(1).item())
    assert seen[0] == seen[1]
    assert seen[0][0][0] != EXAMPLES[0]["text"]


@needs_lm_eval
def test_the_first_metric_where_more_is_better_counts_unless_another_is_asked_for(
    tmp_path: Path, inputs: dict[str, Artifact], task_dir: Path
) -> None:
    pytest.importorskip("lm_eval")
    for name in ("plain", "normed"):
        write_task(task_dir, name)
        file = task_dir / f"{name}.yaml"
        file.write_text(file.read_text().partition("metric_list")[0] + METRICS)
    config = stage(task_dir, "plain", "normed", task_limit=20, task_metrics={"normed": "acc_norm"})
    _, models = run(tmp_path / "out", config, inputs)
    plain, normed = models["parent"]["tasks"].values()
    assert (plain["metric"], normed["metric"]) == ("acc", "acc_norm")
    assert plain["metrics"] == normed["metrics"]
    assert plain["metrics"].keys() == {"brier_score", "acc", "acc_norm"}
    for row in (plain, normed):
        assert row["metrics"][row["metric"]] == {"value": row["value"], "stderr": row["stderr"]}
    for metric, message in {
        "f1": r"evaluate\.task_metrics: plain has no metric f1; it has brier_score, acc, acc_norm",
        "brier_score": r"plain is measured by brier_score, where less is better",
    }.items():
        with pytest.raises(ValueError, match=message):
            make_recipe("evaluate", stage(task_dir, "plain", task_metrics={"plain": metric}), {})


@needs_lm_eval
@pytest.mark.parametrize(
    ("asked", "label"), [("", "exact_match,strict"), ("filter_list: loose, ", "exact_match,loose")]
)
def test_a_group_counts_by_its_own_filter_or_the_first_of_its_first_member(
    inputs: dict[str, Artifact], task_dir: Path, asked: str, label: str
) -> None:
    pytest.importorskip("lm_eval")
    for name in ("four_words", "again"):
        write_task(task_dir, name, output_type="generate_until", metric="exact_match", further=SHORT + FILTERS)
        file = task_dir / f"{name}.yaml"
        file.write_text(file.read_text().replace("doc_to_choice: choices\n", "").replace("label", "text"))
    weighed = WEIGHED.replace("metric: acc", f"{asked}metric: exact_match")
    (task_dir / "both.yaml").write_text(GROUP.format(name="both", aggregate=weighed))
    choice = TaskChoice(node="evaluate", tasks=("both",), directory=str(task_dir), limit=2)
    model, tokenizer = load_model(inputs["parent"].path), load_tokenizer(inputs["parent"].path)
    harness = Harness.around(model, tokenizer, Tasks.read(choice), batch_size=4, max_positions=256, progress=False)
    assert harness.results()["both"].metric == label


@needs_lm_eval
@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("unlikely", "unlikely is measured by acc, where less is better"),
        ("coded", "coded runs code that the model writes"),
        ("coded_group", "coded runs code that the model writes"),
        ("loose", "loose is a group without a value of the whole .*name its members: four_words, again"),
        ("tagged", "tagged stands for several tasks without a value of the whole; name them: again"),
        ("odd", "odd is of type multiple_choices; give tasks of type multiple_choice or"),
    ],
)
def test_what_files_say_is_refused_by_the_plan(task_dir: Path, task: str, message: str) -> None:
    pytest.importorskip("lm_eval")
    write_task(task_dir, "again", further="tag: tagged\n")
    write_task(task_dir, "unlikely", more_is_better=False)
    write_task(task_dir, "coded", further="unsafe_code: true\n")
    write_task(task_dir, "odd", output_type="multiple_choices")
    (task_dir / "loose.yaml").write_text(GROUP.format(name="loose", aggregate=""))
    coded = GROUP.format(name="coded_group", aggregate=WEIGHED).replace("again", "coded")
    (task_dir / "coded_group.yaml").write_text(coded)
    (task_dir / "examples.jsonl").unlink()
    with pytest.raises(ValueError, match=rf"evaluate\.tasks: {message}"):
        make_recipe("evaluate", stage(task_dir, task), {})


@needs_lm_eval
def test_the_headline_says_of_how_many_tasks_a_share_can_be_told(
    tmp_path: Path, inputs: dict[str, Artifact], task_dir: Path
) -> None:
    pytest.importorskip("lm_eval")
    write_task(task_dir, "never", output_type="generate_until", metric="exact_match", further=SHORT)
    result, models = run(tmp_path / "out", stage(task_dir, "four_words", "never"), inputs)
    kept = models["child"]["tasks"]["four_words"]["recovery_frac"]
    assert models["child"]["tasks_recovery_frac"] == pytest.approx(kept)
    assert result.headline.endswith(f"; 1 of 2 tasks recovered: child {kept:.1%}")


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


def test_a_metric_is_chosen_on_the_command_line() -> None:
    overrides = ["evaluate.tasks=[hellaswag,arc_easy]", "evaluate.task_metrics={hellaswag:acc_norm}"]
    assert compose_stage(EvaluateStage, overrides).evaluate.task_metrics == {"hellaswag": "acc_norm"}
    assert compose_stage(EvaluateStage, []).evaluate.task_metrics is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task_limit": 0}, r"evaluate\.task_limit must be > 0, got 0; null takes all"),
        ({"num_fewshot": -1}, r"evaluate\.num_fewshot must be >= 0, got -1"),
        ({"tasks": ("mmlu", "mmlu")}, r"evaluate\.tasks has one twice"),
        ({"task_metrics": {"mmlu": "acc"}}, r"evaluate\.task_metrics names mmlu, not of evaluate\.tasks=\[\]"),
    ],
)
def test_impossible_values_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(stage(None).evaluate, **change)
