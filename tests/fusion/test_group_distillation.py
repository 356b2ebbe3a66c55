"""Both directions on a pico child, through the module and through the stage."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from distill.config import EngineConfig, OptimConfig, TrackingConfig, TrainConfig
from distill.data.batch import Batch
from distill.data.dataset import TokenDataset
from distill.data.tokenizer import tokenizer_sha256
from distill.engine.base import resolve_dtype
from distill.losses import normalized_mse
from distill.tracking import Tracker
from fusion import group_distillation
from fusion.config import FuseConfig, GroupDistillationConfig, Norm
from fusion.fuse import fuse_checkpoint
from fusion.group_distillation import GroupOutcome, distill_groups, learning_blocks, plan_parts
from fusion.group_trainees import GroupTrainees
from launch.stage import StageContext, StageResult
from launch.stage_configs import DistillGroupsStage, FuseStage
from launch.stages import distill_groups as stage
from launch.stages import fuse
from puzzle.group_training import BldSettings
from puzzle.model.checkpoint import TensorReader, copy_tokenizer, load_model, read_architecture, save_model
from puzzle.slices import ParentSlice
from puzzle.trainees import output_power

A = (2, 256)
FFN = (None, 256)
GROUPS = ((1, 3), (6, 7))
"""Unequal widths in the first; in the second all of a run."""
SEQ_LEN = 24
BATCH_TOKENS = 4 * SEQ_LEN
TRAIN = TrainConfig(
    max_tokens=12 * BATCH_TOKENS,
    data_end="repeat",
    seq_len=SEQ_LEN,
    batch_size=4,
    eval_every_tokens=6 * BATCH_TOKENS,
    eval_sequences=6,
    resume_every_tokens=5 * BATCH_TOKENS,
)
OPTIM = OptimConfig(lr=1e-3)
CPU = EngineConfig(device="cpu")


def random_tokens(seed: int, batch: int = 4) -> Tensor:
    return torch.randint(0, 320, (batch, SEQ_LEN), generator=torch.Generator().manual_seed(seed))


HELD_OUT = random_tokens(1_000, batch=6)


class ToyBatches:
    """Random tokens, a pure function of the step; killed at ``dies_at``."""

    def __init__(self, dies_at: int | None = None) -> None:
        self.dies_at = dies_at
        self.steps: list[int] = []

    def batch(self, step: int) -> Batch:
        if step == self.dies_at:
            raise KeyboardInterrupt
        self.steps.append(step)
        return Batch.of(random_tokens(step))


def settings_of(**fields: Any) -> BldSettings:
    defaults = {
        "train": TRAIN,
        "optim": OPTIM,
        "engine": CPU,
        "batches": ToyBatches(),
        "held_out": HELD_OUT,
        "lr_key": "group_distillation.optim.lr",
    }
    return BldSettings(**(defaults | fields))


@pytest.fixture
def child(tmp_path: Path, make_checkpoint: Callable[..., Any], pico_parent_dir: Path) -> Path:
    """Attention, four FFNs, attention, two FFNs, attention; a tokenizer of 320 tokens."""
    make_checkpoint(tmp_path / "child", A, FFN, (None, 512), FFN, FFN, A, FFN, FFN, A, vocab_size=320)
    copy_tokenizer(pico_parent_dir, tmp_path / "child")
    return tmp_path / "child"


@pytest.fixture
def fused(tmp_path: Path, child: Path) -> Path:
    """The child with both groups fused."""
    fuse_checkpoint(child, tmp_path / "fused", GROUPS, "folded")
    return tmp_path / "fused"


def distill(
    directory: Path,
    child: Path,
    source: Path,
    settings: BldSettings | None = None,
    *,
    groups: tuple[tuple[int, int], ...] = GROUPS,
    norm: Norm = "folded",
    sequential_weight: float = 1.0,
) -> tuple[GroupOutcome, ...]:
    """Distil into ``directory / "model"``, with the curve beside it. ``source``: the child, or a fused form of it."""
    settings = settings or settings_of()
    directory.mkdir(exist_ok=True)
    tracking = {"run_name": "run", "step_name": "step", "stage": "distill_groups", "settings": {}}
    tracking |= {"resume_dir": directory}
    with Tracker(directory / "metrics.jsonl", TrackingConfig(), **tracking) as tracker:
        return distill_groups(
            ParentSlice.whole(load_model(child, dtype=resolve_dtype(settings.engine))),
            source,
            learning_blocks(read_architecture(child).num_blocks, groups, fused=source != child),
            settings,
            norm=norm,
            sequential_weight=sequential_weight,
            out_dir=directory / "model",
            resume_dir=directory / "resume",
            tracker=tracker,
        )


def tensors_of(directory: Path) -> dict[str, Tensor]:
    with TensorReader(directory) as reader:
        return {name: reader.read(name) for name in reader.names()}


def same(ours: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> bool:
    return ours.keys() == others.keys() and all(torch.equal(ours[name], others[name]) for name in ours)


def changed_names(before: Path, after: Path) -> set[str]:
    old, new = tensors_of(before), tensors_of(after)
    assert old.keys() == new.keys()
    return {name for name in old if not torch.equal(old[name], new[name])}


def ffn_names(*blocks: int) -> set[str]:
    parts = ("post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    return {f"model.layers.{block}.{part}.weight" for block in blocks for part in parts}


def rows(directory: Path) -> list[dict[str, float]]:
    """The curve without what depends on the clock."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith(("perf", "mem"))} for line in lines]


