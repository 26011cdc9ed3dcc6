"""How the repository is laid out, and who imports what."""

import ast
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("model", "platform", "studies", "dashboard")
MAY_IMPORT = {
    "ray": {"platform/cluster.py"} | {path.relative_to(ROOT).as_posix() for path in ROOT.glob("platform/**/ray_*.py")},
    "deepspeed": {"platform/training/engine.py"},
}
"""A training loop or a figure that imports these cannot run in a notebook, in a fast test or on an analyst's laptop."""


def sources(*rooms: str) -> list[Path]:
    return sorted(path for room in rooms for path in (ROOT / room).rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    """Full names of all modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def python(code: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("folder", [*ROOMS, "tests", "benchmarks"])
def test_top_level_folders(folder):
    assert (ROOT / folder).is_dir()


def test_platform_is_never_a_regular_package():
    """With platform/__init__.py, ``import platform`` from the repository's root finds this folder, not the standard
    library's module: torch, ray and pip would all fail to import wherever the root is on sys.path (a submitted job, a
    notebook, ``python -m``). As a namespace folder it loses against the standard library and is harmless."""
    assert not (ROOT / "platform" / "__init__.py").exists()


def test_the_standard_library_keeps_its_platform_module():
    done = python("import platform, torch, ray; print(platform.system())")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == platform.system()


def test_all_rooms_are_found_under_one_name():
    assert all(path.name != "__init__.py" for path in sources("tests"))
    code = "import haltscale.model, haltscale.platform.store, haltscale.studies, haltscale.dashboard.data"
    done = python(code, cwd=ROOT / "tests")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("package", sorted(MAY_IMPORT))
def test_only_the_named_files_import(package):
    importers = {
        path.relative_to(ROOT).as_posix()
        for path in sources(*ROOMS)
        if any(name.split(".")[0] == package for name in imported(path))
    }
    assert importers <= MAY_IMPORT[package]
    assert importers, f"nobody imports {package}: this test has lost its subject"


def test_arrows_point_one_way():
    allowed = {
        "model": {"model"},
        "platform": {"model", "platform", "studies"},  # studies: the command line loads them by name
        "studies": {"model", "platform", "studies"},
        "dashboard": {"platform", "dashboard"},
    }
    for room, targets in allowed.items():
        for path in sources(room):
            names = {name.split(".")[1] for name in imported(path) if name.startswith("haltscale.")}
            assert names <= targets, path
    loaders = [path.name for path in sources("platform") if "haltscale.studies" in imported(path)]
    assert loaders in ([], ["cli.py"])


def loaded_by(statement: str) -> set[str]:
    """Top-level modules that are loaded after a statement, in a fresh interpreter."""
    done = python(f"import sys; {statement}; print('\\n'.join({{name.split('.')[0] for name in sys.modules}}))")
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_the_dashboard_needs_neither_ray_nor_torch():
    loaded = loaded_by("import haltscale.dashboard.data, haltscale.dashboard.figures")
    assert "plotly" in loaded
    assert not loaded & {"ray", "torch", "deepspeed"}


def test_defining_and_reading_studies_needs_no_ray():
    modules = (
        "config, recorder, cli, corpora.corpus, training.engine, evaluation.evaluate_split, inference.models,"
        " sweeps.study"
    )
    loaded = loaded_by("; ".join(f"import haltscale.platform.{module}" for module in modules.split(", ")))
    assert "torch" in loaded
    assert not loaded & {"ray", "deepspeed"}


def test_the_store_reads_without_torch():
    assert not loaded_by("import haltscale.platform.store, haltscale.platform.sweeps.report") & {
        "ray",
        "torch",
        "deepspeed",
    }
