"""Which models the tables of the fusion ablation compare, as steps of the real stages. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

from fusion.group_table import GroupTable
from fusion.grouping import Group, format_groups, fusion_groups
from launch.config import StepConfig, compose_stage
from launch.stage_configs import FuseStage
from puzzle.model.architecture import Architecture

PAPER_STEPS = ("step_1", "step_2", "step_3", "step_4")
"""Options of the group ``fuse``: steps of the 49B ablation (FFN Fusion, Table 4)."""
MAX_WINDOWS = 4
"""Parallel windows of the last row (FFN Fusion, Table 7)."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Models that are compared with one another."""

    name: str
    title: str
    rows: dict[str, str]
    """Label -> step whose model it is."""
    steps: dict[str, StepConfig] = field(default_factory=dict)
    """How the models come about; they may build on steps of other tables."""


@dataclass(frozen=True, kw_only=True)
class Child:
    """The unfused model that the tables are of."""

    architecture: Architecture
    scores: GroupTable | None
    """Of its groups; None: they could not be measured, and what needs them is left out."""
    fusions: dict[str, tuple[Group, ...]]
    """Groups of the paper's steps, without those that repeat an earlier one, finest first."""
    labels: dict[str, str]
    """Keys of ``fusions`` -> "step 1", or "step 3, 4" where they are the same."""
    local_tokens: int
    """Budget of every block-local distillation."""
    distill_tokens: int
    """Budget of every global distillation."""

    @property
    def measured(self) -> dict[str, str]:
        """Inputs of stage fuse: the child and what is known of it."""
        inputs = {"model": "child", "dependency": "dependency"}
        return inputs if self.scores is None else inputs | {"group_scores": "group_scores"}

    def fuse(self, *overrides: str) -> StepConfig:
        """The step that fuses it."""
        return StepConfig(stage="fuse", inputs=self.measured, overrides=overrides)

    def step_of(self, groups: Sequence[Group]) -> str | None:
        """The step that has just these groups."""
        return next((step for step, chosen in self.fusions.items() if chosen == tuple(groups)), None)

    @property
    def coarsest(self) -> str:
        """The last distinct step: whole runs."""
        return list(self.fusions)[-1]


def new_child(
    architecture: Architecture,
    scores: GroupTable | None,
    overrides: Sequence[str],
    *,
    local_tokens: int,
    distill_tokens: int,
) -> Child:
    """The child with the groups of the paper's steps.

    Raises:
        ValueError: nothing of it can be fused.
    """
    fusions: dict[str, tuple[Group, ...]] = {}
    labels: dict[str, str] = {}
    for step in PAPER_STEPS:
        config = compose_stage(FuseStage, [f"fuse={step}", *overrides]).fuse
        groups = fusion_groups(architecture, config, None)
        same = next((name for name, earlier in fusions.items() if earlier == groups), None)
        if same is None:
            fusions[step] = groups
            labels[step] = step.replace("_", " ")
        else:
            labels[same] += f", {step.removeprefix('step_')}"
    return Child(
        architecture=architecture,
        scores=scores,
        fusions=fusions,
        labels=labels,
        local_tokens=local_tokens,
        distill_tokens=distill_tokens,
    )


def base_steps(*, num_attentions: int, choice: str, child_tokens: int) -> dict[str, StepConfig]:
    """Parent, data and the child, whose dependency and group scores are measured.

    Args:
        num_attentions: attentions that the child lacks.
        choice: which: ``contiguous``, ``iterative`` or ``independent``, as in ``prune_attention``.
        child_tokens: budget of a global distillation of the child before anything is fused; 0: none.
    """
    chosen = () if choice == "independent" else (f"prune_attention.{choice}=true",)
    prune = StepConfig(
        stage="prune_attention",
        inputs={"model": "parent", "data": "data"},
        overrides=(f"prune_attention.num_attentions={num_attentions}", *chosen),
    )
    steps = {
        "parent": StepConfig(stage="import_parent"),
        "data": StepConfig(stage="prepare_data", inputs={"parent": "parent"}),
        "child" if child_tokens == 0 else "pruned": prune,
    }
    if child_tokens > 0:
        steps["child"] = _distill("pruned", child_tokens)
    measured = {"model": "child", "data": "data"}
    steps["dependency"] = StepConfig(stage="measure_dependency", inputs=measured)
    steps["group_scores"] = StepConfig(stage="score_groups", inputs=measured)
    return steps