@torch.no_grad()
def fused_nmse(
    child: Path, fused: Path, groups: tuple[tuple[int, int], ...] = GROUPS, sequences: Tensor = HELD_OUT
) -> list[float]:
    """By its definition: what every fused block makes of the child's hidden state before the group, whole forwards."""
    states = load_model(child, dtype=torch.float32).model(sequences, output_hidden_states=True).hidden_states
    blocks = learning_blocks(read_architecture(child).num_blocks, groups, fused=True)
    layers = load_model(fused, dtype=torch.float32).model.layers
    return [
        normalized_mse(layers[block](states[first]), states[last + 1]).item()
        for (first, last), (block,) in blocks.items()
    ]


@torch.no_grad()
def chain_nmse(child: Path, trained: Path) -> list[float]:
    """The same of the trained members one after another."""
    states = load_model(child).model(HELD_OUT, output_hidden_states=True).hidden_states
    layers = load_model(trained).model.layers
    errors = []
    for first, last in GROUPS:
        hidden = states[first]
        for block in layers[first : last + 1]:
            hidden = block(hidden)
        errors.append(normalized_mse(hidden, states[last + 1]).item())
    return errors


@pytest.mark.parametrize("norm", ["folded", "last"])
def test_error_before_training_is_that_of_the_fused_checkpoint_in_both_directions(
    tmp_path: Path, child: Path, norm: Norm
) -> None:
    fuse_checkpoint(child, tmp_path / "fused", GROUPS, norm)
    expected = fused_nmse(child, tmp_path / "fused")
    assert min(expected) > 1e-3  # there is something to learn
    for name, source in (("fused_first", tmp_path / "fused"), ("run_first", child)):
        outcomes = distill(tmp_path / name, child, source, norm=norm)
        # fp32 sums over channels and tokens in another order
        assert [outcome.nmse_init for outcome in outcomes] == pytest.approx(expected, rel=1e-4)
        assert [outcome.group for outcome in outcomes] == list(GROUPS)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_fused_ffns_learn_and_the_stored_weights_have_the_error_that_is_told(
    tmp_path: Path, child: Path, fused: Path, precision: Literal["fp32", "bf16"]
) -> None:
    train = replace(TRAIN, max_tokens=30 * BATCH_TOKENS)
    settings = settings_of(train=train, engine=EngineConfig(device="cpu", precision=precision))
    outcomes = distill(tmp_path / "out", child, fused, settings)
    assert all(outcome.trained for outcome in outcomes)
    assert all(outcome.nmse < 0.8 * outcome.nmse_init for outcome in outcomes)
    assert all(outcome.sequential_nmse is None for outcome in outcomes)
    # fp32 sums in another order; in bf16 the forward rounds to 8 bits
    tolerance = {"fp32": 1e-4, "bf16": 3e-2}[precision]
    stored = fused_nmse(child, tmp_path / "out" / "model")
    assert [outcome.nmse for outcome in outcomes] == pytest.approx(stored, rel=tolerance)
    # norm scales are trained too; nothing else changes
    assert changed_names(fused, tmp_path / "out" / "model") == ffn_names(1, 4)
    assert read_architecture(tmp_path / "out" / "model") == read_architecture(fused)
    curve = rows(tmp_path / "out")
    assert curve[-1]["eval/nmse"] < curve[0]["eval/nmse"]
    assert sum("train/nmse" in row for row in curve) == 30


