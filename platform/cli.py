"""The command line ``haltscale``."""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any

from haltscale.platform import cli_models, cluster
from haltscale.platform.load_study import UnknownStudyError, load_study, studies
from haltscale.platform.store import RunStore, StoreError

if TYPE_CHECKING:
    from haltscale.platform.lease import Holder

EXAMPLES = {
    "up": "haltscale up --cpus 8",
    "down": "haltscale down",
    "run": "haltscale run quickstart -- --dry-run",
    "submit": "haltscale submit quickstart -- --set tokens=50000",
    "status": "haltscale status quickstart --json",
    "results": "haltscale results quickstart --json",
    "logs": "haltscale logs quickstart --follow",
    "cancel": "haltscale cancel quickstart",
    "list": "haltscale list --json",
    "dashboard": "haltscale dashboard --port 8501",
    "report": "haltscale report quickstart --out quickstart.html",
    "figures": "haltscale figures quickstart --out figures --width single --format pdf",
    **cli_models.EXAMPLES,
}
"""One for each verb; ``haltscale VERB --help`` shows it."""
DASHBOARD = {
    "dashboard": "haltscale.dashboard",
    "report": "haltscale.dashboard.html_report",
    "figures": "haltscale.dashboard.figure_files",
}
"""Verbs of the dashboard's modules, which parse their own arguments."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse and dispatch. Errors of the user's making end with a sentence and exit code 1, not with a traceback."""
    parser = argparse.ArgumentParser(
        prog="haltscale",
        description="Scaling studies of language models that decide, token by token, how many latent steps to take.",
        epilog="examples:\n" + "\n".join(f"  {example}" for example in EXAMPLES.values()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"haltscale {metadata.version('haltscale')}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, text: str, **more: Any) -> argparse.ArgumentParser:
        return verbs.add_parser(name, help=text, description=text, epilog=f"example: {EXAMPLES[name]}", **more)

    up = verb("up", "start a local Ray head, or find the running one")
    up.add_argument("--cpus", type=int, help="CPUs to offer (default: all)")
    verb("down", "stop the head that `haltscale up` started; jobs on it end")
    for name, text in (("run", "run a study in this process"), ("submit", "run a study as a Ray job, and follow it")):
        command = verb(name, text)
        command.add_argument(
            "study",
            help="the name of an installed one (haltscale list), a file (my_sweep.py), an importable module"
            " (package.module) or a function in it (package.module:study)",
        )
        command.add_argument("arguments", nargs="*", help="for the study; after `--`")
        if name == "submit":
            command.add_argument("--no-follow", action="store_true", help="submit and return at once")
            command.add_argument("--json", action="store_true", help="print the job as JSON and return at once")
    for name, text in (("status", "the progress of runs"), ("results", "the table of results")):
        command = verb(name, text)
        command.add_argument("study", nargs="?" if name == "status" else None, help="a study in the store")
        command.add_argument("--store", help="root of the run store: a folder or an fsspec URL")
        command.add_argument("--json", action="store_true", help="machine-readable")
        if name == "results":
            command.add_argument(
                "--export", metavar="DIR", help="copy the finished runs' records (no weights) to a store in this folder"
            )
            command.add_argument(
                "--with-model", action="append", default=[], metavar="KEY", help="export this run's finished model too"
            )
    logs = verb("logs", "the output of a study's last job")
    logs.add_argument("study", help="the study's name")
    logs.add_argument("--follow", action="store_true", help="follow the job until it ends, and exit with its status")
    verb("cancel", "stop the job that runs a study; submit it again to resume it").add_argument(
        "study", help="the study's name"
    )
    verb("list", "the methods and studies that are installed").add_argument(
        "--json", action="store_true", help="machine-readable"
    )
    cli_models.add_verbs(verb)
    verb("dashboard", "open the dashboard (--store, --port, --demo)", add_help=False)
    verb("report", "a study as one HTML file (STUDY, --out, --store)", add_help=False)
    verb("figures", "a study's figures as SVG, PDF, PNG and data (STUDY, --out, --store)", add_help=False)

    options, rest = parser.parse_known_args(arguments)
    if rest and options.verb not in DASHBOARD:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    options.rest = rest
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that knows no Greek letters shows the rest
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    try:
        _dispatch(options)
    except (cluster.ClusterError, StoreError, UnknownStudyError) as error:
        sys.exit(f"error: {error}")
    except BrokenPipeError:  # whoever read the output has enough of it
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        sys.exit(141)
    except OSError as error:  # a file or folder of the user's that cannot be read or written
        if error.filename is None:
            raise
        sys.exit(f"error: {error.filename}: {error.strerror}")
    except KeyboardInterrupt:
        sys.exit(130)


def _dispatch(options: argparse.Namespace) -> None:
    match options.verb:
        case "up":
            head = cluster.up(cpus=options.cpus)
            print(f"Ray head at {head.dashboard} (token authentication on; `haltscale down` stops it)")
            print(f"for plain `ray job submit`: export RAY_API_SERVER_ADDRESS={head.dashboard} RAY_AUTH_MODE=token")
        case "down":
            print("stopped" if cluster.down() else "no local Ray head is running")
        case "run":
            load_study(options.study).study.main(options.arguments)
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
                _export_results(RunStore(options.store), options.study, options.export, options.with_model)
            else:
                _results(RunStore(options.store), options.study, as_json=options.json)
        case "list":
            _list(as_json=options.json)
        case "evaluate" | "generate" | "serve" | "export":
            _model_verb(options)
        case "dashboard" | "report" | "figures":
            os.execv(sys.executable, [sys.executable, "-m", DASHBOARD[options.verb], *options.rest])


def _model_verb(options: argparse.Namespace) -> None:
    try:
        cli_models.dispatch(options)
    except ValueError as error:
        if not type(error).__module__.startswith("haltscale."):  # a library's: nobody has made a sentence of it
            raise
        sys.exit(f"error: {error}")


def _connected() -> tuple[cluster.Head, Any]:
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


def submit(target: str, arguments: Sequence[str], *, follow: bool, as_json: bool = False) -> int:
    """Submit a study as a Ray job; where it is running already, follow that job instead of starting a second one.

    Args:
        target: as for :func:`load_study`.

    Returns:
        The exit code: 0 where the job succeeded or was only submitted.

    Raises:
        ClusterError: no head is running, or the study is running and other arguments are given.
        UnknownStudyError: there is no such study.
    """
    loaded = load_study(target)
    name = loaded.study.name
    head, client = _connected()
    job = cluster.running_job(client, name, _owning_job(name))
    if job and arguments:
        raise cluster.ClusterError(
            f"{name} is already running as {job}, perhaps with other arguments: wait, or `haltscale cancel {name}`"
        )
    running = job is not None
    job = job or cluster.submit_study(client, [*loaded.entrypoint, *arguments], name, loaded.files)
    if as_json:
        print(json.dumps({"study": name, "job": job, "address": head.dashboard, "was_running": running}))
    elif running:
        print(f"{name} is already running as {job}; following it")
    else:
        print(f"submitted {name} as {job} to {head.dashboard}")
    if not follow:
        return 0
    try:
        return cluster.follow(client, job)
    except KeyboardInterrupt:
        print(f"\n{job} continues without this terminal. Follow it: haltscale logs {name} --follow")
        print(f"Stop it: haltscale cancel {name}")
        return 130


def _owner(study: str) -> Holder | None:
    """The process that owns a study in the store, or its last one."""
    try:
        return RunStore().holder(study)
    except StoreError:
        return None


def _owning_job(study: str) -> str:
    """The Ray job that owns a study in the store, or did: plain ``ray job submit`` may have started it."""
    owner = _owner(study)
    return owner.job if owner else ""


def logs(study: str, *, follow: bool) -> int:
    """Print the output of a study's last job.

    Returns:
        The exit code: that of the job where it is followed to its end, else 0.

    Raises:
        ClusterError: no head is running, or it knows of no such job.
    """
    head, client = _connected()
    job = cluster.latest_job(client, study, _owning_job(study))
    if job is None:
        raise cluster.ClusterError(f"{head.dashboard} has had no job of study {study!r}{_run_elsewhere(study)}")
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
    job = cluster.running_job(client, study, _owning_job(study))
    if job is None:
        raise cluster.ClusterError(f"no job at {head.dashboard} is running study {study!r}{_run_elsewhere(study)}")
    cluster.cancel(client, job)
    print(f"stopped {job}; `haltscale submit` resumes it")


def _run_elsewhere(study: str) -> str:
    owner = _owner(study)
    if owner is None or owner.is_dead():
        return ""
    return f"; it is run by {owner.description}: stop it there, with Ctrl-C or that cluster's `haltscale cancel`"


def _status(store: RunStore, study: str | None, *, as_json: bool) -> None:
    from haltscale.platform.sweeps import progress, report

    names = [study] if study else store.studies()
    if study and study not in store.studies():
        raise store.no_study(study)
    if as_json:
        rows = [
            {"study": name, "run": run.label, "key": run.key, "state": run.state, **_without_schema(run.status)}
            for name in names
            for run in store.runs(name)
        ]
        print(json.dumps({"schema": report.JSON_SCHEMA, "runs": rows}, indent=1))
        _raise_if_damaged(store, study)
        return
    if not names:
        print(f"no studies in {store.root}; start one: haltscale submit quickstart")
    for name in names:
        owner = store.holder(name)
        print(f"{name} (run by {owner.description})" if owner and not owner.is_dead() else name)
        for run in store.runs(name):
            print(f"  {run.state:<9} {progress.describe(run)}")
        if study is None and (problem := store.study_problem(name)):
            print(f"  {problem}")
    _raise_if_damaged(store, study)


def _raise_if_damaged(store: RunStore, study: str | None) -> None:
    """Raise StoreError if the requested study cannot be read in full; the runs that can be read have been shown."""
    if study and (problem := store.study_problem(study)):
        raise StoreError(problem)


def _results(store: RunStore, study: str, *, as_json: bool) -> None:
    from haltscale.platform.sweeps import report

    if study not in store.studies():
        raise store.no_study(study)
    frame = report.results(store, study)
    if as_json:
        report.print_json(frame)
    else:
        note = "" if store.study_problem(study) else str(store.study(study).get("note", ""))
        report.show_results(frame, title=study, note=note)
        report.show_targets(report.judged_targets(store, study), title=f"{study}: targets")
    _raise_if_damaged(store, study)


def _list(*, as_json: bool) -> None:
    from haltscale.model import METHODS, MethodError

    methods = []
    for name in METHODS:
        try:
            summary = METHODS[name].summary
        except MethodError as error:
            summary = str(error)
        methods.append({"method": str(name), "package": METHODS.package(name), "summary": summary})
    known = [{"study": name, "package": found.package, "summary": found.summary()} for name, found in studies().items()]
    if as_json:
        print(json.dumps({"schema": 1, "methods": methods, "studies": known}, indent=1))
        return
    for rows in (methods, known):
        kind = next(iter(rows[0]))
        print(f"{kind:<24} {'package':<16} summary")
        for row in rows:
            print(f"{row[kind]:<24} {row['package']:<16} {row['summary']}")
        print()


def _export_results(store: RunStore, study: str, folder: str, models: list[str]) -> None:
    from haltscale.platform.sweeps import publishing

    copy = publishing.publish(store, study, folder, models=models)
    print(f"{len(copy.run_keys(study))} finished runs of {study} are in {copy.root}")
    print(f"see them: haltscale dashboard --store {folder}")


def _without_schema(document: object) -> dict[str, object]:
    return {k: v for k, v in dict(document).items() if k not in ("schema", "state")}  # type: ignore[call-overload]


if __name__ == "__main__":
    main()
