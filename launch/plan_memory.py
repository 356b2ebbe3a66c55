"""Memory of a training step on one GPU and on its host, moment by moment, for torch and DeepSpeed. Torch-free.

A step is followed through: the teacher's forward pass, the heads, the backward pass block by block, the embedding's
gradient, the optimizer. At every moment each kind of memory is added up; the moment with the most is what has to fit.
:mod:`launch.plan_activations` has what a block keeps, :mod:`launch.plan_state` what stays. Bytes are those that torch's
allocator hands out (``torch.cuda.max_memory_allocated``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from math import prod

from launch.plan_activations import Numerics, Part, Shape, block_parts, forward_bytes, widest_ffn
from launch.plan_heads import Parts, head_bytes
from launch.plan_state import (
    MAX_LIVE_VALUES,
    REDUCE_BUCKET_VALUES,
    State,
    is_sharded,
    point_bytes,
    product_bytes,
    student_state,
    teacher_bytes,
)
from launch.plan_step import Step
from puzzle.model.architecture import Architecture
from puzzle.model.stats import block_params, num_params
from puzzle.model.tensor_layout import block_shapes

PIECE_BYTES = 32 * 2**20
"""``distill.memory.PIECE_BYTES``: unit of CPU memory for block inputs."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """The fullest moment of a step."""

    moment: str
    parts: Parts
    """On the GPU, by kind."""
    host: Parts = field(default_factory=dict)
    """On the CPU, for one rank."""

    @property
    def total(self) -> float:
        """Bytes on the GPU."""
        return sum(self.parts.values())

    @property
    def host_total(self) -> float:
        """Bytes on the CPU, of one rank."""
        return sum(self.host.values())


def training_memory(step: Step) -> Memory:
    """The fullest moment of ``step`` on the fullest rank. Megatron: :func:`launch.plan_megatron.megatron_memory`."""
    assert step.engine.name != "megatron"
    timeline = _Timeline(step)
    moments = [Memory(moment=name, parts=parts) for name, parts in timeline.moments()]
    return replace(max(moments, key=lambda memory: memory.total), host=timeline.host())


def point_copy(step: Step, num_bytes: float, *, on_host: bool) -> Parts:
    """One rank's copy of the state that a thread writes beside training: on the host, which on a CPU is the device."""
    lies_here = step.background_points and (step.engine.device != "cpu") == on_host
    return {"resume point's copy": num_bytes} if lies_here else {}


