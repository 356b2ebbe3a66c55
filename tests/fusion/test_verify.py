from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from fusion import verify
from fusion.fuse import fuse_checkpoint
from fusion.verify import tolerance, verify_fusion
from puzzle.model import tensor_reader

BLOCKS = ((2, 256), (None, 256), (None, 512), (None, 256), (2, 256), (None, 256), (None, 256))
GROUPS = ((1, 3), (5, 6))


def fuse_and_verify(tmp_path, make_checkpoint, norm, dtype):
    source, out = tmp_path / "source", tmp_path / "out"
    make_checkpoint(source, *BLOCKS, dtype=dtype)
    fuse_checkpoint(source, out, GROUPS, norm)
    return verify_fusion(source, out, GROUPS, norm)


@pytest.mark.parametrize("norm", ["folded", "last"])
def test_fp32_checkpoint_equals_the_parallel_sum_to_rounding(tmp_path, make_checkpoint, norm):
    errors = fuse_and_verify(tmp_path, make_checkpoint, norm, torch.float32)
    assert [(error.first, error.last, error.block) for error in errors] == [(1, 3, 1), (5, 6, 3)]
    for error in errors:
        assert error.max_relative_error_fp32 < 1e-6
        # In fp64 what is left is the rounding of the folded weights to fp32; "last" rounds nothing.
        assert error.max_relative_error_fp64 < (1e-7 if norm == "folded" else 1e-14)


def test_bf16_checkpoint_is_within_the_rounding_of_folded_weights(tmp_path, make_checkpoint):
    errors = fuse_and_verify(tmp_path, make_checkpoint, "folded", torch.bfloat16)
    worst = max(error.max_relative_error_fp64 for error in errors)
    assert 1e-4 < worst < tolerance("folded", torch.bfloat16)
    assert worst == pytest.approx(max(error.max_relative_error_fp32 for error in errors), rel=1e-2)


def test_bf16_weights_that_are_only_moved_stay_exact(tmp_path, make_checkpoint):
    errors = fuse_and_verify(tmp_path, make_checkpoint, "last", torch.bfloat16)
    assert max(error.max_relative_error_fp32 for error in errors) < 1e-6


def test_same_seed_same_errors(tmp_path, make_checkpoint):
    errors = fuse_and_verify(tmp_path, make_checkpoint, "folded", torch.float32)
    again = verify_fusion(tmp_path / "source", tmp_path / "out", GROUPS, "folded")
    other = verify_fusion(tmp_path / "source", tmp_path / "out", GROUPS, "folded", seed=1)
    assert errors == again
    assert errors != other


def test_verification_reads_chunks_of_rows_only(tmp_path, make_checkpoint, monkeypatch):
    sizes = []

    def noted(stream, offset, tensor):
        sizes.append(tensor.nbytes)
        read_into(stream, offset, tensor)

    read_into = tensor_reader.read_into
    fuse_and_verify(tmp_path, make_checkpoint, "last", torch.float32)
    monkeypatch.setattr(verify, "_CHUNK_BYTES", 5_000)
    monkeypatch.setattr(tensor_reader, "read_into", noted)
    errors = verify_fusion(tmp_path / "source", tmp_path / "out", GROUPS, "last")
    assert max(error.max_relative_error_fp64 for error in errors) < 1e-14
    assert max(sizes) <= 5_000


def test_fusion_with_the_other_norm_is_found_out(tmp_path, make_checkpoint):
    fuse_and_verify(tmp_path, make_checkpoint, "last", torch.float32)
    with pytest.raises(
        RuntimeError, match=r"fused block 1 differs from the parallel sum of blocks 1-3 by \d\.\d+ relative"
    ):
        verify_fusion(tmp_path / "source", tmp_path / "out", GROUPS, "folded")


@pytest.mark.parametrize("value", [0.5, float("nan")])
def test_one_altered_weight_is_found_out(tmp_path, make_checkpoint, value):
    fuse_and_verify(tmp_path, make_checkpoint, "folded", torch.float32)
    file = next((tmp_path / "out").glob("*.safetensors"))
    tensors = load_file(file)
    tensors["model.layers.3.mlp.down_proj.weight"][7, 300] += value
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match="fused block 3 differs from the parallel sum of blocks 5-6"):
        verify_fusion(tmp_path / "source", tmp_path / "out", GROUPS, "folded")
