"""The verbs of the command line that work on models: evaluate, generate, serve, export."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from haltscale.platform.store import RunStore

if TYPE_CHECKING:
    from haltscale.platform.evaluation.evaluation_jobs import Evaluation
    from haltscale.platform.inference.model_ref import Reference
    from haltscale.platform.inference.models import LoadedModel


class UsageError(ValueError):
    """An argument is invalid; the message says what is allowed."""


EXAMPLES = {
    "evaluate": "haltscale evaluate state-of-the-union/adaptive-0.6m --tasks lambada,piqa --controls --dial",
    "generate": 'haltscale generate state-of-the-union/adaptive-0.6m "The state of the union"',
    "serve": "haltscale serve state-of-the-union/adaptive-0.6m --port 8300",
    "export": "haltscale export state-of-the-union/adaptive-0.6m ./exported",
}
MODEL_HELP = (
    "STUDY/RUN in the store (the beginning of a run's key will do); STUDY/RUN@STEP or STUDY/RUN@latest for a training"
    " checkpoint, also while the run is training; or the folder of a model"
)


def add_verbs(verb: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the verbs to the command line's parser."""
    evaluate = verb("evaluate", "held-out loss, tasks, controls and compute dial of one model or several")
    evaluate.add_argument("model", nargs="+", help=MODEL_HELP)
    evaluate.add_argument("--tasks", default="", help="comma-separated: lambada, piqa, ..., all; or JSON-lines files")
    evaluate.add_argument("--shots", default="0,5", help="examples before each question (default: 0,5)")
    evaluate.add_argument("--limit", type=int, help="evaluate at most this many items of each task")
    evaluate.add_argument("--corpus", action="append", help="folder of a prepared corpus (default: the run's own)")
    evaluate.add_argument("--controls", action="store_true", help="learned halting against other sources of steps")
    evaluate.add_argument("--dial", action="store_true", help="loss against inference FLOPs: tau, and maximum depth")
    evaluate.add_argument("--tokens", type=int, help="held-out tokens for controls and dial (default: all)")
    evaluate.add_argument("--ray", action="store_true", help="evaluate models, corpora and tasks in parallel, on Ray")
    generate = verb("generate", "continue a prompt, and show the latent steps before every token")
    generate.add_argument("model", help=MODEL_HELP)
    generate.add_argument("prompt", nargs="+", help="one or more texts to continue")
    generate.add_argument("--tokens", type=int, help="maximum number of new tokens (default: as many as fit)")
    generate.add_argument("--temperature", type=float, default=0.0, help="0 (default): the most likely token")
    generate.add_argument("--top-k", type=int, default=0, help="sample from the k most likely tokens")
    generate.add_argument("--top-p", type=float, default=1.0, help="sample from tokens with this total probability")
    generate.add_argument("--seed", type=int, default=0, help="seed of the sampling")
    generate.add_argument("--stop", action="append", default=[], help="a token that ends the text")
    generate.add_argument("--max-cache-mib", type=int, default=2048, help="limit of the key-value cache, MiB")
    serve = verb("serve", "serve completions in the format of OpenAI's API, on 127.0.0.1")
    serve.add_argument("model", help=MODEL_HELP)
    serve.add_argument("--port", type=int, default=8300, help="default: 8300; 0: any free port")
    serve.add_argument("--max-cache-mib", type=int, default=2048, help="limit of the key-value cache, MiB")
    export = verb("export", "write a model for transformers: safetensors, config, tokenizer, code, model card")
    export.add_argument("model", help=MODEL_HELP)
    export.add_argument("target", help="a new folder")
    for command in (evaluate, generate, serve, export):
        command.add_argument("--store", help="root of the run store: a folder or an fsspec URL")
        if command is not export:
            command.add_argument("--device", default="cpu", help="cpu (default), cuda, ...")
        if command in (evaluate, generate):
            command.add_argument("--json", action="store_true", help="machine-readable")


def dispatch(options: argparse.Namespace) -> None:
    """Run a verb.

    Raises:
        ValueError: something of the user's making is wrong; the message is a sentence for the user.
    """
    from haltscale.platform.inference.model_ref import find_model, model_folder
    from haltscale.platform.inference.models import load_model

    store = RunStore(options.store)
    if options.verb == "evaluate":
        _evaluate(options, store)
        return
    reference = find_model(options.model, store)
    with model_folder(reference, store) as folder:
        loaded = load_model(folder, device=getattr(options, "device", "cpu"))
    match options.verb:
        case "generate":
            _generate(options, loaded)
        case "serve":
            _serve(options, reference, loaded)
        case _:
            _export(options, store, reference, loaded)


def _evaluate(options: argparse.Namespace, store: RunStore) -> None:
    from haltscale.platform.inference.model_ref import find_model

    references = {one.name: one for one in (find_model(name, store) for name in options.model)}
    evaluations = {name: _evaluation_of(options, store, reference) for name, reference in references.items()}
    if options.ray:
        from haltscale.platform.evaluation import ray_evaluate

        found = ((part.model, results) for part, results in ray_evaluate.spread(list(evaluations.values())))
    else:
        found = ((name, [result]) for name, evaluation in evaluations.items() for result in evaluation.results())
    every: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in evaluations}
    for model, results in found:
        reference = references[model]
        for name, result in results:
            every[model][name] = result
            if reference.folder is None:
                path = store.evaluation_path(reference.study, reference.key, name, reference.step)
                store.write_json(path, {**result, "time": time.time()})
            if not options.json:
                _show(name if len(evaluations) == 1 else f"{model}: {name}", result)
    if options.json:
        print(json.dumps(every if len(evaluations) > 1 else next(iter(every.values())), indent=1))


