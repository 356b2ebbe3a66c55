"""One rank's share of a decoder with random weights, and one decode step of it as a list of operators.

The step is what a serving engine runs per token of each sequence: embedding, then per block residual + norm (+
quantisation), the fused QKV projection, rotary with the cache write, attention over the KV cache, output projection,
all-reduce, and likewise for the FFN; at the end the final norm, the LM head and the choice of a token. With fp8 all
matrices of the blocks are e4m3 with one scale per output channel, activations are quantised per token as they come, and
embedding, norms, KV cache, residual stream and LM head stay bf16, as engines keep them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from picking import Picker
from products import FP8, Activation, Weight
from reductions import Method, Reduction
from token_ops import Context, Heads, TokenOps
from torch import Tensor

from puzzle.model.architecture import Architecture, AttentionConfig, FFNConfig
from puzzle.shard import Shard

ALIGNMENT = 256
"""Bytes, of every tensor in a ring."""
NORM, QKV, ROTARY, ATTENTION, OUTPUT, GATE_UP, DOWN, ALL_REDUCE, HEAD = (
    *("norm", "qkv", "rotary", "attention", "output", "gate_up", "down", "all_reduce", "head"),
)
"""Classes of operators, as in the breakdown."""
OpClass = str
Op = tuple[OpClass, Callable[[], object]]


class Ring:
    """Random values of one type that weights are cut from, one behind the other, and from the start again when it ends.

    As long as a ring is several times the last-level cache, every weight comes from memory in every step, whether or
    not all are distinct.
    """

    def __init__(self, num_bytes: int, dtype: torch.dtype, device: torch.device, *, std: float = 1.0) -> None:
        self.dtype = dtype
        self.taken_bytes = 0
        itemsize = torch.empty(0, dtype=dtype).element_size()
        self._values = torch.empty(num_bytes // ALIGNMENT * ALIGNMENT // itemsize, dtype=dtype, device=device)
        self._next = 0
        self._fill(std)

    @property
    def num_bytes(self) -> int:
        return self._values.numel() * self._values.element_size()

    def take(self, *shape: int) -> Tensor:
        """The next values as a tensor of ``shape``."""
        num_values = torch.Size(shape).numel()
        assert num_values <= self._values.numel(), f"a ring of {self._values.numel()} values for {shape}"
        if self._next + num_values > self._values.numel():
            self._next = 0
        taken = self._values[self._next : self._next + num_values].view(shape)
        step = ALIGNMENT // self._values.element_size()
        self._next += -(-num_values // step) * step
        self.taken_bytes += num_values * self._values.element_size()
        return taken

    def _fill(self, std: float) -> None:
        values = self._values.view(torch.uint8) if self.dtype == FP8 else self._values
        chunk = min(values.numel(), 2**26)
        random = torch.randn(chunk, device=values.device).mul_(std).to(self.dtype)
        random = random.view(torch.uint8) if self.dtype == FP8 else random
        for start in range(0, values.numel(), chunk):
            part = values[start : start + chunk]
            part.copy_(random[: part.numel()])


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is measured on one rank."""

    fp8: bool
    batch: int
    """Sequences; one token of each per step."""
    kv_tokens: int
    """Tokens in the cache of every sequence when the step ends, the new one included."""
    num_ranks: int
    """Ranks of the tensor parallelism whose shapes these are."""
    reduce: Method
    device: torch.device

    @property
    def half(self) -> torch.dtype:
        """The 16-bit type; the interpreter of Triton cannot multiply bfloat16."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float16


@dataclass(frozen=True, kw_only=True)
class Machinery:
    """What all shards of one process share."""

    ops: TokenOps
    picker: Picker
    weights: Ring
    cache: Ring


class DecodeShard:
    """Builds ``ops``, the decode step, operator by operator.

    Args:
        architecture: the whole model.
        setting: batch, context, ranks, data type.
        machinery: kernels and memory.
    """

    def __init__(self, architecture: Architecture, setting: Setting, machinery: Machinery) -> None:
        self.architecture, self.setting, self.machinery = architecture, setting, machinery
        self.ops: list[Op] = []
        self.read_bytes = 0
        """Of weights and KV cache per step."""
        self.num_all_reduces = 0
        self.matrices: list[tuple[OpClass, Weight]] = []
        """In the order of the step."""
        self.caches: list[Tensor] = []
        """[2, batch, KV heads, positions, head_dim] of every attention."""
        self._shard = Shard(parent=architecture, num_ranks=setting.num_ranks)
        device, half, batch = setting.device, setting.half, setting.batch
        hidden = architecture.hidden_dim
        self._residual = torch.randn(batch, hidden, device=device).to(half)
        self._added: Tensor | None = None
        self._reduction = Reduction(setting.reduce, (batch, hidden), half, device)
        self._norm_weight = torch.ones(hidden, dtype=half, device=device)
        self._amax = torch.ones(batch, device=device)
        self._scales = torch.full((2 * self._max_rows(),), hidden**-0.5, device=device)
        self._normed = self._activation(hidden, quantised=setting.fp8)
        self._context = _context(architecture, setting)
        self._waiting: dict[str, list[tuple[int, Activation, Weight, Tensor, Tensor | None, bool]]] = defaultdict(list)

    def build_model(self) -> DecodeShard:
        """The whole step."""
        rows = self._shard.architecture.vocab_size
        table = Weight(values=(torch.randn(rows, self.architecture.hidden_dim, device=self.setting.device) * 0.02).to(
            self.setting.half))  # fmt: skip
        self._add_embedding(table.values)
        for block in self.architecture.blocks:
            if block.attention.kind == "gqa":
                self._add_attention(block.attention)
            if block.ffn.kind == "swiglu":
                self._add_ffn(block.ffn)
        self._add_head(table)
        self._pick_products()
        return self

    def build_ffns(self, ffn_dims: list[int]) -> DecodeShard:
        """Only FFN subblocks of the given widths (channels of one rank), one after another."""
        for width in ffn_dims:
            self._add_ffn_of_width(width)
        self._pick_products()
        return self

    def run(self, op_class: OpClass | None = None) -> None:
        """One step, or its operators of one class."""
        for name, op in self.ops:
            if op_class is None or name == op_class:
                op()

    @property
    def op_classes(self) -> list[OpClass]:
        """Those that occur."""
        return list(dict.fromkeys(name for name, _ in self.ops))

    def _add_embedding(self, table: Tensor) -> None:
        tokens = self.tokens = torch.randint(table.shape[0], (self.setting.batch,), device=self.setting.device)
        addend, total, residual = self._reduction.addend, self._reduction.total, self._residual
        self.ops.append((HEAD, lambda: torch.index_select(table, 0, tokens, out=addend)))
        self._add_all_reduce()
        self.ops.append((HEAD, lambda: residual.copy_(total)))
        self._added = None

    def _add_attention(self, attention: AttentionConfig) -> None:
        heads = Heads(
            num_heads=self._shard.architecture.num_heads,
            num_kv_heads=self._shard.num_kv_heads(attention),
            head_dim=self.architecture.head_dim,
        )
        batch, hidden, half = self.setting.batch, self.architecture.hidden_dim, self.setting.half
        qkv = self._buffer("qkv", heads.qkv_width, half)
        attended = self._activation(heads.width, quantised=self.setting.fp8)
        cache = self.machinery.cache.take(2, batch, heads.num_kv_heads, self.setting.kv_tokens, heads.head_dim)
        ops, context = self.machinery.ops, self._context
        self._add_norm(self._normed)
        self._add_product(QKV, self._normed, self._weight(heads.qkv_width, hidden), qkv)
        self.ops.append((ROTARY, lambda: ops.rotate(qkv, context, cache, heads)))
        self.ops.append((ATTENTION, lambda: ops.attend(qkv, context, cache, heads, attended)))
        self._add_product(OUTPUT, attended, self._weight(hidden, heads.width), self._reduction.addend)
        self._add_all_reduce()
        self.caches.append(cache)
        self.read_bytes += cache.numel() * cache.element_size()

    def _add_ffn(self, ffn: FFNConfig) -> None:
        self._add_ffn_of_width(self._shard.ffn_dim(ffn))

    def _add_ffn_of_width(self, width: int) -> None:
        hidden = self.architecture.hidden_dim
        channels = self._buffer("channels", width, self.setting.half)
        amax = self._amax if self.setting.fp8 else None
        self._add_norm(self._normed)
        self._add_product(GATE_UP, self._normed, self._weight(2 * width, hidden), channels, amax_out=amax, gated=True)
        inner = Activation(values=channels, amax=amax)
        self._add_product(DOWN, inner, self._weight(hidden, width), self._reduction.addend)
        self._add_all_reduce()

    def _add_head(self, table: Weight) -> None:
        normed = self._activation(self.architecture.hidden_dim, quantised=False)
        logits = self.logits = self._buffer("logits", table.values.shape[0], self.setting.half)
        token = torch.zeros(self.setting.batch, dtype=torch.long, device=self.setting.device)
        self._add_norm(normed)
        self._add_product(HEAD, normed, table, logits)
        self.ops.append((HEAD, lambda: torch.argmax(logits, dim=1, out=token)))

    def _add_norm(self, out: Activation) -> None:
        ops, residual, added, weight = self.machinery.ops, self._residual, self._added, self._norm_weight
        amax, eps = self._amax, self.architecture.norm_eps
        self.ops.append((NORM, lambda: ops.norm(residual, added, weight, out, amax, eps)))

    def _add_all_reduce(self) -> None:
        if self._reduction.method != "none":
            self.ops.append((ALL_REDUCE, self._reduction))
        self.num_all_reduces += 1
        self._added = self._reduction.total

    def _add_product(
        self, op_class: OpClass, x: Activation, weight: Weight, out: Tensor,
        *, amax_out: Tensor | None = None, gated: bool = False,
    ) -> None:  # fmt: skip
        """Leaves a place in the step, which :meth:`_pick_products` fills."""
        shape = f"{op_class} {tuple(weight.values.shape)}"
        self._waiting[shape].append((len(self.ops), x, weight, out, amax_out, gated))
        self.ops.append((op_class, lambda: None))
        self.matrices.append((op_class, weight))
        self.read_bytes += weight.values.numel() * weight.values.element_size()

    def _pick_products(self) -> None:
        for waiting in self._waiting.values():
            _, x, _, out, amax_out, gated = waiting[0]
            # What the steps before would have written.
            _randomise(x)
            weights = [weight for _, _, weight, *_ in waiting][:32]
            product = self.machinery.picker.pick(x, weights, out, amax_out, gated=gated)
            for place, x, weight, out, amax_out, _ in waiting:
                self.ops[place] = (self.ops[place][0], partial(product, x, weight, out, amax_out))
        self._waiting.clear()

    def _weight(self, num_rows: int, width: int) -> Weight:
        values = self.machinery.weights.take(num_rows, width)
        return Weight(values=values, scale=self._scales[:num_rows] if self.setting.fp8 else None)

    def _activation(self, width: int, *, quantised: bool) -> Activation:
        batch, device = self.setting.batch, self.setting.device
        if quantised:
            values = torch.zeros(batch, width, dtype=FP8, device=device)
            return Activation(values=values, scale=torch.ones(batch, device=device))
        return Activation(values=torch.zeros(batch, width, dtype=self.setting.half, device=device))

    def _buffer(self, name: str, width: int, dtype: torch.dtype) -> Tensor:
        return self.machinery.picker.workspace.take(name, (self.setting.batch, width), dtype)

    def _max_rows(self) -> int:
        widths = [block.ffn.ffn_dim or 0 for block in self.architecture.blocks]
        return 2 * max(*widths, self.architecture.hidden_dim) + self.architecture.hidden_dim


def _context(architecture: Architecture, setting: Setting) -> Context:
    """Every sequence's new token stands at the end of its cache. Rotary scaling changes angles, not time: left out."""
    half_dim = architecture.head_dim // 2
    exponents = torch.arange(half_dim, device=setting.device) / half_dim
    angles = torch.arange(setting.kv_tokens, device=setting.device)[:, None] / architecture.rope.theta**exponents
    last = torch.full((setting.batch,), setting.kv_tokens - 1, dtype=torch.int32, device=setting.device)
    return Context(positions=last, cosines=angles.cos().contiguous(), sines=angles.sin().contiguous())


def _randomise(x: Activation) -> None:
    values = torch.randn(x.values.shape, device=x.values.device)
    if x.scale is not None:
        x.scale.fill_(1.0)
    x.values.copy_(values.to(x.values.dtype))
    if x.amax is not None:
        x.amax.copy_(values.abs().amax(dim=1))
