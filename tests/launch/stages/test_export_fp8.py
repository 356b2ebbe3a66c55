"""FP8 exports by the stage: what is stored, what is refused, and that it is what the weights round to."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from launch.config import compose_stage
from launch.stage import StageContext, StageResult
from launch.stage_configs import ExportStage
from launch.stages import export
from puzzle.model import target_directory, tensor_reader
from puzzle.model.architecture import NO_ATTENTION, NO_FFN, Architecture, AttentionConfig, BlockConfig, FFNConfig
from puzzle.model.checkpoint import build_model, load_model, read_architecture, save_model
from puzzle.model.config import ExportConfig
from puzzle.model.fp8 import (
    FP8_CONFIG,
    SCALE_SUFFIX,
    dequantize,
    fp8_dtypes,
    fp8_shapes,
    quantize,
    quantized_tensors,
)
from puzzle.model.fp8_check import check_fp8
from puzzle.model.tensor_layout import tensor_shapes
from tests.fp8_models import dequantized_weights, import_benchmark, load_dequantized

KV1, KV2 = (AttentionConfig(num_kv_heads=heads) for heads in (1, 2))
W512, WIDE = FFNConfig(ffn_dim=512), FFNConfig(ffn_dim=2048)
SUBBLOCKS = ((NO_ATTENTION, W512), (KV1, W512), (NO_ATTENTION, NO_FFN), (KV2, NO_FFN), (NO_ATTENTION, WIDE))
DOWN = "model.layers.3.mlp.down_proj.weight"


def _run(model_dir: Path, out: Path, **config: Any) -> StageResult:
    stage = ExportStage(export=ExportConfig(quantization="fp8_dynamic", **config))
    context = StageContext(out=out, resume=out, pool=out, run_name="run", step_name="export")
    return export.run(stage, {"model": SimpleNamespace(path=model_dir)}, context)  # type: ignore[dict-item]


def _save(architecture: Architecture, tokenizer: Path, path: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    blocks = tuple(
        BlockConfig(attention=attention, ffn=ffn, parent_block_indices=(index,))
        for index, (attention, ffn) in enumerate(SUBBLOCKS)
    )
    architecture = architecture.with_blocks(blocks)
    model = build_model(architecture, seed=0)
    with torch.no_grad():
        # As padding leaves it: channels of zeros.
        model.get_parameter("model.layers.0.mlp.gate_proj.weight")[300:] = 0
    save_model(model, path, architecture=architecture, tokenizer_from=tokenizer, dtype=dtype)
    return path


@pytest.fixture
def child_dir(pico_architecture: Architecture, pico_parent_dir: Path, tmp_path: Path) -> Path:
    """A child with a wide FFN, a dummy, blocks without attention and without FFN, and two KV head counts, in bf16."""
    return _save(replace(pico_architecture, tie_embeddings=True), pico_parent_dir, tmp_path / "child")


@torch.no_grad()
def _logits(model: torch.nn.Module) -> torch.Tensor:
    return model(torch.randint(0, 320, (2, 24), generator=torch.Generator().manual_seed(1))).logits


def test_matrices_of_blocks_are_fp8_with_a_scale_per_output_channel_and_the_rest_is_as_it_was(
    child_dir: Path, tmp_path: Path
) -> None:
    _run(child_dir, tmp_path / "out", targets=("transformers",))
    source = load_file(child_dir / "model.safetensors")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    scales = {name for name in stored if name.endswith("_scale")}
    matrices = {name.removesuffix("_scale") for name in scales}
    assert len(matrices) == 3 + 2 * 4 + 3 + 3  # FFNs of three blocks, attentions of two
    assert {name for name, tensor in stored.items() if tensor.dtype == torch.float8_e4m3fn} == matrices
    for name in matrices:
        assert stored[name + "_scale"].shape == (stored[name].shape[0], 1)
        assert stored[name + "_scale"].dtype == torch.float32
        largest = stored[name].float().abs().amax(dim=1)
        assert set(largest.tolist()) <= {448.0, 0.0}
    # The third block of the source is a dummy.
    origin = {0: 0, 1: 1, 2: 3, 3: 4}
    for name in stored.keys() - matrices - scales:
        parts = name.split(".")
        if parts[1] == "layers":
            parts[2] = str(origin[int(parts[2])])
        assert torch.equal(stored[name], source[".".join(parts)]), name
    assert "lm_head.weight" not in stored


def test_config_is_that_of_compressed_tensors(child_dir: Path, tmp_path: Path) -> None:
    _run(child_dir, tmp_path / "out", targets=("transformers",), max_shard_gib=200_000 / 2**30)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    found = config["quantization_config"]
    assert found == FP8_CONFIG
    assert (found["quant_method"], found["format"], found["ignore"]) == (
        "compressed-tensors",
        "float-quantized",
        ["lm_head"],
    )
    group = found["config_groups"]["group_0"]
    assert group["targets"] == ["Linear"]
    both = {"num_bits": 8, "type": "float", "symmetric": True}
    assert group["weights"] == both | {"strategy": "channel", "dynamic": False}
    assert group["input_activations"] == both | {"strategy": "token", "dynamic": True}
    assert config["torch_dtype"] == "bfloat16"
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 1
    names = set()
    for shard in shards:
        with safe_open(shard, framework="pt") as file:
            assert all(index["weight_map"][name] == shard.name for name in file.keys())  # noqa: SIM118
            names |= set(file.keys())
    assert names == set(index["weight_map"])
    assert index["metadata"]["total_size"] == sum(
        tensor.nbytes for shard in shards for tensor in load_file(shard).values()
    )


def test_weights_are_within_half_a_step_and_the_model_is_close(child_dir: Path, tmp_path: Path) -> None:
    result = _run(child_dir, tmp_path / "out", targets=("transformers",))
    written = dict(dequantized_weights(tmp_path / "out"))
    source = load_file(child_dir / "model.safetensors")
    wide, down = written[DOWN], source["model.layers.4.mlp.down_proj.weight"].float()
    assert wide.dtype == torch.float32
    scale = down.abs().amax(dim=1, keepdim=True) / 448
    bound = torch.maximum(down.abs() * 2**-4, scale * 2**-10) * (1 + 1e-5)
    assert ((wide - down).abs() <= bound).all()
    assert not torch.equal(wide, down)
    assert written["model.layers.0.mlp.gate_proj.weight"][300:].abs().max() == 0
    assert 0.01 < result.metrics["quantization_error_frac"] < 0.04
    assert result.metrics["quantization_error_of"] in written
    expected = _logits(load_model(child_dir, dtype=torch.float32))
    found = _logits(load_dequantized(tmp_path / "out"))
    spread = expected.std()
    assert 0 < (found - expected).abs().max() < 0.1 * spread


def test_scales_of_zeros_are_one(pico_architecture: Architecture, pico_parent_dir: Path, tmp_path: Path) -> None:
    """For vLLM block 0 gets an attention of zeros, whose scales could be no numbers."""
    child = _save(pico_architecture, pico_parent_dir, tmp_path / "child")
    result = _run(child, tmp_path / "out", targets=("transformers", "vllm", "sglang"))
    assert result.metrics["paths"] == {name: name for name in ("transformers", "vllm", "sglang")}
    stored = load_file(tmp_path / "out" / "vllm" / "model.safetensors")
    zeros = [name for name in stored if name.startswith("model.layers.0.self_attn") and name.endswith("weight")]
    assert len(zeros) == 4
    assert all((stored[f"{name}_scale"] == 1).all() and (stored[name].float() == 0).all() for name in zeros)
    for name in ("vllm", "sglang"):
        found = _logits(load_dequantized(tmp_path / "out" / name))
        assert torch.equal(found, _logits(load_dequantized(tmp_path / "out" / "transformers"))), name


def test_report_and_metrics_say_quantisation_and_bytes(child_dir: Path, tmp_path: Path) -> None:
    result = _run(child_dir, tmp_path / "out", targets=("transformers", "vllm"))
    assert result.headline.endswith(", stored in FP8_DYNAMIC")
    assert result.metrics["quantization"] == "fp8_dynamic"
    content = json.loads((tmp_path / "out" / "compatibility.json").read_text())
    assert content["quantization"] == "fp8_dynamic"
    reports = {report["target"]: report for report in content["targets"]}
    size = (tmp_path / "out" / "vllm" / "model.safetensors").stat().st_size
    assert reports["vllm"]["bytes"] == result.metrics["bytes"]["vllm"] == size
    assert reports["sglang"]["bytes"] is None
    assert size < (child_dir / "model.safetensors").stat().st_size
    assert any("FP8 matrices" in note for note in reports["sglang"]["notes"])
    assert any("compressed-tensors" in note for note in reports["transformers"]["notes"])
    assert {name for name, report in reports.items() if report["status"] == "cannot"} == {
        "llama_cpp",
        "mlx",
        "megatron",
    }


@pytest.mark.parametrize(
    ("target", "way_out"), [("llama_cpp", "llama-quantize"), ("mlx", r"mlx_lm\.convert"), ("megatron", "--fp8-format")]
)
def test_engines_without_fp8_are_refused_at_configuration(target: str, way_out: str) -> None:
    expected = rf"export\.quantization=fp8_dynamic: {target}: .*{way_out}.*; leave {target} out of export\.targets"
    with pytest.raises(ValueError, match=expected):
        compose_stage(ExportStage, ["export.quantization=fp8_dynamic", f"export.targets=[vllm,{target}]"])


def test_what_is_not_quantised_of_a_model_in_fp32_is_stored_in_bf16(
    pico_architecture: Architecture, pico_parent_dir: Path, tmp_path: Path
) -> None:
    child = _save(pico_architecture, pico_parent_dir, tmp_path / "child", torch.float32)
    _run(child, tmp_path / "out", targets=("transformers",))
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {str(tensor.dtype) for name, tensor in stored.items() if not name.endswith("_scale")} == {
        "torch.bfloat16",
        "torch.float8_e4m3fn",
    }
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("damaged", "row", "factor", "refused"),
    [
        (DOWN + "_scale", 5, 1.2, DOWN),
        ("model.embed_tokens.weight", 319, 3.0, "model.embed_tokens.weight"),
        ("model.norm.weight", 7, float("nan"), "model.norm.weight"),
        ("model.layers.1.input_layernorm.weight", 0, float("nan"), "model.layers.1.input_layernorm.weight"),
    ],
)
def test_what_is_not_what_the_weights_round_to_is_refused(
    child_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    damaged: str,
    row: int,
    factor: float,
    refused: str,
) -> None:
    def check_damaged(directory: Path, architecture: Architecture, tensors: Any) -> Any:
        stored = load_file(directory / "model.safetensors")
        stored[damaged][row] *= factor
        save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
        return check_fp8(directory, architecture, tensors)

    monkeypatch.setattr(tensor_reader, "CHUNK_BYTES", 4096)
    monkeypatch.setattr(target_directory, "check_fp8", check_damaged)
    with pytest.raises(ValueError, match=rf"{re.escape(refused)} is not what the model's weights round to"):
        _run(child_dir, tmp_path / "out", targets=("transformers",))


def test_an_fp8_directory_is_no_model_of_ours(child_dir: Path, tmp_path: Path) -> None:
    _run(child_dir, tmp_path / "out", targets=("transformers",))
    with pytest.raises(ValueError, match=r"config\.json: its weights are quantised, for engines; give the model from"):
        read_architecture(tmp_path / "out")


def test_other_quantisations_are_unknown() -> None:
    assert compose_stage(ExportStage, []).export.quantization == "none"
    with pytest.raises(ValueError, match=r"export\.quantization=int4 is unknown; choose one of none, fp8_dynamic"):
        compose_stage(ExportStage, ["export.quantization=int4"])


def test_tensors_are_quantised_one_at_a_time(pico_architecture: Architecture) -> None:
    taken: list[str] = []

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name, shape in tensor_shapes(pico_architecture).items():
            taken.append(name)
            yield name, torch.ones(shape)

    seen = []
    for name, tensor in quantized_tensors(tensors(), pico_architecture):
        assert taken[-1] == name.removesuffix(SCALE_SUFFIX)
        seen.append((name, tuple(tensor.shape), tensor.dtype))
    dtypes = fp8_dtypes(pico_architecture, torch.float32)
    assert seen == [(name, shape, dtypes[name]) for name, shape in fp8_shapes(pico_architecture).items()]


@pytest.mark.parametrize("largest", [1e-45, 1e-38, 1.0, 3e38])
def test_any_magnitude_has_a_scale(largest: float) -> None:
    values = torch.tensor([[largest, -largest / 3, 0.0], [0.0, 0.0, 0.0]])
    stored, scale = quantize(values)
    found = dequantize(stored, scale)
    assert found.isfinite().all()
    assert (found - values).abs().max() <= largest / 16 + torch.finfo(torch.float32).tiny
    assert scale[1] == 1


def test_quantised_inputs_cost_more_than_quantised_weights_alone(
    child_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_fp8_linears = import_benchmark("fp8_linear", monkeypatch).with_fp8_linears
    _run(child_dir, tmp_path / "out", targets=("transformers",))
    exact = _logits(load_model(child_dir, dtype=torch.float32))
    of_weights = _logits(load_dequantized(tmp_path / "out"))
    of_both = _logits(with_fp8_linears(load_dequantized(tmp_path / "out")))
    # The same from the model itself: quantising what was quantised changes nothing.
    assert torch.allclose(_logits(with_fp8_linears(load_model(child_dir, dtype=torch.float32))), of_both, atol=1e-4)
    assert (of_both - exact).norm() > (of_weights - exact).norm()


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
def test_products_in_fp8_and_in_fp32_agree_and_are_rounded_once(monkeypatch: pytest.MonkeyPatch, bias: bool) -> None:
    make = import_benchmark("fp8_linear", monkeypatch).Fp8Linear
    generator = torch.Generator().manual_seed(0)
    linear = torch.nn.Linear(64, 32, bias=bias).bfloat16()
    for parameter in linear.parameters():
        parameter.normal_(std=0.1, generator=generator)
    inputs = torch.randn(2, 5, 64, generator=generator).bfloat16()
    in_fp8, in_fp32 = (make(linear, scaled_mm=scaled_mm)(inputs) for scaled_mm in (True, False))
    assert in_fp8.shape == (2, 5, 32)
    weight, values = dequantize(*quantize(linear.weight)), dequantize(*quantize(inputs.flatten(0, 1)))
    unrounded = torch.nn.functional.linear(values, weight, linear.bias.float() if bias else None)
    # bf16 has 8 significant bits, so that what is rounded once is off by 2**-8 of the power of two below, at most.
    half_step = 2.0 ** (unrounded.frexp().exponent - 9)
    for found in (in_fp8, in_fp32):
        assert ((found.flatten(0, 1).float() - unrounded).abs() <= half_step + 1e-6).all()
    assert torch.allclose(in_fp32.float(), linear(inputs).float(), atol=0.1)
