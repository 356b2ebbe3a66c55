"""FP8 exports, read by transformers with compressed-tensors and by vLLM, which quantise the inputs of every matrix.

Both are held against our own model of what was written: its weights dequantised, with quantised inputs or without.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from puzzle.model.targets import Target
from tests.fp8_models import import_benchmark, load_dequantized
from tests.readers.children import PADDED
from tests.readers.conftest import require_reader
from tests.readers.reading import PROMPT, Reading, read_exports, reading_of, run_export

pytestmark = pytest.mark.slow

CHILDREN = (
    "attention removed, wide fused FFN",
    "dummy blocks, one of them last",
    "no attention in block 0",
    "tied embeddings",
    "biases of q, k, v",
    PADDED,
)
TOLERANCE = 1e-4
"""Absolute difference of a log-probability with dequantised weights; 2e-06 was seen."""
CLOSER = 1 / 3
"""Distance of an engine to our quantised inputs over that to unquantised ones, at most; 0.14 was seen. Not zero:
where an engine sums in another order, an input of the next layer may fall to the next value of FP8."""


Exports = Mapping[Target, dict[str, Path]]


@pytest.fixture(scope="module")
def exports_for(children: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Exports:
    work = tmp_path_factory.mktemp("fp8")
    exports: dict[Target, dict[str, Path]] = {"transformers": {}, "vllm": {}}
    for number, name in enumerate(CHILDREN):
        paths = run_export(("transformers", "vllm"), children[name], work / str(number), "fp8_dynamic")
        for target, path in paths.items():
            exports[target][name] = path
    return exports


def test_transformers_dequantises_what_was_written(exports_for: Exports, tmp_path: Path) -> None:
    require_reader("transformers")
    exports = exports_for["transformers"]
    session = read_exports("transformers", exports, tmp_path, prompt=PROMPT, dequantize=True)
    for name, path in exports.items():
        ours, theirs = reading_of(load_dequantized(path), PROMPT), session.readings[name]
        assert theirs.tokens == ours.tokens, name
        assert np.abs(theirs.logprobs - ours.logprobs).max() < TOLERANCE, name


@pytest.mark.parametrize("target", ["transformers", "vllm"])
def test_engine_multiplies_in_fp8_as_our_linear_layer_does(
    target: Target, exports_for: Exports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_reader(target)
    with_fp8_linears = import_benchmark("fp8_linear", monkeypatch).with_fp8_linears
    session = read_exports(target, exports_for[target], tmp_path, prompt=PROMPT)
    for name, path in exports_for[target].items():
        theirs, model = session.readings[name], load_dequantized(path)
        from_weights_alone = _distance(theirs, reading_of(model, PROMPT))
        assert _distance(theirs, reading_of(with_fp8_linears(model), PROMPT)) < CLOSER * from_weights_alone, name


def _distance(theirs: Reading, ours: Reading) -> float:
    """Mean KL divergence to ours, in nats per token."""
    return float((np.exp(ours.logprobs) * (ours.logprobs - theirs.logprobs)).sum(-1).mean())
