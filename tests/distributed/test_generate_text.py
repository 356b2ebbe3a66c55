"""Text sampled by two processes, against one."""

from __future__ import annotations

from pathlib import Path

from distill.config import EngineConfig
from distill.data.generation import GenerationConfig
from distill.distributed import join, leave, rank, together
from launch.stage import StageContext
from launch.stage_configs import GenerateTextStage
from launch.stages import generate_text
from tests.distributed.conftest import RunInProcesses
from tests.launch.training_inputs import artifact_at

# Five batches or so: the second process has one more to sample than count, or one less.
CONFIG = GenerateTextStage(
    generation=GenerationConfig(max_tokens=500, document_tokens=30, batch_size=4, prompts=("The ",)),
    engine=EngineConfig(device="cpu"),
    seed=0,
)


def _generate(teacher: Path, root: Path) -> int:
    """Number of batches that this machine has sampled when the stage ends."""
    out, resume = root / "out", root / "resume"
    context = StageContext(out=out, resume=resume, pool=root / "pool", run_name="run", step_name="text")
    result = generate_text.run(CONFIG, {"teacher": artifact_at(teacher, "model")}, context)
    assert result.metrics["num_tokens"] >= CONFIG.generation.max_tokens
    return len(list(resume.glob("part_*.jsonl")))


def _in_process(teacher: Path, root: Path) -> tuple[int, int]:
    join()
    with together():
        counts = rank(), _generate(teacher, root)
    leave()
    return counts


def test_processes_share_the_batches(run_in_processes: RunInProcesses, pico_parent_dir: Path, tmp_path: Path) -> None:
    for name in ("alone", "shared"):
        (tmp_path / name / "out").mkdir(parents=True)
    num_alone = _generate(pico_parent_dir, tmp_path / "alone")
    counts = run_in_processes(2, _in_process, pico_parent_dir, tmp_path / "shared")
    assert [place for place, _ in counts] == [0, 1]
    # Rounds of two: at most one batch more than count.
    assert num_alone <= counts[0][1] <= num_alone + 1
    texts = [(tmp_path / name / "out" / "text.jsonl").read_text(encoding="utf-8") for name in ("alone", "shared")]
    assert texts[0] == texts[1]
