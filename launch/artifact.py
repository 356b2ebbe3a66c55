"""The contract between stages: a directory whose manifest is written last.

No manifest, no artifact. The manifest says what the directory holds (files with sizes and checksums), what it was made
from (stage, version, configuration, inputs) and what came of it (metrics, tokens). Torch-free.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import dacite

from distill.files import flush_to_disk, sha256_of

MANIFEST_NAME = "artifact.json"
SCHEMA_VERSION = 1


class DamagedArtifactError(ValueError):
    """A committed artifact no longer holds what its manifest says."""


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """One file of an artifact."""

    name: str
    """Path relative to the artifact, with forward slashes."""
    num_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class InputRecord:
    """An artifact that another was made from."""

    kind: str
    fingerprint: str
    path: str
    """Where the input stood when it was used."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that an artifact's content depends on."""

    stage: str
    stage_version: int
    config: dict[str, Any]
    """The stage's configuration without placement fields."""
    externals: dict[str, Any] = field(default_factory=dict)
    """Facts from outside of the configuration, such as the content of a source directory."""
    inputs: dict[str, str] = field(default_factory=dict)
    """Fingerprints by input name."""

    @property
    def fingerprint(self) -> str:
        """64 hexadecimal digits."""
        return hashlib.sha256(canonical_json(asdict(self)).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Content of ``artifact.json``."""

    schema_version: int = SCHEMA_VERSION
    kind: str
    stage: str
    stage_version: int
    fingerprint: str
    config: dict[str, Any]
    externals: dict[str, Any]
    inputs: dict[str, InputRecord]
    files: tuple[FileRecord, ...]
    headline: str
    metrics: dict[str, Any]
    tokens: dict[str, int]
    """Training tokens by stage since the parent, summed along the line of models that led here."""
    seconds: float
    """Wall-clock time of the attempt that committed."""
    provenance: dict[str, Any]
    created_at: str
    digest: str = ""
    """Checksum over all other fields; empty until the commit."""

    @property
    def content_digest(self) -> str:
        """What ``digest`` is for the other fields as they stand."""
        return hashlib.sha256(canonical_json({**asdict(self), "digest": ""}).encode()).hexdigest()

    @property
    def recipe(self) -> Recipe:
        """What the fingerprint is computed from."""
        return Recipe(
            stage=self.stage,
            stage_version=self.stage_version,
            config=self.config,
            externals=self.externals,
            inputs={name: record.fingerprint for name, record in self.inputs.items()},
        )


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """A committed directory."""

    path: Path
    manifest: Manifest

    @classmethod
    def load(cls, path: Path) -> Artifact:
        """Read the manifest of the artifact at ``path``.

        Raises:
            ValueError: there is no artifact at ``path``.
            DamagedArtifactError: the manifest cannot be read or was altered.
        """
        manifest_path = path / MANIFEST_NAME
        if not manifest_path.is_file():
            raise ValueError(
                f"{path} is not an artifact: it has no {MANIFEST_NAME}; name the output of a finished step"
            )
        try:
            content = json.loads(manifest_path.read_text())
            manifest = dacite.from_dict(Manifest, content, dacite.Config(cast=[tuple], strict=True))
        except (json.JSONDecodeError, UnicodeDecodeError, dacite.DaciteError) as error:
            raise DamagedArtifactError(f"{manifest_path} cannot be read ({error}); {_way_out(path)}") from error
        if manifest.schema_version != SCHEMA_VERSION:
            raise DamagedArtifactError(
                f"{manifest_path} has schema version {manifest.schema_version}, this program reads {SCHEMA_VERSION}; "
                f"{_way_out(path)}"
            )
        if manifest.content_digest != manifest.digest or manifest.recipe.fingerprint != manifest.fingerprint:
            raise DamagedArtifactError(f"{manifest_path} was altered since it was written; {_way_out(path)}")
        return cls(path=path, manifest=manifest)

    def verify(self, *, checksums: bool = True) -> None:
        """Compare the files with the manifest.

        Args:
            checksums: read every file and compare its SHA-256; otherwise presence and size alone.

        Raises:
            DamagedArtifactError: names the first file that is missing, truncated or altered.
        """
        for record in self.manifest.files:
            file = self.path / record.name
            if not file.is_file():
                raise DamagedArtifactError(f"{file} is missing; {_way_out(self.path)}")
            size = file.stat().st_size
            if size != record.num_bytes:
                raise DamagedArtifactError(
                    f"{file} has {size} bytes, its manifest says {record.num_bytes}; {_way_out(self.path)}"
                )
            if checksums and sha256_of(file) != record.sha256:
                raise DamagedArtifactError(
                    f"{file} was altered: its checksum differs from the manifest's; {_way_out(self.path)}"
                )


def _way_out(path: Path) -> str:
    return f"restore it, or remove {path} to have the step computed again"


def require_made_from(product: Artifact, input_name: str, source: Artifact, *, what: str) -> None:
    """Raise ``ValueError`` unless ``source`` is the artifact that ``product`` had as its input ``input_name``.

    ``what`` names the product in the error: "library".
    """
    used, given = product.manifest.inputs[input_name].fingerprint, source.manifest.fingerprint
    if used != given:
        raise ValueError(
            f"the {what} was made from {input_name} {used[:12]}, the {input_name} given is {given[:12]}; "
            f"give the one that it was made from, or make a {what} of this one"
        )


def commit(path: Path, manifest: Manifest, *, to: Path | None = None) -> Artifact:
    """Turn the finished directory ``path`` into an artifact: its manifest is written, flushed to disk and renamed.

    With ``to``, on the same file system, the whole directory is renamed to it afterwards: there it is never seen
    without its manifest.
    """
    manifest = replace(manifest, digest=manifest.content_digest)
    temporary = path / f"{MANIFEST_NAME}.tmp"
    with temporary.open("w") as stream:
        json.dump(asdict(manifest), stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.rename(path / MANIFEST_NAME)
    for directory in (path, *(p for p in path.rglob("*") if p.is_dir())):
        flush_to_disk(directory)
    if to is None:
        return Artifact(path=path, manifest=manifest)
    path.rename(to)
    flush_to_disk(to.parent)
    return Artifact(path=to, manifest=manifest)


def record_files(path: Path) -> tuple[FileRecord, ...]:
    """Sizes and checksums of every file under ``path``, each flushed to disk first."""
    records = []
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
        name = file.relative_to(path).as_posix()
        records.append(FileRecord(name=name, num_bytes=file.stat().st_size, sha256=sha256_of(file)))
    return tuple(records)


def fingerprinted_config(config: Any) -> dict[str, Any]:
    """A configuration dataclass as JSON values, without the fields that only decide where and how fast work runs."""
    return {f.name: _json_value(getattr(config, f.name)) for f in fields(config) if not f.metadata.get("placement")}


def canonical_json(value: Any) -> str:
    """One text for equal values, whatever the order of their keys."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _json_value(value: Any) -> Any:
    if is_dataclass(value):
        return fingerprinted_config(value)
    if isinstance(value, Mapping):
        return {str(key): _json_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_value(item) for item in value]
    return value
