"""What is read from a cache is what the teacher said, as precisely as its number formats have it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from distill import chunked_head
from distill.config import ObjectiveConfig
from distill.data.batch import IGNORE_INDEX, Batch
from distill.data.dataset import TokenDataset, documents_apart
from distill.objective import Objective
from distill.teacher import CachedTeacher, Teacher
from distill.teacher_cache import CacheIndex, TeacherCacheConfig
from distill.teacher_store import SignalStore, is_whole, plan_shards, read_record, top_signals, write_shard

VOCAB_SIZE = 61
CONFIG = TeacherCacheConfig(seq_len=8, max_tokens=45, top_k=5, eval_sequences=2, batch_size=2, shard_tokens=24)
"""Five train sequences in shards of three, two validation sequences."""
EOS = 3
DOCUMENT_END = 11
"""In the middle of the second sequence."""
FP16 = 2**-11
"""Relative rounding error of fp16: of a log-probability, and with it the absolute one per nat."""
CPU = torch.device("cpu")
WHOLE = slice(0, 8)


def make_dataset(directory: Path, vocab_size: int) -> TokenDataset:
    generator = np.random.default_rng(0)
    for name in ("train", "validation"):
        tokens = generator.integers(4, vocab_size, 64)
        tokens[DOCUMENT_END] = EOS
        np.save(directory / f"{name}.npy", tokens.astype(np.uint32))
    summary = {"vocab_size": vocab_size, "eos_token_id": EOS, "tokenizer_sha256": "0" * 64, "unigram_entropy_nats": 1.0}
    (directory / "data.json").write_text(json.dumps(summary))
    return TokenDataset.open(directory)


@pytest.fixture
def dataset(tmp_path: Path) -> TokenDataset:
    return make_dataset(tmp_path, VOCAB_SIZE)


@pytest.fixture
def teacher(make_llama: Callable[..., LlamaForCausalLM]) -> Teacher:
    return Teacher(make_llama(seed=0))


def write_store(
    directory: Path, teacher: Teacher, dataset: TokenDataset, config: TeacherCacheConfig = CONFIG
) -> SignalStore:
    directory.mkdir(exist_ok=True)
    index = CacheIndex(
        teacher="t",
        vocab_size=len(teacher.model.lm_head.weight),
        tokenizer_sha256=dataset.tokenizer_sha256,
        seq_len=config.seq_len,
        top_k=config.top_k,
        separate_documents=config.separate_documents,
        shards=tuple(write_shard(directory, shard, teacher, dataset, config) for shard in plan_shards(config)),
    )
    index.write(directory)
    return SignalStore.open(directory)


def log_probs_of(teacher: Teacher, batch: Batch) -> Tensor:
    """fp64 [batch, seq, vocab]"""
    signal = teacher.signal(batch)
    return (signal.hidden.double() @ signal.head.double().T).log_softmax(-1)


def of_split(dataset: TokenDataset, split: str, indices: list[int]) -> Batch:
    return replace(Batch.of(dataset.split(split).sequences(8, indices)), sequence_ids=torch.tensor(indices))


def test_top_signals_are_those_of_the_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(13, 16, dtype=torch.float64, generator=generator)
    head = torch.randn(VOCAB_SIZE, 16, dtype=torch.float64, generator=generator)
    labels = torch.randint(VOCAB_SIZE, (13,), generator=generator)
    labels[4] = IGNORE_INDEX
    monkeypatch.setitem(chunked_head.CHUNK_BYTES, "cpu", 4 * 8 * VOCAB_SIZE)  # chunks of four tokens
    found = top_signals(hidden, head, labels, 7)

    log_p = (hidden @ head.T).log_softmax(-1)
    sorted_log_p, token_ids = log_p.sort(descending=True)
    assert torch.equal(found["token_ids"], token_ids[:, :7])
    torch.testing.assert_close(found["log_probs"], sorted_log_p[:, :7])
    torch.testing.assert_close(found["log_tails"], sorted_log_p[:, 7:].logsumexp(-1))
    expected = torch.nn.functional.nll_loss(log_p, labels, reduction="none", ignore_index=IGNORE_INDEX)
    torch.testing.assert_close(found["nll"], expected)


def test_all_tokens_leave_no_tail() -> None:
    found = top_signals(torch.ones(2, 4), torch.rand(6, 4), torch.zeros(2, dtype=torch.int64), 6)
    assert found["log_tails"].tolist() == [float("-inf")] * 2


def test_signals_come_back_in_any_order_across_shards(tmp_path: Path, teacher: Teacher, dataset: TokenDataset) -> None:
    store = write_store(tmp_path / "cache", teacher, dataset)
    assert sorted(path.name for path in store.directory.glob("*.safetensors")) == [
        "train-000000000.safetensors",
        "train-000000003.safetensors",
        "validation-000000000.safetensors",
    ]
    for split, signals in (("train", store.train), ("validation", store.validation)):
        batch = of_split(dataset, split, [4, 0, 3, 1] if split == "train" else [1, 0])
        top = signals.signal(batch.sequence_ids, WHOLE, device=CPU)
        expected, token_ids = log_probs_of(teacher, batch).sort(descending=True)
        assert torch.equal(top.token_ids, token_ids[..., :5])
        assert top.log_probs.dtype == torch.float32
        # Once for the stored number, once for the sum of all that it is scaled by.
        torch.testing.assert_close(top.log_probs.double(), expected[..., :5], rtol=2 * FP16, atol=2 * FP16)


def test_tail_of_a_confident_teacher_survives(tmp_path: Path, teacher: Teacher, dataset: TokenDataset) -> None:
    """Tails of 1e-5 and less, far below the rounding of the probabilities beside them."""
    with torch.no_grad():
        teacher.model.model.norm.weight.mul_(15)
    store = write_store(tmp_path / "cache", teacher, dataset)
    batch = of_split(dataset, "train", [0, 1, 2, 3, 4])
    expected = log_probs_of(teacher, batch).sort(descending=True).values[..., 5:].logsumexp(-1)
    assert expected.exp().median() < 1e-4
    log_probs = store.train.signal(batch.sequence_ids, WHOLE, device=CPU).log_probs
    tail = 1 - log_probs.double().exp().sum(-1)
    # fp16 of the log-mass; 3e-7: the fp32 sum.
    torch.testing.assert_close(tail, expected.exp(), rtol=FP16 * float(expected.abs().max()), atol=3e-7)


def test_lm_loss_is_the_teachers_own(tmp_path: Path, teacher: Teacher, dataset: TokenDataset) -> None:
    store = write_store(tmp_path / "cache", teacher, dataset)
    batch = of_split(dataset, "validation", [0, 1])
    log_p = log_probs_of(teacher, batch)[:, :-1].flatten(0, 1)
    nll = torch.nn.functional.nll_loss(log_p, batch.labels[:, :-1].flatten(), reduction="none").view(2, 7)
    assert store.validation.teacher_lm_loss(2) == pytest.approx(float(nll.mean()), rel=1e-5)  # fp32
    assert store.validation.teacher_lm_loss(1) == pytest.approx(float(nll[0].mean()), rel=1e-5)


def test_objective_from_the_cache_nears_that_from_the_teacher(
    tmp_path: Path, make_llama: Callable[..., LlamaForCausalLM], teacher: Teacher, dataset: TokenDataset
) -> None:
    """Fewer outcomes never tell two distributions further apart, so that the divergence grows with k."""
    student, batch = make_llama(seed=1), of_split(dataset, "train", [3, 1, 4])

    def divergence(source: Teacher | CachedTeacher) -> tuple[float, Tensor]:
        student.zero_grad()
        loss, _ = Objective(config=ObjectiveConfig(kld=1.0), teacher=source)(student, batch)
        loss.backward()
        return float(loss.detach()), torch.cat([parameter.grad.flatten() for parameter in student.parameters()])

    online, gradient = divergence(teacher)
    found = []
    for k in (2, 8, 30, VOCAB_SIZE - 1):
        store = write_store(tmp_path / str(k), teacher, dataset, replace(CONFIG, top_k=k))
        kld, own = divergence(CachedTeacher(store.train))
        found.append((kld, float((own - gradient).norm() / gradient.norm())))
    klds, errors = zip(*found, strict=True)
    assert list(klds) == sorted(klds)
    assert list(errors) == sorted(errors, reverse=True)
    # All tokens but one: what is left is fp16, 5e-4 of a log-probability.
    assert klds[-1] == pytest.approx(online, rel=2e-3)
    assert errors[-1] < 2e-3


@pytest.mark.parametrize("top_k", [5, VOCAB_SIZE - 1])
def test_a_bf16_model_is_at_no_distance_from_its_own_cache(
    tmp_path: Path, make_llama: Callable[..., LlamaForCausalLM], dataset: TokenDataset, top_k: int
) -> None:
    model = make_llama(seed=0).bfloat16()
    with torch.no_grad():  # logits of which bf16 keeps 8 bits, as of a trained model
        model.model.norm.weight.mul_(2)
    teacher = Teacher(model)
    store = write_store(tmp_path / "cache", teacher, dataset, replace(CONFIG, top_k=top_k))
    batch = of_split(dataset, "train", [3, 1, 4])
    assert log_probs_of(teacher, batch).min() < -8
    objective = Objective(config=ObjectiveConfig(kld=1.0), teacher=CachedTeacher(store.train))
    with torch.no_grad():
        _, metrics = objective(model, batch)
    # Half the square of the log-probabilities' error: fp16 rounds those that matter by 1e-3 and less, bf16 by 1e-2.
    assert 0 <= metrics["kld_top_k"] < 1e-6


def test_parts_of_sequences_are_those_of_whole_ones(tmp_path: Path, teacher: Teacher, dataset: TokenDataset) -> None:
    store, ids = write_store(tmp_path / "cache", teacher, dataset), torch.tensor([4, 0, 3])
    whole = store.train.signal(ids, WHOLE, device=CPU)
    part = store.train.signal(ids, slice(2, 6), device=CPU)
    assert torch.equal(part.token_ids, whole.token_ids[:, 2:6])
    assert torch.equal(part.log_probs, whole.log_probs[:, 2:6])


@pytest.mark.parametrize("split", ["train", "validation"])
def test_documents_are_kept_apart(tmp_path: Path, teacher: Teacher, dataset: TokenDataset, split: str) -> None:
    packed = getattr(write_store(tmp_path / "packed", teacher, dataset), split)
    apart = getattr(write_store(tmp_path / "apart", teacher, dataset, replace(CONFIG, separate_documents=True)), split)
    index, cut = divmod(DOCUMENT_END, 8)
    batch = documents_apart(of_split(dataset, split, [index]), eos_token_id=EOS)
    log_probs = apart.signal(batch.sequence_ids, WHOLE, device=CPU).log_probs
    expected = log_probs_of(teacher, batch)
    torch.testing.assert_close(
        log_probs.double(), expected.sort(descending=True).values[..., :5], rtol=2 * FP16, atol=2 * FP16
    )
    together = packed.signal(batch.sequence_ids, WHOLE, device=CPU).log_probs
    assert not torch.allclose(together[:, cut + 1 :], log_probs[:, cut + 1 :], atol=0.01)
    others = documents_apart(of_split(dataset, split, [0]), eos_token_id=EOS)
    losses = [
        torch.nn.functional.nll_loss(log_probs_of(teacher, part).flatten(0, 1), part.labels.flatten(), reduction="sum")
        for part in (others, batch)
    ]
    # The end of the document predicts nothing, as the end of a sequence. fp32.
    assert apart.teacher_lm_loss(2) == pytest.approx(float(sum(losses)) / (7 + 6), rel=1e-5)


@pytest.mark.parametrize(("vocab_size", "stored"), [(40_000, torch.uint16), (70_000, torch.uint32)])
def test_large_token_ids(tmp_path: Path, vocab_size: int, stored: torch.dtype) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    teacher, dataset = Teacher(LlamaForCausalLM(config)), make_dataset(tmp_path, vocab_size)
    store = write_store(tmp_path / "cache", teacher, dataset)
    first = store.index.shards[0]
    assert load_file(store.directory / first.name)["token_ids"].dtype == stored
    top = store.train.signal(torch.arange(5), WHOLE, device=CPU)
    expected = log_probs_of(teacher, of_split(dataset, "train", list(range(5)))).gather(-1, top.token_ids)
    assert top.token_ids.max() > (2**16 if vocab_size > 2**16 else 2**15)
    torch.testing.assert_close(expected, top.log_probs.double(), rtol=2 * FP16, atol=2 * FP16)


def test_bytes_per_token_are_those_of_the_files(tmp_path: Path, teacher: Teacher, dataset: TokenDataset) -> None:
    store = write_store(tmp_path / "cache", teacher, dataset)
    assert store.index.bytes_per_token == 5 * (2 + 2) + 2
    for shard in store.index.shards:
        tensors = load_file(store.directory / shard.name)
        num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        assert num_bytes == (shard.end - shard.first) * (8 * store.index.bytes_per_token + 8)


def test_a_shard_depends_on_no_other(tmp_path: Path, teacher: Teacher, dataset: TokenDataset) -> None:
    store = write_store(tmp_path / "cache", teacher, dataset)
    alone = tmp_path / "alone"
    alone.mkdir()
    for shard, record in reversed(list(zip(plan_shards(CONFIG), store.index.shards, strict=True))):
        assert write_shard(alone, shard, teacher, dataset, CONFIG) == record


def test_damaged_shards_are_computed_again(tmp_path: Path, teacher: Teacher, dataset: TokenDataset) -> None:
    shard = plan_shards(CONFIG)[0]
    assert not is_whole(tmp_path, shard)
    record = write_shard(tmp_path, shard, teacher, dataset, CONFIG)
    file = tmp_path / shard.name
    assert is_whole(tmp_path, shard)
    assert read_record(tmp_path, shard) == record
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert not is_whole(tmp_path, shard)
    file.write_bytes(content[:-1])
    assert read_record(tmp_path, shard) is None
    file.unlink()
    assert not is_whole(tmp_path, shard)


def test_short_or_missing_files_are_named(tmp_path: Path, teacher: Teacher, dataset: TokenDataset) -> None:
    store = write_store(tmp_path / "cache", teacher, dataset)
    file = store.directory / "train-000000003.safetensors"
    num_bytes = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(
        ValueError, match=rf"000000003.safetensors has {num_bytes - 1} bytes, its index says {num_bytes}"
    ):
        SignalStore.open(store.directory)
    file.unlink()
    with pytest.raises(ValueError, match=r"train-000000003.safetensors has 0 bytes, its index says \d+"):
        SignalStore.open(store.directory)


def test_teacher_without_numbers_is_refused(tmp_path: Path, teacher: Teacher, dataset: TokenDataset) -> None:
    with torch.no_grad():
        teacher.model.model.norm.weight[0] = float("nan")
    with pytest.raises(ValueError, match="not finite in sequences 0 to 1; look at its weights"):
        write_shard(tmp_path, plan_shards(CONFIG)[0], teacher, dataset, CONFIG)
    assert list(tmp_path.glob("*.safetensors")) == []


@pytest.mark.gpu
def test_signals_on_a_gpu_are_those_on_the_cpu(tmp_path: Path, teacher: Teacher, dataset: TokenDataset) -> None:
    store = write_store(tmp_path / "cache", teacher, dataset)
    ids = torch.tensor([4, 0])
    there, here = (store.train.signal(ids, WHOLE, device=torch.device(name)) for name in ("cuda", "cpu"))
    assert torch.equal(there.token_ids.cpu(), here.token_ids)
    torch.testing.assert_close(there.log_probs.cpu(), here.log_probs, rtol=1e-6, atol=1e-6)  # fp32 exp and log
