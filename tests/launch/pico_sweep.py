"""The shipped pipeline attention_fusion on a pico parent: seconds per run."""

from __future__ import annotations

from pathlib import Path

TEXT = "\n\n".join(f"{n}: the square of {n} is {n * n}, as everybody knows." for n in range(4000))


def pico_overrides(parent: Path, root: Path) -> list[str]:
    """Overrides of a run whose store and directory lie under ``root``, which must be there."""
    text = root / "text.txt"
    text.write_text(TEXT)
    return [
        f"model.source={parent}",
        "model.dtype=float32",
        "data=text",
        f"data.sources.0.path={text}",
        "data.train_tokens=8000",
        "data.validation_tokens=2000",
        "data.calibration_tokens=2000",
        "prune_attention.num_sequences=4",
        "prune_attention.seq_len=32",
        "dependency.num_sequences=4",
        "dependency.seq_len=32",
        "distill.max_tokens=1024",
        "distill.seq_len=32",
        "distill.batch_size=4",
        "distill.eval_every_tokens=512",
        "distill.eval_sequences=4",
        "evaluate.seq_len=32",
        "evaluate.num_sequences=4",
        "workload.prefill_tokens=16",
        "workload.generated_tokens=8",
        "benchmark.repeats=2",
        "engine.device=cpu",
        f"run.root={root}",
    ]