def fusion_steps(child: Child) -> Table:
    """Table 4: coarser and coarser fusion."""
    steps = {step: child.fuse(f"fuse={step}") for step in child.fusions}
    rows = {"unfused": "child"} | {_fused_label(child, step): step for step in child.fusions}
    return Table(name="steps", title="Fusion steps (Table 4)", rows=rows, steps=steps)


def removal(child: Child) -> Table:
    """Section 5.2: the FFNs of a fusion's groups removed, as few as make the model as fast, against the fusion."""
    steps = {f"{step}_removed": child.fuse(f"fuse={step}", "fuse.treatment=remove") for step in child.fusions}
    rows = {"unfused": "child"}
    for step in child.fusions if child.scores is not None else ():
        rows[_fused_label(child, step)] = step
        rows[f"{child.labels[step]}: removed instead, no slower"] = f"{step}_removed"
    return Table(name="removal", title="Removal against fusion at equal latency (section 5.2)", rows=rows, steps=steps)


def last_ffn(child: Child) -> Table:
    """Table 5: whole runs fused without their last FFN, without their first, or with both."""
    runs = [(first, last) for first, last in child.architecture.attention_free_runs() if last - first >= 2]
    sets = [[run] for run in runs] + ([runs] if len(runs) > 1 else [])
    rows, steps = {"unfused": "child"}, {}
    for index, chosen in enumerate(sets):
        for left_out, start, end in (("last", 0, 1), ("first", 1, 0), ("none", 0, 0)):
            groups = [(first + start, last - end) for first, last in chosen]
            name = child.step_of(groups) or f"without_{left_out}_{index}"
            if name not in child.fusions:
                steps[name] = child.fuse(_by_hand(groups))
            rows[f"{format_groups(groups)} fused, {left_out} left out"] = name
    return Table(name="last_ffn", title="The last FFN of a run (Table 5)", rows=rows, steps=steps)


def order(child: Child) -> Table:
    """Table 6: the FFNs of a group in reversed order against the group fused, nothing trained."""
    rows, steps = {"unfused": "child"}, {}
    for index, groups in enumerate(_ranges(child)):
        for treatment, label in (("fuse", "fused"), ("reverse", "reversed")):
            same = child.step_of(groups) if treatment == "fuse" else None
            name = same or f"range_{index}_{treatment}"
            if same is None:
                steps[name] = child.fuse(_by_hand(groups), f"fuse.treatment={treatment}")
            rows[f"{format_groups(groups)} {label}"] = name
    return Table(name="order", title="Reversed order against fusion (Table 6)", rows=rows, steps=steps)


def norm(child: Child) -> Table:
    """Eq. 5 with the last member's norm, against every member's own norm folded into its weights."""
    rows, steps = {"unfused": "child"}, {}
    for step in dict.fromkeys((next(iter(child.fusions)), child.coarsest)):
        # Group scores hold for one norm.
        steps[f"{step}_last_norm"] = StepConfig(
            stage="fuse",
            inputs={"model": "child", "dependency": "dependency"},
            overrides=(f"fuse={step}", "fuse.norm=last"),
        )
        rows[f"{child.labels[step]}: own norms, folded"] = step
        rows[f"{child.labels[step]}: the last member's norm"] = f"{step}_last_norm"
    return Table(name="norm", title="Norm of the fused FFN (eq. 5)", rows=rows, steps=steps)


def local(child: Child) -> Table:
    """Block-local distillation in both directions: of the fused FFNs, and of the run before it is fused."""
    step = child.coarsest
    by_hand, budget = _by_hand(child.fusions[step]), f"group_distillation.train.max_tokens={child.local_tokens}"
    sources = {"model": "child", "data": "data"}
    steps = {
        "fused_first": StepConfig(stage="distill_groups", inputs=sources | {"fused": step}, overrides=(budget,)),
        "run_first": StepConfig(stage="distill_groups", inputs=sources, overrides=(budget, by_hand)),
        "run_first_fused": StepConfig(stage="fuse", inputs={"model": "run_first"}, overrides=(by_hand,)),
    }
    rows = {
        "unfused": "child",
        _fused_label(child, step): step,
        "fused, then the fused FFNs distilled": "fused_first",
        "the run's FFNs distilled, not fused yet": "run_first",
        "the run's FFNs distilled, then fused": "run_first_fused",
    }
    return Table(name="local", title="Block-local distillation", rows=rows, steps=steps)


