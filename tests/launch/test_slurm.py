"""Jobs of a pipeline: what is rendered, submitted and refused, and what a script does, with stand-ins for Slurm."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from launch.__main__ import main
from launch.artifact import Artifact
from launch.cluster_config import ClusterConfig
from launch.config import PipelineConfig, StepConfig, compose_pipeline, run_settings
from launch.pipeline import Listener, plan
from launch.preemption import Preempted
from launch.registry import STAGES, Stage
from launch.rundir import RunDirectory
from launch.single_step import committed, run_step
from launch.slurm import StepJob, plan_jobs, plan_report, submit, submit_report, twins
from launch.slurm_site import Container, SiteConfig, read_site
from launch.stage import Inputs, StageContext, StageResult
from launch.store import Store

ROOT = Path(__file__).parents[2]
QUIET = Listener(started=lambda *_: None, waiting=lambda _: None, finished=lambda *_: None)
TEXT = [
    "data=text",
    "data.train_tokens=2000",
    "data.validation_tokens=500",
    "data.calibration_tokens=500",
    "prune_attention.num_attentions=3",
    "prune_attention.num_sequences=2",
    "prune_attention.seq_len=32",
    "dependency.num_sequences=2",
    "dependency.seq_len=32",
    "distill.seq_len=32",
    "distill.max_tokens=1024",
    "distill.eval_sequences=2",
    "evaluate.seq_len=32",
    "evaluate.num_sequences=2",
    "engine.device=cpu",
]


@pytest.fixture
def overrides(pico_parent_dir: Path, tmp_path: Path) -> list[str]:
    text = tmp_path / "text"
    shutil.copytree(Path(os.__file__).parent / "asyncio", text, ignore=shutil.ignore_patterns("__pycache__"))
    return [*TEXT, f"model.source={pico_parent_dir}", f"data.sources.0.path={text}", f"run.root={tmp_path / 'runs'}"]


def jobs_of(
    overrides: list[str],
    run: RunDirectory,
    pipeline: str = "attention_fusion",
    site: SiteConfig | None = None,
    asked: dict[str, StepConfig] | None = None,
) -> list[StepJob]:
    """Jobs of a pipeline, some steps of which are replaced by ``asked``."""
    composed = compose_pipeline(pipeline, overrides)
    composed = replace(composed, steps=composed.steps | (asked or {}))
    return plan_jobs(
        pipeline,
        composed,
        plan(composed, overrides),
        overrides=overrides,
        cluster=run_settings(composed, overrides).cluster,
        site=site or SiteConfig(),
        store=Store(run.store),
        run=run,
    )


def option(script: str, name: str) -> str | None:
    found = [line.split("=", 1)[1] for line in script.splitlines() if line.startswith(f"#SBATCH --{name}=")]
    assert len(found) <= 1
    return found[0] if found else None


@pytest.mark.parametrize("pipeline", ["ultra", "super_49b", "llama_8b"])
def test_the_large_pipelines_plan_offline(
    pipeline: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FUSION_SITE", str(ROOT / "slurm/site.example.yaml"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "empty"))
    assert main([pipeline, "cluster=slurm", "--dry-run", f"run.root={tmp_path}"]) == 0
    said = capsys.readouterr().out
    assert said.count("#!/bin/bash") == said.count("to compute") > 5
    assert "#SBATCH --account=my_account" in said
    assert list(tmp_path.iterdir()) == []
    assert main([pipeline, "--dry-run", f"run.root={tmp_path}"]) == 0


def test_the_recipe_has_the_papers_budgets() -> None:
    """54B at 8k, 5B at 16k and 32k, 0.8B at 128k; then 73B at 8k and 15B at 258k with a rope factor of 16."""
    steps = {step.name: step.config for step in plan(compose_pipeline("ultra", []), [])}
    distilled = steps["distilled"].distill
    phases = [
        phase
        for name in ("extended", "extended_long", "pretrained", "pretrained_long")
        for phase in steps[name].extend_context.phases
    ]
    budgets = [(distilled.seq_len, distilled.max_tokens), *((phase.seq_len, phase.max_tokens) for phase in phases)]
    billion = 10**9
    assert budgets == [
        (8192, 54 * billion),
        (16384, 5 * billion),
        (32768, 5 * billion),
        (131072, 800_000_000),
        (8192, 73 * billion),
        (258048, 15 * billion),
    ]
    assert distilled.batch_size * distilled.seq_len == 512 * 8192
    # All phases take as many tokens to a step, to within a sequence; the last, with as few sequences, twice as many.
    for phase in phases[:-1]:
        assert abs(phase.batch_size * phase.seq_len - 512 * 8192) < 2**18
    assert phases[-1].rope.factor == 16.0
    assert steps["distilled"].objective.lm == 0.0
    assert steps["pretrained"].objective.kld == 0.0


def test_a_job_has_the_nodes_and_processes_of_its_step(overrides: list[str], tmp_path: Path) -> None:
    settings = [*overrides, "cluster=slurm", "cluster.nodes=3", "cluster.gpus_per_node=4", "distill.batch_size=24"]
    jobs = {job.step: job for job in jobs_of(settings, RunDirectory(root=tmp_path, name="r"))}
    shapes = {step: (job.nodes, job.processes_per_node) for step, job in jobs.items()}
    assert shapes["distilled"] == (3, 4)
    assert shapes["fused"] == (1, 1)
    assert jobs["distilled"].after == ("fused", "parent", "data")
    script = jobs["distilled"].script
    assert (option(script, "nodes"), option(script, "gpus-per-node")) == ("3", "4")
    assert option(script, "signal") == "B:USR2@300"
    assert "--nnodes=3 --nproc-per-node=4" in script
    assert "torch.distributed.run" not in jobs["fused"].script


def test_settings_reach_the_job_as_they_were_typed(overrides: list[str], tmp_path: Path) -> None:
    settings = [*overrides, "cluster=slurm", "cluster.gpus_per_node=1", "fuse.groups=[[1, 2]]", "fuse.norm='last'"]
    script = jobs_of(settings, RunDirectory(root=tmp_path, name="r"))[0].script
    assert "'fuse.groups=[[1, 2]]'" in script
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_a_step_may_ask_for_its_own_machines(overrides: list[str], tmp_path: Path) -> None:
    pipeline = compose_pipeline("attention_fusion", overrides)
    step = replace(pipeline.steps["distilled"], nodes=2, gpus_per_node=4, time_limit="2-00:00:00", signal_seconds=900)
    run = RunDirectory(root=tmp_path, name="r")
    jobs = {job.step: job for job in jobs_of([*overrides, "cluster=slurm"], run, asked={"distilled": step})}
    script = jobs["distilled"].script
    assert [option(script, name) for name in ("nodes", "gpus-per-node", "time")] == ["2", "4", "2-00:00:00"]
    assert option(script, "signal") == "B:USR2@900"
    assert option(jobs["parent"].script, "time") == "04:00:00"


def test_more_nodes_for_a_stage_of_one_process_are_refused(overrides: list[str], tmp_path: Path) -> None:
    pipeline = compose_pipeline("attention_fusion", overrides)
    steps = {**pipeline.steps, "fused": replace(pipeline.steps["fused"], nodes=2)}
    with pytest.raises(ValueError, match="step fused: nodes=2, but stage fuse runs in one process"):
        plan_jobs(
            "attention_fusion",
            replace(pipeline, steps=steps),
            plan(pipeline, overrides),
            overrides=overrides,
            cluster=ClusterConfig(kind="slurm"),
            site=SiteConfig(),
            store=Store(tmp_path / "store"),
            run=RunDirectory(root=tmp_path, name="r"),
        )


def test_a_batch_that_the_nodes_cannot_share_is_refused(overrides: list[str], tmp_path: Path) -> None:
    settings = [*overrides, "cluster=slurm", "cluster.nodes=3", "cluster.gpus_per_node=7"]
    with pytest.raises(ValueError, match=r"step distilled: .*batch_size=16 cannot be dealt evenly over 21 data ranks"):
        jobs_of(settings, RunDirectory(root=tmp_path, name="r"))


def test_one_step_runs_on_what_the_others_have_left(overrides: list[str], tmp_path: Path) -> None:
    steps = plan(compose_pipeline("attention_fusion", overrides), overrides)
    run = RunDirectory(root=tmp_path, name="r")
    run.path.mkdir()
    store = Store(run.store)
    context = StageContext(out=run.path, resume=run.path, pool=store.pool, run_name="r", step_name="")

    def run_one(name: str) -> dict[str, Artifact] | None:
        return run_step(steps, name, store=store, run=run, context=context, listener=QUIET)

    with pytest.raises(ValueError, match="step data needs what step parent gives, which is not in"):
        run_one("data")
    assert run_one("parent") is None
    assert run_one("data") is None
    assert list(committed(steps, store=store, run=run)) == ["parent", "data"]
    left = {job.step: job.after for job in jobs_of([*overrides, "cluster.gpus_per_node=1"], run)}
    assert left["pruned"] == ()
    assert "parent" not in left
    assert run.linked("data") is not None
    # The parent, which is there now, is the teacher of a step to come, and has four heads.
    dealt = [*overrides, "cluster.gpus_per_node=8", "steps.distilled.engine.sequence_parallel=8"]
    with pytest.raises(ValueError, match=r"step distilled: .*parallel=8: it does not divide the 4 attention heads of"):
        jobs_of(dealt, run)


@dataclass(frozen=True, kw_only=True)
class SeedOnly:
    seed: int


PLACE = {"device": "login node", "content": "one"}


def place(config: SeedOnly) -> dict[str, str]:
    return dict(PLACE)


def write_nothing(config: SeedOnly, inputs: Inputs, context: StageContext) -> StageResult:
    (context.out / "value.txt").write_text("1")
    return StageResult(headline="measured")


def test_what_was_measured_on_another_machine_counts_where_the_run_links_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = {"config": SeedOnly, "body": f"{__name__}:write_nothing", "output": "model"}
    monkeypatch.setitem(STAGES, "measure", Stage(inputs={}, externals=f"{__name__}:place", **body))
    monkeypatch.setitem(STAGES, "use", Stage(inputs={"model": "model"}, **body))
    monkeypatch.setattr(Stage, "load_body", lambda self: write_nothing)
    monkeypatch.setattr(Stage, "load_externals", lambda self: place if self.externals else None)
    names = {"first": StepConfig(stage="measure"), "second": StepConfig(stage="use", inputs={"model": "first"})}
    pipeline = PipelineConfig(about="test", steps=names)
    run = RunDirectory(root=tmp_path, name="r")
    run.path.mkdir()
    store = Store(run.store)
    context = StageContext(out=run.path, resume=run.path, pool=store.pool, run_name="r", step_name="")

    def run_one(name: str) -> dict[str, Artifact] | None:
        return run_step(plan(pipeline, []), name, store=store, run=run, context=context, listener=QUIET)

    assert run_one("first") is None
    monkeypatch.setitem(PLACE, "device", "compute node")
    done = run_one("second")
    assert done is not None
    assert list(done) == ["first", "second"]
    assert done["first"].manifest.externals["device"] == "login node"
    assert done["second"].manifest.inputs["model"].fingerprint == done["first"].manifest.fingerprint
    # What the measurement was of is another matter.
    monkeypatch.setitem(PLACE, "content", "two")
    assert committed(plan(pipeline, []), store=store, run=run) == {}


# --- what stands in for Slurm ---


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory at the front of PATH; calls are recorded in ``calls``."""
    directory = tmp_path / "bin"
    directory.mkdir()
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")
    return directory


