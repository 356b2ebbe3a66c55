from __future__ import annotations

import errno
import multiprocessing
import shutil
import signal
from pathlib import Path

import pytest

from launch import artifact as artifact_module
from launch.artifact import Artifact, DamagedArtifactError, Recipe
from launch.rundir import RunDirectory
from launch.stage import StageContext, StageResult
from launch.store import Job, Store, is_disk_full
from tests.killing import kill_at_call


def job(body, *, value: int = 1, inputs: dict[str, Artifact] | None = None, stage: str = "distill") -> Job:
    recipe = Recipe(
        stage=stage,
        stage_version=1,
        config={"value": value},
        inputs={name: artifact.manifest.fingerprint for name, artifact in (inputs or {}).items()},
    )
    return Job(
        recipe=recipe,
        kind="model",
        inputs=inputs or {},
        body=body,
        context=lambda out, resume: StageContext(
            out=out, resume=resume, pool=out.parent / ".pool", run_name="run", step_name="step"
        ),
    )


def write(context: StageContext) -> StageResult:
    (context.out / "payload.txt").write_text("payload")
    return StageResult(headline="written", metrics={"loss": float("nan")}, tokens=5)


def refuse(context: StageContext) -> StageResult:
    raise AssertionError("must not run")


def silent(message: str) -> None:
    raise AssertionError(message)


def test_computes_once_and_skips_afterwards(tmp_path: Path) -> None:
    first, cached = Store(tmp_path).get_or_compute(job(write), on_wait=silent)
    assert not cached
    assert first.manifest.metrics == {"loss": None}
    again, cached = Store(tmp_path).get_or_compute(job(refuse), on_wait=silent)
    assert cached
    assert again == first


def test_changed_recipe_stands_beside_the_old_one(tmp_path: Path) -> None:
    store = Store(tmp_path)
    old, _ = store.get_or_compute(job(write, value=1), on_wait=silent)
    new, cached = store.get_or_compute(job(write, value=2), on_wait=silent)
    assert not cached
    assert old.path != new.path
    old.verify()


def test_torn_attempt_is_not_an_artifact_and_its_resume_state_survives(tmp_path: Path) -> None:
    def torn(context: StageContext) -> StageResult:
        (context.out / "half.txt").write_text("half")
        (context.resume / "point.txt").write_text("step 3")
        raise RuntimeError("killed")

    def resumed(context: StageContext) -> StageResult:
        assert list(context.out.iterdir()) == []
        assert (context.resume / "point.txt").read_text() == "step 3"
        return write(context)

    store = Store(tmp_path)
    with pytest.raises(RuntimeError):
        store.get_or_compute(job(torn), on_wait=silent)
    assert store.find(job(torn).recipe) is None
    artifact, _ = store.get_or_compute(job(resumed), on_wait=silent)
    assert [record.name for record in artifact.manifest.files] == ["payload.txt"]
    assert not store.resume_path(artifact.manifest.recipe).exists()


def test_damaged_artifact_is_an_error_not_a_recomputation(tmp_path: Path) -> None:
    artifact, _ = Store(tmp_path).get_or_compute(job(write), on_wait=silent)
    (artifact.path / "payload.txt").write_text("PAYLOAD")
    with pytest.raises(DamagedArtifactError, match=r"payload\.txt was altered"):
        Store(tmp_path).get_or_compute(job(refuse), on_wait=silent)


def test_damaged_input_is_found_before_work_starts(tmp_path: Path) -> None:
    parent, _ = Store(tmp_path).get_or_compute(job(write), on_wait=silent)
    (parent.path / "payload.txt").unlink()
    with pytest.raises(DamagedArtifactError, match=r"payload\.txt is missing"):
        Store(tmp_path).get_or_compute(job(refuse, value=2, inputs={"student": parent}), on_wait=silent)


