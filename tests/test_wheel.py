"""The wheel, built from what git tracks and installed outside of the repository, does what the README says."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
import tomllib
import urllib.request
import zipfile
from pathlib import Path

import pytest
from toys import write_study, write_texts

from haltscale.platform.cluster import free_ports

from jobs import ROOT

ROOMS = ("model", "platform", "studies", "dashboard")
VERSION = "9.8.7"


def test_constraints_cover_what_is_installed() -> None:
    def normalised(name: str) -> str:
        return re.sub(r"[-_.]+", "-", name).lower()

    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pinned = [normalised(line.partition("==")[0]) for line in lines]
    assert len(set(pinned)) == len(pinned)
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines), "no local versions such as +cpu"
    unpinned = {"haltscale", "pip", "setuptools", "wheel"}
    unpinned |= {"litgpt", "lightning", "lightning-utilities", "torchmetrics"}  # of the benchmarks; see the Makefile
    found = [one for one in importlib.metadata.distributions() if "_vendor" not in str(one.locate_file(""))]
    installed = {normalised(one.name) for one in found}
    assert installed - unpinned <= set(pinned) | {name for name in installed if name.startswith(("nvidia-", "triton"))}


def test_every_package_is_named_in_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    named = project["tool"]["setuptools"]["package-dir"]
    folders = {file.parent.relative_to(ROOT).as_posix() for room in ROOMS for file in (ROOT / room).rglob("*.py")}
    folders = {folder for folder in folders if not folder.startswith("studies/results")}
    assert set(named.values()) == folders
    assert set(named) == set(project["tool"]["setuptools"]["packages"])


def quiet(*command: str | Path, cwd: Path, **environment: str) -> str:
    """The output of a command that must succeed, in an environment that knows nothing of the repository."""
    hidden = ("PYTHONPATH", "HALTSCALE_STORE")
    clean = {name: value for name, value in os.environ.items() if name not in hidden} | environment
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=clean, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of what git tracks, with a tag."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs the repository")
    source = tmp_path_factory.mktemp("source")
    for name in quiet("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT).split("\0")[:-1]:
        if (ROOT / name).is_file() and not name.startswith("tests/"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, source / name)
    version = quiet(sys.executable, "-m", "setuptools_scm", cwd=source, GIT_CEILING_DIRECTORIES=str(source.parent))
    assert version.strip() == "0.1.0", "without git"
    git = ("git", "-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
    for command in (("init", "-q"), ("add", "-A"), ("commit", "-qm", "all"), ("tag", f"v{VERSION}")):
        quiet(*git, *command, cwd=source)
    target = source.parent / "wheels"
    build = ("pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", target, ".")
    quiet(sys.executable, "-m", *build, cwd=source)
    (built,) = target.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def bin_folder(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of an environment with the wheel in it, which borrows all other packages from this one."""
    folder = tmp_path_factory.mktemp("installed") / "venv"
    quiet(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    own = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    # A path that a .pth file adds has its own .pth files left alone: the editable haltscale stays unknown.
    (own / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = ("install", "--quiet", "--no-deps", "--no-index", "--ignore-installed", wheel)
    quiet(sys.executable, "-m", "pip", "--python", folder / "bin" / "python", *install, cwd=folder.parent)
    where = quiet(folder / "bin" / "python", "-c", "import haltscale; print(*haltscale.__path__)", cwd=folder.parent)
    assert where.strip() == str(own / "haltscale")
    return folder / "bin"


@pytest.mark.slow
def test_what_is_in_it(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert wheel.name.startswith(f"haltscale-{VERSION}-py3-none-any")
    for room in ROOMS:
        assert f"haltscale/{room}/py.typed" in names
        for file in (ROOT / room).rglob("*"):
            kind = file.suffix in (".py", ".css", ".js", ".toml") or (
                room == "studies" and file.suffix in (".json", ".parquet")
            )
            if file.is_file() and kind and not file.match("studies/results/*.py"):
                assert f"haltscale/{file.relative_to(ROOT).as_posix()}" in names
    assert {f"haltscale-{VERSION}.dist-info/licenses/{name}" for name in ("LICENSE", "NOTICE")} <= names
    assert {name.partition("/")[0] for name in names} == {"haltscale", f"haltscale-{VERSION}.dist-info"}


@pytest.mark.slow
def test_commands_and_published_results(bin_folder: Path, tmp_path: Path) -> None:
    home = {"HALTSCALE_HOME": str(tmp_path / "home")}
    program = bin_folder / "haltscale"
    assert "usage: haltscale" in quiet(program, "--help", cwd=tmp_path, **home)
    assert quiet(program, "--version", cwd=tmp_path, **home).strip() == f"haltscale {VERSION}"
    listed = json.loads(quiet(program, "list", "--json", cwd=tmp_path, **home))
    assert {"quickstart", "reference"} <= {row["study"] for row in listed["studies"]}
    assert "adaptive" in {row["method"] for row in listed["methods"]}
    code = "from haltscale.dashboard.launch import demo_root; print(demo_root())"
    store = quiet(bin_folder / "python", "-c", code, cwd=tmp_path, **home).strip()
    assert store.startswith(str(bin_folder.parent))
    rows = json.loads(quiet(program, "results", "reference", "--json", "--store", store, cwd=tmp_path, **home))["runs"]
    assert len(rows) > 10
    assert {row["state"] for row in rows} == {"finished"}


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_study_is_trained(bin_folder: Path, tmp_path: Path) -> None:
    script = write_study(tmp_path / "toy_study.py", write_texts(tmp_path / "toy"))
    home = {"HALTSCALE_HOME": str(tmp_path / "home")}
    quiet(bin_folder / "haltscale", "run", script, cwd=tmp_path, **home)
    (row,) = json.loads(quiet(bin_folder / "haltscale", "results", "toy", "--json", cwd=tmp_path, **home))["runs"]
    assert (row["method"], row["state"]) == ("adaptive", "finished")


@pytest.mark.slow
def test_the_dashboard_starts(bin_folder: Path, tmp_path: Path) -> None:
    (port,) = free_ports(1)
    address = f"http://127.0.0.1:{port}"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["HALTSCALE_HOME"] = str(tmp_path / "home")
    command = [bin_folder / "haltscale", "dashboard", "--demo", "--port", str(port)]
    server = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                with urllib.request.urlopen(address) as answer:
                    assert answer.status == 200
                break
            except OSError:
                assert server.poll() is None, "the dashboard ended"
                assert time.monotonic() < deadline
                time.sleep(0.2)
    finally:
        os.killpg(server.pid, 15)
        server.wait(30)
    code = (
        "import pathlib, haltscale.dashboard\n"
        "from streamlit.testing.v1 import AppTest\n"
        "app = pathlib.Path(haltscale.dashboard.__file__).with_name('app.py')\n"
        "page = AppTest.from_file(str(app), default_timeout=120).run()\n"
        "assert not page.exception, page.exception\n"
        "print(page.title[0].value if page.title else page.header[0].value)\n"
    )
    store = str(next(bin_folder.parent.rglob("haltscale/studies/results")))
    shown = quiet(bin_folder / "python", "-c", code, cwd=tmp_path, HALTSCALE_STORE=store)
    assert shown.strip()
