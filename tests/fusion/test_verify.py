from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from fusion import verify
from fusion.fuse import NORM, fuse_checkpoint
from fusion.verify import FP64_TOLERANCE, verify_fusion
from puzzle.model import tensor_reader

BLOCKS = ((2, 256), (None, 256), (None, 512), (None, 256), (2, 256), (None, 256), (None, 256))
GROUPS = ((1, 3), (5, 6))


def fuse_and_verify(tmp_path, make_checkpoint, norm, dtype):
    source, out = tmp_path / "source", tmp_path / "out"
    make_checkpoint(source, *BLOCKS, dtype=dtype)
    fuse_checkpoint(source, out, GROUPS, norm)
    return verify_fusion(source, out, GROUPS, norm)


@pytest.mark.parametrize("norm", ["folded", "last"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_checkpoint_of_any_type_equals_the_parallel_sum_and_tells_its_rounding(tmp_path, make_checkpoint, norm, dtype):
    errors = fuse_and_verify(tmp_path, make_checkpoint, norm, dtype)
    assert [(error.first, error.last, error.block) for error in errors] == [(1, 3, 1), (5, 6, 3)]
    for error in errors:
        # Sums of some 1,000 products in another order; the members' weights are rounded as the fused ones are.
        assert error.max_relative_error_fp32 < 1e-6
        assert error.max_relative_error_fp64 < 1e-14
        if norm == "last" or dtype == torch.float64:
            assert error.max_relative_rounding < 1e-14
        else:
            # Gate and up are rounded by half an epsilon at most, and by a quarter of it or so on average.
            eps = torch.finfo(dtype).eps
            assert 0.05 * eps < error.max_relative_rounding < 2 * eps


@pytest.mark.parametrize("norm", ["folded", "last"])
def test_norms_of_another_type_than_the_matrices_are_rounding_too(tmp_path, make_checkpoint, norm):
    """Some checkpoints keep fp32 norms beside bf16 matrices; the fused one has one type."""
    source, out = tmp_path / "source", tmp_path / "out"
    make_checkpoint(source, *BLOCKS, dtype=torch.bfloat16)
    file = next(source.glob("*.safetensors"))
    scales = {f"model.layers.{block}.{NORM}": torch.linspace(0.3, 2.0, 32) + block for block in (1, 2, 3, 5, 6)}
    save_file(load_file(file) | scales, file, metadata={"format": "pt"})
    fuse_checkpoint(source, out, GROUPS, norm)
    for error in verify_fusion(source, out, GROUPS, norm):
        assert error.max_relative_error_fp64 < 1e-14
        assert error.max_relative_rounding > 1e-5


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


def alter(directory, name, change):
    file = next(directory.glob("*.safetensors"))
    tensors = load_file(file)
    change(tensors[name])
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [0.5, float("nan")])
def test_one_altered_weight_is_found_out(tmp_path, make_checkpoint, value, dtype):
    fuse_and_verify(tmp_path, make_checkpoint, "folded", dtype)
    alter(tmp_path / "out", "model.layers.3.mlp.down_proj.weight", lambda weight: weight[7, 300].add_(value))
    with pytest.raises(RuntimeError, match="fused block 3 differs from the parallel sum of blocks 5-6"):
        verify_fusion(tmp_path / "source", tmp_path / "out", GROUPS, "folded")


@pytest.mark.parametrize("name", ["gate_proj", "up_proj", "down_proj"])
def test_last_bit_of_one_bf16_weight_is_found_out(tmp_path, make_checkpoint, name):
    fuse_and_verify(tmp_path, make_checkpoint, "folded", torch.bfloat16)
    alter(tmp_path / "out", f"model.layers.3.mlp.{name}.weight", lambda weight: weight.view(torch.int16)[7, 20].add_(1))
    with pytest.raises(RuntimeError, match=r"fused block 3 differs .* relative in fp\d\d"):
        verify_fusion(tmp_path / "source", tmp_path / "out", GROUPS, "folded")


def test_one_lost_channel_of_many_is_found_out_in_bf16(tmp_path, make_checkpoint):
    """Among 16,384 channels it weighs less than the rounding of all others."""
    source, out = tmp_path / "source", tmp_path / "out"
    make_checkpoint(source, (2, 256), (None, 8192), (None, 8192), dtype=torch.bfloat16)
    fuse_checkpoint(source, out, ((1, 2),), "folded")
    (whole,) = verify_fusion(source, out, ((1, 2),), "folded")
    assert whole.max_relative_error_fp32 < 1e-6
    alter(out, "model.layers.1.mlp.down_proj.weight", lambda weight: weight[:, 9000].mul_(0.25))
    with pytest.raises(RuntimeError, match=r"by [\d.e-]+ relative in fp32, over the tolerance of 1e-05"):
        verify_fusion(source, out, ((1, 2),), "folded")


def test_members_that_sum_to_zero(tmp_path, make_checkpoint):
    source, out = tmp_path / "source", tmp_path / "out"
    make_checkpoint(source, (2, 256), (None, 256), (None, 256))
    file = next(source.glob("*.safetensors"))
    tensors = load_file(file)
    for block in (1, 2):
        tensors[f"model.layers.{block}.mlp.down_proj.weight"].zero_()
    save_file(tensors, file, metadata={"format": "pt"})
    fuse_checkpoint(source, out, ((1, 2),), "folded")
    (error,) = verify_fusion(source, out, ((1, 2),), "folded")
    assert error.max_relative_error_fp32 == error.max_relative_error_fp64 == error.max_relative_rounding == 0
    alter(out, "model.layers.1.mlp.down_proj.weight", lambda weight: weight[0, 0].fill_(1e-3))
    with pytest.raises(RuntimeError, match="fused block 1 differs"):
        verify_fusion(source, out, ((1, 2),), "folded")


def test_error_that_fp32_does_not_show_is_found_in_fp64(tmp_path, make_checkpoint):
    fuse_and_verify(tmp_path, make_checkpoint, "folded", torch.float64)
    alter(
        tmp_path / "out", "model.layers.1.mlp.up_proj.weight", lambda weight: weight[0].mul_(1 + 100 * FP64_TOLERANCE)
    )
    with pytest.raises(RuntimeError, match="relative in fp64, over the tolerance of 1e-10"):
        verify_fusion(tmp_path / "source", tmp_path / "out", GROUPS, "folded")