def stand_in(directory: Path, name: str, body: str) -> None:
    file = directory / name
    file.write_text(f'#!/bin/bash\necho "{name} $*" >> {directory}/calls\n{body}\n')
    file.chmod(0o755)


def calls(directory: Path) -> list[str]:
    file = directory / "calls"
    return file.read_text().splitlines() if file.exists() else []


def small_jobs(run: RunDirectory) -> list[StepJob]:
    def job(step: str, *after: str) -> StepJob:
        return StepJob(
            step=step, nodes=1, processes_per_node=1, after=after, artifact=f"made-{step}", script="#!/bin/bash\n"
        )

    return [job("a"), job("b", "a"), job("c", "a", "b")]


def in_queue(*rows: str) -> str:
    """What a squeue does that tells ``rows``: id, reason and name of a job."""
    return "; ".join(f"echo '{row}'" for row in rows)


NUMBERED = 'case "$*" in *test-only*) exit 0;; esac; grep -c "^sbatch --parsable" $(dirname $0)/calls'


def test_jobs_wait_for_those_that_they_need(commands: Path, tmp_path: Path) -> None:
    stand_in(commands, "sbatch", NUMBERED)
    run = RunDirectory(root=tmp_path, name="r")
    assert submit(small_jobs(run), run) == {"a": "1", "b": "2", "c": "3"}
    submitted = [call for call in calls(commands) if "--parsable" in call]
    scripts = run.path / "slurm"
    assert submitted == [
        f"sbatch --parsable {scripts}/a.sbatch",
        f"sbatch --parsable --dependency=afterok:1 --kill-on-invalid-dep=yes {scripts}/b.sbatch",
        f"sbatch --parsable --dependency=afterok:1:2 --kill-on-invalid-dep=yes {scripts}/c.sbatch",
    ]
    assert all((run.path / "logs" / step).is_dir() for step in "abc")
    stand_in(commands, "squeue", in_queue("3|Priority|r.c"))
    with pytest.raises(ValueError, match=r"run r has jobs in the queue \(c 3\); wait for them, or scancel 3"):
        submit(small_jobs(run), run)
    stand_in(commands, "squeue", 'echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1')
    assert submit(small_jobs(run), run)["a"] == "4"


