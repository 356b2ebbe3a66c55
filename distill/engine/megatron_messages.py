"""What pipeline stages send each other where a teacher runs beside the student."""

from __future__ import annotations

from typing import Any

from megatron.core import parallel_state
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from torch.nn import functional


class ForwardBeside(P2PCommunicator):
    """Forward messages carry the teacher's channels behind the student's; backward ones the student's alone.

    Args:
        config: of the student.
        extra: channels of the teacher.
    """

    def __init__(self, config: Any, extra: int) -> None:
        super().__init__(pp_group=parallel_state.get_pipeline_model_parallel_group(), config=config)
        self._extra = extra

    def _communicate(
        self, *, tensor_send_prev: Tensor | None, recv_next: bool, tensor_shape: Any, recv_prev: bool, **others: Any
    ) -> tuple[Tensor | None, Tensor | None, Any]:
        assert not (recv_next and recv_prev), "stages of one chunk never wait for both sides at once"
        if tensor_send_prev is not None:
            tensor_send_prev = tensor_send_prev[..., : -self._extra].contiguous()
        if recv_next:
            tensor_shape = (*tensor_shape[:-1], tensor_shape[-1] - self._extra)
        activations, gradient, requests = super()._communicate(
            tensor_send_prev=tensor_send_prev,
            recv_next=recv_next,
            tensor_shape=tensor_shape,
            recv_prev=recv_prev,
            **others,
        )
        if gradient is not None:
            gradient = functional.pad(gradient.detach(), (0, self._extra))
        return activations, gradient, requests


def grid_groups() -> ProcessGroupCollection:
    """megatron-core's groups, which its schedules take with a communicator; those that they make without one."""
    groups = ProcessGroupCollection()
    groups.tp = parallel_state.get_tensor_model_parallel_group()
    groups.pp = parallel_state.get_pipeline_model_parallel_group()
    groups.cp = parallel_state.get_context_parallel_group()
    groups.embd = parallel_state.get_embedding_group(check_initialized=False)
    groups.pos_embd = parallel_state.get_position_embedding_group(check_initialized=False)
    groups.dp_cp = parallel_state.get_data_parallel_group(with_context_parallel=True, partial_data_parallel=False)
    return groups
