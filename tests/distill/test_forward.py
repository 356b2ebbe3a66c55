from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig, LlamaForCausalLM

from distill import forward
from distill.data.batch import Batch
from distill.data.dataset import documents_apart
from distill.flex_attention import MASK_BLOCK
from distill.forward import SDPA_OR_FLEX, document_mask, forward_inputs, sdpa_or_flex_attention
from distill.sequence_parallel import ULYSSES

EOS = 0
CUDA = torch.device("cuda")


def _packed(lengths: list[int], seed: int = 0) -> Batch:
    """One sequence of documents of these lengths in tokens, the last of which is EOS."""
    generator = torch.Generator().manual_seed(seed)
    documents = [torch.randint(1, 61, (length,), generator=generator) for length in lengths]
    for document in documents:
        document[-1] = EOS
    return documents_apart(Batch.of(torch.cat(documents)[None]), EOS)


def _hidden(model: LlamaForCausalLM, batch: Batch) -> Tensor:
    return model.model(batch.input_ids, use_cache=False, **forward_inputs(batch, model)).last_hidden_state


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_document_is_seen_as_if_it_stood_alone(
    make_llama: Callable[..., LlamaForCausalLM], implementation: str
) -> None:
    model = make_llama(seed=0).eval()
    model.set_attn_implementation(implementation)
    lengths = [5, 1, 9, 17]
    packed = _packed(lengths)
    with torch.no_grad():
        found = _hidden(model, packed)[0].split(lengths)
        apart = [_hidden(model, Batch.of(document[None]))[0] for document in packed.input_ids[0].split(lengths)]
        mixed = _hidden(model, Batch.of(packed.input_ids))[0].split(lengths)
    for here, there in zip(found, apart, strict=True):
        # fp32; the two differ in the order of their sums.
        torch.testing.assert_close(here, there, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(mixed[0], apart[0], atol=2e-5, rtol=1e-5)
    assert all((here - there).abs().max() > 1e-2 for here, there in zip(mixed[1:], apart[1:], strict=True))


def test_without_separate_documents_there_is_no_mask(make_llama: Callable[..., LlamaForCausalLM]) -> None:
    model = make_llama(seed=0).eval()
    inputs = forward_inputs(Batch.of(torch.ones(2, 7, dtype=torch.int64)), model)
    assert inputs == {"position_ids": None, "attention_mask": None}


def test_sdpa_or_flex_is_sdpa_without_a_block_mask(make_llama: Callable[..., LlamaForCausalLM]) -> None:
    model = make_llama(seed=0).eval()
    batches = [_packed([5, 9]), Batch.of(_packed([5, 9]).input_ids)]
    with torch.no_grad():
        expected = [_hidden(model, batch) for batch in batches]
        model.config._attn_implementation = SDPA_OR_FLEX
        for batch, hidden in zip(batches, expected, strict=True):
            assert torch.equal(_hidden(model, batch), hidden)


def test_a_part_of_a_sequence_is_given_its_positions(make_llama: Callable[..., LlamaForCausalLM]) -> None:
    model = make_llama(seed=0).eval()
    model.config._attn_implementation = ULYSSES
    part = Batch.of(torch.ones(2, 8, dtype=torch.int64)).sequence_part(1, 2)
    inputs = forward_inputs(part, model)
    assert inputs["attention_mask"] is None
    assert inputs["position_ids"].tolist() == [[4, 5, 6, 7]] * 2


def test_an_implementation_without_masks_is_refused(make_llama: Callable[..., LlamaForCausalLM]) -> None:
    model = make_llama(seed=0).eval()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="flash_attention_2 does not take"):
        forward_inputs(_packed([3, 4]), model)


def test_a_batch_has_one_mask_for_student_and_teacher(make_llama: Callable[..., LlamaForCausalLM]) -> None:
    student, teacher = (make_llama(seed=seed).eval() for seed in (0, 1))
    batch, other = _packed([5, 9]), _packed([3, 11])
    mask = forward_inputs(batch, student)["attention_mask"]
    assert forward_inputs(batch, teacher)["attention_mask"] is mask
    assert not torch.equal(forward_inputs(other, student)["attention_mask"], mask)
    teacher.config.sliding_window = 4
    assert not torch.equal(forward_inputs(batch, teacher)["attention_mask"], mask)
    # It goes with the batch.
    last = weakref.ref(mask)
    del mask, batch
    gc.collect()
    assert last() is None


