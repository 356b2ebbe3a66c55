from __future__ import annotations

import json
import math
import re
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from torch import Tensor

from distill.config import EngineConfig
from distill.data.tokenizer import tokenizer_sha256
from fusion.config import DependencyConfig
from fusion.dependency import DependencySums, measure_dependency
from launch.stage import StageContext, StageResult
from launch.stage_configs import MeasureDependencyStage
from launch.stages import measure_dependency as measure_dependency_stage
from puzzle.model.architecture import NO_ATTENTION, NO_FFN, BlockConfig
from puzzle.model.checkpoint import build_model, copy_tokenizer, load_model, read_architecture
from puzzle.model.modeling_decilm import DeciLMForCausalLM
from puzzle.model.tensor_layout import block_prefix
from puzzle.slices import ParentSlice

A = (2, 256)
FFN = (None, 256)
NARROW = (None, 512)
ONLY_ATTENTION = (2, None)
IDENTITY = (None, None)
SEQUENCES = torch.randint(0, 64, (5, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model_dir(tmp_path: Path, make_checkpoint) -> Path:
    make_checkpoint(tmp_path / "model", A, FFN, ONLY_ATTENTION, IDENTITY, NARROW, FFN, A)
    return tmp_path / "model"


def load(directory: Path, device: str = "cpu") -> ParentSlice:
    return ParentSlice.whole(load_model(directory, dtype=torch.float32, device=device))


def load_without(directory: Path, removed: int) -> DeciLMForCausalLM:
    """A fresh model whose block ``removed`` is an identity: it never had these weights."""
    architecture = read_architecture(directory)
    identity = BlockConfig(attention=NO_ATTENTION, ffn=NO_FFN, parent_block_indices=(removed,))
    model = build_model(architecture.with_block(removed, identity), seed=1)
    tensors = load_model(directory, dtype=torch.float32).state_dict()
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(block_prefix(removed))}
    model.load_state_dict(kept, strict=True)
    return model


@torch.no_grad()
def contributions(model: DeciLMForCausalLM) -> list[Tensor]:
    """h_j(X) = f_j(X) - X of every block, through the model's own forward, [sequences, seq, hidden] fp64."""
    found = []
    hooks = [
        block.register_forward_hook(lambda _, args, output: found.append((output - args[0]).double()))
        for block in model.model.layers
    ]
    model(SEQUENCES, use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


def mean_distance(first: Tensor, second: Tensor, average: str) -> float:
    """Of each token, or of each sequence's tokens taken as one vector."""
    distances = []
    for one, other in zip(first, second, strict=True):
        pairs = zip(one, other, strict=True) if average == "token" else [(one.flatten(), other.flatten())]
        distances += [1 - (u @ v / (u @ u).sqrt() / (v @ v).sqrt()).item() for u, v in pairs]
    return math.fsum(distances) / len(distances)


@pytest.mark.parametrize("average", ["token", "sequence"])
@pytest.mark.parametrize("batch_size", [2, 5])
def test_matrix_is_that_of_fresh_models_without_the_block(model_dir: Path, batch_size: int, average: str) -> None:
    dependency = measure_dependency(load(model_dir), SEQUENCES, batch_size=batch_size, average=average)
    full = contributions(load(model_dir).model)
    expected = torch.full((7, 7), math.nan, dtype=torch.float64)
    active = [0, 1, 2, 4, 5, 6]
    for place, i in enumerate(active):
        without = contributions(load_without(model_dir, i))
        for j in active[place + 1 :]:
            expected[i, j] = mean_distance(full[j], without[j], average)
    assert expected.nan_to_num().max() > 0.05
    # The same fp32 forward batched otherwise: distances of order 0.1 agree to rounding.
    torch.testing.assert_close(dependency.matrix, expected, rtol=1e-4, atol=1e-6, equal_nan=True)
    assert dependency.matrix.dtype == torch.float64
    assert dependency.num_tokens == 60
    assert dependency.average == average


@pytest.mark.parametrize("average", ["token", "sequence"])
@torch.no_grad()
def test_direction_change_and_contribution_ratio(model_dir: Path, average: str) -> None:
    parent = load(model_dir)
    dependency = measure_dependency(parent, SEQUENCES, batch_size=2, average=average)
    states = [parent.model.model.embed(SEQUENCES).double()]
    for contribution in contributions(parent.model):
        states.append(states[-1] + contribution)
    vectors = states if average == "token" else [state.flatten(1) for state in states]
    change = [mean_distance(x, y, average) for x, y in pairwise(states)]
    ratio = [((y - x).norm(dim=-1) / x.norm(dim=-1)).mean().item() for x, y in pairwise(vectors)]
    # fp32 hidden states on one side, their exact sums on the other.
    assert dependency.direction_change.tolist() == pytest.approx(change, rel=1e-4, abs=1e-9)
    assert dependency.contribution_ratio.tolist() == pytest.approx(ratio, rel=1e-4)
    assert dependency.contribution_ratio[3] == dependency.direction_change[3] == 0


def test_the_averages_differ_where_tokens_do(model_dir: Path) -> None:
    by_token, by_sequence = (
        measure_dependency(load(model_dir), SEQUENCES, batch_size=5, average=average).matrix
        for average in ("token", "sequence")
    )
    assert torch.equal(by_token.isnan(), by_sequence.isnan())
    assert ((by_token - by_sequence).abs() / by_token).nanmedian() > 0.01


def test_identity_blocks_are_skipped(tmp_path: Path, make_checkpoint) -> None:
    make_checkpoint(tmp_path / "model", A, FFN, IDENTITY, FFN)
    matrix = measure_dependency(load(tmp_path / "model"), SEQUENCES, batch_size=5).matrix
    measured = [(i, j) for i in range(4) for j in range(4) if not math.isnan(matrix[i, j])]
    assert measured == [(0, 1), (0, 3), (1, 3)]


def test_block_that_adds_nothing_is_not_depended_on_and_depends_on_nothing(tmp_path: Path, make_checkpoint) -> None:
    make_checkpoint(tmp_path / "model", A, FFN, FFN, FFN)
    parent = load(tmp_path / "model")
    torch.nn.init.zeros_(parent.block(1).mlp.down_proj.weight)
    for average in ("token", "sequence"):
        matrix = measure_dependency(parent, SEQUENCES, batch_size=5, average=average).matrix
        # fp64 rounding of 1 - cos of two equal vectors
        assert matrix[1, 2:].tolist() == pytest.approx([0, 0], abs=1e-15)
        assert matrix[0, 1] == 0
        assert matrix[0, 3] > 1e-3


def test_a_small_distance_is_not_lost_in_fp32(tmp_path: Path, make_checkpoint) -> None:
    """A block that adds little turns the next by some 1e-8, less than fp32's noise in 1 - cos."""
    make_checkpoint(tmp_path / "model", FFN, FFN, FFN)
    parent = load(tmp_path / "model")
    with torch.no_grad():
        parent.block(0).mlp.down_proj.weight *= 1e-5
        small = measure_dependency(parent, SEQUENCES, batch_size=5).matrix[0, 1].item()
        parent.block(0).mlp.down_proj.weight *= 2
        double = measure_dependency(parent, SEQUENCES, batch_size=5).matrix[0, 1].item()
    assert 0 < small < 5e-8
    # 1 - cos is quadratic in a small turn; what is left is fp32's rounding of the hidden states themselves.
    assert double / small == pytest.approx(4, rel=0.01)


def test_weights_that_are_not_finite_are_refused(model_dir: Path) -> None:
    parent = load(model_dir)
    torch.nn.init.constant_(parent.block(4).mlp.down_proj.weight, math.inf)
    with pytest.raises(ValueError, match="what block 4 reads or adds is not finite"):
        measure_dependency(parent, SEQUENCES, batch_size=5)


def test_bf16_is_close_to_fp32(model_dir: Path) -> None:
    exact = measure_dependency(load(model_dir), SEQUENCES, batch_size=5)
    rounded = ParentSlice.whole(load_model(model_dir, dtype=torch.bfloat16))
    close = measure_dependency(rounded, SEQUENCES, batch_size=5)
    # Three significant digits in every matrix product, on distances of order 0.1.
    torch.testing.assert_close(close.matrix, exact.matrix, rtol=0.1, atol=5e-3, equal_nan=True)


@pytest.mark.parametrize("average", ["token", "sequence"])
def test_files(tmp_path: Path, make_checkpoint, average: str) -> None:
    make_checkpoint(tmp_path / "model", A, FFN, FFN)
    dependency = measure_dependency(load(tmp_path / "model"), SEQUENCES, batch_size=4, average=average)
    dependency.save(tmp_path)
    content = json.loads((tmp_path / "dependency.json").read_text())
    assert (content["num_tokens"], content["average"]) == (60, average)
    assert content["matrix"][0][0] is None
    assert content["matrix"][1][2] == dependency.matrix[1, 2].item()
    assert [set(block) for block in content["blocks"]] == [{"direction_change", "contribution_ratio"}] * 3
    np.testing.assert_array_equal(np.load(tmp_path / "dependency.npy", allow_pickle=False), dependency.matrix.numpy())


@pytest.fixture
def stage_inputs(tmp_path: Path, make_checkpoint, pico_parent_dir: Path):
    """``stage_inputs((2, 256), ...)``: a model of these blocks with a tokenizer, and data of six sequences."""

    def make(*blocks) -> dict[str, Any]:
        make_checkpoint(tmp_path / "model", *blocks, vocab_size=320)
        copy_tokenizer(pico_parent_dir, tmp_path / "model")
        (tmp_path / "data").mkdir()
        np.save(tmp_path / "data" / "calibration.npy", np.arange(6 * 16, dtype=np.uint16))
        summary = {"vocab_size": 320, "eos_token_id": 0, "unigram_entropy_nats": 5.0}
        summary["tokenizer_sha256"] = tokenizer_sha256(pico_parent_dir)
        (tmp_path / "data" / "data.json").write_text(json.dumps(summary))
        return {name: SimpleNamespace(path=tmp_path / name) for name in ("model", "data")}

    return make


def run_stage(inputs: dict[str, Any], out: Path, **fields: Any) -> StageResult:
    out.mkdir()
    settings = {"num_sequences": 6, "seq_len": 16, "batch_size": 4, **fields}
    config = MeasureDependencyStage(dependency=DependencyConfig(**settings), engine=EngineConfig(device="cpu"))
    pool = out.parent / "pool"
    return measure_dependency_stage.run(
        config, inputs, StageContext(out=out, resume=pool, pool=pool, run_name="test", step_name="dependency")
    )


@pytest.mark.parametrize("average", ["token", "sequence"])
def test_stage_writes_what_is_measured_and_draws_it(tmp_path: Path, stage_inputs, average: str) -> None:
    inputs = stage_inputs(A, FFN, FFN, NARROW, IDENTITY, A, FFN)
    result = run_stage(inputs, tmp_path / "out", average=average)
    matrix = np.load(tmp_path / "out" / "dependency.npy", allow_pickle=False)
    sequences = torch.arange(6 * 16).view(6, 16)
    expected = measure_dependency(load(tmp_path / "model"), sequences, batch_size=4, average=average)
    np.testing.assert_array_equal(matrix, expected.matrix.numpy())
    (run,) = result.metrics["attention_free_runs"]
    assert run == {"first": 1, "last": 3, "largest_dependency": np.nanmax(matrix[1:4, 1:4])}
    assert result.metrics["median_dependency"] == np.nanmedian(matrix)
    texts = {}
    for name in ("dependency.svg", "contributions.svg"):
        content = (tmp_path / "out" / name).read_text(encoding="utf-8")
        assert "var(--" not in content
        root = ElementTree.fromstring(content)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        texts[name] = {element.text for element in root.iter("{http://www.w3.org/2000/svg}text")}
        targets = {element.get("id") for element in root.iter()}
        for element in root.iter("{http://www.w3.org/2000/svg}use"):
            assert element.get("{http://www.w3.org/1999/xlink}href", "").removeprefix("#") in targets
    assert {"removed block i", "measured block j", "cosine distance", "≤ 2⁻⁹", "≥ 2⁻¹", "1-3"} <= texts[
        "dependency.svg"
    ]
    assert {"block", "cosine distance of X to f(X)", "‖h(X)‖ / ‖X‖"} <= texts["contributions.svg"]


def test_half_precision_engine_changes_nothing(tmp_path: Path, stage_inputs) -> None:
    inputs = stage_inputs(A, FFN, FFN)
    run_stage(inputs, tmp_path / "fp32")
    config = MeasureDependencyStage(
        dependency=DependencyConfig(num_sequences=6, seq_len=16, batch_size=4),
        engine=EngineConfig(device="cpu", precision="bf16"),
    )
    (tmp_path / "bf16").mkdir()
    context = StageContext(out=tmp_path / "bf16", resume=tmp_path, pool=tmp_path, run_name="test", step_name="bf16")
    measure_dependency_stage.run(config, inputs, context)
    one, other = ((tmp_path / name / "dependency.npy").read_bytes() for name in ("fp32", "bf16"))
    assert one == other


@pytest.mark.parametrize(
    ("blocks", "fields", "message"),
    [
        ((A, FFN), {"seq_len": 129}, "dependency.seq_len=129 is beyond the 128 positions of the model; lower it"),
        ((A, FFN), {"num_sequences": 7}, "7 sequences of 16 tokens asked of the calibration split"),
        ((IDENTITY, A, IDENTITY), {}, "the model has 3 blocks, 1 of them with attention or FFN"),
    ],
)
def test_stage_refuses_bad_input_and_writes_nothing(tmp_path: Path, stage_inputs, blocks, fields, message) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        run_stage(stage_inputs(*blocks), tmp_path / "out", **fields)
    assert list((tmp_path / "out").iterdir()) == []


def test_stage_refuses_data_of_another_tokenizer(tmp_path: Path, stage_inputs) -> None:
    inputs = stage_inputs(A, FFN)
    data = inputs["data"].path / "data.json"
    data.write_text(json.dumps({**json.loads(data.read_text()), "tokenizer_sha256": "0" * 64}))
    with pytest.raises(ValueError, match="tokenizer"):
        run_stage(inputs, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.gpu
@pytest.mark.parametrize("average", ["token", "sequence"])
@pytest.mark.parametrize("compile", [False, True])
def test_a_gpu_measures_what_a_cpu_does_and_the_host_never_waits(model_dir: Path, average: str, compile: bool) -> None:
    expected = measure_dependency(load(model_dir), SEQUENCES, batch_size=5, average=average)
    parent = load(model_dir, "cuda")
    found = measure_dependency(parent, SEQUENCES, batch_size=5, average=average, compile=compile)
    # Other kernels, and other orders of fp32 sums.
    torch.testing.assert_close(found.matrix, expected.matrix, rtol=1e-3, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(found.contribution_ratio, expected.contribution_ratio, rtol=1e-4, atol=1e-6)

    sums = DependencySums(parent, average=average)
    batch = SEQUENCES.to("cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        sums.add(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    again = sums.result(num_sequences=5, seq_len=12)
    assert again.num_tokens == 60
    torch.testing.assert_close(again.matrix, found.matrix, rtol=1e-5, atol=1e-9, equal_nan=True)
