from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from puzzle.model.checkpoint import TensorReader, load_model, read_architecture
from puzzle.model.convert import export_hf, import_hf

LOGITS_ATOL = 1e-5
"""fp32 rounding of the same operations, in another order inside attention; logits are of order 1."""

PICO: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 500.0}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16}


def _llama(**changed: Any) -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**PICO | changed))


PARENTS = {
    "llama": lambda: _llama(num_key_value_heads=4),
    "llama_llama3_rope_tied": lambda: _llama(rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True),
    "llama_linear_rope": lambda: _llama(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}),
    "llama_padded_ffn": lambda: _llama(intermediate_size=300),
    "mistral_full": lambda: MistralForCausalLM(MistralConfig(**PICO, sliding_window=None, head_dim=32)),
    "mistral_window": lambda: MistralForCausalLM(MistralConfig(**PICO, sliding_window=8)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**PICO, rope_parameters=YARN_ROPE)),
    "qwen2_window": lambda: Qwen2ForCausalLM(
        Qwen2Config(**PICO, use_sliding_window=True, sliding_window=8, max_window_layers=0)
    ),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**PICO, head_dim=24, tie_word_embeddings=True)),
    "qwen3_window": lambda: Qwen3ForCausalLM(
        Qwen3Config(**PICO, head_dim=24, use_sliding_window=True, sliding_window=8, max_window_layers=0)
    ),
    "smollm3": lambda: SmolLM3ForCausalLM(
        SmolLM3Config(**PICO | {"num_hidden_layers": 5}, pad_token_id=0, rope_parameters=DEFAULT_ROPE)
    ),
    "smollm3_named": lambda: SmolLM3ForCausalLM(
        SmolLM3Config(
            **PICO, pad_token_id=0, no_rope_layers=[0, 1, 0], tie_word_embeddings=False, rope_parameters=DEFAULT_ROPE
        )
    ),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**PICO, pad_token_id=0)),
    "phi3_window_padded": lambda: Phi3ForCausalLM(
        Phi3Config(**PICO | {"intermediate_size": 300}, pad_token_id=0, sliding_window=8)
    ),
}


