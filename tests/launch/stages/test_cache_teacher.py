from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from distill.config import EngineConfig, ObjectiveConfig, OptimConfig, TrainConfig
from distill.data.dataset import TokenDataset
from distill.files import sha256_of
from distill.teacher_cache import TeacherCacheConfig, check_tokens
from distill.teacher_store import SignalStore
from launch.artifact import Artifact
from launch.stage import StageContext, StageResult
from launch.stage_configs import CacheTeacherStage, DistillStage
from launch.stages import cache_teacher, distill
from puzzle.model.checkpoint import load_model
from tests.launch.training_inputs import commit_artifact, write_data, write_student, write_teacher

SEQ_LEN = 16
CONFIG = CacheTeacherStage(
    teacher_cache=TeacherCacheConfig(
        seq_len=SEQ_LEN, max_tokens=40 * SEQ_LEN, top_k=32, eval_sequences=4, batch_size=3, shard_tokens=16 * SEQ_LEN
    ),
    engine=EngineConfig(device="cpu"),
)
"""Forty train sequences in three files, four validation sequences in one."""


@pytest.fixture(scope="module")
def inputs(pico_parent_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    root = tmp_path_factory.mktemp("inputs")
    return {
        "teacher": write_teacher(root / "teacher", pico_parent_dir),
        "data": write_data(root / "data", pico_parent_dir),
    }


def context_in(root: Path) -> StageContext:
    for name in ("out", "resume"):
        (root / name).mkdir(parents=True, exist_ok=True)
    return StageContext(
        out=root / "out", resume=root / "resume", pool=root / "pool", run_name="pico", step_name="signals"
    )


def cached(root: Path, inputs: dict[str, Artifact], **changes: int) -> tuple[StageContext, StageResult]:
    context = context_in(root)
    config = replace(CONFIG, teacher_cache=replace(CONFIG.teacher_cache, **changes))
    return context, cache_teacher.run(config, inputs, context)


def digests(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}


def test_stage_caches_what_the_teacher_says(tmp_path: Path, inputs: dict[str, Artifact]) -> None:
    context, result = cached(tmp_path, inputs)
    store, dataset = SignalStore.open(context.out), TokenDataset.open(inputs["data"].path)
    assert all(sha256_of(context.out / shard.name) == shard.sha256 for shard in store.index.shards)
    assert store.index.teacher == inputs["teacher"].manifest.fingerprint
    assert (store.train.num_sequences, store.validation.num_sequences) == (40, 4)
    for split in ("train", "validation"):
        check_tokens(store.index, split, dataset.split(split).tokens)

    ids = torch.tensor([39, 17])
    with torch.no_grad():
        logits = load_model(inputs["teacher"].path)(dataset.split("train").sequences(SEQ_LEN, ids.tolist())).logits
    expected, token_ids = logits.log_softmax(-1).sort(descending=True)
    top = store.train.signal(ids, slice(0, SEQ_LEN), device=torch.device("cpu"))
    assert torch.equal(top.token_ids, token_ids[..., :32])
    # fp16: 2^-11 of each number, twice, and the same of the sum that they are scaled by.
    torch.testing.assert_close(top.log_probs, expected[..., :32], rtol=2**-10, atol=2**-10)

    tail = 1 - expected[..., :32].exp().sum(-1).mean()
    assert result.metrics["tail_mass_frac"]["train"] == pytest.approx(float(tail), rel=0.5)  # of two sequences of 40
    assert result.metrics["num_tokens"] == {"train": 640, "validation": 64}
    assert result.metrics["num_shards"] == 4
    kept = 1 - result.metrics["tail_mass_frac"]["train"]
    assert result.headline == f"640 train tokens, 130 bytes each; the top 32 of 320 hold {kept:.2%} of the mass"
    assert result.metrics["teacher_lm_loss"]["validation"] == pytest.approx(store.validation.teacher_lm_loss(4))


def test_killed_run_goes_on_with_the_shards_it_lacks(
    tmp_path: Path, inputs: dict[str, Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = cached(tmp_path / "whole", inputs)
    written: list[str] = []
    write_shard = cache_teacher.write_shard

    def dies_at_the_third(directory: Path, shard: object, *arguments: object) -> object:
        if len(written) == 2:
            (directory / "train-000000032.tmp").write_bytes(b"torn")
            raise KeyboardInterrupt
        written.append(shard.name)
        return write_shard(directory, shard, *arguments)

    monkeypatch.setattr(cache_teacher, "write_shard", dies_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        cached(tmp_path / "killed", inputs)
    damaged = tmp_path / "killed" / "resume" / written[0]
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\0\0")

    written.clear()
    monkeypatch.setattr(cache_teacher, "write_shard", lambda *a: (written.append(a[1].name), write_shard(*a))[1])
    context, _ = cached(tmp_path / "killed", inputs)
    assert written == ["train-000000000.safetensors", "train-000000032.safetensors", "validation-000000000.safetensors"]
    assert digests(context.out) == digests(whole.out)

    # All is there: no teacher is loaded.
    for path in context.out.iterdir():
        path.unlink()
    monkeypatch.setattr(cache_teacher, "build_teachers", lambda *_, **__: pytest.fail("the teacher was loaded"))
    cached(tmp_path / "killed", inputs)
    assert digests(context.out) == digests(whole.out)


def test_files_are_copied_where_they_cannot_be_linked(
    tmp_path: Path, inputs: dict[str, Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    linked, _ = cached(tmp_path / "linked", inputs)

    def no_links(*_: object) -> None:
        raise OSError("not supported")

    monkeypatch.setattr(cache_teacher.os, "link", no_links)
    copied, _ = cached(tmp_path / "copied", inputs)
    assert digests(copied.out) == digests(linked.out)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seq_len": 512, "max_tokens": 512}, "seq_len=512 is beyond the 256 positions of the teacher; lower it"),
        ({"top_k": 320}, "top_k=320 leaves no other of the 320 tokens of the teacher's vocabulary"),
        (
            {"max_tokens": 9000},
            r"max_tokens=9000 asks for 562 sequences of 16 tokens of the train split, which has 512; set it to 8192",
        ),
        ({"eval_sequences": 65}, r"eval_sequences=65 asks for 65 .* validation split, which has 64; set it to 64"),
    ],
)
def test_what_cannot_be_cached_is_refused_before_a_model_is_loaded(
    tmp_path: Path,
    inputs: dict[str, Artifact],
    changes: dict[str, int],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cache_teacher, "build_teachers", lambda *_, **__: pytest.fail("the teacher was loaded"))
    with pytest.raises(ValueError, match=message):
        cached(tmp_path, inputs, **changes)


@pytest.mark.parametrize("option", ["slices", "tensor_parallel", "pipeline_parallel", "sequence_parallel"])
def test_what_would_deal_one_model_is_refused(option: str) -> None:
    with pytest.raises(ValueError, match=rf"engine.{option}=2: every process of stage cache_teacher.*torch_fsdp"):
        replace(CONFIG, engine=EngineConfig(device="cpu", **{option: 2}))


def test_distillation_from_the_cache_is_that_from_the_teacher(tmp_path: Path, inputs: dict[str, Artifact]) -> None:
    """Same data, same steps: 319 of 320 tokens are cached, so that fp16 alone makes a difference."""
    teacher, student = inputs["teacher"], write_student(tmp_path / "student", inputs["teacher"].path, torch.float32)
    data = write_data(tmp_path / "data", teacher.path, train_tokens=40 * SEQ_LEN)
    signals, _ = cached(tmp_path / "signals", {"teacher": teacher, "data": data}, top_k=319)
    sources = {
        "online": {"teacher": teacher},
        "cached": {"signals": commit_artifact(signals.out, "teacher_signals")},
    }
    config = DistillStage(
        distill=TrainConfig(max_tokens=40 * SEQ_LEN, seq_len=SEQ_LEN, batch_size=4, eval_sequences=4),
        objective=ObjectiveConfig(kld=1.0, chunk_tokens=64),
        optim=OptimConfig(lr=1e-3),
        engine=EngineConfig(device="cpu"),
        seed=0,
    )
    runs = {}
    for name, source in sources.items():
        given = {"student": student, "data": data, **source}
        runs[name] = distill.run(config, given, context_in(tmp_path / name)).metrics
    # fp16 log-probabilities, 5e-4 of each of them, over ten steps.
    for point in ("start", "end"):
        cached_point, online = runs["cached"][point], runs["online"][point]
        assert cached_point["lm_loss"] == pytest.approx(online["lm_loss"], rel=2e-3)
        assert cached_point["kld_top_k"] == pytest.approx(online["kld"], rel=2e-3)
        assert "kld" not in cached_point
    assert runs["online"]["end"]["kld"] < 0.9 * runs["online"]["start"]["kld"]
    assert runs["cached"]["teacher"]["lm_loss"] == pytest.approx(runs["online"]["teacher"]["lm_loss"], rel=1e-5)
