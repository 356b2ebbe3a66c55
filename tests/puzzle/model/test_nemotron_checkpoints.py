"""Published nemotron-nas checkpoints go through an import unchanged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from puzzle.model import stats
from puzzle.model.checkpoint import REMOTE_CODE_FILES, load_model, read_architecture
from puzzle.model.convert import import_hf
from puzzle.model.hf_config import architecture_from_config, ffn_dim, hf_config
from puzzle.model.tensor_layout import tensor_shapes
from tests.puzzle.model.nemotron_layouts import SUPER_49B, ULTRA_253B, Published, config_json, tiny

PUBLISHED = pytest.mark.parametrize("published", [SUPER_49B, ULTRA_253B], ids=lambda published: published.name)
NOT_KEPT = {"_name_or_path", "transformers_version"}
"""Where a file came from and what wrote it; no reader takes them for part of the model."""


@pytest.mark.parametrize(
    ("published", "billions", "blocks", "attentions", "dummies"),
    [(SUPER_49B, 49.867, 80, 49, 0), (ULTRA_253B, 253.401, 162, 64, 81)],
    ids=["Super-49B", "Ultra-253B"],
)
def test_published_parameter_counts(
    published: Published, billions: float, blocks: int, attentions: int, dummies: int
) -> None:
    architecture = architecture_from_config(config_json(published))
    assert round(stats.num_params(architecture) / 1e9, 3) == billions
    assert architecture.num_blocks == blocks
    assert sum(block.attention.kind == "gqa" for block in architecture.blocks) == attentions
    assert sum(block.attention.is_no_op and block.ffn.is_no_op for block in architecture.blocks) == dummies
    assert {block.attention.num_kv_heads for block in architecture.blocks} == {8, None}


def test_published_widths() -> None:
    ultra = architecture_from_config(config_json(ULTRA_253B))
    widest = {index: ultra.blocks[index].ffn.ffn_dim for index in (125, 134, 143, 149)}
    assert widest == {125: 399_360, 134: 425_984, 143: 343_040, 149: 301_056}
    assert ultra.blocks[150].name == "no_op+w21504"
    widths = {block.ffn.ffn_dim for block in architecture_from_config(config_json(SUPER_49B)).blocks}
    assert widths == {28_672, 17_920, 14_336, 7168, 5632, 2816}


@PUBLISHED
def test_configuration_is_written_as_it_was_read(published: Published) -> None:
    """Every key and every value, but that ``ffn_mult`` is spelt for the width itself: 1.03125 for 1.0 where both are
    5,632 channels, as the format rounds up."""
    config = config_json(published)
    again = json.loads(json.dumps(hf_config(architecture_from_config(config), "bfloat16")))
    hidden = published.hidden_size
    for entry, ours in zip(config["block_configs"], again["block_configs"], strict=True):
        assert ours["ffn"].keys() == entry["ffn"].keys()
        theirs, mult = entry["ffn"].pop("ffn_mult"), ours["ffn"].pop("ffn_mult")
        assert (theirs is None) == (mult is None)
        assert mult is None or ffn_dim(mult, hidden) == ffn_dim(theirs, hidden) == round(2 * mult * hidden / 3)
    assert again == {key: value for key, value in config.items() if key not in NOT_KEPT}


@pytest.fixture
def directory(published: Published, tmp_path: Path) -> Path:
    """A tiny checkpoint of the layout: random weights in two shards, no code and no tokenizer of ours."""
    directory = tmp_path / "published"
    directory.mkdir()
    config = config_json(tiny(published)) | {"torch_dtype": "float32"}
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    generator = torch.Generator().manual_seed(0)
    shapes = tensor_shapes(architecture_from_config(config))
    tensors = {
        name: torch.randn(shape, generator=generator) * (0.3 if len(shape) == 1 else 0.05) + (len(shape) == 1)
        for name, shape in shapes.items()
    }
    weight_map = {name: f"model-0000{1 + index % 2}-of-00002.safetensors" for index, name in enumerate(tensors)}
    for file in sorted(set(weight_map.values())):
        own = {name: tensor for name, tensor in tensors.items() if weight_map[name] == file}
        save_file(own, directory / file, metadata={"format": "pt"})
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (directory / "configuration_decilm.py").write_text("raise RuntimeError('code of a checkpoint was run')\n")
    (directory / "modeling_decilm.py").write_text("raise RuntimeError('code of a checkpoint was run')\n")
    return directory


def _tensors(directory: Path) -> dict[str, Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


@torch.no_grad()
def _logits(model: torch.nn.Module) -> Tensor:
    return model(torch.randint(0, 320, (2, 24), generator=torch.Generator().manual_seed(1))).logits


@PUBLISHED
def test_import_changes_nothing(published: Published, directory: Path, tmp_path: Path) -> None:
    architecture = import_hf(directory, tmp_path / "ours", dtype=torch.float32)
    assert read_architecture(directory) == read_architecture(tmp_path / "ours") == architecture
    before, after = _tensors(directory), _tensors(tmp_path / "ours")
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())

    expected = _logits(load_model(directory))
    assert expected.std() > 0.1
    assert torch.equal(_logits(load_model(tmp_path / "ours")), expected)
    # As remote code, which is ours now and not the checkpoint's.
    for file in REMOTE_CODE_FILES:
        assert (tmp_path / "ours" / file.name).read_bytes() == file.read_bytes()
    remote = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", trust_remote_code=True, dtype=torch.float32)
    assert torch.equal(_logits(remote.eval()), expected)


@pytest.mark.parametrize("published", [SUPER_49B], ids=["Super-49B"])
def test_a_newer_dialect_means_the_same(published: Published, directory: Path) -> None:
    """KV heads and widths by number, as later code of the format writes them, with its neutral keys."""
    config = json.loads((directory / "config.json").read_text())
    expected = architecture_from_config(config)
    for entry, block in zip(config["block_configs"], expected.blocks, strict=True):
        attention, ffn = entry["attention"], entry["ffn"]
        del attention["n_heads_in_group"], ffn["ffn_mult"]
        attention |= {"num_key_value_heads": block.attention.num_kv_heads, "mamba": None, "llama4": None}
        ffn |= {"intermediate_size": block.ffn.ffn_dim, "moe": None, "gated": True, "hidden_act": "silu"}
        ffn["weights_precision"] = attention["weights_precision"] = "bf16"
        entry["parallel_blocks"] = None
    config |= {"position_embedding_type": "rope", "o_proj_bias": False, "hidden_act": None}
    assert architecture_from_config(config) == expected


@pytest.mark.parametrize("published", [SUPER_49B], ids=["Super-49B"])
@pytest.mark.parametrize(
    ("where", "changed", "message"),
    [
        (
            (),
            {"quantization_config": {"quant_method": "modelopt"}},
            "quantization_config; import the unquantized",
        ),
        ((), {"position_embedding_type": "mistral_yarn"}, "position_embedding_type='mistral_yarn' is not supported"),
        ((), {"o_proj_bias": True}, "o_proj_bias=True is not supported"),
        ((6,), {"parallel_blocks": [{}, {}]}, r"block 6: parallel_blocks=\[{}, {}\] is not supported"),
        ((6, "ffn"), {"moe": {"num_local_experts": 8}}, "block 6: ffn: moe={'num_local_experts': 8} is not supported"),
        ((6, "ffn"), {"sparsify": ["2:4"]}, r"block 6: ffn: sparsify=\['2:4'\]"),
        ((3, "attention"), {"num_sink_tokens": 4}, "block 3: attention: num_sink_tokens=4 is not supported"),
        ((3, "attention"), {"mamba": {"state_dim": 16}}, "block 3: attention: mamba="),
        ((3, "attention"), {"of_tomorrow": 1}, "block 3: attention: of_tomorrow=1 is not supported"),
        ((3,), {"attention": None}, "block 3: attention is None, expected a JSON object"),
    ],
)
def test_what_a_directory_has_beyond_is_named_and_nothing_written(
    published: Published, directory: Path, tmp_path: Path, where: tuple[Any, ...], changed: dict[str, Any], message: str
) -> None:
    config = json.loads((directory / "config.json").read_text())
    node = config if not where else config["block_configs"]
    for key in where:
        node = node[key]
    node.update(changed)
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message) as error:
        import_hf(directory, tmp_path / "ours", dtype=torch.float32)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "ours").exists()
