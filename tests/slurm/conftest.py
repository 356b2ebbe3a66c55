"""A private Slurm: munge, a controller and two virtual nodes of this machine, in a directory of their own."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DAEMONS = ("slurmctld", "slurmd", "munged")
CONFIGURATION = """\
ClusterName=private
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={base}/munge/socket,cred_expire=5
CryptoType=crypto/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
SchedulerType=sched/backfill
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmctldPidFile={base}/slurmctld.pid
SlurmdPidFile={base}/slurmd.%n.pid
StateSaveLocation={base}/state
SlurmdSpoolDir={base}/spool.%n
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=1
MinJobAge=3600
KillWait=5
JobRequeue=1
ReturnToService=2
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4 RealMemory=4000 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[3]} CPUs=4 RealMemory=4000 State=UNKNOWN
PartitionName=cpu Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""


def program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")


def wait_for(what: str, condition: Callable[[], object], seconds: float) -> None:
    """Poll until ``condition`` holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        time.sleep(0.2)


@dataclass
class Cluster:
    """The daemons, by the processes that the tests have started."""

    base: Path
    daemons: list[subprocess.Popen] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        return {"SLURM_CONF": str(self.base / "slurm.conf"), "PATH": f"{os.environ['PATH']}:/usr/sbin"}

    def command(self, *words: str, **variables: str) -> str:
        environment = {**os.environ, **self.environment, **variables}
        done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    def start(self) -> None:
        munge = self.base / "munge"
        for directory in (munge, self.base / "state"):
            directory.mkdir(mode=0o755)
        (munge / "key").write_bytes(os.urandom(1024))
        (munge / "key").chmod(0o400)
        ports = [_free_port() for _ in range(4)]
        host = socket.gethostname().partition(".")[0]
        (self.base / "slurm.conf").write_text(CONFIGURATION.format(host=host, base=self.base, ports=ports))
        files = {name: f"--{name}-file={munge / name}" for name in ("key", "pid", "log", "seed")}
        self._daemon("munged", "--foreground", "--force", f"--socket={munge / 'socket'}", *files.values())
        wait_for("munge", (munge / "socket").exists, 10)
        self._daemon("slurmctld", "-D", "-f", str(self.base / "slurm.conf"))
        for node in ("n1", "n2"):
            self._daemon("slurmd", "-D", "-f", str(self.base / "slurm.conf"), "-N", node)
        wait_for("two idle nodes", lambda: self._states() == {"idle"}, 30)

    def stop(self) -> None:
        """The jobs, then the daemons, the last to start first."""
        subprocess.run(["scancel", "--user=root"], env={**os.environ, **self.environment}, check=False)
        # A step whose daemon has gone would wait for it for ever. KillWait is 5 s.
        end = time.monotonic() + 20
        while time.monotonic() < end and self._jobs():
            time.sleep(0.2)
        for daemon in reversed(self.daemons):
            daemon.terminate()
        for daemon in self.daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def _daemon(self, name: str, *options: str) -> None:
        path = program(name)
        assert path is not None
        with (self.base / f"{name}.{len(self.daemons)}.out").open("wb") as log:
            environment = {**os.environ, **self.environment}
            self.daemons.append(
                subprocess.Popen([path, *options], stdout=log, stderr=log, env=environment, start_new_session=True)
            )

    def _jobs(self) -> str:
        """Those that are in the queue or still ending."""
        done = subprocess.run(
            ["squeue", "--noheader"],
            env={**os.environ, **self.environment},
            capture_output=True,
            text=True,
            check=False,
        )
        return done.stdout.strip()

    def _states(self) -> set[str]:
        try:
            return set(self.command("sinfo", "--noheader", "--format=%T").split())
        except AssertionError:
            return set()


def launch(cluster: Cluster, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **cluster.environment, "OMP_NUM_THREADS": "1", "COLUMNS": "200", **variables}
    return subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def site_file(directory: Path, **further: str) -> str:
    path = directory / "site.yaml"
    path.write_text(json.dumps({"gpu_request": None, "environment": {"HF_HUB_OFFLINE": "1"}, **further}))
    return str(path)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Skips where Slurm is not installed (``make slurm``), or where this is not root, as slurmd has to be."""
    missing = [name for name in DAEMONS if program(name) is None]
    if missing or os.geteuid() != 0:
        pytest.skip(f"needs root and {', '.join(DAEMONS)}; missing here: {', '.join(missing) or 'root'}")
    running = Cluster(base=tmp_path_factory.mktemp("slurm"))
    try:
        running.start()
        yield running
    finally:
        running.stop()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
