"""Reader: llama.cpp through llama-cpp-python. Arguments: job file, result directory."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import llama_cpp
import numpy as np


def read(path: str, prompt: list[int], num_tokens: int) -> tuple[list[int], np.ndarray, dict]:
    llama = llama_cpp.Llama(
        path, n_ctx=256, logits_all=True, n_threads=2, verbose=False, flash_attn=False,
        type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32,
    )  # fmt: skip
    llama.eval(prompt)
    logits = np.array(llama.scores[: len(prompt)], dtype=np.float64)
    peak = logits.max(-1, keepdims=True)
    logprobs = logits - peak - np.log(np.exp(logits - peak).sum(-1, keepdims=True))
    tokens = [int(logits[-1].argmax())]
    while len(tokens) < num_tokens:
        llama.eval(tokens[-1:])
        tokens.append(int(llama.scores[len(prompt) + len(tokens) - 1].argmax()))
    return tokens, logprobs, llama


def main() -> None:
    job, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    for name, path in job["models"].items():
        tokens, logprobs, llama = read(path, job["prompt"], job["num_tokens"])
        texts = [llama.tokenize(text.encode(), add_bos=True, special=False) for text in job["texts"]]
        np.savez(out / f"{name}.npz", tokens=tokens, logprobs=logprobs)
        (out / f"{name}.json").write_text(json.dumps(texts))
        llama.close()
    (out / "version.txt").write_text(f"llama-cpp-python {llama_cpp.__version__}")


if __name__ == "__main__":
    main()
