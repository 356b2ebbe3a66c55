"""Does a run survive SIGKILL at any moment? Kills in every step of a pipeline, and runs that are killed many times.

    python benchmarks/kills.py OUT [--kills 50] [--chains 3] [--chain-kills 8] [--seed 0] [--target demo] [KEY=VALUE]

The pipeline runs once without interruption. Each kill then takes the artifacts of all steps before one, starts that
step (``python -m launch TARGET --step STEP``), kills its process group at a random moment and starts the same command
again until it ends. Moments are dealt over all steps and, within one, over its time; some hit the writing of a resume
point, some the commit. What comes out is compared with the uninterrupted run, file by file, and every artifact of the
store is verified after the kill and at the end. Chains run the whole pipeline (``python -m launch TARGET``) and are
killed again and again.

Measured times differ from run to run: artifacts of stages that measure are verified and not compared, and chains begin
with the costs of the uninterrupted run. Results are written after every kill, and a second call goes on.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ablation import write_results
from kill_results import Chain, Kill, read_findings, table
from killed_launch import Kind, Launch, Moment, Places, first_new_step, kill_at, lost_steps

from launch.artifact import Artifact, DamagedArtifactError
from launch.config import compose_pipeline
from launch.pipeline import PlannedStep, plan
from launch.provenance import provenance
from launch.rundir import RunDirectory
from launch.store import Store

RUN = "run"
TRAINING = ("pretrain", "build_library", "distill", "extend_context")
"""Stages with resume points."""
MEASURING = ("measure_costs", "benchmark")
"""Stages whose output is another one each time."""
CLOCKS = ("perf/", "mem/")
"""Rows of metrics.jsonl that no two runs share."""
MAX_RESTARTS = 3
MAX_TRIES = 8
"""To hit a step that ends before its moment; each is at half the time of the one before."""
STARTUP_S = 8.0
"""A chain's attempt is given this much longer than its share of the steps: to import, and to verify what is there."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One kill."""

    number: int
    step: str
    moment: Moment


