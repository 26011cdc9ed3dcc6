"""The studies that are installed, and the study that a user names on the command line.

Another package adds a study by an entry point of the group ``haltscale.studies``; its value is a module, as those of
haltscale.studies are, or a function that returns a ``Study`` (``my_package.sweeps:wide``).
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import logging
import os
import pkgutil
import re
import runpy
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from haltscale.platform.sweeps.study import Study

log = logging.getLogger(__name__)

GROUP = "haltscale.studies"
"""Entry points of this group add studies."""


@dataclass(frozen=True, kw_only=True)
class InstalledStudy:
    """Where a study that is known by name is defined."""

    path: str
    """``package.module`` or ``package.module:function``."""
    package: str
    """The distribution that it comes from."""

    def summary(self) -> str:
        """The first line of its module's docstring; the module is read and not run. Empty where there is none."""
        try:
            spec = importlib.util.find_spec(self.path.partition(":")[0])
            source = Path(spec.origin or "").read_text(encoding="utf-8") if spec else ""
        except (ImportError, OSError):
            return ""
        return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]


def studies() -> dict[str, InstalledStudy]:
    """The studies that are known by name: those that ship, then those of other packages."""
    shipped = importlib.import_module("haltscale.studies")  # by name: the platform knows no study
    names = sorted(module.name for module in pkgutil.iter_modules(shipped.__path__))
    found = {name: InstalledStudy(path=f"haltscale.studies.{name}", package="haltscale") for name in names}
    for point in sorted(entry_points(group=GROUP)):
        package = point.dist.name if point.dist else point.value
        if point.name in found:
            log.warning("study %r of package %s is ignored: the name is taken", point.name, package)
        else:
            found[point.name] = InstalledStudy(path=point.value, package=package)
    return found


class UnknownStudyError(ValueError):
    """There is no such study, or it lacks what it is made of; the message says which there are."""


@dataclass(frozen=True, kw_only=True)
class LoadedStudy:
    """A study, and how a job runs it again."""

    study: Study
    entrypoint: tuple[str, ...]
    """The command, without its arguments."""
    files: tuple[Path, ...] = ()
    """What the command needs beside haltscale: a script and the modules beside it, or a package."""


def load_study(target: str) -> LoadedStudy:
    """The study of a file (``my_sweep.py``), an importable module (``my_package.sweeps``), a function in one
    (``my_package.sweeps:wide``), or of an installed name (:func:`studies`).

    A script is run up to where its ``main()`` would begin.

    Raises:
        UnknownStudyError: there is no such file or module, or its study cannot be made (a text that cannot be fetched).
    """
    known = studies()
    name, file = target, Path(target)
    if target in known:
        name = known[target].path
    elif target.endswith(".py") or os.sep in target:
        if not file.is_file():
            raise UnknownStudyError(f"no study {target!r}: there is no such file; installed: {', '.join(known)}")
        study = _captured(lambda: runpy.run_path(str(file), run_name="__main__"), target)
        beside = tuple(sorted(file.resolve().parent.glob("*.py")))
        return LoadedStudy(study=study, entrypoint=("python", file.name), files=beside)
    elif not _is_importable(target.partition(":")[0]):
        raise UnknownStudyError(
            f"no study {target!r}: give a file (my_sweep.py), an importable module (package.module), a function in it"
            f" (package.module:study), or one of {', '.join(known)}"
        )
    study = _captured(lambda: _run_module(name), target)
    run = ("-m", "haltscale.platform.cli", "run", name, "--") if ":" in name else ("-m", name)
    return LoadedStudy(study=study, entrypoint=("python", *run), files=_package_of(name))


def _run_module(path: str) -> None:
    name, _, function = path.partition(":")
    module = importlib.import_module(name)
    if function or hasattr(module, "study"):
        getattr(module, function or "study")().main()
    else:
        runpy.run_module(name, run_name="__main__", alter_sys=True)


def _captured(run: Callable[[], object], target: str) -> Study:
    from haltscale.platform.config import ConfigError
    from haltscale.platform.sweeps.study_cli import captured

    arguments, sys.argv = sys.argv, [target]
    try:
        with captured() as found:
            run()
    except ConfigError as error:
        raise UnknownStudyError(str(error)) from error
    except ValueError as error:
        raise UnknownStudyError(f"{target}: {error}") from error
    finally:
        sys.argv = arguments
    if not found:
        raise UnknownStudyError(f"{target} defines no study: it must call Study(...).main() when it is run")
    study: Study = found[0]
    return replace(study, source=study.source or (Path(target).name if target.endswith(".py") else target))


def _is_importable(name: str) -> bool:
    if not all(part.isidentifier() and not part.startswith("__") for part in name.split(".")):
        return False
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _package_of(name: str) -> tuple[Path, ...]:
    """What makes a module importable elsewhere: its top-level package or file, unless haltscale's own or installed."""
    top = re.split("[.:]", name)[0]
    spec = importlib.util.find_spec(top)
    if top == "haltscale" or spec is None or spec.origin is None or "site-packages" in spec.origin:
        return ()
    origin = Path(spec.origin)
    return (origin.parent if origin.name == "__init__.py" else origin,)
