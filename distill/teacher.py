"""The teacher as a source of training signals: a model that runs, beside the student or elsewhere, or its cache."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from distill.chunked_head import TopK
from distill.config import EngineConfig, require
from distill.data.batch import Batch, moved_tensor
from distill.engine.setup import TeacherStore
from distill.forward import forward_inputs


@dataclass(frozen=True, kw_only=True)
class TeacherSignal:
    """What a student learns from on one batch. Nothing here has a gradient."""

    hidden: Tensor | None = None
    """[batch, seq, hidden], after the final norm; None from a cache."""
    head: Tensor | None = None
    """LM head [vocab, hidden]; None from a cache."""
    blocks: dict[int, Tensor] = field(default_factory=dict)
    """Output [batch, seq, hidden] of the teacher's blocks that were asked for, by index; the last block's is taken
    after the final norm, as transformers reports it."""
    top: TopK | None = None
    """Of [batch, seq, k]: from a cache, in place of the others."""


class Teacher:
    """A frozen model that runs in the precision of its own weights, on any device.

    Where it is not the student's, tokens travel to it and signals back in the order of the devices' streams: the host
    waits for nothing. A teacher on the CPU reads the batch that was there before it was moved to the student.

    Args:
        model: causal LM with the Hugging Face surface. It is put in eval mode and its parameters are frozen.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model.eval().requires_grad_(False)
        self._heads: dict[torch.device, Tensor] = {}

    @property
    def num_blocks(self) -> int:
        """Blocks of the teacher."""
        return self.model.config.num_hidden_layers

    @property
    def device(self) -> torch.device:
        """Where the teacher runs."""
        return next(self.model.parameters()).device

    def signal(self, batch: Batch, blocks: Collection[int] = ()) -> TeacherSignal:
        """Signals on ``batch``, on its device. Outputs of blocks that are not in ``blocks`` are freed at once."""
        return self.start(batch, blocks)()

    def start(self, batch: Batch, blocks: Collection[int] = ()) -> Callable[[], TeacherSignal]:
        """As :meth:`signal`, for a teacher on a device of its own: what is called to get the signals.

        Between the two calls the student's forward pass is to be launched. A teacher on another GPU then runs beside
        it; one on the CPU runs in the second call, while the GPU works off what was launched.
        """
        own = batch.to(self.device)
        if self.device.type == "cpu":
            return lambda: self._delivered(self._run(own, blocks), batch.input_ids.device)
        signal = self._run(own, blocks)
        return lambda: self._delivered(signal, batch.input_ids.device)

    @torch.no_grad()
    def _run(self, batch: Batch, blocks: Collection[int]) -> TeacherSignal:
        with torch.autocast(self.device.type, enabled=False):
            outputs = self.model.model(
                batch.input_ids,
                **forward_inputs(batch, self.model),
                output_hidden_states=bool(blocks),
                use_cache=False,
            )
        return TeacherSignal(
            hidden=outputs.last_hidden_state,
            blocks={block: outputs.hidden_states[block + 1] for block in sorted(set(blocks))},
        )

    def _delivered(self, signal: TeacherSignal, device: torch.device) -> TeacherSignal:
        assert signal.hidden is not None
        return TeacherSignal(
            hidden=moved_tensor(signal.hidden, device),
            head=self._head(device),
            blocks={block: moved_tensor(hidden, device) for block, hidden in signal.blocks.items()},
        )

    def _head(self, device: torch.device) -> Tensor:
        """The LM head on ``device``: copied there once. One that is dealt over ranks is gathered every time."""
        weight = self.model.get_output_embeddings().weight
        if isinstance(weight, DTensor):
            return moved_tensor(weight.full_tensor(), device)
        if weight.device == device:
            return weight
        if device not in self._heads:
            self._heads[device] = weight.to(device)
        return self._heads[device]


class CachedTeacher:
    """Signals that were computed before, by the index of each sequence in its split.

    Args:
        store: of the split that the batches are from.
        part: part of every sequence that this rank's batches hold.
        num_parts: equal parts that sequences are cut into.
    """

    def __init__(self, store: TeacherStore, *, part: int = 0, num_parts: int = 1) -> None:
        assert 0 <= part < num_parts
        self._store = store
        self._part = part
        self._num_parts = num_parts

    def signal(self, batch: Batch, blocks: Collection[int] = ()) -> TeacherSignal:
        """Signals on ``batch``, on the device of its tokens.

        Its ``sequence_ids`` are read by the host, which waits for them where they are on a GPU.
        """
        return self.start(batch, blocks)()

    def start(self, batch: Batch, blocks: Collection[int] = ()) -> Callable[[], TeacherSignal]:
        """As :meth:`Teacher.start`: this rank's part is read and its copy to the device is launched at once."""
        assert not blocks, "hidden states are not cached"
        size = batch.input_ids.shape[1]
        own = slice(self._part * size, (self._part + 1) * size)
        top: TopK = self._store.signal(batch.sequence_ids, own, device=batch.input_ids.device)
        assert top.token_ids.shape[:2] == batch.input_ids.shape
        return lambda: TeacherSignal(top=top)


def resolve_teacher_device(engine: EngineConfig, student_device: torch.device) -> torch.device:
    """The device that ``engine.teacher_device`` means for a student on ``student_device``.

    Raises:
        ValueError: it is no device, or torch finds no such one.
    """
    name = engine.teacher_device
    if name == "same":
        return student_device
    way_out = "set engine.teacher_device to same, cpu or cuda:<index>"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"engine.teacher_device={name} is no device; {way_out}") from error
    require(device.type in ("cpu", "cuda"), f"engine.teacher_device={name} is neither CPU nor CUDA; {way_out}")
    if device.type == "cpu":
        return device
    num_devices = torch.cuda.device_count()
    require(
        device.index is not None and device.index < num_devices,
        f"engine.teacher_device={name}, but torch finds {num_devices} CUDA devices; {way_out} below that number",
    )
    return device