def test_what_decides_is_the_error_of_the_weights_as_they_are_rounded_to_be_stored(
    tmp_path: Path, make_checkpoint: Callable[..., Any]
) -> None:
    child = tmp_path / "child"
    make_checkpoint(child, A, FFN, FFN, FFN, A, vocab_size=320, dtype=torch.bfloat16)
    fuse_checkpoint(child, tmp_path / "fused", ((1, 3),), "folded")
    # steps that the master weights take and bf16 rounds away, nearly all
    settings = settings_of(optim=replace(OPTIM, lr=1e-6))
    (still,) = distill(tmp_path / "still", child, tmp_path / "fused", settings, groups=((1, 3),))
    (learnt,) = distill(tmp_path / "learnt", child, tmp_path / "fused", groups=((1, 3),))
    assert learnt.nmse < still.nmse <= still.nmse_init
    for outcome, name in ((still, "still"), (learnt, "learnt")):
        stored = tensors_of(tmp_path / name / "model")
        assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
        # fp32 sums over channels and tokens in another order; rounding after the measurement would show as 2e-4
        assert outcome.nmse == pytest.approx(fused_nmse(child, tmp_path / name / "model", ((1, 3),))[0], rel=1e-5)


@pytest.mark.parametrize("norm", ["folded", "last"])
def test_a_run_that_was_distilled_loses_less_when_it_is_fused(tmp_path: Path, child: Path, norm: Norm) -> None:
    settings = settings_of(train=replace(TRAIN, max_tokens=60 * BATCH_TOKENS))
    outcomes = distill(tmp_path / "out", child, child, settings, norm=norm)
    trained = tmp_path / "out" / "model"
    assert all(outcome.trained for outcome in outcomes)
    assert changed_names(child, trained) == ffn_names(1, 2, 3, 6, 7)
    fuse_checkpoint(child, tmp_path / "before", GROUPS, norm)
    fuse_checkpoint(trained, tmp_path / "after", GROUPS, norm)
    before, after = (fused_nmse(child, tmp_path / name) for name in ("before", "after"))
    assert all(new < 0.8 * old for new, old in zip(after, before, strict=True))
    # fp32 sums in another order, and the folded weights' rounding
    assert [outcome.nmse for outcome in outcomes] == pytest.approx(after, rel=1e-4)
    assert [outcome.sequential_nmse for outcome in outcomes] == pytest.approx(chain_nmse(child, trained), rel=1e-4)


def test_the_sequential_weight_keeps_the_unfused_model_as_it_is(tmp_path: Path, child: Path) -> None:
    settings = settings_of(train=replace(TRAIN, max_tokens=40 * BATCH_TOKENS))
    free = distill(tmp_path / "free", child, child, settings, sequential_weight=0.0)
    bound = distill(tmp_path / "bound", child, child, settings, sequential_weight=4.0)
    for without, with_weight in zip(free, bound, strict=True):
        assert with_weight.sequential_nmse < 0.5 * without.sequential_nmse  # type: ignore[operator]
        assert without.nmse < with_weight.nmse < with_weight.nmse_init


