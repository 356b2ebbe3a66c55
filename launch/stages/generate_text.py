"""Stage generate_text: teacher -> text sampled from it, for the source `generated` of stage prepare_data.

All processes sample, each its share of the batches; a run that was killed goes on with the batches that it lacks.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from functools import cached_property
from pathlib import Path

from tqdm.auto import tqdm

from distill.config import require
from distill.data.generation import TEXT_NAME
from distill.data.sampling import DocumentSampler, SampledDocument, prompt_ids
from distill.data.tokenizer import load_tokenizer
from distill.distributed import barrier, gather_objects, is_main, rank
from distill.engine.base import resolve_device, resolve_dtype
from distill.files import write_whole
from launch.quantities import scaled
from launch.stage import Inputs, StageContext, StageResult
from launch.stage_configs import GenerateTextStage
from puzzle.model.checkpoint import load_model, read_architecture


def run(config: GenerateTextStage, inputs: Inputs, context: StageContext) -> StageResult:
    """Write ``text.jsonl``: one document per line with its ``text``, ``num_tokens`` and whether the model ended it."""
    teacher_dir = inputs["teacher"].path
    check_generation(config, teacher_dir)
    parts = _Parts(config, teacher_dir, context.resume)
    kept = _sample(parts, config.generation.max_tokens, desc=context.step_name)
    barrier()
    documents = [document for path in kept for document in read_part(path)]
    if is_main():
        with (context.out / TEXT_NAME).open("wb") as text:
            for path in kept:
                with path.open("rb") as part:
                    shutil.copyfileobj(part, text)
    barrier()
    num_tokens, num_ended = sum(d.num_tokens for d in documents), sum(d.ended for d in documents)
    metrics = {
        "num_tokens": num_tokens,
        "num_documents": len(documents),
        "ended_frac": num_ended / len(documents),
        "num_empty": sum(not d.text.strip() for d in documents),
    }
    return StageResult(
        headline=f"{scaled(num_tokens)} tokens in {len(documents)} documents, {num_ended / len(documents):.0%} ended",
        metrics=metrics,
    )


def check_generation(config: GenerateTextStage, teacher_dir: Path) -> None:
    """Raise ``ValueError`` where documents are beyond the teacher's positions or a prompt fills one."""
    generation, teacher = config.generation, read_architecture(teacher_dir)
    # The begin-of-text token takes a position too.
    longest = teacher.max_positions - 1
    require(
        generation.document_tokens <= longest,
        f"generation.document_tokens={generation.document_tokens} is beyond the {teacher.max_positions} positions of "
        f"the teacher; set it to at most {longest}",
    )
    for text, ids in zip(generation.prompts, prompt_ids(load_tokenizer(teacher_dir), generation), strict=False):
        require(
            len(ids) < generation.document_tokens,
            f"generation.prompts: {text[:40]!r} has {len(ids)} tokens and leaves nothing of "
            f"generation.document_tokens={generation.document_tokens} to sample; shorten it or raise the latter",
        )


def _sample(parts: _Parts, max_tokens: int, *, desc: str) -> list[Path]:
    """Sample batches in rounds, one per process, until they reach ``max_tokens``. Returns the files that count.

    The last round may go beyond: what counts is a function of the batches alone, not of the number of processes.
    """
    kept: list[Path] = []
    num_tokens = 0
    with tqdm(total=max_tokens, desc=desc, unit="tok", unit_scale=True, leave=False, disable=not is_main()) as bar:
        while True:
            documents = parts.documents(len(kept) + rank())
            for count in gather_objects(sum(document.num_tokens for document in documents)):
                kept.append(parts.path(len(kept)))
                num_tokens += count
                bar.update(count)
                if num_tokens >= max_tokens:
                    return kept


class _Parts:
    """Batches of documents, each in a file of its own that appears by one rename."""

    def __init__(self, config: GenerateTextStage, teacher_dir: Path, directory: Path) -> None:
        self._config = config
        self._teacher_dir = teacher_dir
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def path(self, index: int) -> Path:
        """File of a batch."""
        return self._directory / f"part_{index:06d}.jsonl"

    def documents(self, index: int) -> list[SampledDocument]:
        """Batch ``index``, read where it was sampled before."""
        path = self.path(index)
        if path.is_file():
            return read_part(path)
        documents = self._sampler.batch(index)
        write_whole(path, "".join(json.dumps(asdict(document)) + "\n" for document in documents))
        return documents

    @cached_property
    def _sampler(self) -> DocumentSampler:
        engine = self._config.engine
        model = load_model(self._teacher_dir, device=resolve_device(engine), dtype=resolve_dtype(engine))
        return DocumentSampler(
            model, load_tokenizer(self._teacher_dir), self._config.generation, seed=self._config.seed
        )


def read_part(path: Path) -> list[SampledDocument]:
    """Documents of a file."""
    with path.open(encoding="utf-8") as lines:
        return [SampledDocument(**json.loads(line)) for line in lines]
