from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from puzzle.model import checkpoint
from puzzle.model.architecture import Architecture
from puzzle.model.checkpoint import (
    CheckpointWriter,
    TensorReader,
    build_model,
    copy_tokenizer,
    has_tokenizer,
    load_model,
    read_architecture,
    save_model,
)
from puzzle.model.modeling_decilm import DeciLMForCausalLM
from puzzle.model.tensor_layout import tensor_shapes

IDS = torch.arange(1, 21).reshape(2, 10)

OUTSIDE_PROGRAM = """
import sys
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
out, ids = {}, torch.arange(1, 21).reshape(2, 10)
for directory in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True).eval()
    assert type(model).__name__ == "DeciLMForCausalLM", type(model)
    with torch.no_grad():
        out[directory + ".logits"] = model(ids).logits
        out[directory + ".tokens"] = model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None)
assert not any(name.split(".")[0] in ("puzzle", "distill") for name in sys.modules)
save_file(out, sys.argv[1])
"""


def write(directory: Path, architecture: Architecture, **kwargs: Any) -> DeciLMForCausalLM:
    model = build_model(architecture, seed=3)
    save_model(model, directory, architecture=architecture, tokenizer_from=None, **kwargs)
    return model


def random_tensors(architecture: Architecture) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in tensor_shapes(architecture).items()}


def write_sharded(directory: Path, architecture: Architecture, max_shard_bytes: int) -> dict[str, Tensor]:
    tensors = random_tensors(architecture)
    with CheckpointWriter(directory, architecture, dtype=torch.float32, max_shard_bytes=max_shard_bytes) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
    return tensors


def test_stock_transformers_loads_it_outside_the_checkout(
    pico_architecture: Architecture, heterogeneous_architecture: Architecture, tmp_path: Path
) -> None:
    models = {
        "heterogeneous": write(tmp_path / "heterogeneous", heterogeneous_architecture),
        "tied": write(tmp_path / "tied", replace(pico_architecture, tie_embeddings=True)),
        "qwen": write(tmp_path / "qwen", replace(pico_architecture, qkv_bias=True, qk_norm=True, head_dim=32)),
    }
    environment = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    # -I: neither the working directory nor PYTHONPATH is searched, so the code can only come from the directory.
    command = [sys.executable, "-I", "-c", OUTSIDE_PROGRAM, "out.safetensors", *models]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    outside = load_file(tmp_path / "out.safetensors")
    for name, model in models.items():
        with torch.no_grad():
            # Another process may run with another number of threads, and so sum in another order.
            torch.testing.assert_close(outside[f"{name}.logits"], model(IDS).logits, rtol=1e-5, atol=1e-6)
            tokens = model.generate(IDS, max_new_tokens=5, do_sample=False, eos_token_id=None)
        assert torch.equal(outside[f"{name}.tokens"], tokens)


@pytest.mark.parametrize(
    "changes", [{}, {"tie_embeddings": True}, {"qkv_bias": True}, {"qk_norm": True, "head_dim": 32}]
)
def test_save_and_load_round_trip(
    heterogeneous_architecture: Architecture, changes: dict[str, Any], tmp_path: Path
) -> None:
    architecture = replace(heterogeneous_architecture, **changes)
    saved = write(tmp_path, architecture)
    loaded = load_model(tmp_path)
    assert read_architecture(tmp_path) == architecture
    assert not loaded.training
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in saved.state_dict().items())
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, saved(IDS).logits)


def test_tied_head_is_not_stored(pico_architecture: Architecture, tmp_path: Path) -> None:
    write(tmp_path, replace(pico_architecture, tie_embeddings=True))
    with TensorReader(tmp_path) as reader:
        assert "lm_head.weight" not in reader
    model = load_model(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_dtype_of_storage_and_of_loading(pico_architecture: Architecture, tmp_path: Path) -> None:
    write(tmp_path, pico_architecture, dtype=torch.bfloat16)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    with TensorReader(tmp_path) as reader:
        assert {reader.dtype(name) for name in reader.names()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in load_model(tmp_path).parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in load_model(tmp_path, dtype=torch.float32).parameters()} == {torch.float32}


def test_shards_are_bounded_and_read_back(heterogeneous_architecture: Architecture, tmp_path: Path) -> None:
    limit = 200_000
    tensors = write_sharded(tmp_path, heterogeneous_architecture, limit)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    assert [path.name for path in shards] == [
        f"model-{index:05d}-of-{len(shards):05d}.safetensors" for index in range(1, len(shards) + 1)
    ]
    assert all(sum(tensor.nbytes for tensor in load_file(path).values()) <= limit for path in shards)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    with TensorReader(tmp_path) as reader:
        assert reader.names() == sorted(tensors)
        for name, tensor in tensors.items():
            assert reader.shape(name) == tuple(tensor.shape)
            assert torch.equal(reader.read(name), tensor)
    assert torch.equal(load_model(tmp_path).lm_head.weight, tensors["lm_head.weight"])


def test_tensor_larger_than_a_shard_gets_its_own(pico_architecture: Architecture, tmp_path: Path) -> None:
    tensors = write_sharded(tmp_path, pico_architecture, max_shard_bytes=1)
    assert len(list(tmp_path.glob("*.safetensors"))) == len(tensors)
    assert torch.equal(load_model(tmp_path).lm_head.weight, tensors["lm_head.weight"])


def test_writer_copies_what_it_is_given(pico_architecture: Architecture, tmp_path: Path) -> None:
    tensors = random_tensors(pico_architecture)
    views = torch.randn(2, 512, 64, generator=torch.Generator().manual_seed(1))
    tensors["model.layers.0.mlp.gate_proj.weight"] = views[0]
    tensors["model.layers.1.mlp.gate_proj.weight"] = views[0]
    tensors["model.layers.0.mlp.down_proj.weight"] = views[1].T
    expected = {name: tensor.clone() for name, tensor in tensors.items()}
    with CheckpointWriter(tmp_path, pico_architecture, dtype=torch.float32) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
            tensor.zero_() if name == "lm_head.weight" else None
    stored = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(stored[name], tensor) for name, tensor in expected.items())