@pytest.mark.parametrize("direction", ["fused_first", "run_first"])
def test_killed_training_goes_on_to_the_same_model_bit_for_bit(
    tmp_path: Path, child: Path, fused: Path, direction: str
) -> None:
    source = fused if direction == "fused_first" else child
    whole = distill(tmp_path / "whole", child, source)
    with pytest.raises(KeyboardInterrupt):
        distill(tmp_path / "killed", child, source, settings_of(batches=ToyBatches(dies_at=8)))
    assert not (tmp_path / "killed" / "model").exists()
    again = ToyBatches()
    resumed = distill(tmp_path / "killed", child, source, settings_of(batches=again))
    assert again.steps == list(range(5, 12))  # from the resume point, not the start
    assert resumed == whole
    assert same(tensors_of(tmp_path / "killed" / "model"), tensors_of(tmp_path / "whole" / "model"))
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")


def test_kill_while_the_model_is_written_costs_no_training(
    tmp_path: Path, child: Path, fused: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(group_distillation, "_write_checkpoint", killed)
    with pytest.raises(KeyboardInterrupt):
        distill(tmp_path / "killed", child, fused)
    monkeypatch.undo()
    outcomes = distill(tmp_path / "killed", child, fused, settings_of(batches=ToyBatches(dies_at=0)))
    assert outcomes == distill(tmp_path / "whole", child, fused)
    assert same(tensors_of(tmp_path / "killed" / "model"), tensors_of(tmp_path / "whole" / "model"))
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")


@pytest.mark.parametrize("direction", ["fused_first", "run_first"])
def test_groups_that_training_made_worse_stay_as_they_were(
    tmp_path: Path, child: Path, fused: Path, direction: str
) -> None:
    source = fused if direction == "fused_first" else child
    settings = settings_of(optim=replace(OPTIM, lr=3.0))
    outcomes = distill(tmp_path / "out", child, source, settings)
    assert not any(outcome.trained for outcome in outcomes)
    assert all(outcome.nmse == outcome.nmse_init for outcome in outcomes)
    assert {outcome.sequential_nmse for outcome in outcomes} == {None if source == fused else 0.0}
    assert changed_names(source, tmp_path / "out" / "model") == set()


def test_one_group_that_diverges_does_not_touch_the_other(tmp_path: Path, child: Path, fused: Path) -> None:
    # an infinite channel in the second group's fused FFN makes its error NaN from the start
    model = load_model(fused)
    with torch.no_grad():
        model.model.layers[4].mlp.down_proj.weight[0, 0] = torch.inf
    broken = tmp_path / "broken"
    save_model(model, broken, architecture=read_architecture(fused), tokenizer_from=None)
    first, second = distill(tmp_path / "out", child, broken)
    assert first == distill(tmp_path / "whole", child, fused)[0]
    assert not second.trained
    assert changed_names(broken, tmp_path / "out" / "model") == ffn_names(1)


def test_divergence_of_all_groups_names_the_learning_rate(tmp_path: Path, child: Path, fused: Path) -> None:
    with pytest.raises(ValueError, match=r"finite error at .* lower group_distillation.optim.lr"):
        distill(tmp_path / "out", child, fused, settings_of(optim=replace(OPTIM, lr=1e20, warmup_frac=0.0)))
    assert not (tmp_path / "out" / "model").exists()


@pytest.mark.parametrize("grad_clip", [0.0, 0.01])
def test_a_group_learns_the_same_alone_and_in_company(tmp_path: Path, child: Path, grad_clip: float) -> None:
    settings = settings_of(optim=replace(OPTIM, grad_clip=grad_clip))
    (alone,) = distill(tmp_path / "alone", child, child, settings, groups=GROUPS[1:])
    assert alone == distill(tmp_path / "company", child, child, settings)[1]
    company = tensors_of(tmp_path / "company" / "model")
    trained = tensors_of(tmp_path / "alone" / "model")
    assert all(torch.equal(trained[name], company[name]) for name in ffn_names(6, 7))


def test_parts_that_train_one_after_another_give_the_same_model(
    tmp_path: Path, child: Path, fused: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once = distill(tmp_path / "at_once", child, fused)
    monkeypatch.setattr(group_distillation, "memory_budget", lambda parent: 1.0)
    batches = ToyBatches()
    assert distill(tmp_path / "parts", child, fused, settings_of(batches=batches)) == at_once
    assert batches.steps == list(range(12)) * 2
    assert same(tensors_of(tmp_path / "parts" / "model"), tensors_of(tmp_path / "at_once" / "model"))
    tokens = [row["tokens"] for row in rows(tmp_path / "parts")]
    assert tokens == sorted(tokens)
    assert tokens[-1] == 2 * TRAIN.max_tokens


def test_plan_parts_fills_the_budget_with_neighbouring_groups(make_architecture: Callable[..., Any]) -> None:
    architecture = make_architecture(*[FFN] * 6)
    learners = learning_blocks(6, ((0, 1), (2, 3), (4, 5)), fused=False)
    block_bytes = 16 * (3 * 32 * 256 + 32)
    assert [list(part) for part in plan_parts(learners, architecture, 4 * block_bytes)] == [[(0, 1), (2, 3)], [(4, 5)]]
    assert [list(part) for part in plan_parts(learners, architecture, 1.0)] == [[(0, 1)], [(2, 3)], [(4, 5)]]


def make_trainees(
    child: Path,
    source: Path,
    *,
    groups: tuple[tuple[int, int], ...] = GROUPS,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    compiled: bool = False,
) -> GroupTrainees:
    parent = ParentSlice.whole(load_model(child, device=device, dtype=dtype).requires_grad_(False))
    architecture = read_architecture(source)
    learners = learning_blocks(9, groups, fused=source != child)
    power = output_power(parent, HELD_OUT, batch_size=6)
    with TensorReader(source) as reader:
        return GroupTrainees(
            parent,
            architecture,
            reader,
            learners,
            OPTIM,
            power,
            norm="folded",
            sequential_weight=1.0,
            compiled=compiled,
        )


def test_micro_batches_add_up_to_the_batch(child: Path) -> None:
    losses, errors = [], []
    for micro_batch in (4, 1):
        trainees = make_trainees(child, child)
        steps = [trainees.step(random_tokens(i), lr=1e-3, micro_batch=micro_batch) for i in range(3)]
        losses += [[metrics["loss"].item() for metrics in steps]]
        errors += [[error.loss for error in trainees.held_out(HELD_OUT, batch_size=micro_batch)]]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    # Adam turns rounding noise in near-zero gradients into whole steps, so weights agree less closely than losses
    assert errors[0] == pytest.approx(errors[1], rel=1e-3)


def test_loss_of_a_step_is_the_held_out_loss_of_its_batch(child: Path) -> None:
    trainees = make_trainees(child, child)
    trainees.step(random_tokens(0), lr=1e-3, micro_batch=4)
    errors = trainees.held_out(HELD_OUT, batch_size=4)
    metrics = trainees.step(HELD_OUT, lr=1e-3, micro_batch=2)
    # fp32 means over parts; the median of two is the lower one
    assert metrics["nmse"].item() == pytest.approx(min(error.nmse for error in errors), rel=1e-5)
    assert metrics["loss"].item() == pytest.approx(min(error.loss for error in errors), rel=1e-5)


def test_masters_are_fp32_and_the_models_own_weights_stay(child: Path) -> None:
    trainees = make_trainees(child, child, dtype=torch.bfloat16)
    before = {group: {n: t.clone() for n, t in trainees.tensors(group).items()} for group in trainees.groups}
    trainees.step(random_tokens(0), lr=1e-6, micro_batch=4)
    for group in trainees.groups:
        for name, tensor in trainees.tensors(group).items():
            assert tensor.dtype == torch.float32
            assert (tensor != before[group][name]).any(), name  # an update that bf16 would round away
    fresh = load_model(child, dtype=torch.bfloat16).state_dict()
    assert same(trainees.parent.model.state_dict(), fresh)


def test_state_has_the_size_that_is_foretold(child: Path, fused: Path) -> None:
    trainees = make_trainees(child, fused)
    trainees.step(random_tokens(0), lr=1e-3, micro_batch=4)
    tensors = [tensor for group in trainees.state_dict().values() for tensor in group.values() if tensor.ndim > 0]
    assert trainees.state_bytes == sum(tensor.nbytes for tensor in tensors)


def test_groups_of_a_shape_share_compiled_code(
    tmp_path: Path, make_checkpoint: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_checkpoint(tmp_path / "child", A, FFN, FFN, FFN, A, FFN, FFN, FFN, A, vocab_size=320)
    compile_ = torch.compile
    # no code is generated: what counts here is how often it would be
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile_(function, backend="eager", **options))
    trainees = make_trainees(tmp_path / "child", tmp_path / "child", groups=((1, 2), (5, 6)), compiled=True)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    trainees.step(random_tokens(0), lr=1e-3, micro_batch=2)
    assert not torch._dynamo.utils.counters["graph_break"]
    # blocks with attention, blocks without, groups of two
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("direction", ["fused_first", "run_first"])
def test_steps_on_a_gpu_learn_as_on_a_cpu_and_never_wait(
    child: Path, fused: Path, compiled: bool, direction: str
) -> None:
    source = fused if direction == "fused_first" else child
    errors = []
    for device in ("cpu", "cuda"):
        trainees = make_trainees(child, source, device=device, compiled=compiled and device == "cuda")
        for step in range(4):
            # the first step allocates and compiles; from then on nothing may wait for the device
            torch.cuda.set_sync_debug_mode("error" if step > 0 else "default")
            trainees.step(random_tokens(step), lr=1e-3, micro_batch=2)
        torch.cuda.set_sync_debug_mode("default")
        errors.append([error.loss for error in trainees.held_out(HELD_OUT, batch_size=6)])
    # Adam turns rounding noise in near-zero gradients into whole steps
    assert errors[0] == pytest.approx(errors[1], rel=1e-2)


# The stage.


def artifact(path: Path, fingerprint: str = "a" * 64, **inputs: str) -> SimpleNamespace:
    records = {name: SimpleNamespace(fingerprint=value) for name, value in inputs.items()}
    return SimpleNamespace(path=path, manifest=SimpleNamespace(fingerprint=fingerprint, inputs=records))


def context(out: Path) -> StageContext:
    out.mkdir()
    return StageContext(
        out=out,
        resume=out.with_name(f"{out.name}_resume"),
        pool=out.parent / "pool",
        run_name="test",
        step_name=out.name,
    )


@pytest.fixture
def data(tmp_path: Path, child: Path) -> SimpleNamespace:
    directory = tmp_path / "data"
    directory.mkdir()
    generator = np.random.default_rng(0)
    for name in ("train", "calibration"):
        np.save(directory / f"{name}.npy", generator.integers(0, 320, 20 * SEQ_LEN).astype(np.uint16))
    summary = {
        "vocab_size": 320,
        "eos_token_id": 0,
        "unigram_entropy_nats": 5.0,
        "tokenizer_sha256": tokenizer_sha256(child),
    }
    (directory / "data.json").write_text(json.dumps(summary))
    return artifact(directory)


def run_fuse(out: Path, model: Path, config: FuseConfig | None = None) -> Path:
    fuse.run(FuseStage(fuse=config or FuseConfig()), {"model": artifact(model)}, context(out))
    return out


def run_stage(
    out: Path,
    child: Path,
    data: SimpleNamespace,
    config: FuseConfig | None = None,
    train: TrainConfig = TRAIN,
    **inputs: SimpleNamespace,
) -> StageResult:
    distillation = GroupDistillationConfig(train=train, optim=OPTIM)
    settings = DistillGroupsStage(group_distillation=distillation, fuse=config or FuseConfig(), engine=CPU, seed=0)
    return stage.run(settings, {"model": artifact(child), "data": data, **inputs}, context(out))


LONGER = replace(TRAIN, max_tokens=40 * BATCH_TOKENS)


def test_stage_trains_the_fused_model(tmp_path: Path, child: Path, data: SimpleNamespace) -> None:
    fused = run_fuse(tmp_path / "stage_fused", child)
    result = run_stage(
        tmp_path / "out", child, data, train=LONGER, fused=artifact(fused, fingerprint="b" * 64, model="a" * 64)
    )
    before = json.loads((fused / "fusion.json").read_text())
    after = json.loads((tmp_path / "out" / "fusion.json").read_text())
    assert after.pop("distilled") == result.metrics["groups"]
    assert after.pop("verify_before_distillation") == before.pop("verify")
    groups = [dict(group) for group in after["groups"]]
    for group in groups:
        group["kld"] = group.pop("kld_before_distillation")
    assert after | {"groups": groups} == before
    # whole runs but for their last FFN; the second run is too short then
    assert [(row["first"], row["last"], row["trained"]) for row in result.metrics["groups"]] == [(1, 3, True)]
    held_out = TokenDataset.open(data.path).split("calibration").first(6, SEQ_LEN)
    (expected,) = fused_nmse(child, tmp_path / "out", ((1, 3),), held_out)
    # fp32 sums over channels and tokens in another order
    assert result.metrics["median_nmse"] == pytest.approx(expected, rel=1e-4)
    assert result.metrics["median_nmse"] < result.metrics["median_nmse_init"]
    assert result.headline.startswith("1 fused FFNs (blocks 1-3), median held-out NMSE of the parallel form 0.")
    assert result.tokens == LONGER.max_tokens
    assert changed_names(fused, tmp_path / "out") == ffn_names(1)
    assert tokenizer_sha256(tmp_path / "out") == tokenizer_sha256(child)
    assert "eval/nmse" in (tmp_path / "out" / "metrics.jsonl").read_text()
    assert not (tmp_path / "out" / "group_distillation.json").exists()
    # what it wrote may be trained on
    again = artifact(tmp_path / "out", fingerprint="c" * 64, model="a" * 64)
    further = run_stage(tmp_path / "further", child, data, fused=again)
    assert further.metrics["median_nmse_init"] == pytest.approx(result.metrics["median_nmse"], rel=1e-6)
    renamed = json.loads((tmp_path / "further" / "fusion.json").read_text())
    assert renamed.pop("distilled") == further.metrics["groups"]
    assert renamed.pop("verify_before_distillation")
    assert renamed == after


def test_stage_prepares_runs_that_stage_fuse_then_fuses(tmp_path: Path, child: Path, data: SimpleNamespace) -> None:
    config = FuseConfig(leave_last_out=False, max_ffn_dim=768)
    result = run_stage(tmp_path / "out", child, data, config, LONGER)
    groups = [(row["first"], row["last"]) for row in result.metrics["groups"]]
    assert groups == [(1, 2), (3, 4), (6, 7)]
    content = json.loads((tmp_path / "out" / "group_distillation.json").read_text())
    assert content == {"groups": result.metrics["groups"], "norm": "folded", "sequential_weight": 1.0}
    assert not (tmp_path / "out" / "fusion.json").exists()
    assert "; members one after another up to 0.0" in result.headline
    assert read_architecture(tmp_path / "out") == read_architecture(child)
    before = run_fuse(tmp_path / "before", child, config)
    after = run_fuse(tmp_path / "after", tmp_path / "out", config)
    errors = [fused_nmse(child, directory, groups=tuple(groups)) for directory in (before, after)]
    assert all(new < old for old, new in zip(*errors, strict=True))


def test_stage_that_was_killed_goes_on(
    tmp_path: Path, child: Path, data: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_stage(tmp_path / "whole", child, data)

    def dies(self: GroupTrainees, input_ids: Tensor, **options: Any) -> dict[str, Tensor]:
        steps.append(len(steps))
        if len(steps) == 9:
            raise KeyboardInterrupt
        return step(self, input_ids, **options)

    steps: list[int] = []
    step = GroupTrainees.step
    monkeypatch.setattr(GroupTrainees, "step", dies)
    with pytest.raises(KeyboardInterrupt):
        run_stage(tmp_path / "killed", child, data)
    for path in (tmp_path / "killed").iterdir():  # the store starts every attempt with an empty directory
        path.unlink()
    (tmp_path / "killed").rmdir()
    resumed = run_stage(tmp_path / "killed", child, data)
    assert len(steps) == 9 + 7  # 8 steps, the kill, and on from the resume point of step 5
    assert resumed == whole
    assert same(tensors_of(tmp_path / "killed"), tensors_of(tmp_path / "whole"))


def test_models_that_do_not_belong_together_are_refused(tmp_path: Path, child: Path, data: SimpleNamespace) -> None:
    fused = run_fuse(tmp_path / "stage_fused", child)
    with pytest.raises(ValueError, match="fused model was made from model bbbbbbbbbbbb, the model given is aaaaaaaaa"):
        run_stage(tmp_path / "other", child, data, fused=artifact(fused, model="b" * 64))
    with pytest.raises(ValueError, match=r"has no fusion.json; give the output of stage fuse"):
        run_stage(tmp_path / "unfused", child, data, fused=artifact(child, model="a" * 64))
    content = json.loads((fused / "fusion.json").read_text())
    (fused / "fusion.json").write_text(json.dumps(content | {"treatment": "reverse"}))
    with pytest.raises(ValueError, match=r"output of fuse.treatment=reverse, which has no fused FFN to train"):
        run_stage(tmp_path / "reversed", child, data, fused=artifact(fused, model="a" * 64))
    content["groups"][0]["last"] = 2
    (fused / "fusion.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"are not those of the model with the groups of its fusion.json fused"):
        run_stage(tmp_path / "altered", child, data, fused=artifact(fused, model="a" * 64))
    for name in ("dependency", "group_scores"):
        with pytest.raises(ValueError, match=r"made from model bbbbbbbbbbbb"):
            run_stage(tmp_path / name, child, data, **{name: artifact(tmp_path, model="b" * 64)})
    for out in ("other", "unfused", "reversed", "altered", "dependency", "group_scores"):
        assert list((tmp_path / out).iterdir()) == []


@pytest.mark.parametrize(
    ("config", "train", "message"),
    [
        ({"treatment": "reverse"}, {}, r"fuse.treatment=reverse leaves nothing to prepare for fusion"),
        ({"min_length": 5}, {}, "nothing to fuse"),
        ({"groups": ((0, 1),)}, {}, r"block 0 of group \[0, 1\] has attention kv2"),
        ({}, {"seq_len": 129, "max_tokens": 1000}, r"train.seq_len=129 is beyond the model's 128 positions"),
        ({}, {"eval_sequences": 21}, "21 sequences of 24 tokens asked of the calibration split, which has 20"),
    ],
)
def test_what_cannot_be_done_is_refused_before_any_work(
    tmp_path: Path,
    child: Path,
    data: SimpleNamespace,
    config: dict[str, Any],
    train: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(ValueError, match=message):
        run_stage(tmp_path / "out", child, data, FuseConfig(**config), replace(TRAIN, **train))
    assert list((tmp_path / "out").iterdir()) == []


def test_model_that_reads_other_tokens_is_refused(tmp_path: Path, child: Path, data: SimpleNamespace) -> None:
    summary = json.loads((data.path / "data.json").read_text())
    (data.path / "data.json").write_text(json.dumps(summary | {"tokenizer_sha256": "0" * 64}))
    with pytest.raises(ValueError, match="the tokenizer of model"):
        run_stage(tmp_path / "out", child, data)
    assert list((tmp_path / "out").iterdir()) == []


def test_damaged_tensor_that_does_not_learn_is_found_before_training(tmp_path: Path, child: Path, fused: Path) -> None:
    """It is only copied, after training."""
    file = fused / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.self_attn.q_proj.weight"] = tensors["model.layers.0.self_attn.q_proj.weight"][:8].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    batches = ToyBatches()
    with pytest.raises(ValueError, match=r"model.layers.0.self_attn.q_proj.weight is \[8, 32\], config.json says"):
        distill(tmp_path / "out", child, fused, settings_of(batches=batches))
    assert batches.steps == []
    assert not (tmp_path / "out" / "model").exists()