def _randomised(model: nn.Module) -> nn.Module:
    """Biases and norms away from zero and one, where a mix-up of them would not show."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.normal_(1.0, 0.3, generator=generator)
    return model.eval()


@pytest.fixture(params=PARENTS)
def parent_dir(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    directory = tmp_path / "parent"
    _randomised(PARENTS[request.param]()).save_pretrained(directory)
    return directory


@pytest.fixture
def llama_dir(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    _llama().save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def _ids() -> Tensor:
    return torch.randint(0, PICO["vocab_size"], (2, 48), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def _logits(model: nn.Module) -> Tensor:
    return model(_ids()).logits


def test_import_has_the_logits_of_transformers_and_export_its_tensors(parent_dir: Path, tmp_path: Path) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(parent_dir)
    expected = _logits(theirs)
    architecture = import_hf(parent_dir, tmp_path / "ours", dtype=torch.float32)
    assert read_architecture(tmp_path / "ours") == architecture
    torch.testing.assert_close(_logits(load_model(tmp_path / "ours")), expected, atol=LOGITS_ATOL, rtol=0)

    export_hf(tmp_path / "ours", tmp_path / "back")
    before, after = load_file(parent_dir / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert type(again) is type(theirs)
    torch.testing.assert_close(_logits(again), expected, atol=0, rtol=0)


def test_ids_differ_enough_to_feel_the_window(tmp_path: Path) -> None:
    """A window shorter than the sequence changes the logits, so that its parity above says something."""
    torch.manual_seed(0)
    _randomised(PARENTS["mistral_window"]()).save_pretrained(tmp_path / "parent")
    import_hf(tmp_path / "parent", tmp_path / "ours", dtype=torch.float32)
    windowed = _logits(load_model(tmp_path / "ours"))
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    (tmp_path / "ours" / "config.json").write_text(json.dumps(config | {"sliding_window": None}))
    assert (_logits(load_model(tmp_path / "ours")) - windowed).abs().max() > 0.1


def test_padding_is_zeros_beyond_the_parents_width(tmp_path: Path) -> None:
    _llama(intermediate_size=300).save_pretrained(tmp_path / "parent")
    import_hf(tmp_path / "parent", tmp_path / "ours", dtype=torch.float32)
    with TensorReader(tmp_path / "ours") as reader:
        gate = reader.read("model.layers.0.mlp.gate_proj.weight")
        down = reader.read("model.layers.0.mlp.down_proj.weight")
    assert gate.shape == (512, 64)
    assert down.shape == (64, 512)
    assert gate[300:].abs().max() == down[:, 300:].abs().max() == 0


def test_padding_that_was_trained_is_not_cut_off(tmp_path: Path) -> None:
    _llama(intermediate_size=300).save_pretrained(tmp_path / "parent")
    import_hf(tmp_path / "parent", tmp_path / "ours", dtype=torch.float32)
    file = tmp_path / "ours" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][400, 3] = 1.0
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj.*212 channels beyond .* width 300 are not zero"):
        export_hf(tmp_path / "ours", tmp_path / "back")


def test_sharded_checkpoints_go_both_ways(tmp_path: Path) -> None:
    model = _llama()
    model.save_pretrained(tmp_path / "parent", max_shard_size="200KB")
    assert len(list((tmp_path / "parent").glob("*.safetensors"))) > 1
    import_hf(tmp_path / "parent", tmp_path / "ours", dtype=torch.float32)
    export_hf(tmp_path / "ours", tmp_path / "back", max_shard_bytes=300_000)
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 1
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "back").state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())


def test_import_rounds_to_the_asked_data_type(llama_dir: Path, tmp_path: Path) -> None:
    import_hf(llama_dir, tmp_path / "ours", dtype=torch.bfloat16)
    before = load_file(llama_dir / "model.safetensors")
    after = load_file(tmp_path / "ours" / "model.safetensors")
    assert all(torch.equal(tensor.bfloat16(), after[name]) for name, tensor in before.items())


def test_own_format_is_copied_with_its_tokenizer(pico_parent_dir: Path, tmp_path: Path) -> None:
    architecture = import_hf(pico_parent_dir, tmp_path / "copy", dtype=torch.float32)
    assert architecture == read_architecture(pico_parent_dir)
    before, after = (load_file(directory / "model.safetensors") for directory in (pico_parent_dir, tmp_path / "copy"))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert (tmp_path / "copy" / "tokenizer.json").read_bytes() == (pico_parent_dir / "tokenizer.json").read_bytes()


def test_own_format_of_a_padded_parent_is_copied(tmp_path: Path) -> None:
    _llama(intermediate_size=300).save_pretrained(tmp_path / "parent")
    first = import_hf(tmp_path / "parent", tmp_path / "ours", dtype=torch.float32)
    assert import_hf(tmp_path / "ours", tmp_path / "copy", dtype=torch.float32) == first
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "copy"))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.parametrize("family", ["phi3", "phi3_window_padded"])
def test_fused_projections_are_dealt_by_rows(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    PARENTS[family]().save_pretrained(tmp_path / "parent")
    import_hf(tmp_path / "parent", tmp_path / "ours", dtype=torch.float32)
    theirs, ours = (load_file(tmp_path / name / "model.safetensors") for name in ("parent", "ours"))
    prefix, width = "model.layers.2.", 300 if "padded" in family else 512
    query, key, value = theirs[f"{prefix}self_attn.qkv_proj.weight"].split([64, 32, 32])
    gate, up = theirs[f"{prefix}mlp.gate_up_proj.weight"].chunk(2)
    for name, expected in (("q", query), ("k", key), ("v", value)):
        assert torch.equal(ours[f"{prefix}self_attn.{name}_proj.weight"], expected)
    for name, expected in (("gate", gate), ("up", up)):
        assert torch.equal(ours[f"{prefix}mlp.{name}_proj.weight"][:width], expected)


def test_quantised_weights_are_named_before_anything_is_written(llama_dir: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    _rewrite(llama_dir, add={name: torch.zeros(512, 64, dtype=torch.uint8)})
    with pytest.raises(ValueError, match=r"1\.mlp\.up_proj\.weight is stored as uint8; import the unquantized"):
        import_hf(llama_dir, tmp_path / "ours", dtype=torch.float32)
    _rewrite(llama_dir, add={name: torch.zeros(512, 64).to(torch.float8_e4m3fn)})
    with pytest.raises(ValueError, match=r"1\.mlp\.up_proj\.weight is stored as F8_E4M3"):
        import_hf(llama_dir, tmp_path / "ours", dtype=torch.float32)
    assert not (tmp_path / "ours").exists()


def _rewrite(directory: Path, *, drop: tuple[str, ...] = (), add: dict[str, Tensor] | None = None) -> None:
    file = directory / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(file).items() if name not in drop} | (add or {})
    save_file(tensors, file, metadata={"format": "pt"})


def test_known_surplus_is_left_out(llama_dir: Path, tmp_path: Path) -> None:
    """Llama 2 stores inverse frequencies; tied models may store the head that equals the embedding."""
    embedding = load_file(llama_dir / "model.safetensors")["model.embed_tokens.weight"]
    surplus = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8), "lm_head.weight": embedding.clone()}
    _rewrite(llama_dir, add=surplus)
    config = json.loads((llama_dir / "config.json").read_text())
    (llama_dir / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    import_hf(llama_dir, tmp_path / "ours", dtype=torch.float32)
    assert not surplus.keys() & load_file(tmp_path / "ours" / "model.safetensors").keys()

    _rewrite(llama_dir, add={"lm_head.weight": embedding + 1})
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight, though tied"):
        import_hf(llama_dir, tmp_path / "other", dtype=torch.float32)


@pytest.mark.parametrize(
    ("drop", "add", "message"),
    [
        (("model.norm.weight",), {}, r"lacks 1 tensors: model\.norm\.weight; does config"),
        (tuple(f"model.layers.{i}.mlp.up_proj.weight" for i in range(3)), {}, r"lacks 3 tensors: .*0.*, .*1.*, .*2"),
        (
            (),
            {f"extra.{i}": torch.ones(1) for i in range(5)},
            r"has unexpected 5 tensors: (extra\.\d,? ?){3};",
        ),
        (
            (),
            {"model.norm.weight": torch.ones(3)},
            r"another shape .*norm\.weight \[3\] instead of \[64\]",
        ),
    ],
)
def test_wrong_tensors_are_named_before_anything_is_written(
    llama_dir: Path, tmp_path: Path, drop: tuple[str, ...], add: dict[str, Tensor], message: str
) -> None:
    _rewrite(llama_dir, drop=drop, add=add)
    with pytest.raises(ValueError, match=message) as error:
        import_hf(llama_dir, tmp_path / "ours", dtype=torch.float32)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "ours").exists()


def test_directories_without_a_checkpoint_are_named(llama_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no config\.json; give a Hugging Face checkpoint directory"):
        import_hf(tmp_path, tmp_path / "ours", dtype=torch.float32)
    (llama_dir / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="has no weights; convert the weights to safetensors"):
        import_hf(llama_dir, tmp_path / "ours", dtype=torch.float32)
    (llama_dir / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"only pytorch_model\.bin: pickles can run code and are never read"):
        import_hf(llama_dir, tmp_path / "ours", dtype=torch.float32)
    assert not (tmp_path / "ours").exists()
