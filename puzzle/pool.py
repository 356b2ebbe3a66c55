"""Finished replacements by content, shared by all libraries: what one has trained, another takes as it is.

The key of a replacement is a digest of all that its weights depend on, up to rounding: parent, data, training settings,
seed, what is replaced, and where its first weights come from. It takes no tensor to form one, and neither the device
nor the micro-batch is in it. A library that asks for one more width therefore trains that width alone, and no index or
name can make it take something else. Files are written once, appear by one rename and carry a checksum
of their own, so that any number of runs may share a directory and any file may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from puzzle.library import Replacement

POOL_VERSION = 2
"""Raise it when equal settings lead to other weights than before."""

_RECORD = "record"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of one replacement: fields of :class:`puzzle.library.LibraryEntry`."""

    bld_nmse_init: float
    bld_nmse: float
    trained: bool


@dataclass(frozen=True, kw_only=True)
class ReplacementPool:
    """A directory of finished replacements."""

    directory: Path
    facts: Mapping[str, Any]
    """JSON values that the weights depend on beside the replacement and its origin: fingerprints of parent and data,
    settings of training, precision, seed."""

    def key(self, replacement: Replacement, origin: Mapping[str, Any]) -> str:
        """Digest of all that the finished weights of ``replacement`` depend on.

        ``origin``: of :meth:`puzzle.child_init.Init.origin`, where its first weights come from.
        """
        facts = {"version": POOL_VERSION, **self.facts, "replacement": replacement.name, "origin": origin}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def take(self, key: str, destination: Path) -> Outcome | None:
        """Link the replacement of ``key`` to ``destination``; None if it is not here, or not as it was written.

        A damaged file is removed, with a warning.
        """
        path = self._path(key)
        destination.unlink(missing_ok=True)
        try:
            _link(path, destination)
        except FileNotFoundError:
            return None
        # What was linked is what is checked: another process may replace or delete the original meanwhile.
        damage, outcome = _read(destination, key)
        if outcome is None:
            message = f"{path} is damaged and not used ({damage}); the replacement is trained again"
            warnings.warn(message, RuntimeWarning, stacklevel=2)
            destination.unlink()
            path.unlink(missing_ok=True)
        return outcome

    def put(
        self, key: str, tensors: Mapping[str, Tensor], outcome: Outcome, destination: Path, *, dtype: torch.dtype
    ) -> None:
        """Write a finished replacement, its tensors as ``dtype``, and link it to ``destination`` too."""
        self.directory.mkdir(parents=True, exist_ok=True)
        stored = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in tensors.items()}
        description = json.dumps({"key": key, **asdict(outcome)})
        # One entry alone: the order of several in the header would not be the same in every process.
        record = json.dumps({"description": description, "sha256": _digest(description, stored)})
        unfinished = self.directory / f"{key}.{uuid.uuid4().hex}.partial"
        save_file(stored, unfinished, metadata={_RECORD: record})
        destination.unlink(missing_ok=True)
        _link(unfinished, destination)
        unfinished.replace(self._path(key))

    def _path(self, key: str) -> Path:
        return self.directory / f"{key}.safetensors"


def content_digest(path: Path) -> str:
    """Digest of a finished replacement's file, key and tensors, as it says of itself: no tensor is read.

    Raises:
        ValueError: it is no file that a pool has written.
    """
    try:
        with safe_open(path, framework="pt") as file:
            digest: str = json.loads((file.metadata() or {})[_RECORD])["sha256"]
            return digest
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no file of a library ({type(error).__name__}); build the library again") from error


def _link(source: Path, destination: Path) -> None:
    """A second name for the same file, or a copy where the file system has no such thing."""
    try:
        os.link(source, destination)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copyfile(source, destination)


def _read(path: Path, key: str) -> tuple[str, Outcome | None]:
    """What is wrong with a file of the pool, or what it says of itself."""
    try:
        with safe_open(path, framework="pt") as file:
            record = json.loads((file.metadata() or {})[_RECORD])
        description = json.loads(record["description"])
        if description.pop("key") != key:
            return "it belongs to another key", None
        if _digest(record["description"], load_file(path)) != record["sha256"]:
            return "it does not match its checksum", None
        return "", Outcome(**description)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        return f"{type(error).__name__}: {error}", None


def _digest(description: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(description.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
