"""The benchmark of fusion and FP8, with pico models; on a GPU it also times, which is not tried here."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from statistics import stdev
from types import ModuleType

import pytest
import torch

from puzzle.model.architecture import NO_ATTENTION
from puzzle.model.checkpoint import TensorReader, check_tensors, load_model, read_architecture, save_model
from tests.fp8_models import import_benchmark
from tests.launch.training_inputs import write_data, write_teacher


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> tuple[ModuleType, ModuleType]:
    return import_benchmark("quantization", monkeypatch), import_benchmark("ffn_in_fp8", monkeypatch)


@pytest.fixture
def arguments(pico_parent_dir: Path, tmp_path: Path) -> list[str]:
    """Of a parent that prefers some tokens to others, a child of it without one attention, and data."""
    parent = write_teacher(tmp_path / "teacher", pico_parent_dir).path
    architecture = read_architecture(parent)
    block = replace(architecture.blocks[1], attention=NO_ATTENTION)
    child = architecture.with_block(1, block)
    model = load_model(parent)
    gone = model.model.layers[1]
    del gone.self_attn, gone.input_layernorm
    save_model(model, tmp_path / "pruned", architecture=child, tokenizer_from=parent)
    with TensorReader(tmp_path / "pruned") as reader:
        check_tensors(reader, child)
    data = write_data(tmp_path / "data", pico_parent_dir).path
    models = ["--parent", str(parent), "--child", str(tmp_path / "pruned")]
    sizes = ["--num-sequences", "6", "--seq-len", "32", "--batch-size", "2"]
    return [str(tmp_path / "out"), *models, "--data", str(data), *sizes]


@pytest.mark.parametrize("scaled_mm", [False, True])
def test_table_of_models_and_formats_and_their_sum(
    programs: tuple[ModuleType, ModuleType], arguments: list[str], tmp_path: Path, scaled_mm: bool
) -> None:
    program, _ = programs
    assert program.main([*arguments, *(["--scaled-mm"] if scaled_mm else [])]) == 0
    found = json.loads((tmp_path / "out" / "quantization.json").read_text())
    rows = {(row["model"], row["format"]): row for row in found["rows"]}
    assert list(rows) == [("parent", "bf16"), ("parent", "fp8"), ("pruned", "bf16"), ("pruned", "fp8")]
    assert rows["parent", "bf16"]["kld"] == pytest.approx(0, abs=1e-6)
    assert rows["parent", "bf16"]["top1_agreement_frac"] == 1
    assert 0 < rows["parent", "fp8"]["kld"] < rows["pruned", "fp8"]["kld"]
    assert all(len(row["klds"]) == 3 for row in rows.values())
    for name in ("parent", "pruned"):
        assert rows[name, "fp8"]["weight_bytes"] < rows[name, "bf16"]["weight_bytes"]
    (total,) = found["sums"]
    assert total["sum"] == rows["pruned", "bf16"]["kld"] + rows["parent", "fp8"]["kld"]
    assert total["excess"] == pytest.approx(rows["pruned", "fp8"]["kld"] - total["sum"])
    klds = [rows[key]["klds"] for key in (("pruned", "fp8"), ("pruned", "bf16"), ("parent", "fp8"))]
    excesses = [both - fused - quantized for both, fused, quantized in zip(*klds, strict=True)]
    assert total["excess_standard_error"] == pytest.approx(stdev(excesses) / 3**0.5)
    text = (tmp_path / "out" / "quantization.md").read_text()
    assert "| pruned | fp8 |" in text
    assert "beyond the sum" in text


def test_speed_is_refused_without_a_gpu(
    programs: tuple[ModuleType, ModuleType],
    arguments: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    program, _ = programs
    assert program.main([*arguments, "--speed"]) == 1
    assert "error: --speed times FP8 on a GPU; pass --device cuda" in capsys.readouterr().out
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert program.main([*arguments, "--device", "cuda"]) == 1
    assert "there is no CUDA device" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_a_shorter_last_batch_weighs_less_in_mean_and_standard_error(
    programs: tuple[ModuleType, ModuleType], arguments: list[str], tmp_path: Path
) -> None:
    program, _ = programs
    assert program.main([*arguments, "--num-sequences", "5"]) == 0
    found = json.loads((tmp_path / "out" / "quantization.json").read_text())
    for row in found["rows"]:
        assert row["batch_sizes"] == [2, 2, 1]
        assert row["kld"] == pytest.approx((2 * row["klds"][0] + 2 * row["klds"][1] + row["klds"][2]) / 5, abs=1e-12)
    # Mean 3; squares 2 * 2**2 + 2 * 0**2 + 4**2 = 24.
    assert program.standard_error([1.0, 3.0, 7.0], [2, 2, 1]) == pytest.approx((24 / 2 / 5) ** 0.5)
    assert program.standard_error([1.0], [2]) is None


def test_quality_is_written_before_speed_is_measured(
    programs: tuple[ModuleType, ModuleType], arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, _ = programs
    row = {"kld": 0.5, "lm_loss": 2.0, "top1_agreement_frac": 0.5, "klds": [0.4, 0.6], "batch_sizes": [2, 2]}
    rows = [row | {"model": name, "format": kind} for name in ("parent", "pruned") for kind in ("bf16", "fp8")]

    def interrupted(shape: object, device: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(program, "require_fp8", lambda device: None)
    monkeypatch.setattr(program, "quality_rows", lambda *_: rows)
    monkeypatch.setattr(program, "measure_speed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        program.main([*arguments, "--device", "cuda", "--speed", "--shape", "64", "128", "2"])
    assert "| pruned | fp8 |" in (tmp_path / "out" / "quantization.md").read_text()
    assert json.loads((tmp_path / "out" / "quantization.json").read_text())["speed"] == []


@torch.inference_mode()
def test_what_is_timed_computes_in_fp8_what_it_does_in_bf16(programs: tuple[ModuleType, ModuleType]) -> None:
    _, timed = programs
    device, hidden = torch.device("cpu"), torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    torch.manual_seed(0)
    chain = timed.ffns([64, 64], 64, device, fp8=False)
    expected = timed.whole(chain, hidden)() - hidden
    found = timed.whole([ffn.in_fp8(scaled_mm=True) for ffn in chain], hidden)() - hidden
    assert (found - expected).norm() < 0.1 * expected.norm()
    products = timed.matmuls(chain, hidden)()
    assert [tuple(product.shape) for product in products] == [(4, 128), (4, 64)] * 2


def test_times_are_set_beside_their_product(
    programs: tuple[ModuleType, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, timed = programs
    times = iter(range(1, 100))
    monkeypatch.setattr(timed, "graph_us", lambda run, device: float(next(times)))
    rows = timed.measure_speed(timed.Shape(hidden_dim=64, width=128, members=2), torch.device("cpu"))
    assert {tuple(row["widths"]) for row in rows} == {(64, 64), (128,)}
    lines = timed.speed_table(rows)
    # Unfused in bf16, unfused in FP8, fused in bf16, fused in FP8, each with four times, in this order.
    assert "| decode | 16 | matmuls | 1.0 | 9.0 | 5.0 | 13.0 | 0.11x | 0.20x | 0.08x | 0.02x |" in lines
    with pytest.raises(ValueError, match="multiples of 16; pass --shape"):
        timed.Shape(hidden_dim=64, width=100, members=2)
