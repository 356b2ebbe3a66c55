"""Models dealt over all ranks by FSDP2, built without any rank holding one whole."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from distill import distributed
from distill.config import EngineConfig
from distill.engine.base import resolve_dtype
from distill.engine.setup import ModelProvider
from distill.engine.student_step import StudentStep


def shard_student(step: StudentStep, engine: EngineConfig, device: torch.device) -> None:
    """Deal the parameters of ``step`` in place, block by block.

    Embeddings, final norm and head are gathered once a step, with the whole step around them.
    """
    mesh = _mesh(device)
    precision = MixedPrecisionPolicy(param_dtype=resolve_dtype(engine), reduce_dtype=torch.float32)
    offload = CPUOffloadPolicy(pin_memory=device.type == "cuda") if engine.offload_optimizer else OffloadPolicy()
    for block in _blocks_with_weights(step.model):
        fully_shard(block, mesh=mesh, mp_policy=precision, offload_policy=offload)
    fully_shard(step, mesh=mesh, mp_policy=precision, offload_policy=offload)


def shard_teacher(model: nn.Module, device: torch.device) -> None:
    """Deal the blocks of ``model`` in place. Embeddings, final norm and head, which is read outside of a forward call,
    stay whole on every rank."""
    mesh = _mesh(device)
    model.requires_grad_(False)
    for block in _blocks_with_weights(model):
        fully_shard(block, mesh=mesh)
    whole = {parameter for parameter in model.model.parameters() if not isinstance(parameter, DTensor)}
    # Without a root of their own the blocks would not share streams, and none be gathered ahead.
    fully_shard(model.model, mesh=mesh, ignored_params=whole)


def fill(model: nn.Module, provider: ModelProvider, device: torch.device, *, on_cpu: bool = False) -> None:
    """Give the parameters of ``model``, which is on the meta device, their values, one tensor at a time.

    Of a sharded parameter each rank reads its own rows alone.

    Args:
        model: sharded, wholly or in part.
        provider: where the values are.
        device: where parameters go.
        on_cpu: sharded ones go to CPU memory instead.
    """
    by_parameter: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        by_parameter.setdefault(parameter, []).append(name)
    state: dict[str, nn.Parameter] = {}
    for parameter, names in by_parameter.items():
        if isinstance(parameter, DTensor):
            value = _own_rows(provider, names[0], parameter, torch.device("cpu") if on_cpu else device)
        else:
            value = provider.read(names[0]).to(device=device, dtype=parameter.dtype)
        filled = nn.Parameter(value, requires_grad=parameter.requires_grad)
        # The same object under all of its names: tied parameters stay tied.
        state |= dict.fromkeys(names, filled)
    model.load_state_dict(state, assign=True)
    left = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    assert not left, f"the directory has no values for {left}"


def _own_rows(provider: ModelProvider, name: str, parameter: DTensor, device: torch.device) -> DTensor:
    """The tensor ``name``, dealt as ``parameter`` is: by rows, in one dimension of the mesh."""
    (placement,) = parameter.placements
    assert placement == Shard(0), f"{name} is dealt as {placement}"
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    # A rank beyond the last row has none, and its offset is the number of rows.
    rows = provider.read(name, range(offset[0], offset[0] + shape[0]))
    # Not DTensor.from_local, which moves what is on the CPU to the mesh's device.
    own = torch.empty_like(parameter, device=device, requires_grad=False)
    own.to_local().copy_(rows)
    return own


def whole(parameter: Tensor) -> Tensor:
    """``parameter`` without gradient, gathered from all ranks where it is sharded."""
    parameter = parameter.detach()
    if not isinstance(parameter, DTensor):
        return parameter
    # From where the ranks' links are, also where the shards are in CPU memory.
    return parameter.to(parameter.device_mesh.device_type).full_tensor()


def _blocks_with_weights(model: nn.Module) -> list[nn.Module]:
    return [block for block in model.model.layers if any(True for _ in block.parameters())]


def _mesh(device: torch.device) -> DeviceMesh:
    return DeviceMesh.from_group(distributed.everyone(), device.type)
