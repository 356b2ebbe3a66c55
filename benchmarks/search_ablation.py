"""What the search and BLD are worth: children of one parent at one latency budget, before any global training.

    python benchmarks/search_ablation.py [--root runs/ablation] [--samples 0 1 2] [--set KEY=VALUE ...] [--out DIR]

Every row is a child that the real stages made: a method of choosing variants (MIP, greedy, attention pruning, random,
most parameters, no-op only), with replacements trained by BLD or as initialised. Everything is repeated with other
samples of calibration data: each has a library of its own, ranked on other sequences and trained on the text in another
order, and scores from sequences that its library has not seen. All meet the same budget of measured decode latency, and
all are judged on the same held-out text, which neither BLD nor the scores have seen. Besides: plain search against
fusion-aware search, before and after fusion, and scores of iterative removals. Steps that are in the store are not
computed again.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping
from typing import Any

from ablation import new_parser, run, write_results

from launch.artifact import Artifact
from launch.config import StepConfig, compose_stage
from launch.registry import STAGES

METHODS = ("mip", "greedy", "attention_pruning", "random", "max_params", "no_op_only")
LIBRARIES = {"bld": "true", "init": "false"}
"""Name -> library.train."""


def search_steps(
    *, libraries: list[str], samples: list[int], stride: int, seen: int, latency_frac: float, iterative_removals: int
) -> tuple[dict[str, StepConfig], list[str]]:
    """Steps up to the children by name, and the children, which are named ``<library>_<method>_<sample>``.

    Args:
        stride: Calibration sequences of a sample.
        seen: Of them, what the library sees; scores are from the others.
    """
    found = {
        "parent": StepConfig(stage="import_parent"),
        "data": StepConfig(stage="prepare_data", inputs={"parent": "parent"}),
    }
    found["costs"] = StepConfig(stage="measure_costs", inputs={"parent": "parent"})
    children: list[str] = []
    for sample in samples:
        skip = f"scores.skip_sequences={sample * stride + seen}"
        for kind in libraries:
            library, scores = f"{kind}_library_{sample}", f"{kind}_scores_{sample}"
            found[library] = _library(kind, sample, stride)
            found[scores] = _scores(library, skip)
            for method in METHODS:
                name = f"{kind}_{method}_{sample}"
                overrides = (f"search.method={method}", f"search.random_seed={sample}")
                children += _child(found, name, library, scores, latency_frac, *overrides)
        if "bld" not in libraries:
            continue
        library, plain = f"bld_library_{sample}", f"bld_plain_{sample}"
        children += _child(found, plain, library, f"bld_scores_{sample}", latency_frac, "search.fusion_aware=false")
        iterative = f"bld_scores_iterative_{sample}"
        found[iterative] = _scores(library, skip, f"scores.iterative_removals={iterative_removals}")
        children += _child(found, f"bld_iterative_{sample}", library, iterative, latency_frac)
    return found, children


def judging_steps(artifacts: Mapping[str, Artifact], children: list[str]) -> dict[str, StepConfig]:
    """Fusion of what plain and fusion-aware search have chosen, where there is something to fuse, and evaluation."""
    judged = dict.fromkeys(children)
    found = {}
    for name in children:
        if name.startswith(("bld_plain_", "bld_mip_")) and _solution(artifacts, name)["num_merges"] > 0:
            found[f"{name}_fused"] = StepConfig(stage="fuse", inputs={"model": name})
            judged[f"{name}_fused"] = None
    inputs = {"parent": "parent", "data": "data"} | {name: name for name in judged}
    return found | {"evaluation": StepConfig(stage="evaluate", inputs=inputs)}


def _library(kind: str, sample: int, stride: int) -> StepConfig:
    settings = (f"library.train={LIBRARIES[kind]}", f"library.skip_sequences={sample * stride}", f"seed={sample}")
    return StepConfig(stage="build_library", inputs={"parent": "parent", "data": "data"}, overrides=settings)


def _scores(library: str, *overrides: str) -> StepConfig:
    inputs = {"parent": "parent", "library": library, "data": "data"}
    return StepConfig(stage="score_library", inputs=inputs, overrides=overrides)


def _child(
    found: dict[str, StepConfig], name: str, library: str, scores: str, latency_frac: float, *overrides: str
) -> list[str]:
    budget = (f"search.constraint.latency_frac={latency_frac}", "search.pareto_latency_fracs=[]")
    found[f"{name}_search"] = StepConfig(
        stage="search", inputs={"scores": scores, "costs": "costs"}, overrides=(*budget, *overrides)
    )
    found[name] = StepConfig(
        stage="assemble", inputs={"parent": "parent", "library": library, "solution": f"{name}_search"}
    )
    return [name]


def rows(artifacts: Mapping[str, Artifact]) -> Iterator[dict[str, Any]]:
    """One row per judged child."""
    judged = json.loads((artifacts["evaluation"].path / "evaluate.json").read_text())["models"]
    for name, quality in judged.items():
        if name == "parent":
            continue
        fused = name.endswith("_fused")
        library, method, sample = name.removesuffix("_fused").split("_", 1)[0], *_method(name)
        solution = _solution(artifacts, name.removesuffix("_fused"))
        parent_ms = solution["parent_costs"]["latency_ms"]
        yield {
            "name": name,
            "library": library,
            "method": method + (", fused" if fused else ""),
            "sample": sample,
            "kld": quality["kld"],
            "lm_loss": quality["lm_loss"],
            "score": solution["score"],
            "latency_frac": solution["costs"]["latency_ms"] / parent_ms,
            "fused_latency_frac": solution["predicted_fused_latency_ms"] / parent_ms,
            "num_attention_free": sum(block.startswith("no_op+") for block in solution["blocks"]),
            "params_frac": solution["costs"]["params"] / solution["parent_costs"]["params"],
        }


def _method(name: str) -> tuple[str, int]:
    method, _, sample = name.removesuffix("_fused").partition("_")[2].rpartition("_")
    return method, int(sample)


def _solution(artifacts: Mapping[str, Artifact], child: str) -> dict[str, Any]:
    return json.loads((artifacts[f"{child}_search"].path / "solution.json").read_text())["solutions"][0]


def table(results: list[dict[str, Any]], parent_loss: float) -> str:
    """Markdown: median and range over the samples."""
    lines = [
        f"Parent: LM loss {parent_loss:.3f}.",
        "",
        "| library | method | KLD | LM loss | latency, fused as predicted | params | attentions removed |",
        "|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in results:
        groups.setdefault((row["library"], row["method"]), []).append(row)
    for (library, method), group in sorted(groups.items()):
        lines.append(
            f"| {library} | {method} | {_spread(group, 'kld')} | {_spread(group, 'lm_loss')} "
            f"| {_spread(group, 'fused_latency_frac')} | {_spread(group, 'params_frac')} "
            f"| {_spread(group, 'num_attention_free', '.0f')} |"
        )
    return "\n".join(lines)


def _spread(group: list[dict[str, Any]], key: str, form: str = ".3f") -> str:
    values = sorted(row[key] for row in group)
    return f"{statistics.median(values):{form}} ({values[0]:{form}} to {values[-1]:{form}})"


def main() -> None:
    parser = new_parser(__doc__, root="runs/ablation")
    parser.add_argument("--libraries", nargs="+", default=list(LIBRARIES), choices=list(LIBRARIES), help="rows to make")
    parser.add_argument("--samples", type=int, nargs="+", default=[0, 1, 2], help="samples of calibration data")
    parser.add_argument("--sequences", type=int, default=32, help="calibration sequences of each sample")
    parser.add_argument("--latency-frac", type=float, default=0.6, help="budget of decode latency")
    parser.add_argument("--iterative-removals", type=int, default=16, help="removals that are scored one after another")
    options = parser.parse_args()
    library = compose_stage(STAGES["build_library"].config, options.set).library
    seen, of_scores = library.importance_sequences + library.bld.eval_sequences, options.sequences
    steps, children = search_steps(
        libraries=options.libraries,
        samples=options.samples,
        stride=seen + of_scores,
        seen=seen,
        latency_frac=options.latency_frac,
        iterative_removals=options.iterative_removals,
    )
    # One length of sequences, so that what the library has seen can be left out by counting.
    overrides = [*options.set, f"scores.num_sequences={of_scores}", f"scores.seq_len={library.bld.seq_len}"]
    # Only a solution says whether its child has anything to fuse, so the fusions are planned afterwards.
    artifacts = run(options.root, "ablation", steps, overrides, is_fused_elsewhere=True)
    steps |= judging_steps(artifacts, children)
    artifacts = run(options.root, "ablation", steps, overrides, is_fused_elsewhere=True)
    results = list(rows(artifacts))
    parent_loss = json.loads((artifacts["evaluation"].path / "evaluate.json").read_text())["models"]["parent"][
        "lm_loss"
    ]
    text = table(results, parent_loss)
    print(text)
    seconds = {name: artifact.manifest.seconds for name, artifact in artifacts.items()}
    write_results(options.out, "ablation", {"rows": results, "seconds": seconds}, text)


if __name__ == "__main__":
    main()
