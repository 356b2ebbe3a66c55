from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from distill.chunked_head import TopK
from distill.config import EngineConfig
from distill.data.batch import Batch
from distill.data.dataset import documents_apart
from distill.teacher import CachedTeacher, Teacher, resolve_teacher_device

CPU = torch.device("cpu")
BATCH = Batch.of(torch.arange(12).reshape(2, 6))


@pytest.fixture
def teacher(make_llama: Callable[..., LlamaForCausalLM]) -> Teacher:
    return Teacher(make_llama(seed=0, num_blocks=3).train())


def test_signal_holds_the_blocks_that_were_asked_for(teacher: Teacher) -> None:
    signal = teacher.signal(BATCH, (2, 0, 2))
    with torch.no_grad():
        outputs = teacher.model.model(BATCH.input_ids, output_hidden_states=True)
    assert list(signal.blocks) == [0, 2]
    assert torch.equal(signal.hidden, outputs.last_hidden_state)
    assert torch.equal(signal.blocks[0], outputs.hidden_states[1])
    assert torch.equal(signal.blocks[2], outputs.hidden_states[3])
    assert signal.head is teacher.model.lm_head.weight
    assert signal.top is None


def test_teacher_is_frozen(teacher: Teacher) -> None:
    signal = teacher.signal(BATCH)
    assert not teacher.model.training
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    assert not signal.hidden.requires_grad
    assert signal.blocks == {}


def test_teacher_runs_in_its_own_precision(teacher: Teacher) -> None:
    alone = teacher.signal(BATCH)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        beside_student = teacher.signal(BATCH)
    assert torch.equal(alone.hidden, beside_student.hidden)
    assert Teacher(teacher.model.bfloat16()).signal(BATCH).hidden.dtype == torch.bfloat16


def test_teacher_keeps_documents_apart_where_the_batch_does(teacher: Teacher) -> None:
    ids = torch.tensor([[5, 6, 0, 7, 8, 9]])
    apart = teacher.signal(documents_apart(Batch.of(ids), eos_token_id=0)).hidden
    alone = teacher.signal(Batch.of(ids[:, 3:])).hidden
    # Another mask is another kernel of the same sums.
    torch.testing.assert_close(apart[:, 3:], alone, rtol=1e-5, atol=1e-5)
    together = teacher.signal(Batch.of(ids)).hidden
    assert (together[:, 3:] - alone).abs().max() > 0.01


class OneSplit:
    """Sequence i has token i everywhere, at log-probability -i - position."""

    seq_len = 6

    def signal(self, sequence_ids: Tensor, positions: slice, *, device: torch.device) -> TopK:
        ids = sequence_ids[:, None, None].expand(-1, self.seq_len, 1)
        log_probs = -(ids + torch.arange(self.seq_len)[None, :, None]).float()
        return TopK(token_ids=ids, log_probs=log_probs).map(lambda tensor: tensor[:, positions].to(device))


def test_cached_teacher_goes_by_the_index_of_the_sequence() -> None:
    signal = CachedTeacher(OneSplit()).signal(replace(BATCH, sequence_ids=torch.tensor([9, 4])))
    assert signal.hidden is None
    assert signal.head is None
    assert signal.top.token_ids[:, 0, 0].tolist() == [9, 4]


def test_cached_teacher_gives_a_rank_its_part_of_every_sequence() -> None:
    whole = CachedTeacher(OneSplit()).signal(BATCH).top
    parts = [CachedTeacher(OneSplit(), part=i, num_parts=2).signal(BATCH.sequence_part(i, 2)).top for i in range(2)]
    for name in ("token_ids", "log_probs"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts], dim=1), getattr(whole, name))


def test_hidden_states_of_a_cache_are_not_asked_for() -> None:
    with pytest.raises(AssertionError, match="not cached"):
        CachedTeacher(OneSplit()).signal(BATCH, (0,))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpu", "teacher_device=gpu is no device; set engine.teacher_device to same, cpu or cuda:<index>"),
        ("meta", "teacher_device=meta is neither CPU nor CUDA"),
        ("cuda:1", "teacher_device=cuda:1, but torch finds 1 CUDA devices"),
        ("cuda", "teacher_device=cuda, but torch finds 1 CUDA devices"),
    ],
)
def test_teacher_device_that_is_not_there(name: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match=message):
        resolve_teacher_device(EngineConfig(teacher_device=name), CPU)


def test_teacher_device_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    student = torch.device("cuda", 0)
    places = {"same": student, "cpu": CPU, "cuda:1": torch.device("cuda", 1), "cuda:0": student}
    for name, place in places.items():
        assert resolve_teacher_device(EngineConfig(teacher_device=name), student) == place


def test_teacher_on_the_cpu_reads_what_is_there(teacher: Teacher) -> None:
    """A device without values in place of a GPU: nothing can be copied back from it."""
    away = torch.device("meta")
    read: list[Tensor] = []
    teacher.model.model.register_forward_pre_hook(lambda _, arguments: read.append(arguments[0]))
    signal = teacher.start(BATCH.to(away).rows(1, 2))()
    assert torch.equal(read[0], BATCH.input_ids[1:])
    assert signal.hidden.device == away
    assert signal.head.device == away


def _same_signals(teacher: Teacher, place: torch.device, student: torch.device) -> None:
    """Signals of ``teacher`` at ``place`` reach ``student`` as those of one that is beside it, step after step."""
    batches = [Batch.of(torch.randint(61, (2, 6), generator=torch.Generator().manual_seed(i))) for i in range(4)]
    expected = [teacher.signal(batch, (1,)) for batch in batches]
    elsewhere = Teacher(teacher.model.to(place))
    pending = [elsewhere.start(batch.to(student), (1,)) for batch in batches]
    busy = torch.ones(512, 512, device=student)
    for _ in range(20):
        busy = busy @ busy / 512
    for finish, expectation in zip(pending, expected, strict=True):
        signal = finish()
        assert {tensor.device for tensor in (signal.hidden, signal.head, signal.blocks[1])} == {student}
        # Kernels of two devices add up in different orders.
        torch.testing.assert_close(signal.hidden.cpu(), expectation.hidden, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(signal.blocks[1].cpu(), expectation.blocks[1], rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
def test_teacher_on_the_cpu_and_student_on_a_gpu(teacher: Teacher) -> None:
    _same_signals(teacher, CPU, torch.device("cuda", 0))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_teacher_on_another_gpu(teacher: Teacher) -> None:
    _same_signals(teacher, torch.device("cuda", 1), torch.device("cuda", 0))
