"""In what settings do runs differ? From what each run's ``config.yaml`` says. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from launch.config import STEP_PREFIX, is_telling
from launch.quantities import MISSING

MAX_COLUMNS = 6
"""Settings that a table of runs shows, where nobody chose them."""


def settings_that_differ(configs: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Every resolved setting that is not the same in all runs, with its value in each of them.

    Args:
        configs: contents of ``config.yaml``.

    Returns:
        Key -> one text per run. ``<key>`` where all steps of a run that have it agree, else ``steps.<step>.<key>``; a
        step that a run lacks, or whose stage is another, is ``steps.<step>``.
    """
    by_step = [{name: _leaves(step["config"]) for name, step in config["steps"].items()} for config in configs]
    stages = [{f"{STEP_PREFIX}{n}": str(step["stage"]) for n, step in config["steps"].items()} for config in configs]
    found = _different(stages) if len({config["target"] for config in configs}) == 1 else {}
    for key in dict.fromkeys(key for steps in by_step for leaves in steps.values() for key in leaves):
        values = [{name: leaves[key] for name, leaves in steps.items() if key in leaves} for steps in by_step]
        if all(len(set(own.values())) <= 1 for own in values):
            found |= _different([{key: next(iter(own.values()))} if own else {} for own in values])
        else:
            found |= _different([{f"{STEP_PREFIX}{n}.{key}": value for n, value in own.items()} for own in values])
    return found


def columns_of(configs: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """The settings that tell runs apart, as a person would name them, with their value in each run.

    Of one pipeline: what was typed differently, so the swept keys of a sweep. Where that tells nothing, or pipelines
    differ, the resolved settings. None where there are more than :data:`MAX_COLUMNS`: names say more then.
    """
    targets = [str(config["target"]) for config in configs]
    if len(set(targets)) == 1:
        typed = [_typed(config) for config in configs]
        keys = dict.fromkeys(key for own in typed for key in own)
        chosen = {
            key: [own.get(key) or _resolved(config, key) for own, config in _pairs(typed, configs)] for key in keys
        }
        chosen = {key: values for key, values in chosen.items() if len(set(values)) > 1}
        if chosen:
            return chosen if len(chosen) <= MAX_COLUMNS else {}
    found = settings_that_differ(configs)
    pipelines = {"pipeline": targets} if len(set(targets)) > 1 else {}
    return {**pipelines, **found} if len(found) <= MAX_COLUMNS else pipelines


def _pairs(typed: Sequence[Mapping[str, str]], configs: Sequence[Mapping[str, Any]]) -> Iterable[Any]:
    return zip(typed, configs, strict=True)


def _typed(config: Mapping[str, Any]) -> dict[str, str]:
    pairs = (text.lstrip("+").partition("=") for text in config["overrides"] if is_telling(text))
    return {key: value for key, _, value in pairs}


def _resolved(config: Mapping[str, Any], key: str) -> str:
    """Value of ``key`` in a run whose command line does not name it."""
    steps: Mapping[str, Any] = config["steps"]
    if key.startswith(STEP_PREFIX):
        step, _, key = key.removeprefix(STEP_PREFIX).partition(".")
        steps = {step: steps[step]} if step in steps else {}
    values = {leaves[key] for step in steps.values() if key in (leaves := _leaves(step["config"]))}
    return values.pop() if len(values) == 1 else "default"


def _different(values: Sequence[Mapping[str, str]]) -> dict[str, list[str]]:
    keys = dict.fromkeys(key for own in values for key in own)
    table = {key: [own.get(key, MISSING) for own in values] for key in keys}
    return {key: row for key, row in table.items() if len(set(row)) > 1}


def _leaves(value: Any, path: str = "") -> dict[str, str]:
    if isinstance(value, Mapping) and value:
        leaves: dict[str, str] = {}
        for key, item in value.items():
            leaves |= _leaves(item, f"{path}.{key}" if path else str(key))
        return leaves
    return {path: "null" if value is None else str(value)}
