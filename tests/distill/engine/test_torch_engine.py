from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from distill.config import EngineConfig, ObjectiveConfig, OptimConfig
from distill.engine.base import create_engine, micro_batch_size, resolve_device
from distill.engine.torch_engine import TorchEngine
from distill.objective import Objective
from distill.teacher import Teacher
from puzzle.model.architecture import Architecture
from puzzle.model.checkpoint import build_model

INPUT_IDS = torch.randint(61, (4, 8), generator=torch.Generator().manual_seed(0))
MakeLlama = Callable[..., LlamaForCausalLM]


def _engine(
    make_llama: MakeLlama, *, device: str = "cpu", grad_clip: float = 1.0, **engine: object
) -> tuple[LlamaForCausalLM, TorchEngine]:
    config = EngineConfig(device=device, **engine)  # type: ignore[arg-type]
    student, teacher = make_llama(seed=0), make_llama(seed=1).to(resolve_device(config))
    runner = create_engine(
        model=student,
        objective=Objective(
            config=ObjectiveConfig(kld=1.0, hidden_cosine=1.0),
            teacher=Teacher(teacher),
            layer_map=tuple(range(teacher.config.num_hidden_layers)),
        ),
        optim=OptimConfig(lr=1e-2, grad_clip=grad_clip),
        engine=config,
    )
    assert isinstance(runner, TorchEngine)
    return student, runner


def _parameters(model: LlamaForCausalLM) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("micro_batch_tokens", [1, 8, 24])
def test_micro_batches_take_the_step_of_the_whole_batch(make_llama: MakeLlama, micro_batch_tokens: int) -> None:
    whole, runner = _engine(make_llama)
    split, split_runner = _engine(make_llama, micro_batch_tokens=micro_batch_tokens)
    metrics, split_metrics = runner.step(INPUT_IDS, lr=1e-2), split_runner.step(INPUT_IDS, lr=1e-2)
    assert metrics.keys() == {"loss", "kld", "hidden_cosine", "lm_loss", "grad_norm"}
    for name, value in metrics.items():
        torch.testing.assert_close(split_metrics[name], value, rtol=1e-5, atol=1e-6)
    # Adam divides by the gradient's size, so rounding of tiny gradients shows more than elsewhere: 1% of a step.
    torch.testing.assert_close(_parameters(split), _parameters(whole), rtol=0, atol=1e-4)


def test_gradients_are_clipped_to_the_norm(make_llama: MakeLlama) -> None:
    norms = {}
    for grad_clip in (0.0, 1e-3):
        _, runner = _engine(make_llama, grad_clip=grad_clip)
        norms[grad_clip] = runner.step(INPUT_IDS, lr=0.0)["grad_norm"]
        first_moment = torch.cat(
            [value.flatten() for name, value in runner.state_dict()["optimizer"].items() if name.endswith("exp_avg")]
        )
        clipped = first_moment.norm() / 0.1  # 1 - beta1
        torch.testing.assert_close(clipped, torch.tensor(grad_clip) if grad_clip else norms[0.0], rtol=1e-3, atol=0)
    assert norms[0.0] == norms[1e-3] > 1e-3


def test_bf16_computes_in_bf16_on_fp32_weights(make_llama: MakeLlama) -> None:
    student, runner = _engine(make_llama, precision="bf16")
    seen = []
    student.model.layers[0].mlp.register_forward_hook(lambda _module, _inputs, output: seen.append(output.dtype))
    loss = runner.step(INPUT_IDS, lr=1e-2)["loss"]
    _, exact_runner = _engine(make_llama)
    assert seen == [torch.bfloat16]
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}
    # Two blocks of bf16 products: 8 bits each.
    torch.testing.assert_close(loss, exact_runner.step(INPUT_IDS, lr=1e-2)["loss"], rtol=3e-2, atol=0)


def test_state_comes_back_bit_for_bit(make_llama: MakeLlama) -> None:
    student, runner = _engine(make_llama)
    runner.step(INPUT_IDS, lr=1e-2)
    state = {group: {name: t.clone() for name, t in named.items()} for group, named in runner.state_dict().items()}
    assert "lm_head.weight" not in state["model"]  # tied
    torch.rand(3)
    runner.step(INPUT_IDS, lr=1e-2)

    restored, restored_runner = _engine(make_llama)
    restored_runner.load_state_dict(state)
    assert torch.equal(torch.get_rng_state(), state["rng"]["cpu"])
    restored_runner.step(INPUT_IDS, lr=1e-2)
    assert torch.equal(_parameters(restored), _parameters(student))


def test_evaluation_is_without_gradient_in_eval_mode(make_llama: MakeLlama) -> None:
    student, runner = _engine(make_llama, precision="bf16")
    with runner.evaluation():
        assert not student.training
        assert not torch.is_grad_enabled()
        assert torch.is_autocast_enabled("cpu")
    assert student.training
    assert torch.is_grad_enabled()


def test_micro_batch_size_is_whole_sequences() -> None:
    sizes = [
        micro_batch_size(EngineConfig(micro_batch_tokens=tokens), batch_size=8, seq_len=100)
        for tokens in (0, 50, 250, 10_000)
    ]
    assert sizes == [8, 1, 2, 8]


def test_missing_cuda_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device(EngineConfig(device="auto")).type == "cpu"
    with pytest.raises(ValueError, match=r"engine.device=cuda, but torch finds no CUDA device; set engine.device=cpu"):
        resolve_device(EngineConfig(device="cuda"))


@pytest.mark.gpu
def test_a_step_on_the_gpu_matches_the_cpu(make_llama: MakeLlama) -> None:
    student, runner = _engine(make_llama)
    gpu_student, gpu_runner = _engine(make_llama, device="cuda")
    for _ in range(2):
        metrics, gpu_metrics = runner.step(INPUT_IDS, lr=1e-3), gpu_runner.step(INPUT_IDS, lr=1e-3)
    for name, value in metrics.items():
        # fp32 on both, kernels that sum in another order.
        torch.testing.assert_close(gpu_metrics[name].cpu(), value, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(_parameters(gpu_student).cpu(), _parameters(student), rtol=0, atol=1e-3)
    assert gpu_runner.state_dict()["rng"].keys() == {"cpu", "cuda"}


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_on_the_gpu_never_waits_for_it(pico_architecture: Architecture, precision: str) -> None:
    """With our model class: transformers' own Llama looks at its attention mask, which waits."""
    _, runner = _engine(
        lambda seed: build_model(pico_architecture, seed=seed),
        device="cuda",
        precision=precision,
        micro_batch_tokens=16,
    )
    runner.step(INPUT_IDS, lr=1e-3)
    torch.cuda.set_sync_debug_mode("error")
    try:
        metrics = runner.step(INPUT_IDS, lr=1e-3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert metrics["grad_norm"].is_cuda