class _Timeline:
    """The moments of one step."""

    def __init__(self, step: Step) -> None:
        self._step = step
        self._numerics = step.numerics
        self._student = step.student
        self._shape = Shape(
            tokens=step.micro_tokens,
            seq_len=step.seq_len,
            tile_tokens=step.engine.ffn_tile_tokens,
            widest=widest_ffn(step.student),
        )
        self._blocks = [block_parts(step.student, block, self._shape, self._numerics) for block in step.student.blocks]
        self._sizes = [block_params(step.student, block) for block in step.student.blocks]
        self._matrices = [
            sum(prod(shape) for shape in block_shapes(step.student, block).values() if len(shape) == 2)
            for block in step.student.blocks
        ]
        self._state: State = student_state(step.student, step.engine, step.num_ranks)
        self._sharded = is_sharded(step.engine)
        self._stream = step.micro_tokens * step.student.hidden_dim
        """Values of the residual stream."""
        self._head_values = step.student.vocab_size * step.student.hidden_dim
        self._trains_head = step.objective.reads_logits

    def moments(self) -> Iterator[tuple[str, Parts]]:
        """Name and parts of every moment that may be the fullest."""
        last = len(self._blocks) - 1
        if self._step.teacher is not None and self._step.engine.teacher_device == "same":
            # A teacher on the CPU runs behind the student's forward pass (Teacher.start), on a GPU before it.
            student = self._sum(self._kept(last), self._casts(last)) if self._step.engine.device == "cpu" else {}
            yield "teacher's forward pass", self._sum(self._static(), self._teacher_run(self._step.teacher), student)
        yield (
            "heads",
            self._sum(self._static(), self._kept(last), self._hidden_terms(), self._casts(last), self._heads()),
        )
        yield (
            "backward of the heads",
            self._sum(
                self._static(), self._kept(last), self._hidden_terms(), self._saved_casts(last), self._head_gradient()
            ),
        )
        for index in range(last, -1, -1):
            yield from self._block_moments(index)
        yield "embedding's gradient", self._sum(self._static(), self._gradients(0), self._embedding_gradient())
        if self._is_ddp:
            both = {"gradients": self._state.gradients, "buffers": self._state.buffers}
            yield "buckets made anew", self._sum(self._static(), both)
        yield (
            "optimizer step",
            self._sum(self._static(gathered=False), {"gradients": self._state.gradients}, self._step_extra()),
        )

    def host(self) -> Parts:
        """What one rank keeps on the CPU."""
        host = {**self._state.host, **self._point_copy(on_host=True)}
        engine = self._step.engine
        if engine.offload_activations:
            pieces = -(-self._stream * self._numerics.residual // PIECE_BYTES)
            host["activations"] = float(len(self._blocks) * pieces * PIECE_BYTES)
        if engine.teacher_device == "cpu" and self._step.teacher is not None:
            host["teacher"] = teacher_bytes(self._step.teacher, replace(engine, shard=False, zero_stage=2), 1)
        return host

    def _point_copy(self, *, on_host: bool) -> Parts:
        return point_copy(self._step, point_bytes(self._student, self._step.num_ranks), on_host=on_host)

    @staticmethod
    def _sum(*parts: Parts) -> Parts:
        total: Parts = {}
        for part in parts:
            for name, size in part.items():
                total[name] = total.get(name, 0.0) + size
        return {name: size for name, size in total.items() if size > 0}

    def _static(self, *, gathered: bool = True) -> Parts:
        state, step = self._state, self._step
        parts = {
            "weights": state.weights,
            "master weights": state.master,
            "optimizer": state.optimizer,
            "buffers": state.buffers if step.engine.name == "deepspeed" and step.engine.zero_stage == 3 else 0.0,
            **self._point_copy(on_host=False),
        }
        if step.teacher is not None and step.engine.teacher_device == "same":
            parts["teacher"] = teacher_bytes(step.teacher, step.engine, step.num_ranks)
        elif step.teacher is not None and step.engine.teacher_device == "cpu":
            # distill.teacher.Teacher._head: copied to the student's device once.
            parts["teacher"] = product_bytes(step.engine) * step.teacher.vocab_size * step.teacher.hidden_dim
        if gathered and self._sharded:
            parts["gathered weights"] = product_bytes(step.engine) * self._root_values()
        return parts

    def _root_values(self) -> int:
        """Parameters that are whole as long as a step runs: FSDP2's root, or under ZeRO 3 the head."""
        return self._root_size() if self._step.engine.name == "torch" else self._head_values

    def _root_size(self) -> int:
        return num_params(self._student) - sum(self._sizes)

    def _kept(self, index: int) -> Parts:
        """Activations of blocks 0 to ``index``, and behind the last one the final norm's."""
        return {"activations": self._kept_bytes(index) + (self._final() if index == len(self._blocks) - 1 else 0.0)}

    def _kept_bytes(self, index: int) -> float:
        engine, stream = self._step.engine, self._stream * self._numerics.residual
        if engine.offload_activations:
            # One on its way to the host, or back one block ahead.
            return float(min(index + 1, 2) * stream)
        if engine.recompute:
            return float((index + 1) * stream)
        return float(sum(part.saved for parts in self._blocks[: index + 1] for part in parts if part is not None))

    def _final(self) -> float:
        """Final norm: what it keeps, and its output, which the heads read."""
        tiled = self._shape.tile(self._student.hidden_dim) < self._shape.tokens
        # It is not compiled with the blocks.
        kept = replace(self._numerics, compiled=False).norm_bytes(self._student.hidden_dim, tiled=tiled)
        return float(kept * self._step.micro_tokens + self._numerics.residual * self._stream)

    def _hidden_terms(self) -> Parts:
        """Outputs of paired blocks, of the teacher and, where blocks do not keep them, of the student."""
        step = self._step
        if step.teacher is None or not step.objective.compares_hidden:
            return {} if step.teacher is None or step.objective.kld == 0 else self._teacher_outputs(1)
        pairs = len(self._blocks)
        kept = step.engine.recompute or self._numerics.residual == 4
        own = 0 if kept and not step.engine.offload_activations else pairs * self._numerics.residual
        return self._sum(self._teacher_outputs(pairs), {"activations": float(own * self._stream)})

    def _teacher_outputs(self, number: int) -> Parts:
        teacher = self._step.teacher
        assert teacher is not None
        return {
            "teacher's outputs": float(number * self._numerics.product * self._step.micro_tokens * teacher.hidden_dim)
        }

    def _teacher_run(self, teacher: Architecture) -> Parts:
        step, c = self._step, self._numerics.product
        shape = replace(self._shape, tile_tokens=0)
        outputs = teacher.num_blocks if step.objective.compares_hidden else 0
        parts = {
            "activations": forward_bytes(teacher, shape, Numerics(residual=c, product=c)),
            "teacher's outputs": float(outputs * c * step.micro_tokens * teacher.hidden_dim),
        }
        if teacher_bytes(teacher, step.engine, 2) < teacher_bytes(teacher, step.engine, 1):
            # A block that runs, and the next one on its way.
            parts["gathered weights"] = 3.0 * c * max(block_params(teacher, block) for block in teacher.blocks)
        return self._sum(parts, self._carried_gradients())

    def _carried_gradients(self) -> Parts:
        """Gradients that are there before the last micro-batch's backward pass."""
        several = self._step.num_micro_batches > 1
        stays = self._is_ddp or several or self._has_flat_gradients()
        # In DDP's first step only the last micro-batch's backward pass puts gradients into its buckets.
        buckets = self._state.buffers if self._is_ddp and several else 0.0
        return {"gradients": self._state.gradients, "buffers": buckets} if stays else {}

    @property
    def _is_ddp(self) -> bool:
        return self._step.engine.name == "torch" and not self._sharded and self._step.num_ranks > 1

    def _has_flat_gradients(self) -> bool:
        """ZeRO's stage 3 and its bf16 optimizer have one buffer of all fp32 gradients, for good."""
        engine = self._step.engine
        whole = engine.zero_stage == 1 and engine.precision == "bf16" and not engine.offload_optimizer
        return engine.name == "deepspeed" and (engine.zero_stage == 3 or whole)

    def _buckets(self) -> Parts:
        """Those of ZeRO 1 and 2 exist in the backward pass alone."""
        return {"buffers": self._state.buffers} if self._step.engine.zero_stage < 3 else {}

    def _casts(self, index: int) -> Parts:
        """bf16 weights of blocks 0 to ``index``, which autocast caches until the forward pass ends."""
        if not self._numerics.is_autocast or self._numerics.compiled:
            return {}
        return {"weight casts": float(self._numerics.product * sum(self._matrices[: index + 1]))}

    def _saved_casts(self, index: int) -> Parts:
        """Of those what the backward pass still needs: all, but for blocks that are computed again."""
        return {} if self._step.engine.recompute else self._casts(index)

    def _heads(self) -> Parts:
        heads = head_bytes(
            self._step.micro_tokens,
            self._student.vocab_size,
            self._student.hidden_dim,
            self._step.objective,
            self._numerics,
            has_teacher=self._step.teacher is not None,
        )
        return self._sum(heads, self._carried_gradients())

    def _head_gradient(self) -> Parts:
        """fp32, beside it in bf16 where the head is bf16, and the gradient of the head's input."""
        if not self._trains_head:
            return self._carried_gradients()
        r = self._numerics.residual
        values = self._head_values * (4 + (r if r < 4 else 0))
        return self._sum(
            {"gradients": float(values), "activations": float(r * self._stream)}, self._carried_gradients()
        )

    def _block_moments(self, index: int) -> Iterator[tuple[str, Parts]]:
        attention, ffn = self._blocks[index]
        terms = self._hidden_terms() if self._step.objective.compares_hidden else {}
        common = self._sum(self._static(), self._gradients(index + 1), terms, self._gathered(index))
        others = self._kept_bytes(index if self._step.engine.recompute else index - 1)
        first = attention or ffn
        if self._step.engine.recompute and first is not None:
            others -= first.norm_input  # the block's own input, kept once
        # The gradient of the residual stream, which is also that of the update. An FFN's input has one besides; that of
        # attention's comes when the kernel's memory is free again.
        stream = self._numerics.residual * self._stream
        for name, part, saved, streams in (
            ("FFN", ffn, (attention, ffn), 2),
            ("attention", attention, (attention,), 1),
        ):
            if part is None:
                continue
            own = sum(p.saved for p in saved if p is not None) + part.backward + streams * stream
            parts = self._sum(
                common, {"activations": others + own}, self._block_casts(index), self._new_gradients(index, part)
            )
            yield f"backward of block {index}, {name}", parts

    def _block_casts(self, index: int) -> Parts:
        if not self._numerics.is_autocast:
            return {}
        number = 1 if self._step.engine.recompute or self._numerics.compiled else index + 1
        values = sum(self._matrices[index - number + 1 : index + 1])
        return {"weight casts": float(self._numerics.product * values)}

    def _gradients(self, index: int) -> Parts:
        """Of blocks ``index`` and above, and of the head; those that are made in fp32 and stay."""
        carried = self._carried_gradients()
        if self._sharded or self._step.engine.name == "deepspeed":
            part = 4.0 * sum(self._sizes[index:]) / self._step.num_ranks if self._state.gradients else 0.0
            return self._sum(carried or {"gradients": part}, self._head_waits(), self._buckets())
        if carried:
            return self._sum(carried, {"gradients": 4.0 * self._head_values} if self._tied_waits() else {})
        head = 4.0 * self._head_values if self._trains_head else 0.0
        return {"gradients": 4.0 * sum(self._sizes[index:]) + head}

    def _tied_waits(self) -> bool:
        """A tied head's gradient waits for the embedding's, the last of the backward pass."""
        return self._trains_head and self._student.tie_embeddings

    def _head_waits(self) -> Parts:
        """FSDP2 reduces the root's gradients last; ZeRO the head's at once, unless it waits for the embedding's."""
        waits = self._trains_head and (self._step.engine.name == "torch" or self._student.tie_embeddings)
        return {"gradients": float(self._numerics.residual * self._head_values)} if waits else {}

    def _new_gradients(self, index: int, part: Part) -> Parts:
        """Of the block at work, in the type of its products, before they are added to what stays."""
        c, engine = self._numerics.product, self._step.engine
        if engine.name == "deepspeed":
            copy = 4 * min(REDUCE_BUCKET_VALUES, sum(self._sizes))
            return {"gradients": float(c * part.largest_matrix), "buffers": float(copy if c < 4 else 0)}
        if self._sharded:
            # Of the whole block, reduced in fp32 once it is done; the copy of the block above waits till then.
            above = self._sizes[index + 1] if index + 1 < len(self._sizes) else 0
            return {"gradients": float(c * part.num_params), "buffers": 4.0 * max(above, 0)}
        extra = c if self._numerics.is_autocast else 0
        extra += 4 if self._carried_gradients() else 0
        return {"gradients": float(extra * part.largest_matrix)}

    def _gathered(self, index: int) -> Parts:
        """Weights of the block at work and of the one that is fetched ahead."""
        c = self._numerics.product
        if not self._sharded:
            return {}
        if self._step.engine.name == "torch":
            ahead = self._sizes[index - 1] if index > 0 else 0
            return {"gathered weights": float(c * (self._sizes[index] + ahead))}
        live = max(self._sizes[index], min(MAX_LIVE_VALUES, sum(self._sizes)))
        return {"gathered weights": float(c * live)}

    def _embedding_gradient(self) -> Parts:
        """Dense; FSDP2 then reduces the root's in fp32."""
        r, stream = self._numerics.residual, self._stream * self._numerics.residual
        own = r * self._head_values
        if self._sharded and self._step.engine.name == "torch":
            return {"gradients": float(own), "buffers": 4.0 * self._root_size(), "activations": float(stream)}
        return {"gradients": float(own), "activations": float(stream)}

    def _step_extra(self) -> Parts:
        """ZeRO 1 and 2 flatten a rank's gradients into a second copy; AdamW makes roots of all second moments on a CPU,
        where its fused kernel is for offloaded state alone (``distill.optim.build_optimizer``)."""
        engine = self._step.engine
        flattens = engine.name == "deepspeed" and engine.zero_stage < 3
        roots = engine.name == "torch" and engine.device == "cpu"
        if (flattens or roots) and not engine.offload_optimizer:
            ranks = self._step.num_ranks if flattens or self._sharded else 1
            return {"buffers": 4.0 * num_params(self._student) / ranks}
        return {}