def test_rotated_heads_attend_in_the_values_type(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under autocast the rotation makes queries and keys fp32; FlexAttention takes one type alone."""
    seen = []

    def attend(*heads: Tensor, **_: object) -> Tensor:
        seen.extend(tensor.dtype for tensor in heads[:3])
        return heads[2].transpose(1, 2)

    monkeypatch.setattr(forward, "attend", attend)
    heads = torch.randn(3, 1, 2, 256, 16)
    mask = document_mask(_packed([100, 156]).position_ids, flex=True)
    sdpa_or_flex_attention(nn.Module(), heads[0], heads[1], heads[2].bfloat16(), mask, scaling=0.25, dropout=0.0)
    assert seen == [torch.bfloat16] * 3


@pytest.mark.parametrize("sliding_window", [None, 100, 300])
@pytest.mark.parametrize("lengths", [[640], [37, 300, 1, 302], [128, 128, 256, 128], [90] * 7])
def test_the_block_mask_is_the_dense_mask(lengths: list[int], sliding_window: int | None) -> None:
    positions = torch.cat((_packed(lengths).position_ids, _packed([sum(lengths)]).position_ids))
    seq = positions.shape[1]
    dense = document_mask(positions, sliding_window=sliding_window)
    blocks = document_mask(positions, sliding_window=sliding_window, flex=True)
    assert isinstance(blocks, BlockMask)
    seen = create_mask(blocks.mask_mod, 2, 1, seq, seq, device="cpu")
    assert torch.equal(seen, dense)

    num_blocks = -(-seq // MASK_BLOCK)
    padding = num_blocks * MASK_BLOCK - seq
    tiles = torch.nn.functional.pad(dense.float(), (0, padding, 0, padding), value=-1)
    tiles = tiles.view(2, 1, num_blocks, MASK_BLOCK, num_blocks, MASK_BLOCK)
    some, every = tiles.amax(dim=(3, 5)) == 1, (tiles != 0).all(dim=5).all(dim=3)
    below = torch.ones(num_blocks, num_blocks).tril(-1).bool()
    assert torch.equal(blocks.to_dense().bool(), some)
    full = _listed(blocks.full_kv_num_blocks, blocks.full_kv_indices)
    assert torch.equal(full, some & every & below)


def _listed(counts: Tensor, indices: Tensor) -> Tensor:
    """Blocks of keys that a block mask lists, bool [batch, 1, blocks of queries, blocks of keys]."""
    chosen = torch.arange(indices.shape[-1]) < counts[..., None]
    return torch.zeros(indices.shape, dtype=torch.bool).scatter(-1, indices.long(), chosen)


def test_flex_attention_reads_the_block_mask() -> None:
    positions = _packed([37, 300, 1, 302]).position_ids
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 640, 16, generator=generator) for _ in range(3))
    dense = document_mask(positions)
    expected = scaled_dot_product_attention(query, key, value, attn_mask=dense)
    found = flex_attention(query, key, value, block_mask=document_mask(positions, flex=True))
    # fp32; the two differ in the order of their sums.
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.gpu
def test_long_sequences_on_a_gpu_take_flex_attention() -> None:
    packed = _packed([700, 3, 1_100, 245])
    batch, dense = packed.to(CUDA), document_mask(packed.position_ids).to(CUDA)
    model, dense_model = _wide_llama(), _wide_llama()
    expected = dense_model.model(
        batch.input_ids, position_ids=batch.position_ids, attention_mask=dense, use_cache=False
    ).last_hidden_state
    found = _hidden(model, batch)
    assert isinstance(forward_inputs(batch, model)["attention_mask"], BlockMask)
    # fp32, perhaps with TF32 products in FlexAttention's kernel: ten bits of mantissa, over two blocks.
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=1e-2)
    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).to(CUDA)
    for output in (found, expected):
        (output * weight).sum().backward()
    gradients = [m.model.layers[0].self_attn.k_proj.weight.grad for m in (model, dense_model)]
    assert (gradients[0] - gradients[1]).norm() < 1e-2 * gradients[1].norm()
    # Without documents to keep apart, the same model runs SDPA without a mask again.
    plain = Batch.of(packed.input_ids).to(CUDA)
    torch.testing.assert_close(_hidden(model, plain), _hidden(dense_model, plain), atol=1e-4, rtol=1e-4)


@pytest.mark.gpu
def test_a_long_block_mask_takes_little_memory() -> None:
    positions = torch.arange(131_072, device=CUDA)[None] % 5_000
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    mask = document_mask(positions)
    assert isinstance(mask, BlockMask)
    # 1,024 x 1,024 blocks in four lists; the dense mask would be 17 GB.
    assert torch.cuda.max_memory_allocated() - before < 20e6


@pytest.mark.gpu
def test_long_documents_are_kept_apart_under_autocast() -> None:
    """Rotated heads are fp32 there, the values bf16."""
    packed = _packed([700, 3, 1_100, 245])
    batch, dense = packed.to(CUDA), document_mask(packed.position_ids).to(CUDA)
    weight = torch.randn(1, 2048, 64, generator=torch.Generator().manual_seed(1)).to(CUDA)
    outputs, gradients = [], []
    for mask in (None, dense):
        model = _wide_llama()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            inputs = forward_inputs(batch, model)
            inputs["attention_mask"] = inputs["attention_mask"] if mask is None else mask
            outputs.append(model.model(batch.input_ids, use_cache=False, **inputs).last_hidden_state)
        (outputs[-1] * weight).sum().backward()
        gradients.append(model.model.layers[0].self_attn.k_proj.weight.grad)
    # bf16 keeps eight bits; two blocks.
    assert (outputs[0] - outputs[1]).norm() < 2e-2 * outputs[1].norm()
    assert (gradients[0] - gradients[1]).norm() < 5e-2 * gradients[1].norm()


def _wide_llama() -> LlamaForCausalLM:
    """Of 16 channels per head, the fewest that FlexAttention takes on a GPU."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
    )
    return LlamaForCausalLM(config).to(CUDA)
