from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from distill.config import OptimConfig
from distill.losses import normalized_mse
from puzzle.blockwise import build_block
from puzzle.child_init import CheckpointInit
from puzzle.config import SpaceConfig
from puzzle.importance import Rankings
from puzzle.library import Mode, Replacement, inherited_names, library_replacements
from puzzle.model.architecture import AttentionConfig, FFNConfig
from puzzle.model.checkpoint import TensorReader, load_model, read_architecture
from puzzle.model.modeling_decilm import DeciLMForCausalLM
from puzzle.slices import ParentSlice
from puzzle.space import block_variants
from puzzle.trainees import Nmse, Trainees, clip_each, output_power, parameter_rows

OPTIM = OptimConfig(lr=1e-3)


def toy_batch(step: int) -> Tensor:
    return torch.randint(0, 320, (4, 24), generator=torch.Generator().manual_seed(step))


def make_trainees(
    parent_dir: Path,
    space: SpaceConfig,
    sequences: Tensor,
    optim: OptimConfig = OPTIM,
    *,
    mode: Mode = "decoupled",
    nmse: Nmse = "tensor",
    power_factor: float = 1.0,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    compiled: bool = False,
) -> Trainees:
    """All replacements of blocks 1 and 2, untrained; narrower FFNs keep the first channels."""
    architecture = read_architecture(parent_dir)
    variants = [block_variants(architecture, index, space) for index in range(4)]
    rankings = Rankings(channels=dict.fromkeys(range(4), torch.arange(512)), kv_heads={}, criterion="independent")
    replacements = library_replacements(architecture, variants, mode)
    with TensorReader(parent_dir) as reader:
        init = CheckpointInit(reader, architecture, rankings, "mean_pool")
        inits = {item: init(item) for item in replacements if item.block in (1, 2)}
    parent = ParentSlice.whole(load_model(parent_dir, device=device, dtype=dtype).requires_grad_(False))
    power = output_power(parent, sequences, batch_size=6)
    power = {index: power_factor * value for index, value in power.items()}
    return Trainees(parent, architecture, inits, optim, power, nmse=nmse, compiled=compiled)


def over_tensor(child: Tensor, parent: Tensor) -> float:
    return normalized_mse(child, parent).item()


def over_samples(child: Tensor, parent: Tensor) -> float:
    return sum(map(over_tensor, child, parent)) / len(child)


def over_tokens(child: Tensor, parent: Tensor) -> float:
    return over_samples(child.flatten(0, 1), parent.flatten(0, 1))


@pytest.mark.parametrize(
    ("nmse", "definition"), [("tensor", over_tensor), ("sample", over_samples), ("token", over_tokens)]
)
@pytest.mark.parametrize(("mode", "num_replacements"), [("decoupled", 7), ("coupled", 14)])
def test_held_out_error_is_the_nmse_of_the_whole_block(
    lively_parent: DeciLMForCausalLM,
    lively_parent_dir: Path,
    space: SpaceConfig,
    sequences: Tensor,
    mode: Mode,
    num_replacements: int,
    nmse: Nmse,
    definition: Callable[[Tensor, Tensor], float],
) -> None:
    architecture = read_architecture(lively_parent_dir)
    trainees = make_trainees(lively_parent_dir, space, sequences, mode=mode, nmse=nmse)
    states = lively_parent.model(sequences, output_hidden_states=True).hidden_states
    shared = lively_parent.model.attention_inputs(states[0])
    errors = trainees.held_out(sequences, batch_size=4)
    assert len(errors) == 2 * num_replacements
    for item, error in zip(trainees.replacements, errors, strict=True):
        block, replaced = item.block_in(architecture), trainees.tensors(item)
        inherited = lively_parent.model.layers[item.block].state_dict()
        names = inherited_names(inherited, architecture.blocks[item.block], block, replaced)
        tensors = {name: inherited[name] for name in names} | replaced
        with torch.no_grad():
            output = build_block(lively_parent, architecture, block, tensors)(states[item.block], **shared)
        # means over batches of 4 and 2 sequences against one over all, in fp32
        assert error.nmse == pytest.approx(over_tensor(output, states[item.block + 1]), rel=1e-4, abs=1e-9), item.name
        assert error.loss == pytest.approx(definition(output, states[item.block + 1]), rel=1e-4, abs=1e-9), item.name


