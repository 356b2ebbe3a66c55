from __future__ import annotations

import json
import sys
from typing import Any

import pytest

from launch.dashboard import PAGES, RECOVERY, SPEED, TABLES, TRAINING, parse, run

USAGE_WORDS = "python -m launch dashboard GROUP"


def spec(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    pytest.importorskip("wandb_workspaces")
    assert run([*arguments, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize("group", ["demo", "demo,fuse.norm=last+x"])
def test_the_workspace_shows_the_runs_of_the_group_alone(capsys: pytest.CaptureFixture[str], group: str) -> None:
    view = spec(capsys, group, "entity=us", "project=pico")
    assert (view["entity"], view["project"]) == ("us", "pico")
    (runs,) = view["spec"]["section"]["runSets"]
    (condition,) = runs["filters"]["filters"]
    assert condition["key"] == {"section": "run", "name": "group"}
    assert (condition["op"], condition["value"], condition["disabled"]) == ("=", group, False)


def test_every_panel_is_there_and_curves_stand_over_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    section = spec(capsys, "demo")["spec"]["section"]
    assert section["settings"]["xAxis"] == "tokens"
    panels = [panel for part in section["panelBankConfig"]["sections"] for panel in part["panels"]]
    lines = [panel["config"] for panel in panels if panel["viewType"] == "Run History Line Plot"]
    by_title = {line["chartTitle"]: line for line in lines}
    for plots in (RECOVERY, TRAINING, SPEED):
        for title, metrics in plots.items():
            assert (by_title[title]["xAxis"], by_title[title]["metrics"]) == ("tokens", list(metrics))
    shown = {metric for line in lines for metric in line["metrics"]}
    assert shown >= {"eval/kld", "eval/lm_loss_gap", "eval/top1_agreement_frac", "eval/retained_frac"}
    assert shown >= {"train/loss", "perf/tokens_per_s", "mem/peak_gib"}
    media = [key for panel in panels if panel["viewType"] == "Media Browser" for key in panel["config"]["mediaKeys"]]
    assert media == list(PAGES.values())
    tables = [json.dumps(panel) for panel in panels if panel["viewType"] == "Weave"]
    assert len(tables) == len(TABLES)
    assert all(name in table for name, table in zip(TABLES, tables, strict=True))


def test_arguments() -> None:
    request = parse(["demo,a.b=1", "project=p", "entity=e"])
    assert (request.group, request.project, request.entity) == ("demo,a.b=1", "p", "e")
    for wrong in ([], ["a", "b"], ["demo", "--jsn"], ["no name"]):
        with pytest.raises(ValueError, match=USAGE_WORDS):
            parse(wrong)


def test_a_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    with pytest.raises(ValueError, match=r"pip install -e '\.\[wandb\]'"):
        run(["demo", "--json"])


def test_saving_without_a_login_is_one_message(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    pytest.importorskip("wandb_workspaces")
    for name in ("WANDB_API_KEY", "WANDB_ENTITY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", f"{tmp_path}/none")
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    with pytest.raises(ValueError, match="needs a W&B login"):
        run(["demo"])