def test_what_another_run_computes_is_waited_for_however_it_ends(commands: Path, tmp_path: Path) -> None:
    stand_in(commands, "sbatch", NUMBERED)
    first, second = (RunDirectory(root=tmp_path, name=name) for name in ("first", "second"))
    assert twins(small_jobs(first), first) == {}
    submit(small_jobs(first), first)
    stand_in(commands, "squeue", in_queue("2|Priority|first.b", "3|Dependency|first.c"))
    jobs = small_jobs(second)[:2]
    assert twins(jobs, second) == {"b": "2"}, "job 1 has ended"
    submit(jobs, second, twins(jobs, second))
    assert calls(commands)[-1] == (
        f"sbatch --parsable --dependency=afterok:4,afterany:2 --kill-on-invalid-dep=yes {second.path}/slurm/b.sbatch"
    )
    third = RunDirectory(root=tmp_path, name="third")
    rows = ["2|None|first.b", "3|Dependency|first.c", "4|None|second.a", "5|Dependency|second.b"]
    stand_in(commands, "squeue", in_queue(*rows))
    assert twins(jobs, third) == {"a": "4", "b": "2"}, "the one that computes, not one that waits for it"
    stand_in(commands, "squeue", in_queue("2|JobHeldUser|first.b", "4|None|of another controller"))
    assert twins(jobs, third) == {}, "one may be held for ever, the other has only the number of a job that has ended"


