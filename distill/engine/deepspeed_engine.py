"""ZeRO through DeepSpeed: optimizer state, gradients and weights dealt over the ranks (Rajbhandari et al., 2020)."""

from __future__ import annotations

import importlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from math import inf, prod
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from distill import distributed
from distill.config import EngineConfig, OptimConfig, require
from distill.data.batch import Batch
from distill.engine import deepspeed_files
from distill.engine.base import export_from, micro_batch_size, resolve_device, resolve_dtype
from distill.engine.random_state import load_random_state, random_state
from distill.engine.setup import ModelProvider, TrainingSetup
from distill.engine.student_step import StudentStep, evaluate_step, own_part, prepare_student, sum_metrics
from distill.engine.teachers import build_teachers
from distill.objective import Objective, Totals
from distill.optim import build_optimizer

_MASTER, _MOMENTS, _COUNT = "fp32", ("exp_avg", "exp_avg_sq"), "step"


class DeepSpeedEngine:
    """fp32 master weights and optimizer state dealt over all ranks; ``engine.zero_stage`` deals gradients and weights.

    With bf16 precision the weights that run are bf16; gradients are summed over micro-batches and ranks in fp32, and
    the masters start from what the directory stores. ZeRO reads the gradient norm on the host: a step waits for the
    device. A gradient that is not finite is reported as a norm of infinity. Under stage 3 no rank ever holds the whole
    student: embeddings and head are gathered for a step, the others block by block, a few of them ahead. A teacher on
    the same device is then dealt over the ranks too (FSDP2).

    See :class:`distill.engine.base.Engine` for the interface and :func:`distill.engine.base.create_engine` for the
    arguments.

    Raises:
        ValueError: deepspeed is not installed, or was set up for another kind of device.
    """

    def __init__(
        self, setup: TrainingSetup, *, optim: OptimConfig, engine: EngineConfig, batch_size: int, seq_len: int
    ) -> None:
        self.device = resolve_device(engine)
        self._deepspeed = _import_deepspeed(self.device)
        self._ranks = distributed.data_ranks(engine.sequence_parallel)
        self.data_rank, self.num_data_ranks = self._ranks.data_rank, self._ranks.num_data_ranks
        assert batch_size % self.num_data_ranks == 0, f"{batch_size} sequences for {self.num_data_ranks} data ranks"
        self._provider = setup.student
        self._dtype = resolve_dtype(engine)
        self._trains_head = setup.objective.reads_logits
        self._num_positions = batch_size * seq_len
        sequences = batch_size // self.num_data_ranks
        self._micro_batch = micro_batch_size(engine, batch_size=sequences, seq_len=seq_len // self._ranks.num_parts)
        _meet(self._deepspeed)
        self._teachers = build_teachers(
            setup, engine, device=self.device, ranks=self._ranks, sharded=engine.zero_stage == 3
        )
        objective = Objective(config=setup.objective, teacher=self._teachers.training, layer_map=setup.layer_map)
        is_dealt = engine.zero_stage == 3
        model = setup.student.empty() if is_dealt else setup.student.load(device=self.device, dtype=self._dtype)
        self._parameters = dict(model.named_parameters())
        prepare_student(model, engine, self._ranks.group)
        self._zero_config = zero_config(
            engine,
            optim,
            micro_batch=self._micro_batch,
            num_micro_batches=-(-sequences // self._micro_batch),
            hidden_dim=model.config.hidden_size,
            on_gpu=self.device.type == "cuda",
        )
        self._zero = self._build(StudentStep(model, objective, self._teachers.held_out), optim, engine)
        self._init_optimizer_state()
        if self._dtype != torch.float32 and setup.student.dtype != self._dtype:
            self._set_masters(setup.student)

    def _build(self, step: StudentStep, optim: OptimConfig, engine: EngineConfig) -> Any:
        """DeepSpeed's engine around ``step``, whose model is on the meta device under stage 3."""
        # Before stage 3 deals the weights: then a matrix looks like a vector.
        optimizer = build_optimizer(step, optim)
        if engine.zero_stage == 3:
            self._deal(step.model)
            # Each block's weights are gathered and freed as one, also where it is computed again.
            self._deepspeed.utils.set_z3_leaf_modules(step.model, [type(step.model.model.layers[0])])
            # The objective reads the head outside of its module: it is whole as long as the step runs.
            self._deepspeed.zero.register_external_parameter(step, step.model.get_output_embeddings().weight)
        if not self._trains_head:
            _spare_head(optimizer, step.model)
        # The kernel for one device, which updates in place: on the CPU the others make copies.
        if engine.offload_optimizer or self.device.type == "cuda":
            for group in optimizer.param_groups:
                group.update(fused=True, foreach=False)
        zero, *_ = self._deepspeed.initialize(model=step, optimizer=optimizer, config=self._zero_config)
        zero.train()
        return zero

    def _deal(self, model: nn.Module) -> None:
        """Give ``model``, which is on the meta device, its values; each rank keeps its part of each parameter.

        The first rank reads and sends them: nobody holds more than one module's own parameters.
        """
        names = {parameter: name for name, parameter in self._parameters.items()}
        for module in reversed(list(model.modules())):
            own = [parameter for parameter in module.parameters(recurse=False) if parameter.is_meta]
            for parameter in own:
                value = torch.empty(parameter.shape, dtype=self._dtype, device=self.device)
                if distributed.is_main():
                    value.copy_(self._provider.read(names[parameter]))
                # The same object stays: the optimizer and tied modules know it.
                torch.utils.swap_tensors(parameter, nn.Parameter(value))
            if own:
                self._deepspeed.zero.Init(module=module, config_dict_or_path=self._zero_config, dtype=self._dtype)

    def step(self, batch: Batch, *, lr: float) -> dict[str, Tensor]:
        """See :class:`distill.engine.base.Engine`."""
        batch = own_part(batch, self._ranks, self.device)
        totals = Totals(num_positions=self._num_positions, num_targets=distributed.all_reduce_sum(batch.num_targets()))
        for group in self._zero.optimizer.param_groups:
            group["lr"] = lr
        metrics = sum_metrics([self._accumulate(part, totals) for part in batch.split(self._micro_batch)])
        grad_norm = torch.as_tensor(self._zero.get_global_grad_norm(), dtype=torch.float32, device=self.device)
        # ZeRO reports a norm that is not finite as -1.
        grad_norm = grad_norm.masked_fill(grad_norm < 0, inf)
        return {**distributed.all_reduce_sums(metrics), "grad_norm": grad_norm}

    def _accumulate(self, batch: Batch, totals: Totals) -> dict[str, Tensor]:
        """Add the gradient of one micro-batch; with the last one of a step DeepSpeed makes the step."""
        loss, metrics = self._zero(batch, totals)
        # ZeRO takes the mean over the ranks where contributions are to be summed.
        self._zero.backward(loss * distributed.world_size(), scale_wrt_gas=False)
        self._zero.step()
        return metrics

    def evaluate(self, sequences: Tensor | Batch) -> dict[str, float]:
        """See :class:`distill.engine.base.Engine`."""
        self._zero.eval()
        metrics = evaluate_step(
            self._zero, sequences, ranks=self._ranks, micro_batch=self._micro_batch, device=self.device
        )
        self._zero.train()
        return metrics | self._teachers.known_metrics(len(sequences))

    def save(self, directory: Path) -> None:
        """See :class:`distill.engine.base.Engine`.

        One file per parameter with its master weight, its moments and the number of steps, written by the ranks in
        turn: what DeepSpeed's universal checkpoint holds. Any number of ranks can load it, under any stage.
        """
        deepspeed_files.write(directory, self._own_share(), random_state(self.device))

    def snapshot(self) -> Callable[[Path], None]:
        """See :class:`distill.engine.base.Engine`. Gathers as :meth:`save` does."""
        share = [
            (name, {key: tensor.to("cpu", copy=True) for key, tensor in tensors.items()})
            for name, tensors in self._own_share()
        ]
        return partial(deepspeed_files.write, share=share, random=random_state(self.device))

    def _own_share(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Whole state of the parameters that this rank writes; every rank goes through it."""
        for index, (name, parameter) in enumerate(self._parameters.items()):
            whole = {_MASTER: self._whole(parameter), **{key: self._whole(parameter, key) for key in _MOMENTS}}
            if index % distributed.world_size() == distributed.rank():
                yield name, {**whole, _COUNT: self._step_counts()[0]}

    def load(self, directory: Path) -> None:
        """See :class:`distill.engine.base.Engine`."""
        state = directory / deepspeed_files.STATE
        require(
            state.is_dir(),
            f"{directory} is no resume point of engine.name=deepspeed; go on with the engine that wrote it, or remove "
            "it and start from the model",
        )
        for name, parameter in self._parameters.items():
            with safe_open(state / f"{name}.safetensors", framework="pt") as file:
                slices = {key: file.get_slice(key) for key in (_MASTER, *_MOMENTS)}
                for key, stored in slices.items():
                    self._set_own(parameter, lambda rows, stored=stored: stored[rows.start : rows.stop], key)
                steps_done = file.get_tensor(_COUNT)
        for count in self._step_counts():
            count.copy_(steps_done)
        self._round_masters()
        load_random_state(directory, self.device)

    def export(self, directory: Path) -> None:
        """See :class:`distill.engine.base.Engine`. No rank ever holds more than one whole parameter."""
        export_from(self._provider, self._whole_parameters(), directory)

    def _whole_parameters(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self._parameters.items():
            yield name, self._whole(parameter)

    @torch.no_grad()
    def _whole(self, parameter: nn.Parameter, key: str | None = None) -> Tensor:
        """fp32 master weight, or optimizer state ``key``, gathered from all ranks."""
        utils = self._deepspeed.utils
        if key is None:
            return utils.safe_get_full_fp32_param(parameter)
        return utils.safe_get_full_optimizer_state(parameter, key)

    @torch.no_grad()
    def _set_own(self, parameter: nn.Parameter, read_rows: Callable[[range], Tensor], key: str) -> None:
        """Set what this rank keeps of the master weight or of optimizer state ``key``, and read nothing else.

        Args:
            parameter: of the student.
            read_rows: these rows of the whole, on the CPU.
            key: one of the tensors of a resume point.
        """
        shape = parameter.ds_shape if hasattr(parameter, "ds_id") else parameter.shape
        start, size = self._own_elements(parameter)
        part = read_elements(read_rows, shape, start=start, size=size).float()
        if hasattr(parameter, "ds_id"):
            utils = self._deepspeed.utils
            if key == _MASTER:
                utils.safe_set_local_fp32_param(parameter, part)
            else:
                utils.safe_set_local_optimizer_state(parameter, part, key)
        elif size > 0:
            parameter._hp_mapping.get_hp_fragment(None if key == _MASTER else key).copy_(part)

    def _own_elements(self, parameter: nn.Parameter) -> tuple[int, int]:
        """First element, and number, of what this rank keeps of the flattened ``parameter``, padding included."""
        if hasattr(parameter, "ds_id"):
            size = parameter.partition_numel()
            return distributed.rank() * size, size
        if parameter._hp_mapping is None:
            return 0, 0
        place = parameter._hp_mapping.lp_fragment_address
        return place.start, place.numel

    @torch.no_grad()
    def _round_masters(self) -> None:
        """Have the weights that run follow the master weights, as after a step."""
        zero = self._zero.optimizer
        if hasattr(zero, "update_lp_params"):
            zero.update_lp_params()
            return
        small = zero.persistent_parameters
        if small:
            # Whole on every rank, and gathered again from what follows.
            small[0].partition(small)
        for parameter in self._parameters.values():
            parameter.ds_tensor.copy_(self._deepspeed.utils.safe_get_local_fp32_param(parameter))
        if small:
            small[0].all_gather(small)

    def _set_masters(self, provider: ModelProvider) -> None:
        """Start the masters from what is stored, not from what bf16 leaves of it."""
        for name, parameter in self._parameters.items():
            self._set_own(parameter, partial(provider.read, name), _MASTER)

    def _flat_masters(self) -> list[Tensor]:
        """This rank's parts of the master weights, as the inner AdamW knows them: each wrapper has its own name."""
        names = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition")
        return next(list(getattr(self._zero.optimizer, name)) for name in names if hasattr(self._zero.optimizer, name))

    def _step_counts(self) -> list[Tensor]:
        """AdamW's count of steps, once for each flat master; all are equal."""
        return [self._zero.optimizer.optimizer.state[master][_COUNT] for master in self._flat_masters()]

    def _init_optimizer_state(self) -> None:
        """Give AdamW the state that it otherwise has from its first step on, and have stages 1 and 2 find it.

        They look for a parameter's state in views that they make after the first group of parameters has made its
        first step, when the other groups have no state yet.
        """
        inner = self._zero.optimizer.optimizer
        on_device = inner.param_groups[0]["fused"]
        for master in self._flat_masters():
            count = torch.zeros((), device=master.device if on_device else "cpu")
            inner.state[master] = {_COUNT: count, **{key: torch.zeros_like(master.detach()) for key in _MOMENTS}}
        if hasattr(self._zero.optimizer, "_lazy_init_hp_params_optimizer_state"):
            self._zero.optimizer._lazy_init_hp_params_optimizer_state()


def zero_config(
    engine: EngineConfig,
    optim: OptimConfig,
    *,
    micro_batch: int,
    num_micro_batches: int,
    hidden_dim: int,
    on_gpu: bool,
) -> dict[str, Any]:
    """DeepSpeed's configuration.

    Args:
        engine: stage, precision and offload.
        optim: gradient clipping; the optimizer itself is handed over.
        micro_batch: sequences in one forward pass of a rank.
        num_micro_batches: of a rank in one optimizer step.
        hidden_dim: channels of the student; parameters of a few rows of them stay whole on every rank under stage 3.
        on_gpu: overlap communication with computation, and pin memory.
    """
    stage: dict[str, Any] = {
        "stage": engine.zero_stage,
        "contiguous_gradients": True,
        "overlap_comm": on_gpu,
        "stage3_param_persistence_threshold": 10 * hidden_dim,
    }
    if engine.offload_optimizer:
        stage["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": num_micro_batches,
        "gradient_clipping": optim.grad_clip,
        "bf16": {"enabled": engine.precision == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": stage,
        # torch's AdamW, on the CPU too: DeepSpeed's own would need a compiler and the CUDA toolkit.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
    }


def read_elements(read_rows: Callable[[range], Tensor], shape: Sequence[int], *, start: int, size: int) -> Tensor:
    """Elements ``start`` to ``start + size`` of a flattened tensor, zeros beyond its end. Reads the rows with them.

    Args:
        read_rows: rows of the tensor.
        shape: of the tensor, of one dimension or more.
        start: first element.
        size: elements.
    """
    num_rows, row_size = shape[0], prod(shape[1:])
    stop = min(start + size, num_rows * row_size)
    if stop <= start:
        return torch.zeros(size)
    rows = range(start // row_size, -(-stop // row_size))
    elements = read_rows(rows).flatten()[start - rows.start * row_size :][: stop - start]
    return nn.functional.pad(elements, (0, size - len(elements)))


def _spare_head(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Take weight decay off a head of its own that no term of the objective trains.

    ZeRO steps every parameter, with a gradient of zero if it has none; torch leaves such a parameter as it is.
    """
    head = model.get_output_embeddings().weight
    if head is model.get_input_embeddings().weight:
        return
    matrices, vectors = optimizer.param_groups
    index = next(i for i, parameter in enumerate(matrices["params"]) if parameter is head)
    for key in ("params", "param_names"):
        vectors[key].append(matrices[key].pop(index))


def _import_deepspeed(device: torch.device) -> ModuleType:
    """The library, for the accelerator of ``device``, which it takes from the environment when it is imported.

    Raises:
        ValueError: it is not installed, or was imported before for another kind of device.
    """
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    try:
        deepspeed = importlib.import_module("deepspeed")
    except ImportError as error:
        raise ValueError(
            f"engine.name=deepspeed needs the package deepspeed ({error}); pip install 'ffn-fusion[deepspeed]', or set "
            "engine.name=torch engine.shard=true"
        ) from error
    accelerator = importlib.import_module("deepspeed.accelerator").get_accelerator().device_name()
    require(
        accelerator == device.type,
        f"engine.device={device.type}, but deepspeed was imported before and set up for {accelerator}; set "
        f"DS_ACCELERATOR={device.type} in the environment",
    )
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # Said at every collective; the names are DeepSpeed's to change.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    if device.type == "cpu":
        # A collective through shared memory, which would be compiled first. gloo's does.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _meet(deepspeed: ModuleType) -> None:
    """Hand the processes that work together over to DeepSpeed."""
    everyone = distributed.everyone()
    assert everyone is torch.distributed.group.WORLD, "DeepSpeed takes all processes; run it in together()"
    os.environ.setdefault("LOCAL_RANK", "0")
    deepspeed.init_distributed(auto_mpi_discovery=False)
