"""From ``conf/`` and the command line to frozen dataclasses: the only module that knows Hydra. Torch-free.

There is one configuration tree, ``conf/config.yaml``: a node for every group and every stage. A stage reads the nodes
that its dataclass in :mod:`launch.registry` names. A pipeline is a tree of its own with a list of steps on top, and
a step's configuration is the tree composed with the pipeline's ``common`` overrides, then the step's own, then those
of the command line.
"""

from __future__ import annotations

import copy
import difflib
import functools
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import dacite
import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from distill.config import TrackingConfig, require
from launch.cluster_config import ClusterConfig

CONF = Path(__file__).resolve().parents[1] / "conf"
STEP_PREFIX = "steps."
INPUT_PREFIX = "inputs."
MAX_NAME_LENGTH = 120


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where a run keeps its things. Never part of a fingerprint."""

    root: str = "runs"
    """Directory of the store and of the run directories."""
    name: str | None = None
    """Name of the run; null: the pipeline's name and the overrides that make this run differ from it."""
    verify: Literal["full", "size"] = "full"
    """How inputs are checked before use: by checksum, or by presence and size alone."""

    def __post_init__(self) -> None:
        require(
            self.name is None or bool(re.fullmatch(r"(?!store$|\.)[\w.,=+-]+", self.name)),
            f"run.name={self.name} is not a file name of its own; use letters, digits and - _ . , = +",
        )


@dataclass(frozen=True, kw_only=True)
class StepConfig:
    """One step of a pipeline."""

    stage: str
    inputs: dict[str, str] = field(default_factory=dict)
    """Input name -> id of an earlier step."""
    overrides: tuple[str, ...] = ()
    """What a person would type behind ``python -m launch <stage>``."""
    nodes: int | None = None
    """Nodes that it needs on a cluster; null: cluster.nodes."""
    gpus_per_node: int | None = None
    """Processes on each of them; null: cluster.gpus_per_node."""
    time_limit: str | None = None
    """Of each of its jobs; null: cluster.time_limit."""
    signal_seconds: int | None = None
    """That a step and a save of it take at most; null: cluster.signal_seconds."""


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """Named steps, in order."""

    about: str
    """One line on what the pipeline does."""
    common: tuple[str, ...] = ()
    """Overrides of every step."""
    steps: dict[str, StepConfig]


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """The nodes of the tree that belong to the run and not to any stage."""

    run: RunConfig
    tracking: TrackingConfig
    cluster: ClusterConfig


def pipeline_names() -> list[str]:
    """Pipelines of ``conf/pipeline/``."""
    return sorted(file.stem for file in (CONF / "pipeline").glob("*.yaml"))


def compose_stage(config_class: type, overrides: Sequence[str]) -> Any:
    """The typed configuration of a stage (or any class whose fields are nodes of the tree).

    Raises:
        ValueError: unknown key or group, missing value, wrong type, or a value that its class refuses.
    """
    tree = _compose("config", [text for text in overrides if not text.lstrip("+").startswith(INPUT_PREFIX)])
    return _build(config_class, tree)


def compose_pipeline(name: str, overrides: Sequence[str]) -> PipelineConfig:
    """The steps of pipeline ``name``. ``overrides`` may choose among the pipeline's own groups (``budget=small``)."""
    plain = [text for text in overrides if not text.startswith(STEP_PREFIX)]
    return _build(PipelineConfig, _compose(f"pipeline/{name}", plain))


def step_overrides(pipeline: PipelineConfig, step: str, overrides: Sequence[str]) -> list[str]:
    """The overrides of one step in order of precedence, last wins: common, the step's, the command line's.

    ``steps.<step>.<key>=<value>`` on the command line reaches that step alone.
    """
    prefix = f"{STEP_PREFIX}{step}."
    nodes = _tree_nodes()
    general = [text for text in overrides if not text.startswith(STEP_PREFIX) and _top_level_key(text) in nodes]
    own = [text.removeprefix(prefix) for text in overrides if text.startswith(prefix)]
    # One entry per key: Hydra refuses two choices of one group.
    ordered = [*pipeline.common, *pipeline.steps[step].overrides, *general, *own]
    return list({text.partition("=")[0]: text for text in ordered}.values())


def check_step_prefixes(pipeline: PipelineConfig, overrides: Sequence[str]) -> None:
    """Refuse ``steps.<id>.`` overrides whose step does not exist."""
    for text in overrides:
        if text.startswith(STEP_PREFIX):
            step = text.removeprefix(STEP_PREFIX).partition(".")[0].partition("=")[0]
            key = _top_level_key(text.removeprefix(f"{STEP_PREFIX}{step}."))
            if step in pipeline.steps and key in ("inputs", "run", "tracking", "cluster"):
                raise ValueError(
                    f"{text}: {key} cannot be set for one step; edit the pipeline, or set {key} for the run"
                )
            if step not in pipeline.steps:
                raise ValueError(
                    f"{text}: no step {step!r}{_suggestion(step, pipeline.steps)}; steps: {', '.join(pipeline.steps)}"
                )


