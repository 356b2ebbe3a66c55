"""What Megatron-LM needs beside the weights: the layers as JSON, and the flags that agree with them. Torch-free.

Megatron-LM compares its arguments with the file of ``--heterogeneous-layers-config-path`` and stops at a difference. It
insists on llama3 scaling of rotary positions; a factor of 1 is none.
"""

from __future__ import annotations

import json
from typing import Any

from puzzle.model.architecture import Architecture
from puzzle.model.hf_config import hf_config
from puzzle.model.rewrites import kv_head_counts

LAYERS_NAME = "megatron_layers.json"
ARGUMENTS_NAME = "megatron_arguments.txt"


def layers_json(architecture: Architecture, dtype_name: str) -> str:
    """Content of ``megatron_layers.json``: config.json with a scaling factor in any case."""
    config = hf_config(architecture, dtype_name)
    config["rope_scaling"] = config["rope_scaling"] or {"rope_type": "llama3", "factor": 1.0}
    return json.dumps(config, indent=2) + "\n"


def arguments(architecture: Architecture) -> str:
    """Content of ``megatron_arguments.txt``: the flags that describe ``architecture``, one a line.

    The blocks have one KV head count: :func:`puzzle.model.rewrites.rewritten` saw to that.
    """
    a = architecture
    (num_kv_heads,) = kv_head_counts(a)
    flags: dict[str, Any] = {
        "heterogeneous-layers-config-path": LAYERS_NAME,
        "num-layers": a.num_blocks,
        "hidden-size": a.hidden_dim,
        "num-attention-heads": a.num_heads,
        "group-query-attention": None,
        "num-query-groups": num_kv_heads,
        "swiglu": None,
        "disable-bias-linear": None,
        "normalization": "RMSNorm",
        "norm-epsilon": a.norm_eps,
        "position-embedding-type": "rope",
        "use-rotary-position-embeddings": None,
        "rotary-percent": 1.0,
        "rotary-base": int(a.rope.theta),
        "use-rope-scaling": None,
        "rope-scaling-factor": a.rope.factor or 1.0,
        "max-position-embeddings": a.max_positions,
        "vocab-size": a.vocab_size,
        "attention-dropout": 0.0,
        "hidden-dropout": 0.0,
    }
    if not a.tie_embeddings:
        flags["untie-embeddings-and-output-weights"] = None
    return "".join(f"--{name}\n" if value is None else f"--{name} {value}\n" for name, value in flags.items())
