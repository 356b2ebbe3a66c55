"""Do fusion and FP8 add up? KL divergence to the bf16 parent of parent and children, in bf16 and in FP8.

    python benchmarks/quantization.py OUT --parent DIR --child DIR [DIR ...] --data DATA_DIR [--device cuda]
        [--num-sequences 64] [--seq-len 512] [--batch-size 4] [--scaled-mm]
        [--speed [--shape HIDDEN WIDTH MEMBERS]]

Models are unquantised model directories, data is what stage prepare_data wrote: the first sequences of its validation
split, the same for all rows. In FP8 every linear layer of the blocks is computed as engines compute an export with
export.quantization=fp8_dynamic: weights rounded per output channel, inputs per token, products summed in fp32.
--scaled-mm multiplies in FP8 itself. If the two losses are independent, KL(child in FP8) is near KL(child) + KL(parent
in FP8).

--speed times, on a GPU that multiplies in FP8, the widest fused FFN of the first child against as many FFNs of equal
width one after another, in bf16 and FP8: CUDA graphs, weights not in the cache. --shape times another one in its place.
Writes OUT/quantization.json and OUT/quantization.md, before --speed starts and again with its times.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from ablation import write_results
from ffn_in_fp8 import Shape, measure_speed, require_fp8, speed_table
from fp8_linear import with_fp8_linears
from torch import Tensor
from tqdm.auto import tqdm

from distill.config import require
from distill.data.dataset import TokenDataset
from distill.data.tokenizer import require_same_tokenizer
from distill.evaluate import evaluate_model
from puzzle.model.architecture import Architecture
from puzzle.model.checkpoint import load_model, read_architecture
from puzzle.model.fp8 import fp8_dtypes, fp8_shapes
from puzzle.model.modeling_decilm import DeciLMForCausalLM
from puzzle.model.stats import weight_bytes

CHUNK_TOKENS = 1024
"""Tokens whose logits exist at once."""
FORMATS = ("bf16", "fp8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line, measure and write."""
    options = new_parser().parse_args(arguments)
    text = ""
    try:
        for content in measure(options):
            text = as_markdown(content)
            write_results(options.out, "quantization", content, text)
    except ValueError as error:
        print(f"error: {error}")
        return 1
    print(text)
    return 0


def new_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--parent", type=Path, required=True)
    parser.add_argument("--child", type=Path, nargs="+", required=True, dest="children")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--num-sequences", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--scaled-mm", action="store_true", help="multiply in FP8 with torch._scaled_mm")
    parser.add_argument("--speed", action="store_true", help="time FFNs too; --device cuda alone")
    parser.add_argument("--shape", type=int, nargs=3, metavar=("HIDDEN", "WIDTH", "MEMBERS"))
    return parser


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Content of quantization.json: with quality alone, then, where it is asked for, with speed too.

    Raises:
        ValueError: models, data or the device are not what the options ask for; before anything is computed.
    """
    device = torch.device(options.device)
    require(device.type != "cuda" or torch.cuda.is_available(), "--device cuda: there is no CUDA device")
    require(
        not options.speed or device.type == "cuda", "--speed times FP8 on a GPU; pass --device cuda, or leave it out"
    )
    if options.speed or (options.scaled_mm and device.type == "cuda"):
        require_fp8(device)
    require(options.shape is None or options.speed, "--shape is of --speed; pass both")
    directories = named(options.parent, options.children)
    architectures = {name: read_architecture(path) for name, path in directories.items()}
    shape = shape_to_time(options, architectures) if options.speed else None
    sequences = held_out(options, directories, architectures)
    rows = quality_rows(options, directories, sequences, device)
    content = {
        "settings": {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
            "torch": torch.__version__,
            "num_sequences": options.num_sequences,
            "seq_len": options.seq_len,
            "batch_size": options.batch_size,
            "scaled_mm": options.scaled_mm,
            "models": {name: str(path) for name, path in directories.items()},
        },
        "rows": [row | {"weight_bytes": stored_bytes(architectures[row["model"]], row["format"])} for row in rows],
        "sums": [added_up(rows, name) for name in directories if name != "parent"],
        "speed": [],
    }
    yield content
    if shape:
        yield content | {"speed": measure_speed(shape, device)}


def named(parent: Path, children: Sequence[Path]) -> dict[str, Path]:
    """Every model directory by its name in the tables."""
    names = [path.resolve().name for path in children]
    clashing = {name for name in names if names.count(name) > 1} | {"parent"}
    pairs = zip(names, children, strict=True)
    return {"parent": parent} | {str(path) if name in clashing else name: path for name, path in pairs}


def held_out(
    options: argparse.Namespace, directories: dict[str, Path], architectures: dict[str, Architecture]
) -> Tensor:
    dataset = TokenDataset.open(options.data)
    for name, path in directories.items():
        require_same_tokenizer(dataset, path, name)
        most = architectures[name].max_positions
        require(options.seq_len <= most, f"--seq-len {options.seq_len} is beyond the {most} positions of {name}")
    return dataset.split("validation").first(options.num_sequences, options.seq_len)


def quality_rows(
    options: argparse.Namespace, directories: dict[str, Path], sequences: Tensor, device: torch.device
) -> list[dict[str, Any]]:
    """One row per model and format; ``klds`` has the mean of every batch, which ``batch_sizes`` weigh."""
    parent = load_model(directories["parent"], device=device, dtype=torch.bfloat16)
    rows = []
    for name, path in tqdm(directories.items(), desc="models", leave=False):
        for kind in FORMATS:
            model = load_model(path, device=device, dtype=torch.bfloat16)
            if kind == "fp8":
                model = with_fp8_linears(model, scaled_mm=options.scaled_mm)
            found = [
                quality(model, parent, batch.to(device), options.batch_size)
                for batch in sequences.split(options.batch_size)
            ]
            means = {key: weighted_mean(found, key) for key in ("kld", "lm_loss", "top1_agreement_frac")}
            klds, sizes = [batch["kld"] for batch in found], [batch["num_sequences"] for batch in found]
            rows.append({"model": name, "format": kind, **means, "klds": klds, "batch_sizes": sizes})
            del model
    return rows


def quality(model: DeciLMForCausalLM, parent: DeciLMForCausalLM, batch: Tensor, batch_size: int) -> dict[str, float]:
    metrics = evaluate_model(model, batch, teacher=parent, batch_size=batch_size, chunk_tokens=CHUNK_TOKENS)
    return metrics | {"num_sequences": len(batch)}


def weighted_mean(batches: Sequence[dict[str, float]], key: str) -> float:
    total = sum(batch["num_sequences"] for batch in batches)
    return sum(batch[key] * batch["num_sequences"] for batch in batches) / total


def added_up(rows: Sequence[dict[str, Any]], child: str) -> dict[str, Any]:
    """KL of ``child`` in FP8 beside the sum of its own in bf16 and the parent's in FP8, paired by batch."""
    by_key = {(row["model"], row["format"]): row for row in rows}
    in_bf16, in_fp8, parent_fp8 = by_key[child, "bf16"], by_key[child, "fp8"], by_key["parent", "fp8"]
    batches = zip(in_fp8["klds"], in_bf16["klds"], parent_fp8["klds"], strict=True)
    excesses = [both - fused - quantized for both, fused, quantized in batches]
    total = in_bf16["kld"] + parent_fp8["kld"]
    return {
        "child": child,
        "kld_child": in_bf16["kld"],
        "kld_parent_fp8": parent_fp8["kld"],
        "sum": total,
        "kld_child_fp8": in_fp8["kld"],
        "excess": in_fp8["kld"] - total,
        "excess_standard_error": standard_error(excesses, in_fp8["batch_sizes"]),
    }


