"""lm-eval tasks as local files, and what a model answers by plain sums of log-probabilities."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from distill.data.tokenizer import load_tokenizer
from puzzle.model.modeling_decilm import DeciLMForCausalLM

WORDS = ("block", "replacement", "search", "member", "parent", "library", "fused", "holds")
EXAMPLES = [
    {"text": f"The {word} {other}", "choices": ["reads", "blocks", "adds up", "may"], "label": number % 4}
    for number, (word, other) in enumerate((a, b) for a in WORDS for b in WORDS)
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: {output_type}
doc_to_text: text
doc_to_choice: choices
doc_to_target: label
metric_list: [{{metric: {metric}, aggregation: mean, higher_is_better: {more_is_better}}}]
"""


def write_task(
    directory: Path,
    name: str,
    *,
    output_type: str = "multiple_choice",
    metric: str = "acc",
    more_is_better: bool = True,
    further: str = "",
) -> None:
    """One task file on the examples of ``directory``; ``further`` is YAML."""
    text = TASK.format(
        name=name,
        file=directory / "examples.jsonl",
        output_type=output_type,
        metric=metric,
        more_is_better=str(more_is_better).lower(),
    )
    (directory / f"{name}.yaml").write_text(text + further)


def write_tasks(directory: Path) -> Path:
    """``four_words``, a choice among four, and ``written``, which generates."""
    directory.mkdir()
    (directory / "examples.jsonl").write_text("".join(json.dumps(example) + "\n" for example in EXAMPLES))
    write_task(directory, "four_words")
    write_task(directory, "written", output_type="generate_until", metric="exact_match")
    return directory


@torch.no_grad()
def right_answers(model: DeciLMForCausalLM, directory: Path) -> list[float]:
    """1 where the right choice is the likeliest; of the examples of ``four_words``, without lm-eval."""
    tokenizer = load_tokenizer(directory)
    right = []
    for example in EXAMPLES:
        likelihoods = []
        for choice in example["choices"]:
            prompt, whole = (tokenizer(text)["input_ids"] for text in (example["text"], f"{example['text']} {choice}"))
            log_p = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            likelihoods.append(sum(log_p[i - 1, whole[i]].item() for i in range(len(prompt), len(whole))))
        right.append(float(max(range(4), key=likelihoods.__getitem__) == example["label"]))
    return right
