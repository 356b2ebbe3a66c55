"""The stage search on tables with round numbers, from artifacts and from a user's own files."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from fusion.config import FuseConfig
from launch.stage import StageContext
from launch.stage_configs import SearchStage
from launch.stages import search
from puzzle import mip
from puzzle.config import ConstraintConfig, SearchConfig, SpaceConfig, WorkloadConfig
from puzzle.integer_program import TimeLimitError
from puzzle.model.hf_config import hf_config
from puzzle.space import block_variants
from puzzle.tables import CostFile, CostTable, MergeSaving, OverheadCost, ScoreRow, ScoreTable, SubblockCost

SPACE = SpaceConfig(ffn_fracs=(0.5,))
WORKLOAD = WorkloadConfig(prefill_tokens=16, generated_tokens=8)
DECODE_MS = {"kv2": 1.0, "w512": 3.0, "w256": 2.0, "no_op": 0.0}


def artifact(path: Path, *, parent: str = "a" * 64) -> SimpleNamespace:
    manifest = SimpleNamespace(inputs={"parent": SimpleNamespace(fingerprint=parent)})
    return SimpleNamespace(path=path, manifest=manifest)


@pytest.fixture
def context(tmp_path):
    out = tmp_path / "search"
    out.mkdir()
    return StageContext(
        out=out, resume=tmp_path / "resume", pool=tmp_path / "pool", run_name="test", step_name="search"
    )


@pytest.fixture
def scores(tmp_path, pico_architecture):
    """Attentions are cheaper to remove towards the end; half an FFN costs more than any attention."""
    rows = []
    for index, own in enumerate(pico_architecture.blocks):
        for variant in block_variants(pico_architecture, index, SPACE):
            kld = 0.1 * (4 - index) * (variant.attention != own.attention) + 1.0 * (variant.ffn != own.ffn)
            values = {"kld": kld, "lm_loss": -kld}
            rows.append(ScoreRow(block=index, variant=variant.name, values=values, stderr={}))
    (tmp_path / "scores").mkdir()
    table = ScoreTable(parent={"lm_loss": 2.0}, num_tokens=64, rows=tuple(rows))
    table.write(tmp_path / "scores" / "scores.json")
    return tmp_path / "scores"


def cost_table(batch_size: int) -> CostTable:
    """1 ms per attention, 3 per FFN, at batch size 1; an attention takes as long again for every further sequence."""
    rows = []
    for subblock, variants in (("attention", ("kv2", "no_op")), ("ffn", ("w512", "w256", "no_op"))):
        for variant in variants:
            decode_ms = DECODE_MS[variant] * (batch_size if variant == "kv2" else 1)
            params = int(1000 * DECODE_MS[variant])
            rows.append(
                SubblockCost(
                    subblock=subblock,
                    variant=variant,
                    prefill_ms=2 * batch_size * DECODE_MS[variant],
                    decode_ms=decode_ms,
                    params=params,
                    weight_bytes=4 * params,
                    kv_bytes_per_token=256 * (variant == "kv2"),
                )
            )
    return CostTable(
        source="measured",
        hardware="this CPU",
        workload=replace(WORKLOAD, batch_size=batch_size),
        kv_tokens=24,
        overhead=OverheadCost(prefill_ms=1.0, decode_ms=0.5, params=500, weight_bytes=2000),
        subblocks=tuple(rows),
        ffn_merge_saving=MergeSaving(prefill_ms=0.0, decode_ms=0.25),
    )


@pytest.fixture
def costs(tmp_path, pico_architecture):
    (tmp_path / "costs").mkdir()
    tables = (cost_table(1), cost_table(4))
    file = CostFile(architecture=hf_config(pico_architecture, "float32"), workload=WORKLOAD, tables=tables)
    file.write(tmp_path / "costs" / "costs.json")
    return tmp_path / "costs"


def run_search(context, scores_dir, costs_dir, *, fuse=None, **fields):
    settings = SearchConfig(**{"constraint": ConstraintConfig(latency_ms=14.3), "batch_sizes": (1,), **fields})
    inputs = {"scores": scores_dir, "costs": costs_dir}
    inputs = {name: artifact(path) for name, path in inputs.items() if getattr(settings, name) is None}
    result = search.run(SearchStage(search=settings, fuse=fuse or FuseConfig()), inputs, context)
    return result, json.loads((context.out / "solution.json").read_text())


def test_search_removes_the_cheapest_run(context, scores, costs):
    """The parent takes 16.5 ms; without attention in the last three blocks 13.5, and 13.25 after one merge."""
    result, content = run_search(context, scores, costs, constraint=ConstraintConfig(latency_ms=13.3))
    best = content["solutions"][0]
    assert best["blocks"] == ["kv2+w512", "no_op+w512", "no_op+w512", "no_op+w512"]
    assert best["score"] == pytest.approx(0.6)
    assert (best["parent_costs"]["latency_ms"], best["costs"]["latency_ms"]) == (16.5, 13.5)
    assert (best["predicted_fused_latency_ms"], best["num_merges"]) == (13.25, 1)
    assert (best["status"], best["method"], best["batch_size"]) == ("optimal", "mip", 1)
    assert (content["metric"], content["hardware"], content["parent"]) == ("kld", "this CPU", "a" * 64)
    assert content["workload"] == asdict(WORKLOAD)
    assert best["costs"].keys() >= {"memory_bytes", "params", "kv_bytes_per_token", "request_ms"}
    assert result.headline == "3 of 4 attentions removed, predicted decode 0.82x (fused 0.80x), score 0.6"
    assert json.dumps(result.metrics, allow_nan=False)


def test_search_front_and_several_solutions(context, scores, costs):
    fields = {"num_solutions": 30, "pareto_latency_fracs": (0.9, 0.1, 1.0), "min_different_frac": 0.5}
    result, content = run_search(context, scores, costs, **fields)
    assert [point["latency_frac"] for point in content["pareto"]] == [0.9, 1.0]
    assert content["pareto"][1]["score"] == 0
    assert content["pareto"][0]["score"] > 0
    assert content["pareto_out_of_reach"] == [0.1]
    assert 1 < len(content["solutions"]) < 30
    assert f"{len(content['solutions'])} of 30 solutions" in result.headline


def test_search_by_another_metric(context, scores, costs):
    """Where the loss falls with every change, all is changed."""
    _, content = run_search(context, scores, costs, metric="lm_loss", constraint=ConstraintConfig())
    assert content["solutions"][0]["blocks"] == ["kv2+w256", *["no_op+w256"] * 3]
    with pytest.raises(ValueError, match="has no accuracy; all rows have kld, lm_loss"):
        run_search(context, scores, costs, metric="accuracy")


def test_every_batch_size_is_searched_and_the_best_score_wins(context, scores, costs):
    """Throughput wants the batch of 4, which takes 28.5 ms for four tokens instead of 16.5 for one."""
    constraint = ConstraintConfig(throughput_ratio=1.05, kv_bytes_per_token=1024)
    result, content = run_search(context, scores, costs, constraint=constraint, batch_sizes=())
    best = content["solutions"][0]
    assert (best["batch_size"], best["parent_costs"]["latency_ms"]) == (4, 28.5)
    assert [entry["batch_size"] for entry in content["batch_sizes"]] == [1, 4]
    assert content["batch_sizes"][0]["score"] is None
    assert "throughput_ratio=1.05 is out of reach, the most is" in content["batch_sizes"][0]["infeasible"]
    assert content["batch_sizes"][1]["score"] == best["score"]
    assert "batch size 4" in result.headline
    # Memory may not hold the parent's cache at batch 4: then its best is at batch 1.
    limit_gib = (66000 + 24 * 1024 + 1) / 2**30
    constraint = ConstraintConfig(throughput_ratio=1.05, memory_gib=limit_gib)
    _, content = run_search(context, scores, costs, constraint=constraint, batch_sizes=())
    assert all(entry["score"] is not None for entry in content["batch_sizes"])


def test_batch_sizes_that_all_fail(context, scores, costs):
    with pytest.raises(ValueError, match=r"latency_ms=1 is out of reach.*; at batch size 4: .*latency_ms=1 is out of"):
        run_search(context, scores, costs, constraint=ConstraintConfig(latency_ms=1.0), batch_sizes=())
    with pytest.raises(ValueError, match=r"batch_sizes=\[8\]: the costs have batch size 1, 4; measure 8"):
        run_search(context, scores, costs, batch_sizes=(8,))


def test_search_by_a_baseline(context, scores, costs):
    fields = {"method": "attention_pruning", "pareto_latency_fracs": (0.9, 0.1)}
    result, content = run_search(context, scores, costs, constraint=ConstraintConfig(latency_ms=13.3), **fields)
    best = content["solutions"][0]
    assert (best["method"], best["status"], best["mip_gap"]) == ("attention_pruning", "heuristic", None)
    assert best["blocks"].count("no_op+w512") == 3
    assert (len(content["pareto"]), content["pareto_out_of_reach"]) == (1, [0.1])
    assert result.headline.startswith("attention_pruning: 3 of 4 attentions removed")


def test_baselines_choose_a_batch_size_by_what_they_go_by(context, scores, costs):
    """At batch size 4 the 16 ms allow far less: more of the attentions go, and with them parameters."""
    fields = {"constraint": ConstraintConfig(latency_ms=16.0), "batch_sizes": (), "metric": "lm_loss"}
    _, content = run_search(context, scores, costs, method="max_params", pareto_latency_fracs=(0.9,), **fields)
    # A loss that falls with every change would have led to batch size 4.
    one, four = content["batch_sizes"]
    assert four["score"] < one["score"] == content["solutions"][0]["score"]
    assert content["solutions"][0]["batch_size"] == 1
    better_by_score = 0
    for seed in range(8):
        _, content = run_search(context, scores, costs, method="random", random_seed=seed, **fields)
        one, four = content["batch_sizes"]
        better_by_score += four["score"] < one["score"]
        # What batch size 4 admits batch size 1 does too, so the least sum of lots is there.
        assert content["solutions"][0]["batch_size"] == 1
    assert better_by_score > 0


def test_what_is_lost_to_the_time_limit_is_said(context, scores, costs, monkeypatch):
    minimise = mip.minimise
    calls = itertools.count()

    def limited(*args, **settings):
        if next(calls) in (0, 2):
            raise TimeLimitError("search.time_limit_seconds=60 passed; raise it")
        return minimise(*args, **settings)

    monkeypatch.setattr(mip, "minimise", limited)
    fields = {"constraint": ConstraintConfig(latency_frac=0.9), "pareto_latency_fracs": (0.9, 1.0)}
    _, content = run_search(context, scores, costs, batch_sizes=(), **fields)
    one, four = content["batch_sizes"]
    assert (one["score"], one["infeasible"], one["time_limit"][:28]) == (None, None, "search.time_limit_seconds=60")
    assert (four["infeasible"], four["time_limit"], content["solutions"][0]["batch_size"]) == (None, None, 4)
    # The point that batch size 1 lost, batch size 4 has.
    assert [point["latency_frac"] for point in content["pareto"]] == [0.9, 1.0]
    assert (content["pareto"][0]["batch_size"], content["pareto_out_of_time"]) == (4, [])

    calls = iter([0, 2])
    with pytest.raises(TimeLimitError, match=r"passed; raise it; at batch size 4: search\.time_limit_seconds=60"):
        run_search(context, scores, costs, batch_sizes=(), **fields)
    calls = iter([1, 2, 1])
    _, content = run_search(context, scores, costs, **fields)
    assert (content["pareto_out_of_time"], content["pareto_out_of_reach"]) == ([0.9], [])


def test_search_on_conditional_scores(context, scores, costs):
    """Scores of changes to the child without its last attention: the parent's own last block is not among the rows."""
    table = ScoreTable.read(scores / "scores.json")
    base = ("kv2+w512",) * 3 + ("no_op+w512",)
    rows = tuple(row for row in table.rows if row.block < 3 or row.variant.startswith("no_op"))
    replace(table, rows=rows, base=base, base_values={"kld": 0.1}).write(scores / "scores.json")
    _, content = run_search(context, scores, costs, constraint=ConstraintConfig(latency_frac=1.0))
    assert content["solutions"][0]["blocks"] == list(base)
    assert content["solutions"][0]["parent_costs"]["latency_ms"] == 16.5
    assert content["conditional"] is True
    fields = {"method": "attention_pruning", "constraint": ConstraintConfig(latency_ms=14.5)}
    _, content = run_search(context, scores, costs, **fields)
    # The base takes 15.5 ms, so one more attention goes.
    assert content["solutions"][0]["blocks"] == ["kv2+w512", "kv2+w512", "no_op+w512", "no_op+w512"]