def test_the_page_of_a_sweep_waits_for_all_jobs_of_its_runs(commands: Path, tmp_path: Path) -> None:
    stand_in(commands, "sbatch", NUMBERED)
    stand_in(commands, "scancel", "")
    stand_in(commands, "squeue", "")
    run, sweep = (RunDirectory(root=tmp_path, name=name) for name in ("run", "sweep"))
    script = plan_report(sweep, "demo", cluster=ClusterConfig(kind="slurm"), site=SiteConfig())
    assert f" -m launch report {sweep.path}\n" in script
    assert "gpus" not in script, "it needs none"
    submit(small_jobs(run), run)
    assert submit_report(script, sweep, [run]) is None, "they all have ended"
    rows = [
        *(f"{number}|None|run.{step}" for number, step in zip("123", "abc", strict=True)),
        "4|Dependency|sweep.report",
    ]
    stand_in(commands, "squeue", in_queue(*rows))
    assert submit_report(script, sweep, [run]) == "4"
    assert "--dependency=afterany:1:2:3 " in calls(commands)[-1]
    assert submit_report(script, sweep, [run]) == "5"
    assert calls(commands)[-1] == "scancel 4", "it has taken the place of the one before"


def test_a_refusal_comes_before_anything_is_submitted(commands: Path, tmp_path: Path) -> None:
    words = "sbatch: error: invalid partition specified: gpus\\nsbatch: error: Batch job submission failed: Invalid"
    stand_in(commands, "sbatch", f'case "$*" in *c.sbatch) printf "{words}\\n" >&2; exit 1;; esac')
    run = RunDirectory(root=tmp_path, name="r")
    with pytest.raises(ValueError, match=r"step c: .* refused: invalid partition specified: gpus; Batch job .*nothing"):
        submit(small_jobs(run), run)
    assert not [call for call in calls(commands) if "--parsable" in call]