def test_tokens_add_up_along_the_line_of_models(tmp_path: Path) -> None:
    store = Store(tmp_path)
    first, _ = store.get_or_compute(job(write), on_wait=silent)
    second, _ = store.get_or_compute(job(write, inputs={"student": first}), on_wait=silent)
    third, _ = store.get_or_compute(job(write, inputs={"teacher": second}), on_wait=silent)
    assert [a.manifest.tokens for a in (first, second, third)] == [{"distill": 5}, {"distill": 10}, {"distill": 5}]


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "x"), RuntimeError("I/O error: No space left on device (os error 28)")]
)
def test_full_disk_is_one_line_and_earlier_artifacts_stay(tmp_path: Path, error: Exception) -> None:
    store = Store(tmp_path)
    earlier, _ = store.get_or_compute(job(write), on_wait=silent)

    def full(context: StageContext) -> StageResult:
        (context.resume / "point.txt").write_text("step 3")
        raise error

    with pytest.raises(ValueError, match=r"the disk under .* is full") as caught:
        store.get_or_compute(job(full, value=2), on_wait=silent)
    assert "\n" not in str(caught.value)
    earlier.verify()
    assert not store.path(job(full, value=2).recipe).exists()
    assert (store.resume_path(job(full, value=2).recipe) / "point.txt").is_file()


@pytest.mark.parametrize("function", ["sha256_of", "replace", "flush_to_disk"])
def test_a_disk_that_is_full_at_the_commit_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    """While files are hashed, before the manifest is written, and between the manifest and the rename."""

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    store = Store(tmp_path)
    earlier, _ = store.get_or_compute(job(write), on_wait=silent)
    with monkeypatch.context() as patch:
        patch.setattr(artifact_module, function, full)
        with pytest.raises(ValueError, match=r"the disk under .* is full .* while distill wrote; free some") as caught:
            store.get_or_compute(job(write, value=2), on_wait=silent)
    assert "\n" not in str(caught.value)
    earlier.verify()
    assert not list((tmp_path / ".unfinished").iterdir())
    later, cached = store.get_or_compute(job(write, value=2), on_wait=silent)
    assert not cached
    later.verify()


def test_other_errors_are_not_called_a_full_disk() -> None:
    assert not is_disk_full(OSError(errno.EACCES, "x"))
    assert not is_disk_full(ValueError("x"))


def _compute_counting(root: str, barrier, queue) -> None:
    def body(context: StageContext) -> StageResult:
        queue.put("computed")
        return write(context)

    store = Store(Path(root))
    barrier.wait()
    _, cached = store.get_or_compute(job(body), on_wait=lambda message: None)
    queue.put(f"cached={cached}")


def test_two_processes_compute_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier, queue = context.Barrier(2), context.Queue()
    processes = [context.Process(target=_compute_counting, args=(str(tmp_path), barrier, queue)) for _ in range(2)]
    for process in processes:
        process.start()
    said = sorted(queue.get(timeout=60) for _ in range(3))
    for process in processes:
        process.join()
    assert said == ["cached=False", "cached=True", "computed"]


def test_artifact_under_another_name_is_not_taken_for_it(tmp_path: Path) -> None:
    store = Store(tmp_path)
    first, _ = store.get_or_compute(job(write, value=1), on_wait=silent)
    shutil.copytree(first.path, store.path(job(write, value=2).recipe))
    with pytest.raises(DamagedArtifactError, match="not the one that its name says"):
        store.get_or_compute(job(refuse, value=2), on_wait=silent)


def test_work_goes_on_apart_from_the_artifacts_place(tmp_path: Path) -> None:
    store = Store(tmp_path)

    def body(context: StageContext) -> StageResult:
        assert context.out == store.unfinished_path(job(write).recipe)
        assert not store.path(job(write).recipe).exists()
        (context.out / "replacements").mkdir()
        (context.out / "replacements" / "a.txt").write_text("a")
        return write(context)

    artifact, _ = store.get_or_compute(job(body), on_wait=silent)
    assert artifact.path == store.path(artifact.manifest.recipe)
    assert [record.name for record in artifact.manifest.files] == ["payload.txt", "replacements/a.txt"]
    assert Artifact.load(artifact.path) == artifact
    assert not list((tmp_path / ".unfinished").iterdir())