@pytest.mark.parametrize("nmse", ["tensor", "sample", "token"])
def test_loss_of_a_step_is_the_held_out_loss_of_its_batch(
    lively_parent_dir: Path, space: SpaceConfig, nmse: Nmse
) -> None:
    batch = toy_batch(0)
    trainees = make_trainees(lively_parent_dir, space, batch, nmse=nmse)
    losses = torch.tensor([error.loss for error in trainees.held_out(batch, batch_size=4)])
    metrics = trainees.step(batch, lr=1e-3, micro_batch=2)
    # the denominator over the tensor is that of the held-out sequences: here the same tokens
    assert metrics["nmse"].item() == pytest.approx(losses.median().item(), rel=1e-5)


@pytest.mark.parametrize("nmse", ["tensor", "token"])
def test_micro_batches_add_up_to_the_batch(
    lively_parent_dir: Path, space: SpaceConfig, sequences: Tensor, nmse: Nmse
) -> None:
    losses, errors = [], []
    for micro_batch in (4, 1):
        trainees = make_trainees(lively_parent_dir, space, sequences, nmse=nmse)
        steps = [trainees.step(toy_batch(i), lr=1e-3, micro_batch=micro_batch) for i in range(3)]
        losses.append([metrics["nmse"].item() for metrics in steps])
        errors.append([error.loss for error in trainees.held_out(sequences, batch_size=6)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    # Adam turns rounding noise in near-zero gradients into whole steps, so weights agree less closely than losses
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)


def test_learning_does_not_slow_down_where_a_blocks_output_is_huge(
    lively_parent_dir: Path, space: SpaceConfig, sequences: Tensor
) -> None:
    errors = []
    for factor in (1.0, 1e8):
        optim = OptimConfig(lr=1e-3, grad_clip=0.0)
        trainees = make_trainees(lively_parent_dir, space, sequences, optim, power_factor=factor)
        for step in range(5):
            trainees.step(toy_batch(step), lr=1e-3, micro_batch=4)
        errors.append([error.nmse * factor for error in trainees.held_out(sequences, batch_size=6)])
    # equal but for what fp32 keeps of gradients of 1e-12
    assert errors[0] == pytest.approx(errors[1], rel=1e-2)


def test_state_has_the_size_that_is_foretold(lively_parent_dir: Path, space: SpaceConfig, sequences: Tensor) -> None:
    trainees = make_trainees(lively_parent_dir, space, sequences)
    trainees.step(toy_batch(0), lr=1e-3, micro_batch=4)
    tensors = [tensor for group in trainees.state_dict().values() for tensor in group.values() if tensor.ndim > 0]
    assert trainees.state_bytes == sum(tensor.nbytes for tensor in tensors)


def test_training_leaves_the_parent_alone(lively_parent_dir: Path, space: SpaceConfig, sequences: Tensor) -> None:
    trainees = make_trainees(lively_parent_dir, space, sequences, OptimConfig(lr=1e-3, grad_clip=0.0), mode="coupled")
    trainees.step(toy_batch(0), lr=1e-3, micro_batch=4)
    fresh = load_model(lively_parent_dir).state_dict()
    assert all(torch.equal(tensor, fresh[name]) for name, tensor in trainees.parent.model.state_dict().items())


def test_each_gradient_is_clipped_as_if_it_were_alone() -> None:
    def children() -> list[list[nn.Parameter]]:
        made = [
            [*nn.Linear(5, 3).parameters()],
            [*nn.Linear(4, 7, bias=False).parameters()],
            [*nn.LSTM(2, 2).parameters()],
        ]
        for number, parameter in enumerate(parameter for child in made for parameter in child):
            generator = torch.Generator().manual_seed(number)
            parameter.grad = torch.randn(parameter.shape, generator=generator) * 10.0**-number
        return made

    together, apart = children(), children()
    clip_each(together, parameter_rows(together), 0.5)
    for ours, child in zip(together, apart, strict=True):
        nn.utils.clip_grad_norm_(child, 0.5)
        for parameter, reference in zip(ours, child, strict=True):
            # the sum of squares in fp32, taken in another order
            torch.testing.assert_close(parameter.grad, reference.grad, rtol=1e-6, atol=0.0)
    alone = children()[1:2]
    clip_each(alone, parameter_rows(alone), 0.5)
    assert torch.equal(alone[0][0].grad, together[1][0].grad)


def test_masters_are_fp32_and_keep_updates_that_bf16_would_round_away(
    lively_parent_dir: Path, space: SpaceConfig, sequences: Tensor
) -> None:
    trainees = make_trainees(lively_parent_dir, space, sequences, dtype=torch.bfloat16)
    before = {item: {n: t.clone() for n, t in trainees.tensors(item).items()} for item in trainees.replacements}
    trainees.step(toy_batch(0), lr=1e-6, micro_batch=4)
    for item in trainees.replacements:
        for name, tensor in trainees.tensors(item).items():
            assert tensor.dtype == torch.float32
            assert (tensor != before[item][name]).any(), (item.name, name)


def graphs_of(trainees: Trainees) -> int:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    trainees.step(toy_batch(0), lr=1e-3, micro_batch=2)
    assert not torch._dynamo.utils.counters["graph_break"]
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_blocks_and_places_share_the_compiled_code_of_a_shape(
    lively_parent_dir: Path, space: SpaceConfig, sequences: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_ = torch.compile
    # no code is generated: what counts here is how often it would be
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile_(function, backend="eager", **options))
    decoupled = make_trainees(lively_parent_dir, space, sequences, compiled=True)
    # the parent's block, and all the variants of a block at once
    assert graphs_of(decoupled) == 1 + 1
    # one replacement per call: 2 attentions and 3 widths, of which narrower and linear FFNs are the same everywhere
    monkeypatch.setattr("puzzle.trainees.CALL_BYTES", 1)
    apart = make_trainees(lively_parent_dir, space, sequences, compiled=True)
    assert graphs_of(apart) == 1 + 2 + 3
    coupled = make_trainees(lively_parent_dir, space, sequences, mode="coupled", compiled=True)
    # beyond the usual limit of 8 shapes, after which torch would silently go on without compiling
    assert graphs_of(coupled) == 1 + 3 * 3 - 1 + 3 + 3


@pytest.mark.slow
def test_compiled_steps_learn_as_eager_ones_do(lively_parent_dir: Path, sequences: Tensor) -> None:
    space = SpaceConfig(kv_heads=(1,), attention_no_op=True)
    errors = []
    for compiled in (False, True):
        trainees = make_trainees(lively_parent_dir, space, sequences, compiled=compiled)
        for step in range(4):
            trainees.step(toy_batch(step), lr=1e-3, micro_batch=2)
        errors.append([error.nmse for error in trainees.held_out(sequences, batch_size=6)])
    # Adam turns rounding noise in near-zero gradients into whole steps
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)