def deal(steps: Sequence[PlannedStep], number: int, seed: int) -> list[Case]:
    """``number`` kills: an equal share for every step, the rest for those that train; strata of each one's time."""
    training = [step.name for step in steps if step.recipe.stage in TRAINING]
    names = [step.name for step in steps] * (number // (len(steps) + len(training) // 2) or 1)
    while training and len(names) < number:
        names += training
    counts = {step.name: names[:number].count(step.name) for step in steps}
    rng = random.Random(seed)
    cases = []
    for step in steps:
        kinds = _kinds(counts[step.name], trains=step.name in training)
        for kind in dict.fromkeys(kinds):
            count = kinds.count(kind)
            moments = [Moment(kind=kind, fraction=(index + rng.random()) / count) for index in range(count)]
            cases += [(step.name, moment) for moment in moments]
    return [Case(number=number, step=step, moment=moment) for number, (step, moment) in enumerate(cases)]


def _kinds(count: int, *, trains: bool) -> list[Kind]:
    """Every third kill of a step hits its commit; where it trains, the others a training step or a resume point."""
    own: tuple[Kind, ...] = ("training step", "commit", "resume point")
    cycle: tuple[Kind, ...] = own if trains else ("anywhere", "commit", "anywhere")
    return [cycle[index % 3] for index in range(count)]


class Bench:
    """The pipeline, its uninterrupted run, and copies of it that are killed."""

    def __init__(self, out: Path, target: str, overrides: list[str]) -> None:
        self.out = out
        self.target = target
        self.overrides = overrides
        self.steps = plan(compose_pipeline(target, overrides), overrides)
        self._reference = out / "work" / "reference"

    def run_reference(self) -> dict[str, float]:
        """Seconds of every step of the uninterrupted run, which is made if it is not there."""
        log = self.out / "work" / "reference.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        if Launch(self._arguments(self._reference), log).wait() != 0:
            raise SystemExit(f"the uninterrupted run failed; see {log}")
        artifacts = RunDirectory(root=self._reference, name=RUN).read_steps()
        return {name: artifact.manifest.seconds for name, artifact in artifacts.items()}

    def kill(self, case: Case, *, step_s: float) -> Kill:
        """Kill one step, and finish it."""
        root = self.out / "work" / f"kill_{case.number}"
        step = next(step for step in self.steps if step.name == case.step)
        places, command = self._places(root, step), [*self._arguments(root), "--step", case.step]
        log = root.with_suffix(".log")
        for tries in range(1, MAX_TRIES + 1):
            self._copy_inputs(root, step)
            launch = Launch(command, log)
            moment = Moment(kind=case.moment.kind, fraction=case.moment.fraction / 2 ** (tries - 1))
            if kill_at(launch, moment, places, step_s=step_s):
                break
        else:
            raise SystemExit(f"step {case.step} ended before it could be killed; see {log}")
        killed_after, before = launch.seconds, launch.bars()
        left, damaged = _left(places), _damaged(root)
        restarts = [Launch(command, log)]
        finished = restarts[0].wait() == 0
        restart_s = restarts[0].seconds
        while not finished and len(restarts) < MAX_RESTARTS:
            restarts.append(Launch(command, log))
            finished = restarts[-1].wait() == 0
        after = restarts[0].bars()
        new = first_new_step(after) if step.recipe.stage in TRAINING else None
        kill = Kill(
            number=case.number,
            step=case.step,
            kind=case.moment.kind,
            dealt_fraction=round(case.moment.fraction, 3),
            fraction=round(moment.fraction, 5),
            tries=tries,
            killed_after_s=round(killed_after, 2),
            left=left,
            finished=finished,
            restarts=len(restarts),
            damaged=sorted({*damaged, *_damaged(root)}),
            unequal=self._unequal(root, [step]),
            leftovers=_leftovers(root),
            restart_s=round(restart_s, 2),
            resume_s=None if new is None else round(new.at_s, 2),
            lost_steps=lost_steps(before, after) if new is not None else None,
        )
        if kill.is_survived:
            shutil.rmtree(root)
            log.unlink()
        return kill

    def chain(self, number: int, kills: int, *, total_s: float, seed: int) -> Chain:
        """Run the whole pipeline, kill it ``kills`` times at random, let it end."""
        root, rng = self.out / "work" / f"chain_{number}", random.Random(f"{seed}/{number}")
        log = root.with_suffix(".log")
        shutil.rmtree(root, ignore_errors=True)
        for step in self.steps:
            if step.recipe.stage == "measure_costs":
                self._copy(root, step)
        damaged: set[str] = set()
        killed: list[str] = []
        started = time.monotonic()
        for _ in range(kills):
            launch = Launch(self._arguments(root), log)
            launch.until(lambda: False, timeout_s=STARTUP_S + rng.uniform(0.2, 1.8) * total_s / (kills + 1))
            if not launch.kill():
                break
            killed.append(self._running(root))
            damaged |= set(_damaged(root))
        finished = Launch(self._arguments(root), log).wait() == 0
        chain = Chain(
            number=number,
            kills=len(killed),
            steps_killed=killed,
            finished=finished,
            damaged=sorted({*damaged, *_damaged(root)}),
            unequal=self._unequal(root, self.steps),
            leftovers=_leftovers(root),
            seconds=round(time.monotonic() - started, 1),
        )
        if chain.is_survived:
            shutil.rmtree(root)
            log.unlink()
        return chain

    def _arguments(self, root: Path) -> list[str]:
        return [self.target, *self.overrides, f"run.root={root}", f"run.name={RUN}"]

    def _places(self, root: Path, step: PlannedStep) -> Places:
        store = Store(root / "store")
        return Places(
            unfinished=store.unfinished_path(step.recipe),
            resume=store.resume_path(step.recipe),
            artifact=store.path(step.recipe),
        )

    def _copy_inputs(self, root: Path, step: PlannedStep) -> None:
        """A store that has what all steps before ``step`` gave, and nothing else."""
        shutil.rmtree(root, ignore_errors=True)
        (root / "store").mkdir(parents=True)
        for earlier in self.steps[: self.steps.index(step)]:
            self._copy(root, earlier)

    def _copy(self, root: Path, step: PlannedStep) -> None:
        """The artifact of ``step`` from the uninterrupted run."""
        name = Store(root / "store").path(step.recipe).name
        shutil.copytree(self._reference / "store" / name, root / "store" / name)

    def _running(self, root: Path) -> str:
        """The step that was killed; the report behind the last one."""
        there = [step.name for step in self.steps if not self._places(root, step).artifact.exists()]
        return there[0] if there else "report"

    def _unequal(self, root: Path, steps: Iterable[PlannedStep]) -> list[str]:
        """Files of the artifacts of ``steps`` that the uninterrupted run has otherwise, or only one has."""
        found = []
        for step in steps:
            if step.recipe.stage in MEASURING:
                continue
            own, expected = (_content(Store(place / "store").path(step.recipe)) for place in (root, self._reference))
            names = sorted(own.keys() | expected.keys())
            found += [f"{step.name}/{name}" for name in names if own.get(name) != expected.get(name)]
        return found


def _content(artifact: Path) -> dict[str, Any]:
    """Checksum of every file, and of metrics the rows without what a clock measured; nothing where none is there."""
    if not artifact.is_dir():
        return {}
    content: dict[str, Any] = {record.name: record.sha256 for record in Artifact.load(artifact).manifest.files}
    if "metrics.jsonl" in content:
        rows = [json.loads(line) for line in (artifact / "metrics.jsonl").read_text().splitlines()]
        content["metrics.jsonl"] = [
            {name: value for name, value in row.items() if not name.startswith(CLOCKS)} for row in rows
        ]
    return content


def _artifacts(root: Path) -> list[Path]:
    return [path for path in sorted((root / "store").glob("*")) if not path.name.startswith(".")]


def _damaged(root: Path) -> list[str]:
    """Artifacts of the store that do not match their manifests, by checksum; those without a manifest count."""
    found = []
    for path in _artifacts(root):
        try:
            Artifact.load(path).verify()
        except (DamagedArtifactError, ValueError) as error:
            found.append(str(error))
    return found


def _left(places: Places) -> list[str]:
    """What a kill left of one step."""
    points = [path for path in places.resume.rglob("step_*") if path.is_dir()]
    standing = {
        "artifact": places.artifact.exists(),
        "unfinished": places.unfinished.exists(),
        "resume point": any(path.suffix != ".tmp" for path in points),
        "half a resume point": any(path.suffix == ".tmp" for path in points),
    }
    return [name for name, stands in standing.items() if stands]


def _leftovers(root: Path) -> list[str]:
    hidden = (root / "store" / name for name in (".unfinished", ".resume"))
    return [str(path.relative_to(root)) for place in hidden if place.is_dir() for path in place.iterdir()]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="directory of results and of the runs")
    parser.add_argument("--kills", type=int, default=50, help="kills of single steps")
    parser.add_argument("--chains", type=int, default=3, help="whole runs that are killed again and again")
    parser.add_argument("--chain-kills", type=int, default=8, help="kills of each of them")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--target", default="demo", help="pipeline")
    options, overrides = parser.parse_known_args(arguments)
    bench = Bench(options.out.absolute(), options.target, overrides)
    findings = read_findings(bench.out)

    def write() -> None:
        content = {**asdict(findings), "overrides": overrides, "seed": options.seed}
        text = table([step.name for step in bench.steps], findings)
        write_results(bench.out, "kills", {**content, "provenance": provenance(seed=options.seed)}, text)

    findings.seconds = findings.seconds or bench.run_reference()
    done = {kill.number for kill in findings.kills}
    for case in deal(bench.steps, options.kills, options.seed):
        if case.number not in done:
            findings.kills.append(bench.kill(case, step_s=findings.seconds[case.step]))
            print(json.dumps(asdict(findings.kills[-1])), flush=True)
            write()
    for number in range(len(findings.chains), options.chains):
        total_s = sum(findings.seconds.values())
        findings.chains.append(bench.chain(number, options.chain_kills, total_s=total_s, seed=options.seed))
        print(json.dumps(asdict(findings.chains[-1])), flush=True)
        write()
    return 0 if all(run.is_survived for run in (*findings.kills, *findings.chains)) else 1


if __name__ == "__main__":
    sys.exit(main())