def test_a_chain_that_breaks_off_is_taken_back(commands: Path, tmp_path: Path) -> None:
    limit = 'case "$*" in *parsable*c.sbatch) echo "sbatch: error: job limit" >&2; exit 1;; esac'
    stand_in(commands, "sbatch", f"{limit}; {NUMBERED}")
    stand_in(commands, "scancel", "")
    run = RunDirectory(root=tmp_path, name="r")
    with pytest.raises(ValueError, match="step c: sbatch refused: job limit; 2 jobs before it were taken back"):
        submit(small_jobs(run), run)
    assert calls(commands)[-1] == "scancel 1 2"


def test_no_slurm_and_no_site_file(
    overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    site = tmp_path / "site.yaml"
    monkeypatch.setenv("FUSION_SITE", str(site))
    monkeypatch.setenv("PATH", str(tmp_path))
    command = ["attention_fusion", *overrides, "cluster=slurm", "cluster.gpus_per_node=1"]
    assert main(command) == 2
    assert f"cp {ROOT}/slurm/site.example.yaml {site}" in capsys.readouterr().err
    site.write_text("partition: gpu\n")
    assert main(command) == 2
    assert "sbatch, which is not on PATH here" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_the_example_of_a_site_is_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FUSION_SITE", str(ROOT / "slurm/site.example.yaml"))
    site = read_site()
    assert site.sbatch_options(8) == [
        "--account=my_account",
        "--partition=batch",
        "--gpus-per-node=8",
        "--exclusive",
        "--mem=0",
    ]
    assert site.python == "/shared/envs/ffn-fusion/bin/python"
    wrong = tmp_path / "wrong.yaml"
    monkeypatch.setenv("FUSION_SITE", str(wrong))
    for content in ("partitions: me\n", "options: [exclusive]\n", "account: [1\n", "- a\n"):
        wrong.write_text(content)
        with pytest.raises(ValueError, match=r"wrong\.yaml: .*site\.example\.yaml says what may stand in it"):
            read_site()


def test_a_container_brings_its_python() -> None:
    site = SiteConfig(container=Container(image="a.sqsh", mounts=("/shared:/shared", "/scratch:/scratch")))
    assert site.python == "python"
    assert site.srun_options() == ["--container-image=a.sqsh", "--container-mounts=/shared:/shared,/scratch:/scratch"]
    assert SiteConfig().python == sys.executable
    with pytest.raises(ValueError, match="venv=/v and container are both given"):
        SiteConfig(container=Container(image="a.sqsh"), venv="/v")


# --- what a script does ---

SRUN = {
    "done": 'echo 0 > "$FUSION_JOB_STATUS"',
    "refused": 'echo 2 > "$FUSION_JOB_STATUS"; exit 1',
    "crashed": "exit 137",
    "saved": """
trap 'echo 75 > "$FUSION_JOB_STATUS"; kill $!; exit 1' USR2
touch "$(dirname $0)/up"
sleep 30 & wait
""",
    "ended": 'touch "$(dirname $0)/up"; sleep 1; exit 9',
    # Not with the script's output, whose reader would wait for the end of the sleep.
    "stuck": """trap '' USR2; touch "$(dirname $0)/up"; exec > /dev/null 2>&1; sleep 30""",
}


class Script:
    """One step's script under stand-ins of srun and scontrol."""

    def __init__(self, overrides: list[str], root: Path, commands: Path, *, max_failures: int = 3) -> None:
        run = RunDirectory(root=root, name="r")
        settings = [*overrides, "cluster=slurm", "cluster.gpus_per_node=1", f"cluster.max_failures={max_failures}"]
        settings += ["cluster.signal_seconds=1"]
        self.text = jobs_of(settings, run)[0].script.replace("sleep 5;", "sleep 1;")
        self.logs = run.path / "logs/parent"
        self.commands = commands
        # Slurm ends the script as it queues the job again.
        stand_in(commands, "scontrol", "kill -KILL $PPID")

    def start(self, behaviour: str) -> subprocess.Popen[str]:
        stand_in(self.commands, "srun", SRUN[behaviour])
        place = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1"}
        return subprocess.Popen(
            ["bash", "-c", self.text], env={**os.environ, **place}, stdout=subprocess.PIPE, text=True
        )

    def run(self, behaviour: str, send: signal.Signals | None = None) -> tuple[int, str]:
        process = self.start(behaviour)
        if send is not None:
            up = self.commands / "up"
            end = time.monotonic() + 20
            while not up.exists():
                assert time.monotonic() < end
                time.sleep(0.05)
            up.unlink()
            process.send_signal(send)
        said, _ = process.communicate(timeout=30)
        return process.returncode, said

    @property
    def requeues(self) -> int:
        return calls(self.commands).count("scontrol requeue 7")


@pytest.fixture
def script(overrides: list[str], tmp_path: Path, commands: Path) -> Script:
    return Script(overrides, tmp_path, commands)


def test_a_step_that_is_done_ends_its_job(script: Script) -> None:
    status, _ = script.run("done")
    assert (status, script.requeues) == (0, 0)
    assert (script.logs / "latest").resolve() == (script.logs / "attempt_1").resolve()


def test_a_refusal_is_not_tried_again(script: Script) -> None:
    status, said = script.run("refused")
    assert (status, script.requeues) == (2, 0)
    assert "refused, see" in said


def test_failures_are_tried_again_up_to_the_cap(script: Script) -> None:
    for number in (1, 2):
        status, said = script.run("crashed")
        assert (status, script.requeues) == (-signal.SIGKILL, number)
        assert f"failure {number} of at most 3, queued again" in said
    status, said = script.run("crashed")
    assert (status, script.requeues) == (1, 2)
    assert "failure 3 of at most 3, given up" in said
    assert (script.logs / "latest").resolve().name == "attempt_3"


def test_the_signal_reaches_the_step_and_a_saved_state_is_no_failure(script: Script) -> None:
    status, said = script.run("saved", send=signal.SIGUSR2)
    assert (status, script.requeues) == (-signal.SIGKILL, 1)
    assert "stopped with its state saved; queued again" in said
    assert not list(script.logs.glob("failures*"))


def test_a_step_that_does_not_stop_in_time_is_queued_again_all_the_same(script: Script) -> None:
    status, said = script.run("stuck", send=signal.SIGUSR2)
    assert (status, script.requeues) == (-signal.SIGKILL, 1)
    assert "no resume point within" in said
    assert "failure 1 of at most 3" in said


def test_a_job_that_is_taken_away_is_not_queued_again(script: Script) -> None:
    status, said = script.run("ended", send=signal.SIGTERM)
    assert (status, script.requeues) == (1, 0)
    assert "ended with exit status 9" in said


# --- the command line ---


def test_a_step_tells_its_job_how_it_ended(
    overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status = tmp_path / "status"
    monkeypatch.setenv("FUSION_JOB_STATUS", str(status))
    command = ["attention_fusion", *overrides, "run.name=r", "cluster=slurm"]
    assert main([*command, "--step", "data"]) == 2
    assert status.read_text() == "2\n"
    assert main([*command, "--step", "parent"]) == 0
    assert status.read_text() == "0\n"
    status.unlink()
    monkeypatch.setattr("launch.commands.run_step", _lose_the_disk)
    assert main([*command, "--step", "data"]) == 2
    assert not status.exists(), "another attempt may find the disk again"
    monkeypatch.setattr("launch.commands.run_step", _stop)
    assert main([*command, "--step", "data"]) == 75
    assert status.read_text() == "75\n"
    assert "stopped at 8 tokens; the same command goes on from there" in capsys.readouterr().out


def _lose_the_disk(*_: object, **__: object) -> None:
    try:
        raise OSError(5, "Input/output error", "/shared")
    except OSError as error:
        raise ValueError("step data: /shared is gone") from error


def _stop(*_: object, **__: object) -> None:
    raise Preempted("stopped at 8 tokens")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--step", "parents"], "--step parents: no such step; steps are data, parent,"),
        (["demo", "--step", "parent", "--dry-run"], "without --multirun and --dry-run"),
        (["fuse", "--step", "parent"], "--step parent runs one step of one pipeline"),
        (
            ["prepare_data", "cluster=slurm", "data.tokenizer=train"],
            "cluster.kind=slurm runs pipelines; prepare_data is",
        ),
        (["demo", "steps.data.cluster.nodes=2"], "cluster cannot be set for one step"),
        (
            ["demo", "cluster=slurm", "cluster.time_limit=00:04:00"],
            "signal_seconds=300 is not before the start of a job",
        ),
        (["demo", "cluster=slurm", "cluster.time_limit=4h"], "cluster.time_limit=4h is no time"),
    ],
)
def test_what_cannot_be_is_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, f"run.root={tmp_path}"]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.strip().splitlines()) == 1