def _evaluation_of(options: argparse.Namespace, store: RunStore, reference: Reference) -> Evaluation:
    """The evaluation that the command line requests of one model."""
    from haltscale.platform.evaluation.evaluation_jobs import Evaluation, EvaluationError
    from haltscale.platform.inference.model_ref import own_corpus_place

    try:
        shots = tuple(int(count) for count in options.shots.split(","))
    except ValueError:
        raise EvaluationError(f"--shots must be integers such as 0,5 (got {options.shots!r})") from None
    corpora = options.corpus or ([] if reference.folder else [own_corpus_place(store, reference.study, reference.key)])
    if not corpora and not options.tasks:
        raise EvaluationError("nothing to evaluate on: name tasks with --tasks, or a prepared corpus with --corpus")
    return Evaluation(
        model=reference.name,
        store=store.root,
        corpora=tuple(str(Path(folder).absolute()) for folder in corpora),
        tasks=tuple(
            str(Path(name).absolute()) if Path(name).is_file() else name for name in options.tasks.split(",") if name
        ),
        shots=shots,
        limit=options.limit,
        controls=options.controls,
        dial=options.dial,
        tokens=options.tokens,
        device=options.device,
    )


COLUMNS = {
    "name": "halting",
    "dial": "dial",
    "value": "value",
    "loss": "nats/token",
    "mean_steps": "steps",
    "flops_realised": "FLOPs/token",
    "seconds": "s/token",
    "own": "trained with",
    "minus_learned": "minus learned",
}
"""What the terminal shows of controls and dial; the rest is in the JSON."""


def _show(name: str, result: dict[str, Any]) -> None:
    """One result for the eye."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    rows = result.get("arms") or result.get("points")
    if rows:
        columns = [key for key in COLUMNS if key in rows[0]]
        table = Table(*(COLUMNS[key] for key in columns), title=Text(name), title_justify="left")
        for row in rows:
            shown = (_gap(row[key]) if key == "minus_learned" else _number(row[key]) for key in columns)
            table.add_row(*map(Text, shown))
    else:
        table = Table("", "value", title=Text(name), title_justify="left", show_header=False)
        for key, value in result.items():
            if isinstance(value, int | float | str):
                table.add_row(Text(key.replace("_", " ")), Text(_number(value)))
    Console().print(table)
    if documents := result.get("tokens_by_document"):
        print(f"intervals: 95 %, by a bootstrap over {len(documents)} documents")


def _gap(gap: dict[str, Any] | None) -> str:
    """A paired difference with its interval, where there is one."""
    if gap is None:
        return ""
    ends = "" if gap["low"] is None else f" [{gap['low']:+.4f}, {gap['high']:+.4f}]"
    return f"{gap['mean']:+.4f}{ends}"


def _number(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _generate(options: argparse.Namespace, loaded: LoadedModel) -> None:
    from rich.console import Console

    from haltscale.model.generation import Cost, Sampling
    from haltscale.platform.inference import text_generation

    cost, began = Cost(), time.perf_counter()
    sampling = Sampling(temperature=options.temperature, top_k=options.top_k, top_p=options.top_p, seed=options.seed)
    tokens = text_generation.write(
        loaded,
        options.prompt,
        new_tokens=options.tokens,
        sampling=sampling,
        stop=options.stop,
        max_cache_bytes=options.max_cache_mib << 20,
        cost=cost,
    )
    if options.json:
        written = list(tokens)
        trace = [token.to_dict() for token in written]
        summary = text_generation.summary(written, cost, time.perf_counter() - began)
        print(json.dumps({"prompts": options.prompt, "tokens": trace, "summary": summary}, indent=1))
        return
    console = Console(highlight=False)
    written = text_generation.show(console, options.prompt, tokens)
    summary = text_generation.summary(written, cost, time.perf_counter() - began)
    console.print(text_generation.legend(max((token.steps for token in written), default=0)))
    console.print(
        f"{summary['tokens']} tokens, {summary['mean_steps']:.2f} latent steps and {summary['mean_nll']:.2f} nats each;"
        f" {summary['flops_realised']:.3g} realised FLOPs per token, {summary['tokens_per_second']:.0f} tokens/s,"
        f" {summary['cache_bytes'] / 2**20:.1f} MiB of keys and values",
        style="dim",
    )


def _serve(options: argparse.Namespace, reference: Reference, loaded: LoadedModel) -> None:
    from haltscale.platform.inference import serving

    if not 0 <= options.port < 1 << 16:
        raise UsageError(f"--port must be from 0 (any free port) to 65535 (got {options.port})")
    server = serving.Server(loaded, reference.name, max_cache_bytes=options.max_cache_mib << 20)
    try:
        with serving.listening(server, options.port) as (address, runner, place):
            print(f"{reference.name} is served at {address}/v1/completions; stop it with Ctrl-C", flush=True)
            runner.run(sockets=[place])
    except OSError as error:
        raise UsageError(f"port {options.port} cannot be used ({error}): choose another one with --port") from error


def _export(options: argparse.Namespace, store: RunStore, reference: Reference, loaded: LoadedModel) -> None:
    from haltscale.platform.inference.export import export
    from haltscale.platform.inference.model_ref import figures

    target = export(loaded, options.target, record=figures(reference, store))
    print(f"exported to {target}; its README.md says how to load it")