def recovery(child: Child) -> Table:
    """Table 4, last row: global distillation after fusion, beside the same tokens without fusion."""
    step = child.coarsest
    models = {"unfused": "child", child.labels[step]: step, "fused, fused FFNs distilled": "fused_first"}
    steps = {f"{name}_distilled": _distill(name, child.distill_tokens) for name in models.values()}
    rows = dict(
        chain.from_iterable(
            ((label, name), (f"{label}, + {child.distill_tokens:,} tokens", f"{name}_distilled"))
            for label, name in models.items()
        )
    )
    return Table(name="recovery", title="Recovery by global distillation (Table 4)", rows=rows, steps=steps)


def most_gain(child: Child) -> Table:
    """The groups that save the most time, at no more summed KLD than each of the paper's steps has."""
    rows, steps = {"unfused": "child"}, {}
    if child.scores is not None:
        for step, groups in child.fusions.items():
            summed = sum(child.scores.group(first, last).kld for first, last in groups)
            name = f"most_gain_{step}"
            # The sum of the same numbers in another order may round up.
            steps[name] = child.fuse("fuse=most_gain", f"fuse.max_kld={summed * (1 + 1e-9)}")
            rows[_fused_label(child, step)] = step
            rows[f"most gain within {summed:.3g} nats, as {child.labels[step]}"] = name
    return Table(name="most_gain", title="Groups by measured gain under a KLD bound", rows=rows, steps=steps)


def windows(child: Child) -> Table:
    """Table 7: windows of whole blocks of the parent in parallel, greedily chosen, nothing trained."""
    steps = {
        "parent_dependency": StepConfig(stage="measure_dependency", inputs={"model": "parent", "data": "data"}),
    }
    rows = {"parent": "parent"}
    for count in range(1, MAX_WINDOWS + 1):
        name = f"windows_{count}"
        steps[name] = StepConfig(
            stage="parallelize_blocks",
            inputs={"model": "parent", "dependency": "parent_dependency"},
            overrides=(f"parallelize.num_windows={count}",),
        )
        rows[f"{count} window{'s' * (count > 1)}"] = name
    return Table(name="windows", title="Full-block parallelism of the parent (Table 7)", rows=rows, steps=steps)


TABLES: Mapping[str, Callable[[Child], Table]] = {
    "steps": fusion_steps,
    "removal": removal,
    "last_ffn": last_ffn,
    "local": local,
    "most_gain": most_gain,
    "recovery": recovery,
    "windows": windows,
    "order": order,
    "norm": norm,
}
"""What is worth the most comes first."""


def _distill(student: str, max_tokens: int) -> StepConfig:
    inputs = {"student": student, "teacher": "parent", "data": "data"}
    return StepConfig(stage="distill", inputs=inputs, overrides=(f"distill.max_tokens={max_tokens}",))


def _by_hand(groups: Sequence[Group]) -> str:
    return f"fuse.groups={json.dumps(groups, separators=(',', ':'))}"


def _fused_label(child: Child, step: str) -> str:
    groups = child.fusions[step]
    num_members = sum(last - first + 1 for first, last in groups)
    return f"{child.labels[step]}: {num_members} FFNs to {len(groups)} ({format_groups(groups)})"


def _ranges(child: Child) -> list[tuple[Group, ...]]:
    """All groups of the coarsest fusion, and both halves of the longest where it has four FFNs at least."""
    groups = child.fusions[child.coarsest]
    first, last = max(groups, key=lambda group: group[1] - group[0])
    middle = (first + last) // 2
    halves = [((first, middle),), ((middle + 1, last),)] if last - first >= 3 else []
    return [groups, *halves]
