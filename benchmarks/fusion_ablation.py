"""What fusion costs and what it is worth: the tables of the FFN Fusion paper's section 5 in kind, on a model of yours.

    python benchmarks/fusion_ablation.py [--root runs/fusion_ablation] [--num-attentions 14] [--skip TABLE ...]
        [--set KEY=VALUE ...] [--out DIR]

The child is the parent without some attentions, distilled for a while so that fusion starts from a model that works.
Its runs of FFNs are then fused in coarser and coarser steps, removed, reversed, distilled and chosen by measured gain,
every model through the real stages; whole blocks of the parent run in parallel windows. Each row has the KL divergence
to the parent and the LM loss on held-out text, the depth, and the decode latency of the whole model; rows of one table
are timed in turns in one process. Tables are written as they are finished, the most telling ones first, and steps that
are in the store are not computed again. A row that a stage refuses is named below its table with the reason.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ablation import Workbench, new_parser, write_results
from fusion_tables import TABLES, Child, Table, base_steps, new_child

from distill.config import require
from fusion.group_table import JSON_NAME, GroupTable
from launch import console
from launch.artifact import Artifact
from launch.config import StepConfig
from puzzle.model.architecture import Architecture
from puzzle.model.checkpoint import read_architecture

STAGES_USED = (
    "import_parent",
    "prepare_data",
    "prune_attention",
    "measure_dependency",
    "score_groups",
    "fuse",
    "distill_groups",
    "parallelize_blocks",
    "distill",
    "evaluate",
    "benchmark",
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model of a table."""

    label: str
    step: str
    """That made it."""
    depth: int
    """Blocks that run one after another; a parallel window counts as one."""
    num_attentions: int
    kld: float
    """To the parent, nats per token."""
    lm_loss: float
    top1_agreement_frac: float
    decode_ms: float | None
    """None: the models of this table could not be timed."""
    decode_vs_parent: float | None
    decode_spread: float | None
    prefill_ms: float | None
    saved_ms: float | None
    """Predicted of the groups by the group scores, summed; None: no groups, or not scored."""
    summed_kld: float | None
    """Of the groups, each measured with it alone fused."""
    removed: tuple[int, ...]
    """Blocks whose FFN was removed instead of fused."""


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What is known so far."""

    tables: dict[str, dict[str, Any]] = field(default_factory=dict)
    quality: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Columns of evaluate by step, so that no model is judged twice."""
    speed: dict[frozenset[str], dict[str, dict[str, Any]]] = field(default_factory=dict)
    """Rows of a benchmark by the set of shapes that it timed; a set is timed once."""


def shape(architecture: Architecture) -> str:
    """A text that is equal for models of equal speed."""
    return f"{' '.join(block.name for block in architecture.blocks)} {architecture.parallel_windows}"


def fill(table: Table, bench: Workbench, found: Findings) -> dict[str, Any]:
    """Make the models of a table, judge and time them; its rows, and why others are missing."""
    models = {label: bench.make(step) for label, step in table.rows.items()}
    made = {table.rows[label]: artifact for label, artifact in models.items() if artifact is not None}
    _judge(table, bench, found, made)
    timed = _time(table, bench, found, made)
    made = {step: artifact for step, artifact in made.items() if step in found.quality}
    rows = [
        _row(label, step, made[step], found.quality[step], timed) for label, step in table.rows.items() if step in made
    ]
    missing = {label: bench.errors.get(step, "not judged") for label, step in table.rows.items() if step not in made}
    return {"title": table.title, "rows": [asdict(row) for row in rows], "missing": missing}


def _judge(table: Table, bench: Workbench, found: Findings, made: Mapping[str, Artifact]) -> None:
    """Evaluate what is new, in one step; each by itself where that fails, so that one model does not take the rest."""
    new = [step for step in made if step != "parent" and step not in found.quality]
    name = f"evaluation_{table.name}"
    for suffix, steps in (("", new), *((f"_{step}", [step]) for step in new)):
        if "parent" in found.quality and all(step in found.quality for step in steps):
            continue
        inputs = {"parent": "parent", "data": "data"} | {step: step for step in steps}
        bench.steps[name + suffix] = StepConfig(stage="evaluate", inputs=inputs)
        evaluation = bench.make(name + suffix)
        if evaluation is not None:
            found.quality.update(json.loads((evaluation.path / "evaluate.json").read_text())["models"])


def _time(
    table: Table, bench: Workbench, found: Findings, made: Mapping[str, Artifact]
) -> Mapping[str, dict[str, Any]]:
    """Columns of the benchmark by shape. Models of one shape are timed once."""
    by_shape: dict[str, str] = {}
    for step, artifact in made.items():
        by_shape.setdefault(shape(read_architecture(artifact.path)), step)
    for shapes, rows in found.speed.items():
        if by_shape.keys() <= shapes:
            return rows
    name = f"speed_{table.name}"
    inputs = {"parent": "parent"} | {step: step for step in by_shape.values() if step != "parent"}
    bench.steps[name] = StepConfig(stage="benchmark", inputs=inputs)
    benchmark = bench.make(name)
    if benchmark is None:
        return {}
    models = json.loads((benchmark.path / "benchmark.json").read_text())["models"]
    parent = read_architecture(bench.artifacts["parent"].path)
    rows = {shape(parent): models["parent"]} | {key: models[step] for key, step in by_shape.items()}
    found.speed[frozenset(rows)] = rows
    return rows


