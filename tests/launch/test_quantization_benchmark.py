"""The benchmark of fusion and FP8, with pico models; on a GPU it also times, which is not tried here."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from puzzle.model.architecture import NO_ATTENTION
from puzzle.model.checkpoint import TensorReader, check_tensors, load_model, read_architecture, save_model
from tests.launch.training_inputs import write_data, write_teacher

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> tuple[ModuleType, ModuleType]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("quantization"), importlib.import_module("ffn_in_fp8")


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
    assert total["excess_standard_error"] > 0
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
