"""How the server is started."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from haltscale.dashboard import figure_files, html_report, launch
from haltscale.platform import cli


def test_the_command_listens_on_this_machine_only():
    line = launch.command("runs", 8123)
    assert line[:4] == [sys.executable, "-m", "streamlit", "run"]
    assert Path(line[4]).name == "app.py"
    assert Path(line[4]).is_file()
    options = dict(zip(line[5::2], line[6::2], strict=True))
    assert options["--server.address"] == "127.0.0.1"
    assert options["--server.port"] == "8123"
    assert options["--browser.gatherUsageStats"] == "false"


def test_the_store_is_found_from_any_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert launch.environment("runs")["HALTSCALE_STORE"] == str(tmp_path / "runs")
    assert launch.environment("s3://bucket/runs")["HALTSCALE_STORE"] == "s3://bucket/runs"


def test_a_taken_port_is_left_alone(capsys, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert not launch.is_free(port)
        monkeypatch.setattr(launch, "PORT", port)
        assert launch.free_port() != port
        with pytest.raises(SystemExit) as stop:
            launch.main(["--port", str(port)])
        assert stop.value.code == 2
        assert f"port {port} is taken" in capsys.readouterr().err


def test_main_prints_where_it_is(monkeypatch, capsys, tmp_path):
    seen = {}

    def run(line, *, env, check):
        seen.update(line=line, store=env["HALTSCALE_STORE"])
        return subprocess.CompletedProcess(line, 0)

    monkeypatch.setattr(subprocess, "run", run)
    assert launch.main(["--store", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    port = seen["line"][seen["line"].index("--server.port") + 1]
    assert f"http://127.0.0.1:{port}" in out
    assert seen["store"] == str(tmp_path)


def test_the_dashboard_imports_neither_ray_nor_torch():
    code = (
        "import sys; from haltscale.dashboard import app_pages, data, figures, launch, layout, tokens; "
        "sys.exit(bool({'ray', 'torch', 'deepspeed'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("program", "verb"), [(launch.main, "dashboard"), (html_report.main, "report"), (figure_files.main, "figures")]
)
def test_help_has_an_example(program, verb, capsys):
    with pytest.raises(SystemExit) as ended:
        program(["--help"])
    assert ended.value.code == 0
    assert f"example: {cli.EXAMPLES[verb]}" in " ".join(capsys.readouterr().out.split())


def test_the_demo_is_what_the_repository_publishes(monkeypatch, capsys):
    seen = {}

    def run(line, *, env, check):
        seen.update(store=env["HALTSCALE_STORE"])
        return subprocess.CompletedProcess(line, 0)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setenv("HALTSCALE_STORE", "s3://somewhere/else")
    assert launch.main(["--demo"]) == 0
    assert Path(seen["store"]) == Path(__file__).parents[2] / "studies" / "results"
    assert seen["store"] in capsys.readouterr().out


def test_an_installation_without_published_studies_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(launch.importlib.resources, "files", lambda name: tmp_path)
    with pytest.raises(SystemExit, match="holds no published study: use a clone"):
        launch.main(["--demo"])


def test_a_demo_and_a_store_are_two_wishes(capsys):
    with pytest.raises(SystemExit) as stop:
        launch.main(["--demo", "--store", "runs"])
    assert stop.value.code == 2
    assert "not allowed with" in capsys.readouterr().err