def _row(label: str, step: str, artifact: Artifact, quality: Mapping[str, Any], timed: Mapping[str, Any]) -> Row:
    architecture = read_architecture(artifact.path)
    speed = timed.get(shape(architecture), {})
    fusion_file = artifact.path / "fusion.json"
    fusion = json.loads(fusion_file.read_text()) if fusion_file.is_file() else {}
    # What fusing the groups would have cost says nothing of a model that was treated otherwise.
    groups = fusion["groups"] if fusion.get("treatment") == "fuse" else []
    return Row(
        label=label,
        step=step,
        depth=architecture.num_blocks - sum(last - first for first, last in architecture.parallel_windows),
        num_attentions=sum(not block.attention.is_no_op for block in architecture.blocks),
        kld=quality["kld"],
        lm_loss=quality["lm_loss"],
        top1_agreement_frac=quality["top1_agreement_frac"],
        **{key: speed.get(key) for key in ("decode_ms", "decode_vs_parent", "decode_spread", "prefill_ms")},
        saved_ms=_sum(groups, "saved_ms"),
        summed_kld=_sum(groups, "kld"),
        removed=tuple(fusion.get("removed", ())),
    )


def _sum(groups: list[dict[str, Any]], key: str) -> float | None:
    values: list[float | None] = [group.get(key) for group in groups]
    known = [value for value in values if value is not None]
    return sum(known) if known and len(known) == len(values) else None


def markdown(found: Findings, child: Child) -> str:
    """All tables so far."""
    runs = ", ".join(f"{first}-{last}" for first, last in child.architecture.attention_free_runs())
    parent = found.quality.get("parent", {})
    lines = [f"Child: blocks without attention {runs}. Parent: LM loss {_number(parent.get('lm_loss'))}.", ""]
    for table in found.tables.values():
        lines += [f"## {table['title']}", "", *_markdown_rows(table["rows"])]
        missing = [f"- {label}: {reason}" for label, reason in table["missing"].items()]
        lines += ["", *missing, *([""] if missing else [])]
    return "\n".join(lines).rstrip()


def _markdown_rows(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield "| model | depth | KLD to parent | LM loss | decode ms | x parent | x first | ms predicted | summed KLD |"
    yield "|---|---|---|---|---|---|---|---|---|"
    first_ms = rows[0]["decode_ms"] if rows else None
    for row in rows:
        removed = f" (FFNs {' '.join(map(str, row['removed']))})" if row["removed"] else ""
        columns = [row["label"] + removed, str(row["depth"])]
        columns += [_number(row[key]) for key in ("kld", "lm_loss", "decode_ms", "decode_vs_parent")]
        known = first_ms is not None and row["decode_ms"] is not None
        columns.append(_number(row["decode_ms"] / first_ms if known else None))
        columns += [_number(row["saved_ms"], ".4f"), _number(row["summed_kld"], ".3g")]
        yield f"| {' | '.join(columns)} |"


def _number(value: float | None, form: str = ".3f") -> str:
    return "-" if value is None else f"{value:{form}}"


def _parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__, root="runs/fusion_ablation")
    parser.add_argument("--num-attentions", type=int, default=14, help="attentions that the child lacks")
    choices = ("contiguous", "iterative", "independent")
    parser.add_argument("--choice", choices=choices, default="contiguous", help="which, as in prune_attention")
    parser.add_argument("--child-tokens", type=int, default=2_000_000, help="distillation of the child; 0: none")
    parser.add_argument("--local-tokens", type=int, default=1_000_000, help="block-local distillation")
    parser.add_argument("--distill-tokens", type=int, default=2_000_000, help="global distillation after fusion")
    parser.add_argument("--skip", nargs="*", default=[], choices=list(TABLES), help="tables to leave out")
    return parser


def make_child(bench: Workbench, options: argparse.Namespace) -> Child:
    """The child and what the tables need to know of it.

    Raises:
        ValueError: it could not be made, or nothing of it can be fused.
    """
    bench.steps.update(
        base_steps(num_attentions=options.num_attentions, choice=options.choice, child_tokens=options.child_tokens)
    )
    artifact, scores = bench.make("child"), bench.make("group_scores")
    require(artifact is not None, f"no child: {'; '.join(f'{k}: {v}' for k, v in bench.errors.items())}")
    assert artifact is not None
    return new_child(
        read_architecture(artifact.path),
        None if scores is None else GroupTable.read(scores.path / JSON_NAME),
        options.set,
        local_tokens=options.local_tokens,
        distill_tokens=options.distill_tokens,
    )


def ablation(bench: Workbench, options: argparse.Namespace) -> bool:
    """Fill one table after another, and write what is known after each; whether no stage broke down."""
    bench.check(STAGES_USED)
    child, found = make_child(bench, options), Findings()
    tables = {name: make(child) for name, make in TABLES.items()}
    for table in tables.values():
        bench.steps.update(table.steps)
    for name, table in tables.items():
        if name not in options.skip:
            found.tables[name] = fill(table, bench, found)
            _write(bench, options, found, child)
    console.say(markdown(found, child))
    return not bench.defects


def _write(bench: Workbench, options: argparse.Namespace, found: Findings, child: Child) -> None:
    content = {
        "overrides": options.set,
        "child": [block.name for block in child.architecture.blocks],
        "parent": found.quality.get("parent"),
        "tables": found.tables,
        "headlines": {name: artifact.manifest.headline for name, artifact in bench.artifacts.items()},
        "seconds": {name: artifact.manifest.seconds for name, artifact in bench.artifacts.items()},
        "errors": bench.errors,
    }
    write_results(options.out, "fusion_ablation", content, markdown(found, child))


def main() -> int:
    options = _parser().parse_args()
    try:
        bench = Workbench(options.root, "fusion_ablation", options.set)
        with bench.directory.held():
            return 0 if ablation(bench, options) else 1
    except ValueError as error:
        console.complain(str(error))
        return 2


if __name__ == "__main__":
    sys.exit(main())
