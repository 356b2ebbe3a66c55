"""One run of Puzzletron's scoring stage (nvidia-modelopt 0.47.0), in its own Python: ``peer.py <settings.json>``.

Runs the stage as it ships. Replaced are: what only CUDA has, on a CPU; bf16, where fp32 is asked for; its loader of
text, which is handed the samples as token ids; with ``metrics: shared``, its 18 metrics by the four that our scorer
computes, from its own functions where it has them. Packages that the stage imports but does not run may be missing.
"""

import importlib.machinery
import importlib.util
import json
import os
import sys
import types
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

IMPORTED_ONLY = ("datasets", "pandas", "pulp", "fire", "lru", "typeguard", "hydra", "immutabledict", "pynvml")
"""Packages of other stages of Puzzletron, which importing it needs all the same."""


def main(settings: dict) -> None:
    os.environ.setdefault("LOCAL_RANK", "0")
    _stand_in_for_missing_packages()
    import torch

    if settings["device"] == "cpu":
        _run_on_cpu()
    if settings["precision"] == "fp32":
        _load_in_fp32()
    from modelopt.torch.puzzletron.tools import validate_model, validate_puzzle_with_multi_replacements

    batches = _batches(settings)
    validate_model.prepare_dataloader = lambda args, tokenizer=None: batches
    if settings["metrics"] == "shared":
        _compute_shared_metrics()
    dtype = torch.float32 if settings["precision"] == "fp32" else torch.bfloat16
    validate_puzzle_with_multi_replacements.validate_puzzle_solutions(_stage_arguments(settings, dtype))


def _stage_arguments(settings: dict, dtype) -> SimpleNamespace:
    puzzle_dir = Path(settings["puzzle_dir"])
    return SimpleNamespace(
        descriptor="llama",
        replacement_library_path=puzzle_dir / "replacement_library.json",
        solutions_path=puzzle_dir / "single_sequence_replacement_solutions.json",
        solutions_to_validate=None,
        sort_solutions_by=None,
        bigger_is_better=False,
        teacher_dir=puzzle_dir / "ckpts/teacher",
        output_dir=Path(settings["out"]),
        model_name_or_path=None,
        model_dtype=dtype,
        autocast_dtype=dtype,
        eval_samples=settings["num_sequences"],
        micro_batch_size=settings["batch_size"],
        skip_validation=False,
        save_models=False,
        calc_losses_on_cpu=False,
        write_results=False,
        activations_log_dir=None,
        activation_hooks_kwargs=None,
    )


def _batches(settings: dict) -> list:
    """Its samples: inputs and the tokens that follow them, [batch, tokens] each."""
    import torch

    sequences = torch.tensor(json.loads(Path(settings["puzzle_dir"], "samples.json").read_text()))
    return [{"input_ids": batch[:, :-1], "targets": batch[:, 1:]} for batch in sequences.split(settings["batch_size"])]


def _stand_in_for_missing_packages() -> None:
    for name in IMPORTED_ONLY:
        if importlib.util.find_spec(name) is None:
            sys.modules[name] = MagicMock(__spec__=importlib.machinery.ModuleSpec(name, None))


def _run_on_cpu() -> None:
    import modelopt.torch.utils.distributed as dist
    import torch

    dist.local_rank = lambda: "cpu"
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self
    torch.cuda.synchronize = lambda *args, **kwargs: None
    torch.cuda.empty_cache = lambda: None


def _load_in_fp32() -> None:
    """The loader writes bf16 into a namespace of its own making, whatever the configuration says."""
    import torch
    from modelopt.torch.puzzletron.tools import sharded_checkpoint_utils

    sharded_checkpoint_utils.SimpleNamespace = lambda **fields: types.SimpleNamespace(
        **{**fields, "dtype": torch.float32}
    )


def _compute_shared_metrics() -> None:
    import torch
    from modelopt.torch.puzzletron.utils import validation

    def of_labels(logits, targets):
        return {"lm_loss": validation._calculate_per_sample_lm_loss(logits, targets)}

    def of_teacher(hidden, teacher_hidden, logits, teacher_logits, calculate_full_score_ablations):
        pairs = zip(logits, teacher_logits.softmax(-1), strict=True)
        agrees = logits.argmax(-1) == teacher_logits.argmax(-1)
        cosine = torch.nn.functional.cosine_similarity(hidden.float(), teacher_hidden.float(), dim=-1)
        return {
            "kl_div": [validation.kl_div(logits=sample, target_probs=probs) for sample, probs in pairs],
            "top1_disagreement": (1 - agrees.float().mean(-1)).tolist(),
            "hidden_cosine": (1 - cosine).mean(-1).tolist(),
        }

    validation._calculate_ground_truth_based_scores = of_labels
    validation._calculate_teacher_similarity_scores = of_teacher


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
