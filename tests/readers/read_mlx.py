"""Reader: MLX-LM. Arguments: job file, result directory."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model


def read(path: str, prompt: list[int], num_tokens: int) -> tuple[list[int], np.ndarray]:
    model, _ = load_model(Path(path))
    cache = make_prompt_cache(model)
    logits = model(mx.array([prompt]), cache=cache)[0].astype(mx.float32)
    logprobs = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
    tokens = [int(logprobs[-1].argmax())]
    while len(tokens) < num_tokens:
        tokens.append(int(mx.argmax(model(mx.array([tokens[-1:]]), cache=cache)[0, -1])))
    return tokens, logprobs


def main() -> None:
    mx.set_default_device(mx.cpu)
    job, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    for name, path in job["models"].items():
        tokens, logprobs = read(path, job["prompt"], job["num_tokens"])
        np.savez(out / f"{name}.npz", tokens=tokens, logprobs=logprobs)
    (out / "version.txt").write_text(f"MLX-LM {importlib.metadata.version('mlx-lm')}")


if __name__ == "__main__":
    main()
