"""Stage export: what each named engine loads, written for it, and a report of all engines.

Engines that take the model in the same form share one directory, which is the artifact itself where no other form is
asked for. Otherwise every engine has a directory of its own name.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from distill.config import require
from launch.stage import Inputs, StageContext, StageResult
from launch.stage_configs import ExportStage
from puzzle.model.architecture import Architecture
from puzzle.model.checkpoint import TensorReader, check_tensors, has_tokenizer, read_architecture
from puzzle.model.compatibility import TargetReport, compatibility, require_loadable
from puzzle.model.config import ExportConfig
from puzzle.model.fp8_check import Fp8Error
from puzzle.model.rewrites import rewritten
from puzzle.model.rewritten_tensors import rewritten_tensors
from puzzle.model.target_directory import (
    add_megatron_files,
    link_directory,
    weight_file_bytes,
    write_fp8_directory,
    write_hf_directory,
)
from puzzle.model.targets import Quantization, Target
from puzzle.model.tensor_layout import EMBEDDING

REPORT_NAME = "compatibility.json"


@dataclass(frozen=True, kw_only=True)
class Form:
    """The model as some engines get it."""

    architecture: Architecture
    is_gguf: bool
    targets: tuple[Target, ...]


def run(config: ExportStage, inputs: Inputs, context: StageContext) -> StageResult:
    """Write the model for ``export.targets``; ``compatibility.json`` reports on all engines.

    Raises:
        ValueError: an engine of ``export.targets`` cannot load the model, whatever is rewritten (nothing is written
            then), or a weight is infinite or no number.
    """
    export, model_dir = config.export, inputs["model"].path
    source = read_architecture(model_dir)
    require(len(export.targets) > 0, "export.targets is empty; name an engine")
    require_loadable(source, export.targets, name="export.targets")
    require(has_tokenizer(model_dir), f"{model_dir} has no tokenizer, and the export needs one; import the model anew")
    forms = _forms(source, export.targets)
    with TensorReader(model_dir) as reader:
        check_tensors(reader, source)
        paths, errors = _write(forms, reader, source, context.out, export)
    reports = compatibility(source, export.quantization)
    num_bytes = {target: weight_file_bytes(context.out / path) for target, path in paths.items()}
    entries = [
        {**report.as_json(), "path": paths.get(report.target), "bytes": num_bytes.get(report.target)}
        for report in reports
    ]
    content = {"quantization": export.quantization, "targets": entries}
    (context.out / REPORT_NAME).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    _show(reports, paths)
    num_blocks = {target: form.architecture.num_blocks for form in forms for target in form.targets}
    return StageResult(
        headline=_headline(reports, paths, source, export.quantization),
        metrics={
            "num_blocks": num_blocks[export.targets[0]],
            "num_dropped_blocks": source.num_blocks - num_blocks[export.targets[0]],
            "targets": {report.target: report.status for report in reports},
            "paths": paths,
            "quantization": export.quantization,
            "bytes": num_bytes,
            **_worst(errors),
        },
    )


def _forms(source: Architecture, targets: Iterable[Target]) -> list[Form]:
    """Targets that get the same, together."""
    forms: list[Form] = []
    for target in dict.fromkeys(targets):
        architecture, _ = rewritten(target, source)
        is_gguf = target == "llama_cpp"
        same = [form for form in forms if form.architecture == architecture and form.is_gguf == is_gguf]
        together = (*(same[0].targets if same else ()), target)
        forms = [form for form in forms if form not in same]
        forms.append(Form(architecture=architecture, is_gguf=is_gguf, targets=together))
    return forms


def _write(
    forms: list[Form], reader: TensorReader, source: Architecture, out: Path, export: ExportConfig
) -> tuple[dict[Target, str], list[Fp8Error]]:
    """Path of what each target loads, relative to the artifact, and the errors of what was quantised."""
    dtype = reader.dtype(EMBEDDING)
    vocabularies = {form.targets: _check_gguf(form, reader, dtype) for form in forms if form.is_gguf}
    paths: dict[Target, str] = {}
    errors: list[Fp8Error] = []
    for form in forms:
        names = ["."] if len(forms) == 1 else list(form.targets)
        if form.is_gguf:
            tensors = rewritten_tensors(reader, source, form.architecture)
            file = _write_gguf(out / names[0], form, tensors, reader, vocabularies[form.targets])
            paths |= dict.fromkeys(form.targets, file.relative_to(out).as_posix())
            continue
        errors += _write_hf(out / names[0], form, reader, source, export)
        for name in names[1:]:
            link_directory(out / names[0], out / name)
        paths |= {target: "." if names == ["."] else target for target in form.targets}
        if "megatron" in form.targets:
            add_megatron_files(out / paths["megatron"], form.architecture, dtype)
    return paths, errors


def _write_hf(
    directory: Path, form: Form, reader: TensorReader, source: Architecture, export: ExportConfig
) -> list[Fp8Error]:
    dtype, max_shard_bytes = reader.dtype(EMBEDDING), int(export.max_shard_gib * 2**30)
    tensors = partial(rewritten_tensors, reader, source, form.architecture)
    if export.quantization == "none":
        write_hf_directory(
            directory,
            form.architecture,
            tensors(),
            dtype=dtype,
            max_shard_bytes=max_shard_bytes,
            tokenizer_from=reader.directory,
        )
        return []
    # Engines multiply FP8 into bf16 or fp16, never into fp32.
    rest = torch.bfloat16 if dtype == torch.float32 else dtype
    error = write_fp8_directory(
        directory,
        form.architecture,
        tensors,
        dtype=rest,
        max_shard_bytes=max_shard_bytes,
        tokenizer_from=reader.directory,
    )
    return [error]


def _write_gguf(
    directory: Path, form: Form, tensors: Iterable[tuple[str, Tensor]], reader: TensorReader, vocabulary: Any
) -> Path:
    from puzzle.model.gguf_export import GGUF_NAME, write_gguf

    directory.mkdir(parents=True, exist_ok=True)
    write_gguf(
        directory / GGUF_NAME,
        form.architecture,
        tensors,
        dtype=reader.dtype(EMBEDDING),
        vocabulary=vocabulary,
        tokenizer_from=reader.directory,
    )
    return directory / GGUF_NAME


def _check_gguf(form: Form, reader: TensorReader, dtype: torch.dtype) -> Any:
    """The vocabulary of the GGUF file, once everything that would keep it from being written is looked at."""
    try:
        from puzzle.model.gguf_export import require_storable
        from puzzle.model.gguf_vocabulary import read_vocabulary
    except ModuleNotFoundError as error:
        raise ValueError(
            f"export.targets: llama_cpp gets a GGUF file, which needs package {error.name}; run "
            "`pip install -e '.[gguf]'`, or leave llama_cpp out"
        ) from error
    require_storable(form.architecture, dtype)
    return read_vocabulary(reader.directory, form.architecture.vocab_size)


def _show(reports: Iterable[TargetReport], paths: Mapping[Target, str]) -> None:
    table = Table(box=None, pad_edge=False)
    for column in ("target", "loads", "how", "written to"):
        table.add_column(column, overflow="fold")
    for report in reports:
        words = {"loads": "as it is", "loads_rewritten": "after an exact rewrite", "cannot": "cannot"}
        how = "; ".join(report.reasons or report.rewrites)
        table.add_row(report.target, words[report.status], how, paths.get(report.target, ""))
    Console(highlight=False, soft_wrap=True).print(table)


def _worst(errors: Iterable[Fp8Error]) -> dict[str, float | str]:
    found = [error for error in errors if error.name]
    if not found:
        return {}
    worst = max(found, key=lambda error: error.largest)
    return {"quantization_error_frac": worst.largest, "quantization_error_of": worst.name}


def _headline(
    reports: Iterable[TargetReport], paths: Mapping[Target, str], source: Architecture, quantization: Quantization
) -> str:
    parts = []
    for report in reports:
        if report.target in paths:
            rewrites = f" ({'; '.join(report.rewrites)})" if report.rewrites else ""
            parts.append(f"{report.target}{rewrites}")
    stored = "" if quantization == "none" else f", stored in {quantization.upper()}"
    return f"{source.num_blocks} blocks load in {', '.join(parts)}{stored}"
