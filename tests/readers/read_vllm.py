"""Reader: vLLM on the CPU. Arguments: job file, result directory."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
}

import numpy as np
import vllm
from vllm.distributed import cleanup_dist_env_and_memory


def read(path: str, prompt: list[int], num_tokens: int) -> tuple[list[int], np.ndarray]:
    vocab_size = json.loads((Path(path) / "config.json").read_text())["vocab_size"]
    shown = vocab_size if vocab_size < 1000 else 20
    llm = vllm.LLM(
        path, dtype="float32", enforce_eager=True, trust_remote_code=True, seed=0,
        max_model_len=128, max_num_seqs=4, max_logprobs=shown, enable_prefix_caching=False,
    )  # fmt: skip
    settings = vllm.SamplingParams(
        temperature=0, max_tokens=num_tokens, ignore_eos=True, prompt_logprobs=shown, logprobs=shown
    )
    (result,) = llm.generate([{"prompt_token_ids": prompt}], settings, use_tqdm=False)
    answer = result.outputs[0]
    logprobs = np.full((len(prompt), vocab_size), np.nan)
    # Of the prompt's own tokens vLLM gives what was predicted before them, so the last row comes from the answer.
    for row, entries in enumerate([*result.prompt_logprobs[1:], answer.logprobs[0]]):
        for token, entry in entries.items():
            logprobs[row, token] = entry.logprob
    tokens = list(answer.token_ids)
    del llm
    cleanup_dist_env_and_memory()
    return tokens, logprobs


def main() -> None:
    job, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    for name, path in job["models"].items():
        tokens, logprobs = read(path, job["prompt"], job["num_tokens"])
        np.savez(out / f"{name}.npz", tokens=tokens, logprobs=logprobs)
    (out / "version.txt").write_text(f"vLLM {vllm.__version__}")


if __name__ == "__main__":
    main()