def inputs_of(overrides: Sequence[str]) -> dict[str, str]:
    """``inputs.<name>=<path>`` overrides of a single stage, as a mapping."""
    inputs = {}
    for text in overrides:
        if text.lstrip("+").startswith(INPUT_PREFIX):
            name, _, path = text.lstrip("+").removeprefix(INPUT_PREFIX).partition("=")
            inputs[name] = path
    return inputs


def run_settings(pipeline: PipelineConfig | None, overrides: Sequence[str]) -> RunSettings:
    """Where the run keeps its things: from the pipeline's ``common`` overrides, then the command line's."""
    texts = [text.lstrip("+") for text in (*(pipeline.common if pipeline else ()), *overrides)]
    own = {text.partition("=")[0]: text for text in texts if _top_level_key(text) in ("run", "tracking", "cluster")}
    return compose_stage(RunSettings, list(own.values()))


def run_name(target: str, overrides: Sequence[str]) -> str:
    """A file name that is a function of what runs, never of the clock, so that a restarted job finds its state."""
    telling = sorted(text for text in overrides if is_telling(text) and _top_level_key(text) != "inputs")
    name = re.sub(r"[^\w.,=+-]+", "_", ",".join([target, *telling])).rstrip("_,")
    if len(name) <= MAX_NAME_LENGTH:
        return name
    digest = hashlib.sha256(",".join(telling).encode()).hexdigest()[:8]
    return f"{name[: MAX_NAME_LENGTH - 9]}-{digest}"


def is_telling(override: str) -> bool:
    """Whether an override can change what is computed, not only where and how it is kept."""
    return _top_level_key(override) not in ("run", "tracking", "cluster", "hydra")


def is_hydra(override: str) -> bool:
    """Whether an override is for Hydra itself, such as ``hydra/launcher=joblib``."""
    return _top_level_key(override) == "hydra"


def sweep_points(overrides: Sequence[str]) -> list[list[str]]:
    """The overrides of every point of a sweep over comma-separated choices and ranges.

    Raises:
        ValueError: an override cannot be parsed.
    """
    try:
        parsed = OverridesParser.create().parse_overrides([text for text in overrides if not is_hydra(text)])
        points = [list(point) for point in BasicSweeper.split_arguments(parsed, max_batch_size=None)[0]]
    except HydraException as error:
        raise ValueError(_one_line(error, "config")) from error
    names = {text for point in points for text in point if text.startswith("run.name=")}
    if len(names) == 1 and len(points) > 1:
        raise ValueError(
            f"{names.pop()} would give {len(points)} runs one directory; leave it out, every point has its own name"
        )
    return points


def launchers() -> list[str]:
    """Names that ``hydra/launcher=`` may have here: Hydra's own, and those of the plugins that are installed."""
    Plugins.instance()
    return sorted(Path(name).stem for name in ConfigStore.instance().list("hydra/launcher"))


def multirun(target: str, overrides: Sequence[str], job: Callable[[int], None]) -> None:
    """Call ``job`` with the number of every point of :func:`sweep_points`, where Hydra's launcher wants it: here, or
    in processes and on machines that ``job`` is pickled for. It reports its errors itself.

    Raises:
        Exception: of whatever kind, where a launcher could not start its processes or has lost one.
    """

    def task(_: DictConfig) -> None:
        job(HydraConfig.get().job.num)

    # New keys need a plus sign.
    added = [f"+{text}" if text.startswith((STEP_PREFIX, INPUT_PREFIX)) else text for text in overrides]
    with _hydra():
        sweeper = GlobalHydra.instance().hydra
        assert sweeper is not None
        sweeper.multirun(f"pipeline/{target}" if target in pipeline_names() else "config", task, added)


def to_yaml(value: Mapping[str, Any]) -> str:
    """A mapping of plain values as YAML."""
    return OmegaConf.to_yaml(OmegaConf.create(dict(value)))


def from_yaml(text: str) -> dict[str, Any]:
    """The mapping that :func:`to_yaml` wrote as ``text``."""
    mapping = OmegaConf.to_container(OmegaConf.create(text))
    assert isinstance(mapping, dict)
    return {str(key): value for key, value in mapping.items()}


def _compose(config_name: str, overrides: Sequence[str]) -> dict[str, Any]:
    """The composed tree with missing values left as '???'."""
    return copy.deepcopy(_composed(config_name, tuple(overrides)))