def test_writer_refuses_what_does_not_fit(pico_architecture: Architecture, tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path / "new", pico_architecture, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"'model.norm.weight' has shape \[3\], expected \[64\]"):
        writer.add("model.norm.weight", torch.zeros(3))
    with pytest.raises(ValueError, match=r"'model.layers.9.mlp' is not a tensor that the architecture still lacks"):
        writer.add("model.layers.9.mlp", torch.zeros(3))


def test_incomplete_checkpoint_has_no_configuration(pico_architecture: Architecture, tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, pico_architecture, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"39 tensors were not written: lm_head.weight"), writer:
        pass
    with pytest.raises(KeyError), writer:
        raise KeyError("surgery failed")
    assert not (tmp_path / "config.json").exists()


def test_directory_with_weights_is_refused(pico_parent_dir: Path, pico_architecture: Architecture) -> None:
    with pytest.raises(ValueError, match="already holds weights"):
        CheckpointWriter(pico_parent_dir, pico_architecture, dtype=torch.float32)


def test_damaged_checkpoints_are_named(heterogeneous_architecture: Architecture, tmp_path: Path) -> None:
    write_sharded(tmp_path, heterogeneous_architecture, 200_000)
    shard = min(tmp_path.glob("*.safetensors"))
    content = load_file(shard)
    name, tensor = content.popitem()
    save_file(content, shard)
    with pytest.raises(ValueError, match=f"lacks the tensor '{name}' that the index places there"):
        load_model(tmp_path)
    save_file(content | {name: torch.zeros(5)}, shard)
    with pytest.raises(ValueError, match=rf"{name} has shape \[5\], config.json says \[{tensor.shape[0]}"):
        load_model(tmp_path)
    shard.write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match="no readable safetensors file"):
        load_model(tmp_path)
    shard.unlink()
    with pytest.raises(ValueError, match=f"shard {shard.name} that model.safetensors.index.json names is missing"):
        load_model(tmp_path)


def test_tensors_must_be_those_of_the_configuration(pico_parent_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(pico_parent_dir, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {"model.extra": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"has tensors that its config.json does not ask for: model.extra"):
        load_model(tmp_path)
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"lacks tensors that its config.json asks for: model.norm.weight"):
        load_model(tmp_path)
    with TensorReader(tmp_path) as reader, pytest.raises(ValueError, match=r"has no tensor 'model.norm.weight'"):
        reader.read("model.norm.weight")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "has no config.json; expected a model directory"),
        ({"config.json": '{"model_type": "llama"}', "model.safetensors": ""}, "model_type is 'llama'; expected"),
        ({"config.json": '{"model_type": "nemotron-nas"}'}, r"has no \*.safetensors; expected"),
        ({"config.json": '{"model_type": "nemotron-nas"}', "model.safetensors": ""}, "lacks the key"),
        ({"config.json": "{", "model.safetensors": ""}, "is not valid JSON"),
    ],
)
def test_directory_that_is_no_checkpoint(files: dict[str, str], message: str, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        load_model(tmp_path)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_reader_of_a_directory_without_weights(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"neither model.safetensors nor model.safetensors.index.json"):
        TensorReader(tmp_path)


def test_code_in_the_directory_is_never_run(pico_parent_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(pico_parent_dir, tmp_path, dirs_exist_ok=True)
    for path in tmp_path.glob("*_decilm.py"):
        path.write_text("raise SystemExit('remote code was run')")
    assert type(load_model(tmp_path)) is DeciLMForCausalLM


def test_remote_code_is_ours(pico_parent_dir: Path) -> None:
    for path in checkpoint.REMOTE_CODE_FILES:
        assert (pico_parent_dir / path.name).read_bytes() == path.read_bytes()


def test_generation_stops_at_the_end_token(pico_parent_dir: Path, pico_model: DeciLMForCausalLM) -> None:
    written = json.loads((pico_parent_dir / "generation_config.json").read_text())
    assert written == {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    assert pico_model.generation_config.eos_token_id == 0
    with torch.no_grad():
        pico_model.lm_head.weight.zero_()  # every logit is equal, so the greedy choice is token 0
    assert pico_model.generate(IDS[:1], max_new_tokens=5, do_sample=False).shape == (1, 11)


def test_building_is_seeded_and_leaves_the_global_state_alone(pico_architecture: Architecture) -> None:
    state = torch.get_rng_state()
    first, again, other = (build_model(pico_architecture, seed=seed).lm_head.weight for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_tokenizer_travels(pico_parent_dir: Path, pico_architecture: Architecture, tmp_path: Path) -> None:
    assert has_tokenizer(pico_parent_dir)
    model = load_model(pico_parent_dir)
    save_model(model, tmp_path / "child", architecture=pico_architecture, tokenizer_from=pico_parent_dir)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "child" / name).read_bytes() == (pico_parent_dir / name).read_bytes()
    with pytest.raises(ValueError, match="has no tokenizer"):
        copy_tokenizer(tmp_path, tmp_path / "child")
