from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distill.config import EngineConfig, ObjectiveConfig, OptimConfig
from distill.data.batch import Batch
from distill.engine.base import create_engine, micro_batch_size, resolve_device
from distill.engine.setup import ModelProvider, TrainingSetup
from distill.engine.torch_engine import TorchEngine
from distill.evaluate import evaluate_model
from distill.teacher import TopK
from puzzle.model.architecture import Architecture
from puzzle.model.checkpoint import build_model, save_model
from puzzle.model.provider import DirectoryProvider

BATCH = Batch.of(torch.randint(61, (4, 8), generator=torch.Generator().manual_seed(0)))
Provider = Callable[..., ModelProvider]


def _engine(
    student: ModelProvider,
    teacher: ModelProvider | None = None,
    *,
    device: str = "cpu",
    grad_clip: float = 1.0,
    objective: ObjectiveConfig | None = None,
    **engine: Any,
) -> TorchEngine:
    setup = TrainingSetup(
        student=student,
        teacher=teacher,
        objective=objective or ObjectiveConfig(kld=1.0, hidden_cosine=1.0) if teacher else ObjectiveConfig(lm=1.0),
        layer_map=() if teacher is None else tuple(range(teacher.num_blocks)),
    )
    runner = create_engine(
        setup,
        optim=OptimConfig(lr=1e-2, grad_clip=grad_clip),
        engine=EngineConfig(device=device, **engine),  # type: ignore[arg-type]
        batch_size=len(BATCH),
        seq_len=BATCH.input_ids.shape[1],
    )
    assert isinstance(runner, TorchEngine)
    return runner


@pytest.fixture
def make_engine(llama_provider: Provider) -> Callable[..., TorchEngine]:
    """Student and teacher of two seeds under given settings."""
    return lambda **settings: _engine(llama_provider(seed=0), llama_provider(seed=1), **settings)


MakeEngine = Callable[..., TorchEngine]


def _parameters(engine: TorchEngine) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in engine.student.parameters()])


@pytest.mark.parametrize("micro_batch_tokens", [1, 8, 24])
def test_micro_batches_take_the_step_of_the_whole_batch(make_engine: MakeEngine, micro_batch_tokens: int) -> None:
    """Also where they have different numbers of labels."""
    batch = Batch.of(BATCH.input_ids)
    batch.labels[0, :5] = -100
    whole, split = make_engine(), make_engine(micro_batch_tokens=micro_batch_tokens)
    metrics, split_metrics = whole.step(batch, lr=1e-2), split.step(batch, lr=1e-2)
    assert metrics.keys() == {"loss", "kld", "hidden_cosine", "lm_loss", "grad_norm"}
    for name, value in metrics.items():
        torch.testing.assert_close(split_metrics[name], value, rtol=1e-5, atol=1e-6)
    # Adam divides by the gradient's size, so rounding of tiny gradients shows more than elsewhere: 1% of a step.
    torch.testing.assert_close(_parameters(split), _parameters(whole), rtol=0, atol=1e-4)