@functools.cache
def _composed(config_name: str, overrides: tuple[str, ...]) -> dict[str, Any]:
    """Planning asks for the same tree again and again, and Hydra takes a tenth of a second each time."""
    try:
        with _hydra():
            config = hydra.compose(config_name=config_name, overrides=list(overrides))
            tree = OmegaConf.to_container(config, resolve=True)
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise ValueError(_one_line(error, config_name)) from error
    assert isinstance(tree, dict)
    return {str(key): value for key, value in tree.items()}


@contextmanager
def _hydra() -> Iterator[None]:
    # Inside a sweep's job Hydra is already initialised; it takes its turn and gets its state back.
    outer = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
            yield
    finally:
        GlobalHydra.instance().hydra = outer


@functools.cache
def _tree_nodes() -> frozenset[str]:
    return frozenset(_compose("config", []))


def _build(config_class: type, tree: Mapping[str, Any]) -> Any:
    nodes = {f.name: tree[f.name] for f in fields(config_class) if f.name in tree}
    missing = next(_missing_keys(nodes, ()), None)
    if missing is not None:
        raise ValueError(f"{missing} has no value; set {missing}=<value>")
    try:
        return dacite.from_dict(config_class, _tuples(nodes), dacite.Config(strict=True, type_hooks={float: _to_float}))
    except dacite.UnexpectedDataError as error:
        raise ValueError(f"unknown key: {error}") from error
    except dacite.WrongTypeError as error:
        if get_origin(error.field_type) is Literal:
            known = ", ".join(map(str, get_args(error.field_type)))
            raise ValueError(f"{error.field_path}={error.value} is unknown; choose one of {known}") from error
        choices = ", ".join(_choices(error.field_type))
        given = f"={list(error.value)}" if isinstance(error.value, tuple) else ""
        message = f"{error.field_path}{given} must be a list, in brackets, of {choices}" if choices else f"{error}"
        raise ValueError(message) from error
    except dacite.DaciteFieldError as error:
        raise ValueError(f"{error}") from error


def _choices(field_type: Any) -> list[str]:
    """What the items of a ``tuple[Literal[...], ...]`` may be; empty for any other type."""
    items = [item for item in get_args(field_type) if get_origin(field_type) is tuple and get_origin(item) is Literal]
    return [str(choice) for item in items for choice in get_args(item)]


def _tuples(value: Any) -> Any:
    """``value`` with every list as a tuple, so that a lone number or word is not taken for a list."""
    if isinstance(value, Mapping):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _to_float(value: Any) -> Any:
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _missing_keys(value: Any, path: tuple[str, ...]) -> Iterator[str]:
    if value == "???":
        yield ".".join(path)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _missing_keys(item, (*path, str(key)))
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _missing_keys(item, (*path, str(index)))


def _one_line(error: Exception, config_name: str) -> str:
    """Hydra's complaint as one line, with the nearest key or group that exists."""
    if isinstance(error, OverrideParseException):
        return f"cannot read {error.override!r}; settings are <key>=<value>, quoted where they hold spaces or brackets"
    text = str(error)
    key_match = re.search(r"Could not override '([^']+)'", text)
    if key_match:
        key = key_match.group(1)
        return f"unknown key or group {key!r}{_suggestion(key, _known_keys(config_name))}"
    group_match = re.search(r"(?:Could not find|In '[^']*': Could not find) '([^']+)'", text)
    if group_match:
        group, _, option = group_match.group(1).rpartition("/")
        options = sorted(file.stem for file in (CONF / group).glob("*.yaml")) if group else pipeline_names()
        if options:
            near = _suggestion(option, options)
            return f"unknown option {option!r} of group {group!r}{near}; options are {', '.join(options)}"
    return " ".join(text.split())


def _known_keys(config_name: str) -> list[str]:
    with _hydra():
        tree = OmegaConf.to_container(hydra.compose(config_name=config_name), resolve=False)
    groups = [path.name for path in CONF.iterdir() if path.is_dir()]
    return [*groups, *_paths(tree, ())]


def _paths(value: Any, path: tuple[str, ...]) -> Iterator[str]:
    if path:
        yield ".".join(path)
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _paths(item, (*path, str(key)))


def _suggestion(key: str, known: Any) -> str:
    near = difflib.get_close_matches(key, [name for name in known if name != key], n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def _top_level_key(override: str) -> str:
    """The node of the tree that an override changes: of ``group@node=option`` the node, not the group."""
    key = override.lstrip("+~").partition("=")[0]
    return re.split(r"[./]", key.partition("@")[2] or key, maxsplit=1)[0]
