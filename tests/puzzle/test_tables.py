"""Tables survive the disk, and refuse to be read with holes."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from puzzle.config import WorkloadConfig
from puzzle.model.architecture import NO_ATTENTION, NO_FFN, AttentionConfig, BlockConfig, FFNConfig
from puzzle.tables import (
    CostFile,
    CostTable,
    MergeSaving,
    OverheadCost,
    ScoreRow,
    ScoreTable,
    SubblockCost,
    parse_variant,
)

ATTENTIONS = (
    AttentionConfig(num_kv_heads=8),
    AttentionConfig(num_kv_heads=8, rope=False),
    AttentionConfig(kind="linear"),
    NO_ATTENTION,
)
FFNS = (FFNConfig(ffn_dim=512), FFNConfig(kind="linear"), NO_FFN)


@pytest.fixture
def scores() -> ScoreTable:
    return ScoreTable(
        parent={"lm_loss": 2.0},
        num_tokens=64,
        rows=tuple(
            ScoreRow(
                block=block,
                variant=variant,
                values={"kld": kld, "lm_loss": -kld, "hidden_cosine": 2 * kld},
                stderr={"kld": 0.0},
            )
            for block in (0, 1)
            for variant, kld in (("kv2+w512", 0.0), ("no_op+w512", 0.25))
        ),
    )


@pytest.fixture
def costs() -> CostTable:
    def row(subblock, variant, prefill_ms, decode_ms, params, kv_bytes):
        return SubblockCost(
            subblock=subblock,
            variant=variant,
            prefill_ms=prefill_ms,
            decode_ms=decode_ms,
            params=params,
            weight_bytes=4 * params,
            kv_bytes_per_token=kv_bytes,
        )

    return CostTable(
        source="measured",
        hardware="a device",
        workload=WorkloadConfig(batch_size=3, prefill_tokens=10, generated_tokens=5),
        kv_tokens=15,
        overhead=OverheadCost(prefill_ms=7.0, decode_ms=0.5, params=100, weight_bytes=400),
        subblocks=(
            row("attention", "kv2", 2.0, 0.25, 10, 64),
            row("attention", "no_op", 0.0, 0.0, 0, 0),
            row("ffn", "w512", 4.0, 1.0, 20, 0),
        ),
        ffn_merge_saving=MergeSaving(prefill_ms=1.0, decode_ms=0.125),
    )


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("ffn", FFNS)
def test_parse_variant_is_the_inverse_of_the_name(attention, ffn):
    block = BlockConfig(attention=attention, ffn=ffn, parent_block_indices=(0,))
    assert parse_variant(block.name) == (attention, ffn)


@pytest.mark.parametrize(
    "name", ["kv2", "kv+w512", "kv0+w512", "kv2_no+w512", "512", "kv2+w100", "gqa+w512", "no_op+", ""]
)
def test_parse_variant_refuses(name):
    with pytest.raises(ValueError, match=r"variant|multiple of 256"):
        parse_variant(name)


def test_scores_survive_the_disk(tmp_path, scores):
    scores.write(tmp_path / "scores.json")
    assert ScoreTable.read(tmp_path / "scores.json") == scores
    assert scores.by_block("hidden_cosine") == ({"kv2+w512": 0.0, "no_op+w512": 0.5},) * 2


def test_a_metric_that_not_all_rows_have(scores):
    del scores.rows[1].values["lm_loss"]
    assert scores.metrics == ("kld", "hidden_cosine")
    with pytest.raises(
        ValueError, match=r"block 0, variant no_op\+w512 has no lm_loss; all rows have kld, hidden_cosine"
    ):
        scores.by_block("lm_loss")


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: [row.update(block=2 * row["block"]) for row in c["rows"]], r"from 0 without gaps.*\[0, 2\]"),
        (lambda c: [row.update(block=row["block"] + 1) for row in c["rows"]], r"from 0 without gaps.*\[1, 2\]"),
        (lambda c: c["rows"].append(c["rows"][1]), r"block 0 has variant no_op\+w512 twice"),
        (lambda c: c["rows"][1]["values"].update(kld=float("nan")), r"block 0, variant no_op\+w512: kld is nan"),
        (lambda c: c["rows"][1]["stderr"].update(kld=float("inf")), r"block 0, variant no_op\+w512: kld is inf"),
        (lambda c: c["rows"][1]["values"].clear(), r"variant no_op\+w512 has no value"),
        (lambda c: c["rows"][1].pop("values"), "values"),
        (lambda c: c["rows"][1]["values"].update(kld="low"), "low"),
        (lambda c: c["rows"][1].update(variant="none"), "none"),
        (lambda c: c.update(rows=[]), "no rows"),
        (lambda c: c.pop("num_tokens"), "num_tokens"),
    ],
)
def test_scores_with_holes_are_refused(tmp_path, scores, change, message):
    path = tmp_path / "scores.json"
    scores.write(path)
    edit(path, change)
    with pytest.raises(ValueError, match=message) as error:
        ScoreTable.read(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [None, "{"])
def test_a_file_that_is_none(tmp_path, content):
    path = tmp_path / "scores.json"
    if content:
        path.write_text(content)
    with pytest.raises(ValueError, match=r"does not exist|is not JSON"):
        ScoreTable.read(path)


def test_costs_survive_the_disk(tmp_path, costs):
    file = CostFile(architecture={"hidden_size": 32}, workload=costs.workload, tables=(costs,))
    file.write(tmp_path / "costs.json")
    assert CostFile.read(tmp_path / "costs.json") == file


def test_tables_of_a_source_by_batch_size(costs):
    at = {size: replace(costs, workload=replace(costs.workload, batch_size=size)) for size in (8, 1, 3)}
    analytic = replace(costs, source="analytic")
    file = CostFile(architecture={}, workload=costs.workload, tables=(*at.values(), analytic))
    assert file.sources == ("measured", "analytic")
    # The workload's own batch size comes first.
    assert list(file.of_source("measured").items()) == [(size, at[size]) for size in (3, 1, 8)]
    with pytest.raises(ValueError, match=r"no table from 'vllm', only from measured, analytic"):
        file.of_source("vllm")


def test_two_tables_of_one_source_and_batch_size_are_refused(costs):
    with pytest.raises(ValueError, match=r"two tables from measured at batch size 3"):
        CostFile(architecture={}, workload=costs.workload, tables=(costs, costs))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["subblocks"].append(t["subblocks"][0]), "attention has variant kv2 twice"),
        (lambda t: t["subblocks"][2].update(decode_ms=-0.5), r"ffn w512: decode_ms is -0.5, below 0"),
        (lambda t: t["subblocks"][2].update(prefill_ms=float("inf")), "prefill_ms is inf"),
        (lambda t: t["subblocks"][0].update(variant="w512"), "attention variant 'w512'"),
        (lambda t: t["subblocks"][0].update(subblock="mamba"), "mamba"),
        (lambda t: t["overhead"].update(params=-1), "overhead: params is -1"),
        (lambda t: t["ffn_merge_saving"].update(decode_ms=-0.1), "ffn_merge_saving: decode_ms"),
        (lambda t: t.pop("overhead"), "overhead"),
        (lambda t: t.update(kv_tokens=0), "kv_tokens"),
    ],
)
def test_costs_with_holes_are_refused(tmp_path, costs, change, message):
    path = tmp_path / "costs.json"
    CostFile(architecture={}, workload=costs.workload, tables=(costs,)).write(path)
    edit(path, lambda content: change(content["tables"][0]))
    with pytest.raises(ValueError, match=message) as error:
        CostFile.read(path)
    assert "\n" not in str(error.value)


def test_cost_of_a_block(costs):
    block = costs.block("kv2+w512")
    assert (block.prefill_ms, block.decode_ms, block.params, block.kv_bytes_per_token) == (6.0, 1.25, 30, 64)
    # The prompt gives the first of the 5 tokens.
    assert block.request_ms == 6.0 + 4 * 1.25
    assert block.memory_bytes == 4 * 30 + 3 * 15 * 64


def test_cost_of_a_model_has_the_overhead_once(costs):
    model = costs.model(["kv2+w512", "no_op+w512"])
    assert (model.prefill_ms, model.decode_ms, model.params) == (7.0 + 6.0 + 4.0, 0.5 + 1.25 + 1.0, 150)
    assert model.memory_bytes == 4 * 150 + 3 * 15 * 64
    assert model.request_ms == 17.0 + 4 * 2.75


def test_merge_saving_by_phase(costs):
    assert [costs.merge_saving_ms(phase) for phase in ("decode", "prefill", "request")] == [0.125, 1.0, 1.5]


def test_a_variant_that_was_not_measured(costs):
    with pytest.raises(ValueError, match=r"attention variant kv1 is not in the table, which has kv2, no_op"):
        costs.block("kv1+w512")


def test_kv_cache_of_a_sliding_window_is_bounded(costs):
    assert replace(costs, kv_tokens=4).block("kv2+w512").memory_bytes == 4 * 30 + 3 * 4 * 64