def test_an_interrupted_stage_leaves_nothing_but_its_resume_state(tmp_path: Path) -> None:
    def interrupted(context: StageContext) -> StageResult:
        write(context)
        (context.resume / "point.txt").write_text("step 3")
        raise KeyboardInterrupt

    store = Store(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        store.get_or_compute(job(interrupted), on_wait=silent)
    assert not store.path(job(write).recipe).exists()
    assert not store.unfinished_path(job(write).recipe).exists()
    assert (store.resume_path(job(write).recipe) / "point.txt").is_file()


def _compute_until_killed(root: str, function: str) -> None:
    kill_at_call(artifact_module, function, 0)
    Store(Path(root)).get_or_compute(job(write), on_wait=silent)


@pytest.mark.parametrize("function", ["sha256_of", "replace", "flush_to_disk"])
def test_a_kill_between_the_payload_and_the_commit_leaves_no_artifact(tmp_path: Path, function: str) -> None:
    """While files are hashed, before the manifest is written, and between the manifest and the rename."""
    process = multiprocessing.get_context("fork").Process(target=_compute_until_killed, args=(str(tmp_path), function))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    store, recipe = Store(tmp_path), job(write).recipe
    assert (store.unfinished_path(recipe) / "payload.txt").is_file()
    assert store.find(recipe) is None
    assert not store.path(recipe).exists()
    _, cached = store.get_or_compute(job(write), on_wait=silent)
    assert not cached
    assert not store.unfinished_path(recipe).exists()


def _write_with_a_point(context: StageContext) -> StageResult:
    (context.resume / "point.txt").write_text("step 3")
    return write(context)


def _compute_and_link_until_killed(root: str, owner: object, function: str, number: int) -> None:
    store, run = Store(Path(root) / "store"), RunDirectory(root=Path(root), name="run")
    run.path.mkdir()
    kill_at_call(owner, function, number)
    artifact, _ = store.get_or_compute(job(_write_with_a_point), on_wait=silent)
    run.link("distilled", artifact)
    run.write_steps({"distilled": artifact.manifest.fingerprint})


@pytest.mark.parametrize(
    ("owner", "function", "number", "is_committed"),
    [
        pytest.param(Path, "rename", 0, False, id="manifest written, not in place"),
        pytest.param(Path, "rename", 1, False, id="manifest in place, artifact not"),
        pytest.param(artifact_module, "flush_to_disk", 1, True, id="artifact in place, its name not flushed"),
        pytest.param(shutil, "rmtree", 0, True, id="private state still there"),
        pytest.param(Path, "symlink_to", 0, True, id="no link"),
        pytest.param(Path, "rename", 2, True, id="link not in place"),
        pytest.param(Path, "replace", 0, True, id="steps not in place"),
    ],
)
def test_a_kill_around_the_commit_leaves_a_whole_artifact_or_none(
    tmp_path: Path, owner: object, function: str, number: int, is_committed: bool
) -> None:
    target = _compute_and_link_until_killed
    process = multiprocessing.get_context("fork").Process(target=target, args=(str(tmp_path), owner, function, number))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    store, run, recipe = Store(tmp_path / "store"), RunDirectory(root=tmp_path, name="run"), job(write).recipe
    found = store.find(recipe)
    assert (found is not None) == is_committed

    body = refuse if is_committed else _write_with_a_point
    artifact, cached = store.get_or_compute(job(body), on_wait=silent)
    assert cached == is_committed
    artifact.verify()
    run.link("distilled", artifact)
    run.write_steps({"distilled": artifact.manifest.fingerprint})
    assert run.read_steps() == {"distilled": run.linked("distilled")}
    assert not store.resume_path(recipe).exists()
    assert not store.unfinished_path(recipe).exists()
    assert not [path for path in run.path.iterdir() if path.name.endswith(".tmp")]


def test_place_without_a_manifest_is_computed_again(tmp_path: Path) -> None:
    store = Store(tmp_path)
    first, _ = store.get_or_compute(job(write), on_wait=silent)
    (first.path / artifact_module.MANIFEST_NAME).unlink()
    again, cached = Store(tmp_path).get_or_compute(job(write), on_wait=silent)
    assert not cached
    again.verify()
