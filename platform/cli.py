"""The command line ``haltscale``."""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import pkgutil
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from haltscale.platform import cli_models, cluster
from haltscale.platform.store import RunStore, StoreError

if TYPE_CHECKING:
    from haltscale.platform.sweeps.study import Study

EXAMPLES = {
    "up": "haltscale up --cpus 8",
    "down": "haltscale down",
    "run": "haltscale run quickstart -- --dry-run",
    "submit": "haltscale submit quickstart -- --set tokens=50000",
    "status": "haltscale status quickstart --json",
    "results": "haltscale results quickstart --json",
    "logs": "haltscale logs quickstart --follow",
    "cancel": "haltscale cancel quickstart",
    "dashboard": "haltscale dashboard --port 8501",
    "report": "haltscale report quickstart --out quickstart.html",
    **cli_models.EXAMPLES,
}
"""One for each verb; ``haltscale VERB --help`` shows it."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse and dispatch. Errors of the user's making end with a sentence and exit code 1, not with a traceback."""
    parser = argparse.ArgumentParser(
        prog="haltscale",
        description="Scaling studies of language models that decide, token by token, how long to think.",
        epilog="examples:\n" + "\n".join(f"  {example}" for example in EXAMPLES.values()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, text: str, **more: Any) -> argparse.ArgumentParser:
        return verbs.add_parser(name, help=text, description=text, epilog=f"example: {EXAMPLES[name]}", **more)

    up = verb("up", "start a local Ray head, or find the running one")
    up.add_argument("--cpus", type=int, help="CPUs to offer (default: all)")
    verb("down", "stop the head that `haltscale up` started; jobs on it end")
    for name, text in (("run", "run a study in this process"), ("submit", "run a study as a Ray job, and follow it")):
        command = verb(name, text)
        command.add_argument("study", help="a module of haltscale.studies, such as quickstart")
        command.add_argument("arguments", nargs="*", help="for the study; after `--`")
        if name == "submit":
            command.add_argument("--no-follow", action="store_true", help="submit and return at once")
            command.add_argument("--json", action="store_true", help="print the job as JSON and return at once")
    for name, text in (("status", "runs and how far they are"), ("results", "the table of results")):
        command = verb(name, text)
        command.add_argument("study", nargs="?" if name == "status" else None, help="a study in the store")
        command.add_argument("--store", help="root of the run store: a folder or an fsspec URL")
        command.add_argument("--json", action="store_true", help="machine-readable")
        if name == "results":
            command.add_argument(
                "--export", metavar="DIR", help="copy the finished runs' records (no weights) to a store in this folder"
            )
    logs = verb("logs", "the output of a study's last job")
    logs.add_argument("study", help="the study's name")
    logs.add_argument("--follow", action="store_true", help="go on until the job ends, and exit as it does")
    verb("cancel", "stop the job that runs a study; submit it again to go on").add_argument(
        "study", help="the study's name"
    )
    cli_models.add_verbs(verb)
    verb("dashboard", "open the dashboard (--store, --port, --demo)", add_help=False)
    verb("report", "a study as one HTML file (STUDY, --out, --store)", add_help=False)

    options, rest = parser.parse_known_args(arguments)
    if rest and options.verb not in ("dashboard", "report"):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    options.rest = rest
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    try:
        _dispatch(options)
    except (cluster.ClusterError, StoreError, UnknownStudyError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def _dispatch(options: argparse.Namespace) -> None:
    match options.verb:
        case "up":
            head = cluster.up(cpus=options.cpus)
            print(f"Ray head at {head.dashboard} (token authentication on; `haltscale down` stops it)")
            print(f"for plain `ray job submit`: export RAY_API_SERVER_ADDRESS={head.dashboard} RAY_AUTH_MODE=token")
        case "down":
            print("stopped" if cluster.down() else "no head of haltscale's was running")
        case "run":
            load_study(options.study).main(options.arguments)
        case "submit":
            follow = not (options.no_follow or options.json)
            sys.exit(submit(options.study, options.arguments, follow=follow, as_json=options.json))
        case "logs":
            sys.exit(logs(options.study, follow=options.follow))
        case "cancel":
            cancel(options.study)
        case "status":
            _status(RunStore(options.store), options.study, as_json=options.json)
        case "results":
            if options.export:
                _export_results(RunStore(options.store), options.study, options.export)
            else:
                _results(RunStore(options.store), options.study, as_json=options.json)
        case "evaluate" | "generate" | "serve" | "export":
            _model_verb(options)
        case "dashboard" | "report":
            module = "haltscale.dashboard" if options.verb == "dashboard" else "haltscale.dashboard.html_report"
            os.execv(sys.executable, [sys.executable, "-m", module, *options.rest])


def _model_verb(options: argparse.Namespace) -> None:
    try:
        cli_models.dispatch(options)
    except ValueError as error:
        sys.exit(f"error: {error}")


class UnknownStudyError(ValueError):
    """No study of that name ships, and the message lists those that do; or it lacks what it is made of."""


def load_study(name: str) -> Study:
    """The study of a module of ``haltscale.studies``.

    Raises:
        UnknownStudyError: there is no such module, or its study cannot be made (a text that cannot be fetched).
    """
    studies = importlib.import_module("haltscale.studies")  # by name: the platform knows no study
    known = sorted(module.name for module in pkgutil.iter_modules(studies.__path__))
    if name not in known:
        raise UnknownStudyError(f"no study {name!r}; there are: {', '.join(known)}")
    module = importlib.import_module(f"haltscale.studies.{name}")
    try:
        study: Study = module.study()
    except ValueError as error:
        raise UnknownStudyError(str(error)) from error
    return study


def _connected() -> tuple[cluster.Head, cluster.JobSubmissionClient]:
    """The head to talk to, and its job client.

    Raises:
        ClusterError: no head is running.
    """
    cluster.prepare_client()
    head = cluster.find_head()
    if head is None:
        raise cluster.ClusterError(
            "no Ray head is running: start one with `haltscale up`, or set RAY_API_SERVER_ADDRESS"
        )
    return head, cluster.client(head)


def submit(name: str, arguments: Sequence[str], *, follow: bool, as_json: bool = False) -> int:
    """Submit a study as a Ray job; where it is running already, follow that job instead of starting a second one.

    Returns:
        The exit code: 0 where the job succeeded or was only submitted.

    Raises:
        ClusterError: no head is running, or the study is running and other arguments are asked for.
        UnknownStudyError: there is no such study.
    """
    study = load_study(name)
    head, client = _connected()
    job = cluster.running_job(client, study.name)
    if job and arguments:
        raise cluster.ClusterError(
            f"{study.name} is running as {job}, with other arguments perhaps: wait, or `haltscale cancel {study.name}`"
        )
    running = job is not None
    job = job or cluster.submit_study(client, name, study.name, arguments)
    if as_json:
        print(json.dumps({"study": study.name, "job": job, "address": head.dashboard, "was_running": running}))
    elif running:
        print(f"{study.name} is running already as {job}; following it")
    else:
        print(f"submitted {study.name} as {job} to {head.dashboard}")
    if not follow:
        return 0
    try:
        return cluster.follow(client, job)
    except KeyboardInterrupt:
        print(f"\n{job} goes on without this terminal. Follow it: haltscale logs {study.name} --follow")
        print(f"Stop it: haltscale cancel {study.name}")
        return 130


def logs(study: str, *, follow: bool) -> int:
    """Print the output of a study's last job.

    Returns:
        The exit code: that of the job where it is followed to its end, else 0.

    Raises:
        ClusterError: no head is running, or it knows of no such job.
    """
    head, client = _connected()
    job = cluster.latest_job(client, study)
    if job is None:
        raise cluster.ClusterError(f"{head.dashboard} has had no job of study {study!r}")
    if follow:
        return cluster.follow(client, job)
    sys.stdout.write(client.get_job_logs(job))
    return 0


def cancel(study: str) -> None:
    """Stop the job that runs a study.

    Raises:
        ClusterError: no head is running, or no job of this study is.
    """
    head, client = _connected()
    job = cluster.running_job(client, study)
    if job is None:
        raise cluster.ClusterError(f"no job at {head.dashboard} is running study {study!r}")
    cluster.cancel(client, job)
    print(f"stopped {job}; `haltscale submit` goes on where it was")


def _status(store: RunStore, study: str | None, *, as_json: bool) -> None:
    from haltscale.platform.sweeps import progress

    names = [study] if study else store.studies()
    if study and study not in store.studies():
        raise StoreError(f"no study {study!r} in {store.root}; there are: {', '.join(store.studies()) or 'none'}")
    if as_json:
        rows = [
            {"study": name, "run": run.label, "key": run.key, "state": run.state, **_without_schema(run.status)}
            for name in names
            for run in store.runs(name)
        ]
        print(json.dumps(rows, indent=1))
        _told_of_damage(store, study)
        return
    if not names:
        print(f"no studies in {store.root}; start one: haltscale submit quickstart")
    for name in names:
        print(name)
        for run in store.runs(name):
            print(f"  {run.state:<9} {progress.describe(run)}")
        if study is None and (problem := store.study_problem(name)):
            print(f"  {problem}")
    _told_of_damage(store, study)


def _told_of_damage(store: RunStore, study: str | None) -> None:
    """End with a sentence where the study that was asked for cannot be read in full; its runs have been shown."""
    if study and (problem := store.study_problem(study)):
        raise StoreError(problem)


def _results(store: RunStore, study: str, *, as_json: bool) -> None:
    from haltscale.platform.sweeps import report

    if study not in store.studies():
        raise StoreError(f"no study {study!r} in {store.root}; there are: {', '.join(store.studies()) or 'none'}")
    frame = report.results(store, study)
    if as_json:
        print(frame.to_json(orient="records", indent=1))
    else:
        note = "" if store.study_problem(study) else str(store.study(study).get("note", ""))
        report.show_results(frame, title=study, note=note)
    _told_of_damage(store, study)


def _export_results(store: RunStore, study: str, folder: str) -> None:
    from haltscale.platform.sweeps import publishing

    copy = publishing.publish(store, study, folder)
    print(f"{len(copy.run_keys(study))} finished runs of {study} are in {copy.root}")
    print(f"see them: haltscale dashboard --store {folder}")


def _without_schema(document: object) -> dict[str, object]:
    return {k: v for k, v in dict(document).items() if k not in ("schema", "state")}  # type: ignore[call-overload]


if __name__ == "__main__":
    main()
