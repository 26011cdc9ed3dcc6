"""A local Ray head with token authentication, and the client that submits jobs to it or to any other cluster.

Everything binds to loopback. The token is Ray's own (``~/.ray/auth_token``, made at the first start); both sides need
``RAY_AUTH_MODE=token``, so it is set here for every process that haltscale starts.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from haltscale.platform import provenance
from haltscale.platform.durable import write_durably
from haltscale.platform.store import haltscale_home

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
LOOPBACK_ONLY = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""Ray's only switch that binds every port of a head to loopback; its clients need it too, or they translate 127.0.0.1
to the machine's outer address and wait there for ever."""
OWN_RAY = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # ray.train.report waits for this poll; 2 s is Ray's default
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # a process per run, for machines that a cloud may take away
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_worker_maximum_startup_concurrency": "8",  # small machines: else Ray warns about every few workers
}
"""Settings of every Ray that haltscale starts, by environment variable."""


class ClusterError(RuntimeError):
    """No usable Ray head; the message says what to do."""


@dataclass(frozen=True, kw_only=True)
class Head:
    """Where a Ray head listens."""

    dashboard: str
    """``http://host:port``: the job server and Ray's own dashboard."""
    gcs: str = ""
    """``host:port`` for ``ray.init``; empty for a head that somebody else started."""
    temp_dir: str = ""
    """Ray's session folder; empty for a head that somebody else started."""


def _state_file() -> Path:
    return haltscale_home() / "cluster.json"


def use_token_authentication() -> None:
    """Turn Ray's token authentication on in this process and its children, before Ray is imported.

    A token is generated at the first use. ``RAY_AUTH_MODE`` set by the user is respected.
    """
    if os.environ.setdefault("RAY_AUTH_MODE", "token") != "token":
        return
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return
    token = Path.home() / ".ray" / "auth_token"
    if not token.exists():
        _ray("get-auth-token", "--generate")
        token.chmod(0o600)


def prepare_client() -> None:
    """Set this process up to talk to a head; call it before Ray is imported, which reads its environment then."""
    use_token_authentication()
    if address := os.environ.get("RAY_ADDRESS"):  # a job's own cluster, which may have many nodes
        on_loopback = LOOPBACK in address or "localhost" in address
    else:
        head = find_head()
        on_loopback = head is None or bool(head.gcs)
    if on_loopback:
        os.environ.update(LOOPBACK_ONLY)


def head_environment() -> dict[str, str]:
    """Environment of a head that haltscale starts; its workers inherit it."""
    scripts = str(Path(sys.executable).parent)
    return {
        **os.environ,
        "PATH": os.pathsep.join([scripts, os.environ.get("PATH", "")]),  # jobs need this python
        **LOOPBACK_ONLY,
        **OWN_RAY,
        "PYTHONUNBUFFERED": "1",
    }


def find_head() -> Head | None:
    """The head to use: ``RAY_API_SERVER_ADDRESS``, ``RAY_ADDRESS`` (http), or the local one that :func:`up` started.

    Raises:
        ClusterError: an address was named but nothing that we may talk to answers there.
    """
    named = os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS", "")
    if named.startswith(("http://", "https://")):
        head = Head(dashboard=named)
        if not is_alive(head):
            raise ClusterError(
                f"no Ray head answers at {named}: start it, or unset RAY_API_SERVER_ADDRESS/RAY_ADDRESS to use a local"
                " one; a 401 means that RAY_AUTH_TOKEN is not that cluster's"
            )
        return head
    try:
        head = Head(**json.loads(_state_file().read_text()))
    except (OSError, ValueError, TypeError):
        return None
    return head if is_alive(head) else None


def is_alive(head: Head) -> bool:
    """Whether the head's job server answers us and its GCS listens.

    Both are asked: another head may have taken the job server's port since, and a client of a GCS that is gone waits
    for minutes.
    """
    import urllib.error
    import urllib.request

    if head.gcs:
        host, port = head.gcs.rsplit(":", 1)
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
        except OSError:
            return False
    token = os.environ.get("RAY_AUTH_TOKEN") or _read_token()
    request = urllib.request.Request(f"{head.dashboard}/api/version")
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False


def _read_token() -> str:
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    return path.read_text().strip() if path.exists() else ""