def test_targets_leave_out_what_they_cannot_load(context, tmp_path, costs, pico_architecture):
    """Without targets the cheapest way to 13.3 ms begins at block 0, whose attention vLLM and SGLang count on."""
    space = SpaceConfig(keep_attention=())
    rows = [
        ScoreRow(block=index, variant=variant.name, values={"kld": 0.1 * index * (variant != own)}, stderr={})
        for index, own in enumerate(pico_architecture.blocks)
        for variant in block_variants(pico_architecture, index, space)
    ]
    (tmp_path / "scores").mkdir()
    ScoreTable(parent={"lm_loss": 2.0}, num_tokens=64, rows=tuple(rows)).write(tmp_path / "scores" / "scores.json")
    fields = {"constraint": ConstraintConfig(latency_ms=13.8), "fusion_aware": False}
    _, content = run_search(context, tmp_path / "scores", costs, **fields)
    assert content["solutions"][0]["blocks"] == ["no_op+w512", "no_op+w512", "no_op+w512", "kv2+w512"]
    _, content = run_search(context, tmp_path / "scores", costs, targets=("transformers", "vllm", "sglang"), **fields)
    assert content["solutions"][0]["blocks"] == ["kv2+w512", "no_op+w512", "no_op+w512", "no_op+w512"]


