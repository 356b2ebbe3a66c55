from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from distill.config import DataConfig, EngineConfig, SourceConfig
from distill.data import sampling
from distill.data.dataset import TokenDataset
from distill.data.generation import GenerationConfig
from distill.data.sampling import DocumentSampler, draw_tokens
from distill.data.tokenizer import load_tokenizer
from launch.stage import StageContext, StageResult
from launch.stage_configs import GenerateTextStage, PrepareDataStage
from launch.stages import generate_text, prepare_data
from puzzle.model.checkpoint import load_model
from tests.launch.training_inputs import artifact_at

GENERATION = GenerationConfig(max_tokens=600, document_tokens=40, batch_size=4, prompts=("The ", "A fused FFN "))
CPU = EngineConfig(device="cpu")


def _context(root: Path) -> StageContext:
    context = StageContext(
        out=root / "out", resume=root / "resume", pool=root / "pool", run_name="run", step_name="text"
    )
    context.out.mkdir(parents=True, exist_ok=True)
    return context


def _generate(root: Path, teacher: Path, generation: GenerationConfig = GENERATION, *, seed: int = 0) -> StageResult:
    config = GenerateTextStage(generation=generation, engine=CPU, seed=seed)
    return generate_text.run(config, {"teacher": artifact_at(teacher, "model")}, _context(root))


def _rows(root: Path) -> list[dict]:
    return [json.loads(line) for line in (root / "out" / "text.jsonl").read_text(encoding="utf-8").splitlines()]