def test_gradients_are_clipped_to_the_norm(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The norm that is reported is that before clipping; the optimizer sees the clipped gradients."""
    seen: list[Tensor] = []

    def step(optimizer: torch.optim.AdamW) -> None:
        gradients = [parameter.grad for group in optimizer.param_groups for parameter in group["params"]]
        seen.append(torch.cat([gradient.flatten() for gradient in gradients if gradient is not None]).norm())

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    free, clipped = (make_engine(grad_clip=clip).step(BATCH, lr=0.0)["grad_norm"] for clip in (0.0, 1e-3))
    assert free == clipped > 1e-3
    torch.testing.assert_close(seen[0], free, rtol=1e-5, atol=0)
    # torch adds 1e-6 to the norm that it divides by.
    torch.testing.assert_close(seen[1], torch.tensor(1e-3), rtol=1e-3, atol=0)


def test_bf16_computes_in_bf16_on_fp32_weights(make_engine: MakeEngine) -> None:
    runner = make_engine(precision="bf16")
    seen = []
    runner.student.model.layers[0].mlp.register_forward_hook(lambda _module, _inputs, output: seen.append(output.dtype))
    loss = runner.step(BATCH, lr=1e-2)["loss"]
    assert seen == [torch.bfloat16]
    assert {parameter.dtype for parameter in runner.student.parameters()} == {torch.float32}
    # Two blocks of bf16 products: 8 bits each.
    torch.testing.assert_close(loss, make_engine().step(BATCH, lr=1e-2)["loss"], rtol=3e-2, atol=0)


def test_state_comes_back_bit_for_bit(make_engine: MakeEngine, tmp_path: Path) -> None:
    runner = make_engine()
    runner.step(BATCH, lr=1e-2)
    runner.save(tmp_path)
    random_state = torch.get_rng_state()
    torch.rand(3)
    runner.step(BATCH, lr=1e-2)

    restored = make_engine()
    restored.load(tmp_path)
    assert torch.equal(torch.get_rng_state(), random_state)
    restored.step(BATCH, lr=1e-2)
    assert torch.equal(_parameters(restored), _parameters(runner))


@pytest.mark.parametrize("layout", [{}, {"shard": True}, {"offload_optimizer": True}], ids=["plain", "fsdp", "offload"])
def test_a_head_that_no_term_trains_stays_and_the_run_goes_on(
    pico_providers: tuple[DirectoryProvider, DirectoryProvider], tmp_path: Path, layout: dict[str, Any]
) -> None:
    """Without a term on the logits a head of its own has no gradient, and yet its weight in the resume point."""
    objective = ObjectiveConfig(hidden_cosine=1.0)
    runner = _engine(*pico_providers, objective=objective, **layout)
    head = runner.student.get_output_embeddings().weight
    assert head is not runner.student.get_input_embeddings().weight
    runner.step(BATCH, lr=1e-2)
    runner.save(tmp_path)
    runner.step(BATCH, lr=1e-2)
    restored = _engine(*pico_providers, objective=objective, **layout)
    restored.load(tmp_path)
    restored.step(BATCH, lr=1e-2)
    runner.export(tmp_path / "expected")
    restored.export(tmp_path / "restored")
    expected, found = DirectoryProvider(tmp_path / "expected"), DirectoryProvider(tmp_path / "restored")
    for name in expected.names():
        assert torch.equal(found.read(name), expected.read(name)), name
        assert torch.equal(found.read(name), pico_providers[0].read(name)) == (name == "lm_head.weight"), name


def test_the_state_of_another_engine_is_refused(make_engine: MakeEngine, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is no resume point of engine.name=torch; go on with the engine that wrote"):
        make_engine().load(tmp_path)


@pytest.mark.parametrize("micro_batch_tokens", [0, 16])
def test_evaluation_is_that_of_the_two_models(
    make_engine: MakeEngine, llama_provider: Provider, micro_batch_tokens: int
) -> None:
    sequences = torch.randint(61, (5, 8), generator=torch.Generator().manual_seed(3))
    runner = make_engine(micro_batch_tokens=micro_batch_tokens)
    settings = {"device": torch.device("cpu"), "dtype": torch.float32}
    expected = evaluate_model(
        llama_provider(seed=0).load(**settings),
        sequences,
        teacher=llama_provider(seed=1).load(**settings),
        batch_size=5,
        chunk_tokens=64,
    )
    assert runner.evaluate(sequences) == pytest.approx(expected, rel=1e-5)  # fp32 sums in another order
    assert runner.student.training


def test_a_teacher_without_a_term_is_still_what_the_student_is_measured_by(llama_provider: Provider) -> None:
    """LM training on the data alone, beside the parent."""
    setup = TrainingSetup(
        student=llama_provider(seed=0), teacher=llama_provider(seed=1), objective=ObjectiveConfig(lm=1.0)
    )
    config = EngineConfig(device="cpu")
    runner = create_engine(setup, optim=OptimConfig(lr=1e-2), engine=config, batch_size=4, seq_len=8)
    assert runner.step(BATCH, lr=1e-2).keys() == {"loss", "lm_loss", "grad_norm"}
    assert runner.evaluate(BATCH.input_ids)["kld"] > 0


@dataclass
class FakeStore:
    """The same signal for all sequences of 8 tokens; remembers which were asked for."""

    asked: list[int] = field(default_factory=list)

    def signal(self, sequence_ids: Tensor, positions: slice, *, device: torch.device) -> TopK:
        self.asked += sequence_ids.tolist()
        shape = (len(sequence_ids), len(range(8)[positions]), 2)
        token_ids = torch.tensor([3, 5]).expand(shape)
        return TopK(token_ids=token_ids, log_probs=torch.tensor([0.6, 0.3]).log().expand(shape))

    def teacher_lm_loss(self, num_sequences: int) -> float:
        return 2.0 + num_sequences


def test_cached_signals_are_asked_for_by_sequence(llama_provider: Provider) -> None:
    store, held_out_store = FakeStore(), FakeStore()
    objective = ObjectiveConfig(kld=1.0)
    setup = TrainingSetup(
        student=llama_provider(seed=0), store=store, held_out_store=held_out_store, objective=objective
    )
    config = EngineConfig(device="cpu", micro_batch_tokens=16)
    runner = create_engine(setup, optim=OptimConfig(lr=1e-2), engine=config, batch_size=4, seq_len=8)
    first = runner.step(BATCH, lr=1e-2)["kld_top_k"]
    assert store.asked == [0, 1, 2, 3]
    for _ in range(10):
        last = runner.step(BATCH, lr=1e-2)["kld_top_k"]
    assert last < first
    metrics = runner.evaluate(BATCH.input_ids[:3])
    assert held_out_store.asked == [0, 1, 2]
    assert metrics.keys() == {"lm_loss", "kld_top_k", "top1_agreement_frac", "teacher_lm_loss"}
    assert metrics["teacher_lm_loss"] == 5.0


@pytest.fixture
def pico_providers(
    heterogeneous_architecture: Architecture, pico_parent_dir: Path, tmp_path: Path
) -> tuple[DirectoryProvider, DirectoryProvider]:
    """A student with every kind of block, and a teacher that serves as its own for hidden states."""
    for name, seed in (("student", 5), ("teacher", 6)):
        model = build_model(heterogeneous_architecture, seed=seed)
        save_model(model, tmp_path / name, architecture=heterogeneous_architecture, tokenizer_from=pico_parent_dir)
    return DirectoryProvider(tmp_path / "student"), DirectoryProvider(tmp_path / "teacher")


@pytest.mark.parametrize(
    "layout",
    [
        {"recompute": True, "offload_activations": True, "ffn_tile_tokens": 4},
        {"shard": True},
        {"offload_optimizer": True, "recompute": True},
    ],
    ids=["less_memory", "sharded", "offloaded"],
)
def test_placement_changes_nothing_but_rounding(
    pico_providers: tuple[DirectoryProvider, DirectoryProvider], tmp_path: Path, layout: dict[str, Any]
) -> None:
    plain, placed = _engine(*pico_providers), _engine(*pico_providers, **layout)
    for _ in range(3):
        metrics, placed_metrics = plain.step(BATCH, lr=1e-3), placed.step(BATCH, lr=1e-3)
    for name, value in metrics.items():
        # fp32 sums in another order, over three steps.
        torch.testing.assert_close(placed_metrics[name], value, rtol=1e-4, atol=1e-6)
    plain.export(tmp_path / "plain")
    placed.export(tmp_path / "placed")
    expected, trained = DirectoryProvider(tmp_path / "plain"), DirectoryProvider(tmp_path / "placed")
    for name in expected.names():
        # 5% of a step.
        torch.testing.assert_close(trained.read(name), expected.read(name), rtol=0, atol=5e-5)


@pytest.mark.parametrize("shard", [False, True])
def test_an_untrained_student_is_exported_as_it_was(
    pico_providers: tuple[DirectoryProvider, DirectoryProvider], tmp_path: Path, shard: bool
) -> None:
    """In fp32 though it runs in bf16, also after an evaluation, and training can go on."""
    student, teacher = pico_providers
    runner = _engine(student, teacher, shard=shard, precision="bf16")
    runner.evaluate(BATCH.input_ids)
    runner.export(tmp_path / "out")
    exported = DirectoryProvider(tmp_path / "out")
    assert exported.names() == student.names()
    assert all(torch.equal(exported.read(name), student.read(name)) for name in student.names())
    assert runner.step(BATCH, lr=1e-3)["grad_norm"] > 0


def test_sharded_bf16_gathers_bf16_and_keeps_fp32_masters(
    pico_providers: tuple[DirectoryProvider, DirectoryProvider],
) -> None:
    student, teacher = pico_providers
    runner = _engine(student, teacher, shard=True, precision="bf16")
    seen = []
    mlp = runner.student.model.layers[0].mlp
    mlp.register_forward_hook(lambda module, _inputs, _output: seen.append(module.up_proj.weight.dtype))
    loss = runner.step(BATCH, lr=1e-3)["loss"]
    assert seen == [torch.bfloat16]
    assert {parameter.dtype for parameter in runner.student.parameters()} == {torch.float32}
    # Six blocks of bf16 products: 8 bits each.
    torch.testing.assert_close(loss, _engine(student, teacher).step(BATCH, lr=1e-3)["loss"], rtol=3e-2, atol=0)


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
def test_a_step_on_the_gpu_matches_the_cpu(make_engine: MakeEngine) -> None:
    runner, gpu_runner = make_engine(), make_engine(device="cuda")
    for _ in range(2):
        metrics, gpu_metrics = runner.step(BATCH, lr=1e-3), gpu_runner.step(BATCH, lr=1e-3)
    for name, value in metrics.items():
        # fp32 on both, kernels that sum in another order.
        torch.testing.assert_close(gpu_metrics[name].cpu(), value, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(_parameters(gpu_runner).cpu(), _parameters(runner), rtol=0, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "layout",
    [
        {},
        {"precision": "bf16", "micro_batch_tokens": 16},
        {"precision": "bf16", "recompute": True, "ffn_tile_tokens": 4},
        {"precision": "bf16", "compile": True},
    ],
    ids=["fp32", "bf16", "less_memory", "compiled"],
)
def test_a_step_on_the_gpu_never_waits_for_it(
    pico_providers: tuple[DirectoryProvider, DirectoryProvider], layout: dict[str, Any]
) -> None:
    """With our model class: transformers' own Llama looks at its attention mask, which waits."""
    runner = _engine(*pico_providers, device="cuda", **layout)
    for _ in range(2):
        runner.step(BATCH, lr=1e-3)
    torch.cuda.set_sync_debug_mode("error")
    try:
        metrics = runner.step(BATCH, lr=1e-3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert metrics["grad_norm"].is_cuda


@pytest.mark.gpu
@pytest.mark.parametrize(
    "layout",
    [
        {"shard": True},
        {"offload_optimizer": True},
        {"shard": True, "recompute": True, "offload_activations": True},
        {"shard": True, "compile": True, "recompute": True},
    ],
    ids=["sharded", "optimizer_offloaded", "activations_offloaded", "compiled"],
)
def test_layouts_on_the_gpu_take_the_steps_of_the_cpu(
    pico_providers: tuple[DirectoryProvider, DirectoryProvider], tmp_path: Path, layout: dict[str, Any]
) -> None:
    runner, gpu_runner = _engine(*pico_providers), _engine(*pico_providers, device="cuda", **layout)
    for _ in range(3):
        metrics, gpu_metrics = runner.step(BATCH, lr=1e-3), gpu_runner.step(BATCH, lr=1e-3)
    for name, value in metrics.items():
        # fp32 on both, kernels that sum in another order.
        torch.testing.assert_close(gpu_metrics[name].cpu(), value, rtol=1e-3, atol=1e-5)
    gpu_runner.save(tmp_path)
    restored = _engine(*pico_providers)
    restored.load(tmp_path)
    # A third of a step, for the same reason.
    torch.testing.assert_close(_parameters(restored), _parameters(runner), rtol=0, atol=1e-3)