def standard_error(means: Sequence[float], sizes: Sequence[int]) -> float | None:
    """Of the mean of sequences in batches of ``sizes`` with these ``means``; None of a single batch."""
    total = sum(sizes)
    if len(means) == 1:
        return None
    mean = sum(value * size for value, size in zip(means, sizes, strict=True)) / total
    squares = sum(size * (value - mean) ** 2 for value, size in zip(means, sizes, strict=True))
    return (squares / (len(means) - 1) / total) ** 0.5


def stored_bytes(architecture: Architecture, kind: str) -> int:
    """Of the weights of an export in this format."""
    if kind == "bf16":
        return weight_bytes(architecture, torch.bfloat16.itemsize)
    dtypes = fp8_dtypes(architecture, torch.bfloat16)
    return sum(prod(shape) * dtypes[name].itemsize for name, shape in fp8_shapes(architecture).items())


def shape_to_time(options: argparse.Namespace, architectures: dict[str, Architecture]) -> Shape:
    if options.shape is not None:
        hidden, width, members = options.shape
        return Shape(hidden_dim=hidden, width=width, members=members)
    name = list(architectures)[1]
    fused = [block for block in architectures[name].blocks if block.is_fused]
    require(len(fused) > 0, f"--speed: no FFN of {name} is fused; put a fused child first, or pass --shape")
    widest = max(fused, key=lambda block: block.ffn.ffn_dim or 0)
    hidden = architectures[name].hidden_dim
    return Shape(hidden_dim=hidden, width=widest.ffn.ffn_dim or 0, members=len(widest.member_indices))


def as_markdown(content: dict[str, Any]) -> str:
    settings = content["settings"]
    lines = [
        f"{settings['num_sequences']} held-out sequences of {settings['seq_len']} tokens, {settings['device']}, "
        f"torch {settings['torch']}. KLD to the parent in bf16, nats per token.",
        "",
        "| model | format | weights | KLD | LM loss | top-1 agreement |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['model']} | {row['format']} | {row['weight_bytes'] / 2**20:,.1f} MiB | {row['kld']:.5f} "
        f"| {row['lm_loss']:.4f} | {row['top1_agreement_frac']:.2%} |"
        for row in content["rows"]
    ]
    lines += [
        "",
        "| child | its KLD in bf16 | parent's in FP8 | sum | its KLD in FP8 | beyond the sum | standard error |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in content["sums"]:
        error = row["excess_standard_error"]
        lines.append(
            f"| {row['child']} | {row['kld_child']:.5f} | {row['kld_parent_fp8']:.5f} | {row['sum']:.5f} "
            f"| {row['kld_child_fp8']:.5f} | {row['excess']:+.5f} | {'' if error is None else f'{error:.5f}'} |"
        )
    return "\n".join([*lines, *speed_table(content["speed"])])


if __name__ == "__main__":
    raise SystemExit(main())
