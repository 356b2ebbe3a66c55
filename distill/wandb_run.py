"""Runs of Weights & Biases: the only importer of wandb. Torch-free.

W&B watches and never stops the work. A login that the server refuses is said before the first run of a process starts;
whatever happens after that (a network that is lost, a service process that dies) ends with one warning, and the work
goes on.
"""

from __future__ import annotations

import functools
import hashlib
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from distill.config import TrackingConfig
from distill.wandb_log import read_records

Mode = Literal["off", "offline", "online"]
MAX_FILES = 1_000_000
"""Of one artifact. W&B stops at 10,000 unless told otherwise."""

UNREACHABLE = ("timed out", "dial tcp", "connection", "no such host", "unreachable", "deadline")
"""Words by which an error says that it is the network's."""


@dataclass(frozen=True, kw_only=True)
class RunIdentity:
    """Which W&B run a step of a pipeline run is."""

    run_name: str
    """Name of the pipeline run, the W&B group."""
    step_name: str
    stage: str
    """The W&B job type."""
    place: str
    """Name of the artifact's directory, which tells recipes apart: another one under the same names is another run."""

    @property
    def name(self) -> str:
        """What W&B shows."""
        return f"{self.run_name}/{self.step_name}"

    @property
    def id(self) -> str:
        """The same for every attempt: 16 hexadecimal digits."""
        return hashlib.sha256(f"{self.name}/{self.place}".encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of plain values under named columns."""

    columns: tuple[str, ...]
    rows: Sequence[Sequence[Any]]


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A directory that W&B knows of and does not copy."""

    name: str
    """Of the W&B artifact, whose versions are the directories of this name."""
    kind: str
    """Type of the W&B artifact."""
    path: Path
    aliases: tuple[str, ...]
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class _Process:
    """What this process knows of W&B."""

    current: WandbRun | None = None
    has_started: bool = False
    is_unreachable: bool = False
    is_lost: bool = False


_process = _Process()


def mode(config: TrackingConfig) -> Mode:
    """Where W&B's records go. ``WANDB_MODE`` may take a run offline, or W&B away, and never the other way."""
    if config.wandb == "off":
        return "off"
    wish = os.environ.get("WANDB_MODE", config.wandb)
    if wish == "disabled":
        return "off"
    return "offline" if "offline" in (wish, config.wandb) or wish == "dryrun" else "online"


def check(config: TrackingConfig) -> None:
    """Refuse, before any work starts, what would stop W&B. Looks at this machine alone, not at the network.

    Raises:
        ValueError: W&B is asked for and not installed, or online and without a login.
    """
    wanted = mode(config)
    if wanted == "off":
        return
    wandb = _wandb()
    if wanted == "online" and _process.current is None:
        way_out = "run `wandb login`, set WANDB_API_KEY, or set tracking.wandb=offline"
        try:
            has_login = wandb.login(prompt=False, verify=False)
        except wandb.Error as error:
            raise ValueError(f"tracking.wandb=online: {first_line(error)}; {way_out}") from error
        if not has_login:
            raise ValueError(f"tracking.wandb=online needs a W&B login, and this machine has none; {way_out}")


def default_entity() -> str:
    """The team or user that the login's runs go to. Asks the server.

    Raises:
        ValueError: W&B is not installed, there is no login, or the server does not say.
    """
    check(TrackingConfig(wandb="online"))
    try:
        entity = os.environ.get("WANDB_ENTITY") or _wandb().Api().default_entity
    except Exception as error:
        raise ValueError(f"W&B does not say whose project it is ({first_line(error)}); give entity=") from error
    if not entity:
        raise ValueError("the W&B login has no default entity; give entity=<team or user>")
    return entity


def current(identity: RunIdentity) -> WandbRun | None:
    """The run that is going on in this process, if it is that of ``identity``."""
    run = _process.current
    return run if run is not None and run.identity == identity else None


def is_lost() -> bool:
    """Whether W&B has failed in this process, which then sends it nothing more."""
    return _process.is_lost


def start(
    config: TrackingConfig,
    identity: RunIdentity,
    *,
    settings: Mapping[str, Any],
    state_dir: Path,
    files_dir: Path | None = None,
) -> WandbRun | None:
    """Start the run of ``identity``, or go on with it.

    Args:
        config: project, entity, mode.
        identity: names and id.
        settings: resolved configuration, shown beside the run.
        state_dir: directory that survives a kill; there stands how many rows W&B has been given, which an offline run
            does not know of its predecessor.
        files_dir: W&B keeps its files in ``<files_dir>/wandb``; None: where it keeps them by itself. ``WANDB_DIR`` goes
            before.

    Returns:
        The run; None where W&B is off, or was lost by an earlier run of this process.

    Raises:
        ValueError: W&B is not installed, or refuses to start the first run of this process.
    """
    wanted = mode(config)
    if wanted == "off" or _process.is_lost:
        return None
    wandb = _wandb()
    own_dir = {"dir": str(files_dir)} if files_dir is not None and "WANDB_DIR" not in os.environ else {}
    arguments = {
        "project": config.project,
        "entity": config.entity,
        "group": identity.run_name,
        "job_type": identity.stage,
        "name": identity.name,
        "id": identity.id,
        "resume": "allow",
        "config": dict(settings),
        **own_dir,
    }
    try:
        run = _init(wandb, "offline" if _process.is_unreachable else wanted, arguments)
        run.define_metric("*", step_metric="tokens")
        _process.current = WandbRun(run, identity, state_dir / f"{identity.id}.rows")
    except Exception as error:
        if isinstance(error, ValueError) and not _process.has_started:
            raise
        _lose(error)
        return None
    _process.has_started = True
    return _process.current


def _init(wandb: Any, wanted: Mode, arguments: Mapping[str, Any]) -> Any:
    """A W&B run; an offline one where the server is asked for and not reached."""
    # Of an offline run W&B has nothing to say; of one online, that the network is lost.
    loudness = {"settings": wandb.Settings(silent=wanted == "offline", quiet=True)}
    try:
        return wandb.init(mode=wanted, **loudness, **arguments)
    except wandb.Error as error:
        is_network = any(word in str(error).lower() for word in UNREACHABLE)
        if wanted == "offline" or not (is_network or _process.has_started):
            raise ValueError(
                f"W&B does not start ({first_line(error)}); run `wandb login`, look at tracking.entity and "
                "tracking.project, or set tracking.wandb=offline"
            ) from error
        _process.is_unreachable = True
        warnings.warn(
            f"W&B does not answer ({first_line(error)}); the further runs of this process are kept offline, for "
            "`wandb sync` to send",
            RuntimeWarning,
            stacklevel=5,
        )
        # The service process keeps the id of a run that did not start.
        wandb.teardown()
    return wandb.init(mode="offline", **loudness, **arguments)


def _gives_up(method: Callable[..., None]) -> Callable[..., None]:
    """``method`` with a warning in place of an exception, after which W&B is left alone."""

    @functools.wraps(method)
    def guarded(self: WandbRun, *arguments: Any, **named: Any) -> None:
        if _process.is_lost:
            return
        try:
            method(self, *arguments, **named)
        except Exception as error:
            _lose(error)

    return guarded


class WandbRun:
    """One run that is going on. Its methods do not raise: W&B is given up with a warning instead.

    A row's number is its W&B step, and a row whose number W&B has already is not sent again: the server says so, or
    offline the logs of earlier attempts. W&B cannot take back the rows between a resume point and the end of the
    attempt that came further.
    """

    def __init__(self, run: Any, identity: RunIdentity, rows_file: Path) -> None:
        self.identity = identity
        self._run = run
        # Rows of the attempts that ended in order, whose files a user may have sent and removed.
        self._rows_file = rows_file
        known = int(rows_file.read_text()) if rows_file.is_file() else 0
        logged = max(known, _num_logged(Path(run.dir).parent, identity.id)) if run.offline else 0
        self._num_sent = max(run.step, logged)

    @property
    def url(self) -> str | None:
        """Its address; None offline."""
        return None if self._run.offline else self._run.url

    @_gives_up
    def log(self, row: Mapping[str, Any], number: int) -> None:
        """Send row ``number``, from 0, unless W&B has it."""
        if number >= self._num_sent:
            self._run.log(dict(row), step=number)
            self._num_sent = number + 1

    @_gives_up
    def show(
        self, *, tables: Mapping[str, Table], pages: Mapping[str, str], summary: Mapping[str, Any], tokens: int
    ) -> None:
        """Send what stands beside the curve, as one further row.

        Args:
            tables: by name.
            pages: HTML or SVG, by name.
            summary: values of the whole run, by name.
            tokens: where the row stands on the x axis.
        """
        wandb = _wandb()
        row: dict[str, Any] = {
            name: wandb.Table(columns=list(table.columns), data=[list(line) for line in table.rows])
            for name, table in tables.items()
        }
        row |= {name: wandb.Html(page, inject=False, data_is_not_path=True) for name, page in pages.items()}
        if row:
            self.log({**row, "tokens": tokens}, self._num_sent)
        self._run.summary.update(dict(summary))

    def takes(self, reference: Reference) -> None:
        """Record an input of this run."""
        # `use_artifact` refuses offline runs, and waits for the server in others. This is what it does with an artifact
        # that the server need not have yet.
        self._record(reference, is_user_created=True, use_after_commit=True)

    def gives(self, reference: Reference) -> None:
        """Record an output of this run."""
        self._record(reference)

    @_gives_up
    def _record(self, reference: Reference, **how: bool) -> None:
        artifact = _wandb().Artifact(reference.name, type=reference.kind, metadata=dict(reference.metadata))
        artifact.add_reference(reference.path.resolve().as_uri(), checksum=False, max_objects=MAX_FILES)
        self._run._log_artifact(artifact, aliases=["latest", *reference.aliases], **how)

    @_gives_up
    def finish(self, *, failed: bool = False, preempted: bool = False) -> None:
        """End the run. A preempted one will go on."""
        _process.current = None
        if preempted:
            self._run.mark_preempting()
        self._run.finish(exit_code=int(failed or preempted))
        self._rows_file.parent.mkdir(parents=True, exist_ok=True)
        self._rows_file.write_text(f"{self._num_sent}\n")


def _num_logged(directory: Path, run_id: str) -> int:
    """Rows before the first that no earlier attempt of the run has in its log, among those beside ``directory``.

    What a killed process had handed to W&B is not all there.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    num_rows = 0
    for file in directory.parent.glob(f"*run-*-{run_id}/run-{run_id}.wandb"):
        if file.parent == directory:
            continue
        for data in read_records(file):
            record = Record.FromString(data)
            if record.WhichOneof("record_type") == "history":
                steps = [
                    int(item.value_json) for item in record.history.item if "_step" in (item.key, *item.nested_key)
                ]
                num_rows = max([num_rows, *(step + 1 for step in steps)])
    return num_rows


def _lose(error: Exception) -> None:
    _process.is_lost = True
    warnings.warn(
        f"W&B is lost ({first_line(error)}): this process sends it nothing more, and the work goes on",
        RuntimeWarning,
        stacklevel=4,
    )


def _wandb() -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ValueError(
            "tracking.wandb needs the package wandb, which is not installed; "
            "install it with `pip install -e '.[wandb]'` or set tracking.wandb=off"
        ) from error
    return wandb


def first_line(error: Exception) -> str:
    """What went wrong, in a line; the kind of error where it has no words."""
    return (str(error).splitlines() or [type(error).__name__])[0]