def up(*, cpus: int | None = None, temp_dir: str | None = None) -> Head:
    """Return the running head, or start a local one.

    Args:
        cpus: CPUs to offer; all of the machine by default.
        temp_dir: Ray's session folder; Ray's default (``/tmp/ray``) if None.

    Raises:
        ClusterError: the head did not start; the message holds Ray's own words.
    """
    use_token_authentication()
    if head := find_head():
        log.info("using the Ray head at %s", head.dashboard)
        return head
    gcs, dashboard, client, agent = free_ports(4, preferred=(6379, 8265, 10001, 52365))
    # fmt: off
    arguments = [
        "start", "--head", f"--node-ip-address={LOOPBACK}", f"--port={gcs}",
        f"--dashboard-host={LOOPBACK}", f"--dashboard-port={dashboard}",
        f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}",
        "--disable-usage-stats",
    ]
    # fmt: on
    arguments += [f"--num-cpus={cpus}"] if cpus is not None else []
    arguments += [f"--temp-dir={temp_dir}"] if temp_dir else []
    head = Head(dashboard=f"http://{LOOPBACK}:{dashboard}", gcs=f"{LOOPBACK}:{gcs}", temp_dir=temp_dir or "/tmp/ray")
    _state_file().parent.mkdir(parents=True, exist_ok=True)
    # Before it is made: an interrupted start, or one that hangs, leaves a head that `down` can stop.
    write_durably(_state_file(), json.dumps(asdict(head)).encode())
    try:
        _ray(*arguments)
    except BaseException:
        _stop_processes(head)
        _state_file().unlink(missing_ok=True)
        raise
    if not is_alive(head):
        raise ClusterError(f"Ray started but its job server does not answer at {head.dashboard}; see {head.temp_dir}")
    return head


def down() -> bool:
    """Stop the local head that :func:`up` started, and only that one. Returns whether one was running."""
    try:
        head = Head(**json.loads(_state_file().read_text()))
    except (OSError, ValueError, TypeError):
        return False
    stopped = _stop_processes(head)
    _state_file().unlink(missing_ok=True)
    return stopped


def _stop_processes(head: Head) -> bool:
    """Terminate the processes of one head; `ray stop` would take every Ray on the machine with it.

    Returns whether there were any.
    """
    import psutil

    flags = ("--gcs-address", "--gcs_address", "--address")  # the last is Ray's client server
    marks = {*(f"{flag}={head.gcs}" for flag in flags), f"--gcs_server_port={head.gcs.split(':')[1]}"}

    def belongs(process: psutil.Process) -> bool:
        try:
            words = process.cmdline()
        except psutil.Error:
            return False
        return bool(marks & set(words)) and any("ray" in word for word in words)

    found = False
    while doomed := [process for process in psutil.process_iter() if belongs(process)]:  # a raylet may still start some
        found = True
        doomed += [child for process in doomed for child in _children(process)]
        for process in doomed:
            _quietly(process.terminate)
        _, stubborn = psutil.wait_procs(doomed, timeout=10)
        for process in stubborn:
            _quietly(process.kill)
        psutil.wait_procs(stubborn, timeout=10)
    return found


def _children(process: Any) -> list[Any]:
    import psutil

    try:
        return list(process.children(recursive=True))
    except psutil.Error:
        return []


def _quietly(action: Callable[[], None]) -> None:
    import psutil

    with contextlib.suppress(psutil.Error):  # it has gone by itself
        action()


def client(head: Head) -> JobSubmissionClient:
    """A job client for this head."""
    use_token_authentication()
    from ray.job_submission import JobSubmissionClient

    jobs = JobSubmissionClient(head.dashboard)
    for logger in [name for name in logging.root.manager.loggerDict if name.split(".")[0] == "ray"]:
        logging.getLogger(logger).setLevel(logging.ERROR)  # they name every file that .gitignore keeps at home
    return jobs


def submit_study(client: JobSubmissionClient, entrypoint: Sequence[str], study: str, files: Sequence[Path] = ()) -> str:
    """Submit a study, with haltscale's code as it stands here: the nodes need Ray and haltscale's requirements, not
    this version of haltscale.

    Args:
        entrypoint: the command.
        study: the study's name.
        files: scripts and packages that the command needs in its working directory.

    Returns:
        The submission id.
    """
    # fmt: off
    variables = {
        name: value for name, value in {
            "HALTSCALE_HOME": os.environ.get("HALTSCALE_HOME") or (_is_local(client) and str(haltscale_home())),
            "HALTSCALE_STORE": os.environ.get("HALTSCALE_STORE"),
            "HALTSCALE_CORPORA": os.environ.get("HALTSCALE_CORPORA"),
            "HALTSCALE_GIT_COMMIT": provenance.git_commit(),  # there, the files have no repository
        }.items() if value
    }
    # fmt: on
    with staged_code() as code, tempfile.TemporaryDirectory() as folder:
        environment: dict[str, Any] = {"env_vars": variables, "py_modules": [str(code)]}
        for file in files:
            if file.is_dir():
                ignored = shutil.ignore_patterns("__pycache__", ".*")
                shutil.copytree(file, Path(folder) / file.name, ignore=ignored)
            else:
                shutil.copy(file, folder)
        if files:
            environment["working_dir"] = folder
        return str(
            client.submit_job(
                entrypoint=shlex.join(entrypoint),
                submission_id=f"{study}-{time.strftime('%Y%m%d-%H%M%S')}",
                runtime_env=environment,
                metadata={"haltscale_study": study},
            )
        )


