"""What an engine, or our own model, makes of a prompt. Engines run as scripts in environments of their own."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from launch.stage import StageContext
from launch.stage_configs import ExportStage
from launch.stages import export
from puzzle.model.checkpoint import load_model, read_architecture
from puzzle.model.compatibility import report
from puzzle.model.config import ExportConfig
from puzzle.model.targets import Quantization, Target

ROOT = Path(__file__).parents[2]
READ: tuple[Target, ...] = ("transformers", "vllm", "llama_cpp", "mlx", "megatron")
"""Targets with a reader. SGLang has no package that runs without a GPU."""
PROMPT = [(7 * position * position + 3 * position + 5) % 311 for position in range(40)]
"""Longer than the sliding window that one of the children has."""
NUM_TOKENS = 16
TEXTS = (
    "The block library has 12345 replacements, isn't it?",
    "def blocks(x):\n    return x  # naïve ✓\n\n",
    "  two",
)
INHERITED = ("PATH", "HOME", "LANG", "TMPDIR", "LD_PRELOAD", "LD_LIBRARY_PATH")


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Of one model and one prompt."""

    tokens: list[int]
    """Greedy continuation."""
    logprobs: np.ndarray
    """Log-probabilities of the next token, [prompt, vocab]; not a number where the engine does not say."""
    texts: list[list[int]] | None = None
    """Token ids of ``TEXTS``, from engines that tokenize by themselves."""


@dataclass(frozen=True, kw_only=True)
class Session:
    """What one engine made of all models that it can load."""

    version: str
    readings: dict[str, Reading]


def our_reading(model_dir: Path, prompt: Sequence[int], num_tokens: int = NUM_TOKENS) -> Reading:
    return reading_of(load_model(model_dir, dtype=torch.float32), prompt, num_tokens)


@torch.no_grad()
def reading_of(model: nn.Module, prompt: Sequence[int], num_tokens: int = NUM_TOKENS) -> Reading:
    ids = torch.tensor([list(prompt)])
    logprobs = model(ids).logits[0].log_softmax(-1).numpy()
    for _ in range(num_tokens):
        ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return Reading(tokens=ids[0, len(prompt) :].tolist(), logprobs=logprobs)


def python_of(target: Target) -> Path | None:
    """The interpreter of its reader; None where it is not installed."""
    if target == "megatron":
        return Path(sys.executable) if importlib.util.find_spec("megatron") else None
    path = ROOT / ".readers" / target / "bin" / "python"
    return path if path.exists() else None


def run_export(
    targets: tuple[Target, ...], model_dir: Path, out: Path, quantization: Quantization = "none"
) -> dict[Target, Path]:
    """Run the stage, and give what every target loads."""
    context = StageContext(out=out, resume=out, pool=out, run_name="run", step_name="export")
    stage = ExportStage(export=ExportConfig(targets=targets, quantization=quantization))
    result = export.run(stage, {"model": SimpleNamespace(path=model_dir)}, context)  # type: ignore[dict-item]
    return {target: out / path for target, path in result.metrics["paths"].items()}


def run_reader(
    target: Target, model_dirs: Mapping[str, Path], work: Path, *, prompt: Sequence[int], num_tokens: int = NUM_TOKENS
) -> Session:
    """What ``target``, whose reader is installed, makes of every model that it can load, all in one process."""
    loadable = [name for name, path in model_dirs.items() if _status(target, path) != "cannot"]
    models = {
        name: run_export((target,), model_dirs[name], work / f"export_{number}")[target]
        for number, name in enumerate(loadable)
    }
    return read_exports(target, models, work, prompt=prompt, num_tokens=num_tokens)


def read_exports(
    target: Target,
    exports: Mapping[str, Path],
    work: Path,
    *,
    prompt: Sequence[int],
    num_tokens: int = NUM_TOKENS,
    dequantize: bool = False,
) -> Session:
    """What ``target``, whose reader is installed, makes of ``exports``; with ``dequantize`` told to do so."""
    python = python_of(target)
    assert python is not None
    work.mkdir(parents=True, exist_ok=True)
    short = {name: f"model_{number}" for number, name in enumerate(exports)}
    models = {short[name]: str(path) for name, path in exports.items()}
    job = {"models": models, "prompt": list(prompt), "num_tokens": num_tokens, "texts": TEXTS, "dequantize": dequantize}
    (work / "job.json").write_text(json.dumps(job))
    environment = {name: os.environ[name] for name in INHERITED if name in os.environ}
    environment |= {"OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1", "HF_HOME": str(work / "hf")}
    script = Path(__file__).with_name(f"read_{target}.py")
    done = subprocess.run(
        [python, "-I", script, work / "job.json", work], env=environment, cwd=work, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{target} failed:\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    readings = {name: _reading(work, short[name]) for name in exports}
    return Session(version=(work / "version.txt").read_text(), readings=readings)


def _status(target: Target, model_dir: Path) -> str:
    return report(target, read_architecture(model_dir)).status


def _reading(work: Path, name: str) -> Reading:
    with np.load(work / f"{name}.npz") as file:
        tokens, logprobs = file["tokens"].tolist(), file["logprobs"]
    texts = work / f"{name}.json"
    return Reading(tokens=tokens, logprobs=logprobs, texts=json.loads(texts.read_text()) if texts.exists() else None)
