"""Reader: plain transformers with the code that comes with the checkpoint. Arguments: job file, result directory."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers


@torch.no_grad()
def read(path: str, prompt: list[int], num_tokens: int, dequantize: bool) -> tuple[list[int], np.ndarray]:
    settings = {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)} if dequantize else {}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, trust_remote_code=True, dtype=torch.float32, **settings
    )
    ids = torch.tensor([prompt])
    generation = transformers.GenerationConfig(do_sample=False, max_new_tokens=num_tokens, pad_token_id=0)
    tokens = model.generate(ids, generation_config=generation, attention_mask=torch.ones_like(ids))
    return tokens[0, len(prompt) :].tolist(), model(ids).logits[0].log_softmax(-1).numpy()


def main() -> None:
    assert importlib.util.find_spec("puzzle") is None, "this environment has the project itself"
    job, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    for name, path in job["models"].items():
        tokens, logprobs = read(path, job["prompt"], job["num_tokens"], job["dequantize"])
        np.savez(out / f"{name}.npz", tokens=tokens, logprobs=logprobs)
    (out / "version.txt").write_text(f"transformers {transformers.__version__}")


if __name__ == "__main__":
    main()