def test_an_attention_learns_through_the_parents_ffn_and_the_pair_does_not_touch_it(
    lively_parent_dir: Path, sequences: Tensor
) -> None:
    architecture = read_architecture(lively_parent_dir)
    parent = ParentSlice.whole(load_model(lively_parent_dir).requires_grad_(False))
    power = output_power(parent, sequences, batch_size=6)
    items = (
        Replacement(block=1, attention=AttentionConfig(num_kv_heads=2)),
        Replacement(block=1, attention=AttentionConfig(num_kv_heads=2), ffn=FFNConfig(ffn_dim=512)),
    )
    own = parent.block(1).state_dict()
    inits = {item: {name: own[name] for name in item.shapes(architecture)} for item in items}
    trainees = Trainees(parent, architecture, inits, OPTIM, power)
    # the parent's own weights do exactly what the parent does, whatever part of them is under training
    assert [error.nmse for error in trainees.held_out(sequences, batch_size=6)] == pytest.approx([0.0, 0.0], abs=1e-12)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_steps_on_a_gpu_learn_as_on_a_cpu_and_never_wait(
    lively_parent_dir: Path, space: SpaceConfig, sequences: Tensor, compiled: bool
) -> None:
    errors = []
    for device in ("cpu", "cuda"):
        trainees = make_trainees(
            lively_parent_dir, space, sequences, device=device, compiled=compiled and device == "cuda"
        )
        for step in range(4):
            # the first step allocates and compiles; from then on nothing may wait for the device
            torch.cuda.set_sync_debug_mode("error" if step > 0 else "default")
            trainees.step(toy_batch(step), lr=1e-3, micro_batch=2)
        torch.cuda.set_sync_debug_mode("default")
        errors.append([error.nmse for error in trainees.held_out(sequences, batch_size=6)])
    # Adam turns rounding noise in near-zero gradients into whole steps
    assert errors[0] == pytest.approx(errors[1], rel=1e-2)
