from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import LlamaForCausalLM

from distill.teacher import Teacher


@pytest.fixture
def teacher(make_llama: Callable[..., LlamaForCausalLM]) -> Teacher:
    return Teacher(make_llama(seed=0, num_blocks=3).train())


def test_signal_holds_the_blocks_that_were_asked_for(teacher: Teacher) -> None:
    input_ids = torch.arange(12).reshape(2, 6)
    signal = teacher.signal(input_ids, (2, 0, 2))
    with torch.no_grad():
        outputs = teacher.model.model(input_ids, output_hidden_states=True)
    assert list(signal.blocks) == [0, 2]
    assert torch.equal(signal.hidden, outputs.last_hidden_state)
    assert torch.equal(signal.blocks[0], outputs.hidden_states[1])
    assert torch.equal(signal.blocks[2], outputs.hidden_states[3])
    assert signal.head is teacher.model.lm_head.weight


def test_teacher_is_frozen(teacher: Teacher) -> None:
    signal = teacher.signal(torch.arange(6)[None])
    assert not teacher.model.training
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    assert not signal.hidden.requires_grad
    assert signal.blocks == {}


def test_teacher_runs_in_its_own_precision(teacher: Teacher) -> None:
    input_ids = torch.arange(6)[None]
    alone = teacher.signal(input_ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        beside_student = teacher.signal(input_ids)
    assert torch.equal(alone.hidden, beside_student.hidden)
    assert Teacher(teacher.model.bfloat16()).signal(input_ids).hidden.dtype == torch.bfloat16
