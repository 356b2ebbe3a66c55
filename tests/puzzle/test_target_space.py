from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from distill.config import RopeConfig
from puzzle.config import SpaceConfig
from puzzle.model.architecture import Architecture
from puzzle.model.targets import TARGETS, Target
from puzzle.space import block_variants
from puzzle.target_space import loadable_variants

EVERYTHING = SpaceConfig(
    kv_heads=(1,), attention_linear=True, attention_no_op=True, ffn_no_op=True, keep_attention=(), ffn_linear=True
)


def _left(parent: Architecture, targets: Sequence[Target], space: SpaceConfig = EVERYTHING) -> list[list[str]]:
    scores = [
        {variant.name: 0.5 for variant in block_variants(parent, index, space)} for index in range(parent.num_blocks)
    ]
    return [list(row) for row in loadable_variants(parent, scores, targets)]


def test_transformers_loads_every_variant(pico_architecture: Architecture) -> None:
    assert [len(row) for row in _left(pico_architecture, ["transformers"])] == [12, 12, 12, 12]


@pytest.mark.parametrize(
    ("targets", "block_0", "block_1"),
    [
        (
            ["vllm"],
            ["kv2+w512", "kv2+no_op", "kv1+w512", "kv1+no_op", "no_op+no_op"],
            ["kv2+w512", "kv2+no_op", "kv1+w512", "kv1+no_op", "no_op+w512", "no_op+no_op"],
        ),
        (
            ["sglang"],
            ["kv2+w512", "kv2+no_op", "no_op+no_op"],
            ["kv2+w512", "kv2+no_op", "no_op+w512", "no_op+no_op"],
        ),
        (
            ["llama_cpp"],
            ["kv2+w512", "kv1+w512", "linear+w512", "no_op+no_op"],
            ["kv2+w512", "kv1+w512", "linear+w512", "no_op+w512", "no_op+no_op"],
        ),
        (["vllm", "sglang", "llama_cpp"], ["kv2+w512", "no_op+no_op"], ["kv2+w512", "no_op+w512", "no_op+no_op"]),
    ],
)
def test_variants_that_cost_more_there_or_do_not_load_are_left_out(
    pico_architecture: Architecture, targets: list[Target], block_0: list[str], block_1: list[str]
) -> None:
    left = _left(pico_architecture, targets)
    assert left[0] == block_0
    assert left[1] == left[3] == block_1


def test_scores_stay_as_they_are(pico_architecture: Architecture) -> None:
    scores = [{"kv2+w512": 0.0, "no_op+w512": float(index), "linear+w512": 9.0} for index in range(4)]
    left = loadable_variants(pico_architecture, scores, ["vllm"])
    assert left[0] == {"kv2+w512": 0.0}
    assert left[2] == {"kv2+w512": 0.0, "no_op+w512": 2.0}


def test_parent_that_no_target_loads_is_refused(pico_architecture: Architecture) -> None:
    parent = replace(pico_architecture, rope=RopeConfig(theta=1e4, kind="yarn", factor=2.0))
    with pytest.raises(ValueError, match=r"search\.targets: megatron cannot load this model: .*leave megatron out of"):
        _left(parent, ["vllm", "megatron"])


def test_space_of_which_nothing_is_left_is_refused(pico_architecture: Architecture) -> None:
    linear = SpaceConfig(attention_no_op=False, attention_linear=True, keep_attention=())
    with pytest.raises(ValueError, match=r"search\.targets=\[vllm,mlx\] leaves the parent's own block everywhere"):
        _left(pico_architecture, ["vllm", "mlx"], linear)
    scores = [{"linear+w512": 0.1}, *({"kv2+w512": 0.0} for _ in range(3))]
    with pytest.raises(ValueError, match=r"leaves nothing at block 0: linear\+w512 \(vllm: an attention is replaced"):
        loadable_variants(pico_architecture, scores, ["vllm"])


def test_base_that_is_left_out_is_refused(pico_architecture: Architecture) -> None:
    scores = [{"kv2+w512": 0.0, "no_op+w512": 0.1, "linear+w512": 0.0} for _ in range(4)]
    base = ["kv2+w512", "kv2+w512", "linear+w512", "kv2+w512"]
    with pytest.raises(ValueError, match=r"changes to a model with linear\+w512 at block 2"):
        loadable_variants(pico_architecture, scores, ["vllm"], base=base)


def test_targets_are_the_names_of_export() -> None:
    assert set(TARGETS) == {"transformers", "vllm", "sglang", "llama_cpp", "mlx", "megatron"}
