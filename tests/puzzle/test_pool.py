from __future__ import annotations

import errno
import os
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from puzzle.library import Replacement
from puzzle.model.architecture import AttentionConfig, FFNConfig
from puzzle.pool import Outcome, ReplacementPool

W256 = Replacement(block=1, ffn=FFNConfig(ffn_dim=256))
OUTCOME = Outcome(bld_nmse_init=0.5, bld_nmse=0.25, trained=True)
ORIGIN = {"channels": "independent"}
TENSORS = {"mlp.up_proj.weight": torch.arange(6.0).reshape(2, 3), "mlp.down_proj.weight": torch.ones(3, 2)}


@pytest.fixture
def pool(tmp_path: Path) -> ReplacementPool:
    return ReplacementPool(directory=tmp_path / "pool", facts={"parent": "a", "seed": 0})


def put(pool: ReplacementPool, destination: Path, tensors: dict[str, Tensor] = TENSORS) -> str:
    key = pool.key(W256, ORIGIN)
    pool.put(key, tensors, OUTCOME, destination, dtype=torch.float32)
    return key


def test_what_was_put_is_taken_without_a_copy(pool: ReplacementPool, tmp_path: Path) -> None:
    key = put(pool, tmp_path / "first")
    assert pool.take(key, tmp_path / "second") == OUTCOME
    (stored,) = pool.directory.iterdir()
    assert stored.samefile(tmp_path / "first")
    assert stored.samefile(tmp_path / "second")
    taken = load_file(tmp_path / "second")
    assert taken.keys() == TENSORS.keys()
    assert all(torch.equal(tensor, TENSORS[name]) for name, tensor in taken.items())


def test_file_is_the_same_bytes_every_time(pool: ReplacementPool, tmp_path: Path) -> None:
    put(pool, tmp_path / "first")
    put(pool, tmp_path / "second")
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()


def test_what_is_not_there_is_not_taken(pool: ReplacementPool, tmp_path: Path) -> None:
    assert pool.take(pool.key(W256, ORIGIN), tmp_path / "file") is None
    assert not (tmp_path / "file").exists()


def test_file_systems_without_hard_links_get_a_copy(
    pool: ReplacementPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(source: Path, destination: Path) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", no_links)
    key = put(pool, tmp_path / "first")
    assert pool.take(key, tmp_path / "second") == OUTCOME
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()


def test_key_depends_on_everything_that_the_weights_depend_on(pool: ReplacementPool) -> None:
    beside_no_op = Replacement(block=1, ffn=FFNConfig(ffn_dim=256), beside="no_op")
    in_block_2 = Replacement(block=2, ffn=FFNConfig(ffn_dim=256))
    pair = Replacement(block=1, attention=AttentionConfig(num_kv_heads=1), ffn=FFNConfig(ffn_dim=256))
    origins: list[dict[str, object]] = [
        {},
        {"channels": "iterative in 8 rounds"},
        {"channels": "independent", "kv_heads": "select"},
        {"library": ["independent"]},
    ]
    other_seed = ReplacementPool(directory=pool.directory, facts={"parent": "a", "seed": 1})
    keys = [
        *(pool.key(item, ORIGIN) for item in (W256, beside_no_op, in_block_2, pair)),
        *(pool.key(W256, origin) for origin in origins),
        other_seed.key(W256, ORIGIN),
    ]
    assert len(set(keys)) == len(keys)
    same_facts = ReplacementPool(directory=pool.directory, facts={"seed": 0, "parent": "a"})
    assert same_facts.key(W256, ORIGIN) == keys[0]
    assert pool.key(pair, dict(reversed(origins[2].items()))) == pool.key(pair, origins[2])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def another_file(path: Path) -> None:
    save_file(TENSORS, path)


@pytest.mark.parametrize("damage", [flip_a_bit, truncate, another_file])
def test_damaged_file_is_never_used(pool: ReplacementPool, tmp_path: Path, damage: object) -> None:
    key = put(pool, tmp_path / "first")
    (stored,) = pool.directory.iterdir()
    assert callable(damage)
    damage(stored)
    with pytest.warns(RuntimeWarning, match="is damaged and not used"):
        assert pool.take(key, tmp_path / "second") is None
    assert not (tmp_path / "second").exists()
    assert list(pool.directory.iterdir()) == []
    put(pool, tmp_path / "first")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pool.take(key, tmp_path / "second") == OUTCOME


def test_file_under_another_key_is_never_used(pool: ReplacementPool, tmp_path: Path) -> None:
    put(pool, tmp_path / "first")
    (stored,) = pool.directory.iterdir()
    other = pool.key(Replacement(block=2, ffn=FFNConfig(ffn_dim=256)), ORIGIN)
    stored.rename(pool.directory / f"{other}.safetensors")
    with pytest.warns(RuntimeWarning, match="belongs to another key"):
        assert pool.take(other, tmp_path / "second") is None
