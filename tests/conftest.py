"""What all tests share. Everything that haltscale keeps goes to a folder of the session, never to the user's."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import settings

# Before anything imports Ray, which reads these then. Jobs are started as `python ...`: this environment's.
os.environ["HALTSCALE_HOME"] = tempfile.mkdtemp(prefix="haltscale-test-")
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
os.environ.setdefault("DS_ACCELERATOR", "cpu")
for name in ("HALTSCALE_STORE", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
    os.environ.pop(name, None)

from haltscale.platform import cluster  # noqa: E402

from jobs import TOY_LENGTH, command_line, run  # noqa: E402

settings.register_profile("haltscale", deadline=None)  # how long a test takes says nothing of what it holds
settings.load_profile("haltscale")
os.environ.update(cluster.LOOPBACK_ONLY)
cluster.use_token_authentication()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where a test runs: here always, and with ``-m gpu`` on a CUDA device."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device: `make gpu` runs this test where there is one")
    if request.param == "cuda" and os.environ["DS_ACCELERATOR"] != "cuda":
        pytest.skip("DeepSpeed was told to use the CPU: set DS_ACCELERATOR=cuda, as `make gpu` does")
    return torch.device(request.param)


@pytest.fixture(scope="session")
def head() -> Iterator[cluster.Head]:
    """One Ray head for the whole session, beside any that the user runs; 2 CPUs whatever the machine has."""
    with tempfile.TemporaryDirectory(prefix="hs-", dir="/tmp", ignore_cleanup_errors=True) as temp_dir:
        yield cluster.up(cpus=2, temp_dir=temp_dir)  # a short path: Unix sockets allow about 100 characters
        cluster.down()
        left = [process.pid for process in psutil.process_iter() if temp_dir in command_line(process)]
        assert not left, f"processes of the head are left: {left}"


@pytest.fixture(scope="session")
def connected(head: cluster.Head) -> Iterator[None]:
    """This process as a client of the session's head."""
    import ray

    ray.init(address=head.gcs, namespace="haltscale", log_to_driver=False, logging_level="WARNING")
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def quickstart(head: cluster.Head) -> str:
    """The whole quickstart at toy length, through a real `ray job submit`, as the README shows it."""
    code, output = run(head, "python", "-m", "haltscale.studies.quickstart", *TOY_LENGTH, working_dir=".")
    assert code == 0, output
    return output


@pytest.fixture(scope="session")  # clients are cached, with the address of their server
def s3() -> Iterator[str]:
    """The URL of an empty bucket on a real server (moto's); the environment points to it, as a user's would."""
    pytest.importorskip("s3fs", reason="needs haltscale[s3]")
    from haltscale.platform.store import RunStore

    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    with pytest.MonkeyPatch.context() as patch:
        server.start()
        host, port = server.get_host_and_port()
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        RunStore("s3://bucket/runs").fs.mkdir("bucket")
        yield "s3://bucket"
        server.stop()
