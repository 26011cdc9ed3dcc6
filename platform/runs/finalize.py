"""What a run does beside training: read the held-out documents and the probe text, export, write the record."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from haltscale.model import LanguageModel
from haltscale.platform import provenance
from haltscale.platform.config import RunConfig
from haltscale.platform.corpora.corpus import PreparedCorpus
from haltscale.platform.evaluation.evaluate_split import SplitResult, read_split
from haltscale.platform.inference.models import TOKENIZER_CONFIG, end_of_text_config
from haltscale.platform.recorder import RunRecorder
from haltscale.platform.training.progress import Progress
from haltscale.platform.training.steps_schedule import StepsSchedule


def evaluate_run(
    model: LanguageModel,
    corpus: PreparedCorpus,
    run: RunConfig,
    progress: Progress,
    recorder: RunRecorder,
    *,
    rank: int = 0,
    world: int = 1,
) -> SplitResult:
    """Read the held-out documents and the probe text, and write both down; see :func:`read_split` for the ranks."""
    result = read_split(
        model, corpus, context=run.context, step=progress.step, recorder=recorder, rank=rank, world=world
    )
    recorder.evaluation(
        {
            "step": progress.step,
            "tokens": progress.tokens,
            "split": "validation",
            **result.row,
            "flops_realised": progress.flops_realised,
            "flops_executed": progress.flops_executed,
            "flops_paper": progress.flops_paper,
            "time": time.time(),
        }
    )
    return result


def finish(
    model: LanguageModel,
    weights: dict[str, torch.Tensor],
    corpus: PreparedCorpus,
    run: RunConfig,
    progress: Progress,
    recorder: RunRecorder,
    described: Mapping[str, Any],
    *,
    rank: int = 0,
    world: int = 1,
) -> None:
    """Evaluate, export the weights, and write the record, last. All ranks call it; rank 0's recorder writes.

    Args:
        weights: the model's, whole (:func:`haltscale.platform.training.engine.full_weights`).
        described: the run's label, study, key, identity and execution.
        rank: this process, in the group of ``world`` that read the held-out documents together.
    """
    result = evaluate_run(model, corpus, run, progress, recorder, rank=rank, world=world)
    row = result.row
    export(model, weights, corpus, recorder)
    per_token = result.flops * (1 / row["tokens_evaluated"])
    groups = model.parameter_groups_count()
    recorder.finish(
        {
            **described,
            "tokens": progress.tokens,
            "steps": progress.step,
            "parameters": groups,
            "parameters_total": sum(groups.values()),
            "parameters_recurrent": model.recurrent_parameters(),
            **{name: row[name] for name in ("loss", "loss_standard_error", "perplexity", "bits_per_byte")},
            **{name: row[name] for name in ("mean_steps", "expected_steps", "steps_histogram", "tokens_evaluated")},
            "held_out_by_document": dict(result.by_document),
            "steps_schedule": StepsSchedule.from_list(progress.steps_schedule).by_share(run),
            "passes_per_token": progress.pass_rows / progress.tokens,
            "flops_realised": progress.flops_realised,
            "flops_executed": progress.flops_executed,
            "flops_paper": progress.flops_paper,
            "flops_overshoot": None if run.flops is None else progress.flops_realised - run.flops,
            "inference_flops_per_token": asdict(per_token),
            "halting": result.summary["difficulty"],
            **({"need": row["need"]} if "need" in row else {}),
            "events": progress.events,
            "sequence_digest": progress.sequence_digest,
            "wall_seconds": progress.seconds,
            "tokens_per_second": progress.tokens / progress.seconds,
            "precision": run.precision,
            "versions": provenance.versions(),
            "git_commit": provenance.git_commit(),
            "machine": provenance.machine(),
            "finished_at": time.time(),
        }
    )


def export(
    model: LanguageModel, weights: dict[str, torch.Tensor], corpus: PreparedCorpus, recorder: RunRecorder
) -> None:
    """The finished model: weights that cannot execute anything, the config, the tokenizer and its end-of-text."""
    if not recorder.enabled:
        return
    store = recorder.store
    with tempfile.TemporaryDirectory() as folder:
        save_file(weights, Path(folder) / "model.safetensors")
        (Path(folder) / "config.json").write_text(json.dumps(model.config.to_dict(), indent=1))
        shutil.copyfile(corpus.folder / "tokenizer.json", Path(folder) / "tokenizer.json")
        (Path(folder) / TOKENIZER_CONFIG).write_text(json.dumps(end_of_text_config(corpus.end_of_text)))
        for file in Path(folder).iterdir():
            target = store.path(recorder.study, recorder.key, "model", file.name)
            store.fs.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
            store.fs.put_file(str(file), target)