def test_targets_that_leave_nothing_are_refused(context, scores, costs, pico_architecture):
    content = json.loads((costs / "costs.json").read_text())
    content["architecture"] = hf_config(replace(pico_architecture, qk_norm=True), "float32")
    (costs / "costs.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"search\.targets: vllm cannot load this model: queries and keys are norm"):
        run_search(context, scores, costs, targets=("transformers", "vllm"))
    run_search(context, scores, costs, targets=("transformers",))


def test_search_without_the_table(context, scores, costs):
    with pytest.raises(ValueError, match=r"costs have no table from 'analytic', only from measured"):
        run_search(context, scores, costs, cost_table="analytic")


def test_search_with_a_variant_that_was_not_measured(context, scores, costs):
    content = json.loads((costs / "costs.json").read_text())
    for table in content["tables"]:
        table["subblocks"] = [row for row in table["subblocks"] if row["variant"] != "w256"]
    (costs / "costs.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="ffn variant w256 is not in the table, which has w512"):
        run_search(context, scores, costs)


def test_scores_and_costs_of_different_parents_are_refused(context, scores, costs):
    config = SearchStage(search=SearchConfig(constraint=ConstraintConfig(latency_ms=14.3)), fuse=FuseConfig())
    inputs = {"scores": artifact(scores), "costs": artifact(costs, parent="b" * 64)}
    with pytest.raises(ValueError, match="scores are of model aaaaaaaaaaaa, the costs of model bbbbbbbbbbbb"):
        search.run(config, inputs, context)
    table = ScoreTable.read(scores / "scores.json")
    replace(table, rows=tuple(row for row in table.rows if row.block < 3)).write(scores / "scores.json")
    with pytest.raises(ValueError, match="scores cover 3 blocks, the parent of the costs has 4"):
        run_search(context, scores, costs, scores=str(scores / "scores.json"))


@pytest.mark.parametrize("setting", [{"max_ffn_dim": 512}, {"max_dependency": 0.1}, {"groups": ((1, 2),)}])
def test_fusion_that_the_cost_does_not_model_is_refused(context, scores, costs, setting):
    name = next(iter(setting))
    with pytest.raises(ValueError, match=f"fuse.{name}=.* is not in the search's fusion-aware cost"):
        run_search(context, scores, costs, fuse=FuseConfig(**setting))
    run_search(context, scores, costs, fuse=FuseConfig(**setting), fusion_aware=False)


def test_short_runs_that_fusion_leaves_alone_save_nothing(context, scores, costs):
    constraint = ConstraintConfig(latency_ms=13.5)
    _, content = run_search(context, scores, costs, constraint=constraint, fuse=FuseConfig(min_length=3))
    assert (content["solutions"][0]["num_merges"], content["solutions"][0]["predicted_fused_latency_ms"]) == (0, 13.5)


OWN_SCORES = "block,variant,kld\n" + "".join(f"{i},full,0\n{i},half,{0.1 * (4 - i)}\n" for i in range(4))
OWN_COSTS = "block,variant,decode_ms,params\noutside,,1,10\n*,full,4,100\n*,half,2,50\n"


def test_tables_of_ones_own_without_torch(tmp_path):
    """The command as a newcomer types it, in a Python that has neither torch nor transformers."""
    (tmp_path / "scores.csv").write_text(OWN_SCORES)
    (tmp_path / "costs.csv").write_text(OWN_COSTS)
    without = (
        "import sys; sys.modules.update(dict.fromkeys(('torch', 'transformers', 'datasets')))\n"
        "from launch.__main__ import main; sys.exit(main())"
    )
    command = [sys.executable, "-c", without, "search", "search.scores=scores.csv", "search.costs=costs.csv"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "COLUMNS": "120"}

    def launch(*overrides):
        return subprocess.run(
            [*command, *overrides], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )

    done = launch("search.constraint.latency_ms=13", "search.constraint.params_frac=0.95")
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["0-1", "full", "full", "0"] in lines
    assert ["2-3", "full", "half", "0.3"] in lines
    assert ["parameters", "410", "310", "0.756x"] in lines
    assert ["decode,", "ms", "per", "token", "17", "13", "0.765x"] in lines
    assert "2 of 4 blocks changed, predicted decode 0.76x (fused 0.76x), score 0.3" in done.stdout
    (solution,) = (tmp_path / "runs").rglob("solution.json")
    content = json.loads(solution.read_text())
    assert content["solutions"][0]["blocks"] == ["full", "full", "half", "half"]
    assert (content["parent"], content["hardware"]) == (None, None)
    assert len(content["pareto"]) == 4

    # The same again is found, other content under the same name is not.
    again = launch("search.constraint.latency_ms=13", "search.constraint.params_frac=0.95")
    assert "cached" in again.stdout
    (tmp_path / "costs.csv").write_text(OWN_COSTS.replace("half,2", "half,-2"))
    wrong = launch("search.constraint.latency_ms=13")
    assert wrong.returncode == 2
    assert "costs.csv, line 4: decode_ms is -2, below 0; measure it again" in wrong.stderr.replace("\n", " ")


def test_own_costs_beside_scores_of_ours(context, scores, tmp_path):
    lines = [f"*,{a}+{f},{DECODE_MS[a] + DECODE_MS[f]}" for a in ("kv2", "no_op") for f in ("w512", "w256")]
    (tmp_path / "own.csv").write_text("\n".join(["block,variant,decode_ms", "outside,,0.5", "merge,,0.25", *lines]))
    fields = {"costs": str(tmp_path / "own.csv"), "constraint": ConstraintConfig(latency_ms=13.3)}
    _, content = run_search(context, scores, None, **fields)
    assert content["solutions"][0]["blocks"] == ["kv2+w512", "no_op+w512", "no_op+w512", "no_op+w512"]
    assert content["solutions"][0]["predicted_fused_latency_ms"] == 13.25
    assert (content["parent"], content["cost_table"]) == ("a" * 64, str(tmp_path / "own.csv"))
    with pytest.raises(
        ValueError, match=r"search\.targets=\[vllm\] goes by the parent's architecture, which search\.c"
    ):
        run_search(context, scores, None, targets=("vllm",), **fields)