def _is_local(client: JobSubmissionClient) -> bool:
    """Whether the head shares this machine's folders."""
    return LOOPBACK in str(client.get_address()) or "localhost" in str(client.get_address())


@contextlib.contextmanager
def staged_code() -> Iterator[Path]:
    """A folder ``haltscale`` with the rooms in it, as Ray's ``py_modules`` wants it, until the block ends.

    A wheel would be installed with all that it requires, torch included; a folder is only put on ``PYTHONPATH``, before
    whatever is installed there.
    """
    rooms = Path(__file__).resolve().parents[1]
    with tempfile.TemporaryDirectory() as folder:
        code = Path(folder) / "haltscale"
        for room in ("model", "platform", "studies", "dashboard"):
            shutil.copytree(rooms / room, code / room, ignore=shutil.ignore_patterns("__pycache__", ".*"))
        yield code


def submission_id() -> str:
    """Of the Ray job that this process drives, however it was submitted; empty for other processes."""
    try:
        config = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", ""))
        return str(config["metadata"]["job_submission_id"])
    except (ValueError, KeyError, TypeError):
        return ""


def running_job(client: JobSubmissionClient, study: str, owner: str = "") -> str | None:
    """The submission id of the job that runs this study now, if one does.

    Args:
        owner: the job that owns the study in the store, which plain ``ray job submit`` may have started.
    """
    return next((job for job, status in _jobs(client, study, owner) if not status.is_terminal()), None)


def latest_job(client: JobSubmissionClient, study: str, owner: str = "") -> str | None:
    """The submission id of the study's last job, running or not; None where this head knows of none."""
    return next((job for job, _ in _jobs(client, study, owner)), None)


def _jobs(client: JobSubmissionClient, study: str, owner: str) -> list[tuple[str, Any]]:
    """Submission ids and statuses of a study's jobs, the latest first."""
    jobs = [
        job
        for job in client.list_jobs()
        if (job.metadata or {}).get("haltscale_study") == study or (owner and job.submission_id == owner)
    ]
    jobs.sort(key=lambda job: job.start_time or 0, reverse=True)
    return [(str(job.submission_id), job.status) for job in jobs if job.submission_id]


def cancel(client: JobSubmissionClient, job: str) -> None:
    """Stop a job and wait until it has ended; what its study finished stays, and what it began can go on."""
    client.stop_job(job)
    while not client.get_job_status(job).is_terminal():
        time.sleep(0.2)


def follow(client: JobSubmissionClient, job: str) -> int:
    """Print a job's output until it ends. Returns 0 where it succeeded, else 1."""

    async def tail() -> None:
        async for lines in client.tail_job_logs(job):
            sys.stdout.write(lines)
            sys.stdout.flush()

    try:
        asyncio.run(tail())
    except RuntimeError as error:
        raise ClusterError(f"lost the output of {job} ({error}); it goes on: submit again to follow it") from error
    status = client.get_job_status(job)
    while not status.is_terminal():  # the output ends a moment before the status says so
        time.sleep(0.2)
        status = client.get_job_status(job)
    if status.value != "SUCCEEDED":
        sys.stdout.write(f"{job}: {status.value.lower()}: {client.get_job_info(job).message or ''}\n")
    return 0 if status.value == "SUCCEEDED" else 1


def free_ports(count: int, *, preferred: tuple[int, ...] = ()) -> list[int]:
    """Free loopback ports, the preferred ones where they are free."""
    sockets, ports = [], []
    for index in range(count):
        wanted = preferred[index] if index < len(preferred) else 0
        for port in (wanted, 0):
            probe = socket.socket()
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port that was just left is free
            try:
                probe.bind((LOOPBACK, port))
            except OSError:
                probe.close()
                continue
            sockets.append(probe)  # kept open, so that the next one cannot get the same port
            ports.append(probe.getsockname()[1])
            break
    for probe in sockets:
        with closing(probe):
            pass
    return ports


def _ray(*arguments: str) -> str:
    executable = shutil.which("ray", path=str(Path(sys.executable).parent)) or "ray"
    done = subprocess.run([executable, *arguments], env=head_environment(), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ClusterError(f"`ray {arguments[0]}` failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return done.stdout