def test_documents_reach_the_budget_and_begin_with_the_prompts_in_turn(pico_parent_dir: Path, tmp_path: Path) -> None:
    result = _generate(tmp_path, pico_parent_dir)
    rows = _rows(tmp_path)
    assert result.metrics["num_documents"] == len(rows)
    assert result.metrics["num_tokens"] == sum(row["num_tokens"] for row in rows)
    # The last batch alone may go beyond the budget.
    assert sum(row["num_tokens"] for row in rows[:-4]) < 600 <= result.metrics["num_tokens"]
    for number, row in enumerate(rows):
        assert row["text"].startswith(("The ", "A fused FFN ")[number // 4 % 2])
        assert 0 < row["num_tokens"] <= 40 + row["ended"]
    assert len({row["text"] for row in rows}) == len(rows)


def test_text_is_a_function_of_the_seed(pico_parent_dir: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        _generate(tmp_path / name, pico_parent_dir, seed=seed)
    assert _rows(tmp_path / "a") == _rows(tmp_path / "b")
    assert not {row["text"] for row in _rows(tmp_path / "a")} & {row["text"] for row in _rows(tmp_path / "c")}


def test_a_killed_run_goes_on_with_the_batches_that_it_lacks(
    pico_parent_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _generate(tmp_path / "reference", pico_parent_dir)
    batch, seen = DocumentSampler.batch, []

    def dies_at_2(self: DocumentSampler, index: int) -> list[sampling.SampledDocument]:
        if index == 2:
            raise KeyboardInterrupt
        return batch(self, index)

    monkeypatch.setattr(DocumentSampler, "batch", dies_at_2)
    with pytest.raises(KeyboardInterrupt):
        _generate(tmp_path / "killed", pico_parent_dir)
    monkeypatch.setattr(DocumentSampler, "batch", lambda self, index: seen.append(index) or batch(self, index))
    _generate(tmp_path / "killed", pico_parent_dir)
    assert seen[0] == 2
    assert _rows(tmp_path / "killed") == _rows(tmp_path / "reference")


def test_a_document_is_what_its_model_and_its_numbers_say(pico_parent_dir: Path) -> None:
    """Against a loop without cache, batch or nucleus shortcuts, in fp64."""
    generation = replace(GENERATION, temperature=0.7, top_p=0.8, prompts=("The ",), batch_size=3)
    model, tokenizer = load_model(pico_parent_dir, dtype=torch.float64), load_tokenizer(pico_parent_dir)
    sampler = DocumentSampler(model, tokenizer, generation, seed=5)
    found = [document.text for document in sampler.batch(1)]
    assert found == [_one_by_one(model, tokenizer, generation, number) for number in (3, 4, 5)]


@torch.no_grad()
def _one_by_one(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, generation: GenerationConfig, number: int
) -> str:
    ids = tokenizer.encode("The ", add_special_tokens=False)
    tokens = [tokenizer.bos_token_id, *ids]
    for draw in np.random.default_rng([5, number]).random(generation.document_tokens - len(ids)):
        probs = (model(torch.tensor([tokens])).logits[0, -1] / generation.temperature).softmax(-1)
        nucleus, mass = [], 0.0
        for token in sorted(range(len(probs)), key=lambda t: -float(probs[t])):
            nucleus.append(token)
            mass += float(probs[token])
            if mass >= generation.top_p:
                break
        rest = draw * mass
        for token in nucleus:
            rest -= float(probs[token])
            if rest < 0:
                break
        if token == tokenizer.eos_token_id:
            break
        tokens.append(token)
    return tokenizer.decode(tokens, skip_special_tokens=True).rstrip("\N{REPLACEMENT CHARACTER}")


def test_documents_that_end_leave_the_batch(pico_parent_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = load_model(pico_parent_dir, dtype=torch.float32), load_tokenizer(pico_parent_dir)
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] = 0
    generation = replace(GENERATION, document_tokens=200, batch_size=32, prompts=())
    sizes: list[int] = []
    choose = DocumentSampler._choose

    def counting(self: DocumentSampler, logits: Tensor, draws: Tensor) -> Tensor:
        sizes.append(len(logits))
        # One token in 30 ends a document.
        return choose(self, logits, draws).where(draws > 1 / 30, tokenizer.eos_token_id)

    monkeypatch.setattr(DocumentSampler, "_choose", counting)
    documents = DocumentSampler(model, tokenizer, generation, seed=0).batch(0)
    assert sizes[0] == 32
    assert sizes[-1] <= 8
    assert sum(document.ended for document in documents) > 24
    whole = [document for document in documents if not document.ended]
    assert all(document.num_tokens == 200 for document in whole)
    monkeypatch.setattr(sampling, "CHECK_EVERY_TOKENS", 10**6)
    assert DocumentSampler(model, tokenizer, generation, seed=0).batch(0) == documents


def test_draw_tokens() -> None:
    probs = torch.tensor([0.1, 0.5, 0.25, 0.15]).expand(6, 4)
    draws = torch.tensor([0.0, 0.49, 0.51, 0.74, 0.76, 0.999999])
    assert draw_tokens(probs, draws, top_p=1.0).tolist() == [1, 1, 2, 2, 3, 0]
    # The two most probable reach 0.6: 0.5 of 0.75 and 0.25 of 0.75.
    draws = torch.tensor([0.0, 0.66, 0.67, 0.9, 0.99, 1.0])
    assert draw_tokens(probs, draws, top_p=0.6).tolist() == [1, 1, 2, 2, 2, 2]
    assert draw_tokens(probs, draws, top_p=1e-9).tolist() == [1] * 6


def test_draws_have_the_frequencies_of_the_probabilities() -> None:
    generator = torch.Generator().manual_seed(0)
    probs = torch.rand(20, generator=generator).softmax(-1)
    draws = torch.rand(200_000, generator=generator)
    counts = draw_tokens(probs.expand(200_000, 20), draws, top_p=1.0).bincount(minlength=20)
    # Four standard deviations of a count.
    assert ((counts / 200_000 - probs).abs() < 4 * (probs / 200_000).sqrt()).all()


def test_what_would_deal_one_model_is_refused() -> None:
    engine = EngineConfig(device="cpu", tensor_parallel=2, shard=True)
    with pytest.raises(
        ValueError, match=r"engine.tensor_parallel=2 engine.shard=true: every process of stage generate_text.*engine="
    ):
        GenerateTextStage(generation=GenerationConfig(max_tokens=10), engine=engine, seed=0)


def test_what_cannot_be_sampled_is_refused(pico_parent_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"document_tokens=256 is beyond the 256 positions .* at most 255"):
        _generate(tmp_path, pico_parent_dir, replace(GENERATION, document_tokens=256))
    with pytest.raises(ValueError, match=r"generation\.prompts: 'The block library.*document_tokens=4 to sample"):
        _generate(
            tmp_path, pico_parent_dir, replace(GENERATION, prompts=("The block library holds",), document_tokens=4)
        )
    for name, value in (("temperature", 0.0), ("top_p", 1.5), ("batch_size", 0), ("prompts", ("",))):
        with pytest.raises(ValueError, match=rf"generation\.{name}"):
            replace(GENERATION, **{name: value})


def _local_rows(directory: Path) -> Path:
    """Documents that are short beside a split, so that shares and held-out splits come out as they should."""
    file = directory / "local.jsonl"
    file.write_text("".join(json.dumps({"text": f"line {i} of a local file\n" * 5}) + "\n" for i in range(400)))
    return file


def test_generated_text_is_a_source_of_a_mixture(pico_parent_dir: Path, tmp_path: Path) -> None:
    _generate(
        tmp_path / "text", pico_parent_dir, replace(GENERATION, max_tokens=5_000, document_tokens=100, batch_size=64)
    )
    local = _local_rows(tmp_path)
    data = DataConfig(
        sources=(
            SourceConfig(kind="generated", weight=1.0),
            SourceConfig(kind="text", path=str(local), weight=3.0),
        ),
        train_tokens=8_000,
        validation_tokens=500,
        calibration_tokens=500,
    )
    inputs = {
        "parent": artifact_at(pico_parent_dir, "model"),
        "generated": artifact_at(tmp_path / "text" / "out", "text"),
    }
    context = _context(tmp_path / "data")
    result = prepare_data.run(PrepareDataStage(data=data, seed=0), inputs, context)
    generated, other = result.metrics["sources"]
    assert generated["path"] is None
    # By tokens read; what is held out, by hash, comes more from one than from the other.
    assert generated["train_tokens"] / (generated["train_tokens"] + other["train_tokens"]) == pytest.approx(
        0.25, abs=0.1
    )
    assert TokenDataset.open(context.out).split("train").num_tokens == 8_000
    with pytest.raises(ValueError, match="not given; give both or neither"):
        prepare_data.run(PrepareDataStage(data=data, seed=0), {"parent": inputs["parent"]}, context)
    local_only = replace(data, sources=data.sources[1:])
    with pytest.raises(ValueError, match="has no source of kind=generated"):
        prepare_data.run(PrepareDataStage(data=local_only, seed=0), inputs, context)


def test_a_short_train_split_is_in_the_headline(pico_parent_dir: Path, tmp_path: Path) -> None:
    local = _local_rows(tmp_path)
    data = DataConfig(
        sources=(SourceConfig(kind="text", path=str(local)),),
        train_tokens=10**7,
        validation_tokens=500,
        calibration_tokens=500,
    )
    context = _context(tmp_path / "data")
    inputs = {"parent": artifact_at(pico_parent_dir, "model")}
    result = prepare_data.run(PrepareDataStage(data=data, seed=0), inputs, context)
    assert "of 10.0M asked, where the text ended" in result.headline
    assert result.metrics["ended_by"] == f"text {local}"
