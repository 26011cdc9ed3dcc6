"""What a method declares of itself, and the methods by name: those of this package and those of other packages.

Another package adds a method by an entry point in its pyproject.toml; docs/extending.md builds one:

    [project.entry-points."haltscale.methods"]
    my_method = "my_package.my_method:ENTRY"

Where there is no package to install, the importable path ``my_module:ENTRY`` is the name of the method: in a study, or
for commands that read its runs in the environment variable HALTSCALE_METHODS.
"""

import functools
import importlib
import logging
import os
import re
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass, fields
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from haltscale.model.config import Method, MethodOptions, did_you_mean
from haltscale.model.language_model import LanguageModel
from haltscale.model.step_source import SourceOptions

log = logging.getLogger(__name__)

GROUP = "haltscale.methods"
"""Entry points of this group add methods."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
"""Names of methods: the name of a run's folder begins with one."""
PATH = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
"""Importable paths, ``package.module:ENTRY``."""


@dataclass(frozen=True)
class MethodEntry:
    """What the platform knows about a method: everything that planner, controls, ledger and tables need."""

    options: type[MethodOptions]
    """Dataclass of its options. One that inherits `SourceOptions` can be replayed, which the trained controls need."""
    model: type[LanguageModel]
    """Its module."""
    max_passes: Callable[[Any], float]
    """Most passes of the stack per token, from the method's options: an upper bound to plan with."""
    summary: str
    """One line for tables and help texts."""
    semantics: int = 1
    """Raised by hand when a change of the code changes what this method computes from given options and weights: runs
    of the method become stale, and no others."""
    costless: frozenset[str] = frozenset()
    """Options that change how often a model halts, or what is learned, but not what a pass costs: the planner prices
    runs that differ in nothing else once, with these options at their defaults."""
    every_step: Callable[[Any], tuple[str, MethodOptions]] | None = None
    """For a method whose steps depend on the data: the name of a method (its own, or another) and options of it that
    take every step which these options could, so that the planner can price the bound. None: the options alone decide
    the passes."""
    drawn: Callable[[Any], Sequence[MethodOptions]] | None = None
    """For a method that draws its depth anew for every training step: the options of each depth, equally likely."""
    sequential: bool = True
    """Whether the passes of a token follow each other, each over the last one's state, so that they add to the depth
    for which CompleteP scales; False where they stand beside each other, as pause tokens do."""
    old_control: bool = False
    """Whether the method only served as a control, with a router of its own, and can have none."""

    def __post_init__(self) -> None:
        if self.every_step is None and issubclass(self.options, SourceOptions):
            raise ValueError(f"{self.model.__name__} has a router (SourceOptions): give every_step, to price its bound")

    @property
    def routed(self) -> bool:
        """Whether the steps of a token depend on the data."""
        return self.every_step is not None or issubclass(self.options, SourceOptions)

    @property
    def replays(self) -> bool:
        """Whether its steps can be replayed by a control."""
        return issubclass(self.options, SourceOptions) and not self.old_control


class MethodError(ValueError):
    """A method of another package cannot be used; the message names the package and what to do."""


class Methods(MutableMapping[str, MethodEntry]):
    """The methods by name. Those of other packages are found at the first look and imported when they are used."""

    def __init__(self, own: dict[str, MethodEntry]):
        self._entries = dict(own)

    @functools.cached_property
    def _points(self) -> dict[str, EntryPoint]:
        paths = os.environ.get("HALTSCALE_METHODS", "").replace(",", " ").split()
        found = {path: EntryPoint(name=path, value=path, group=GROUP) for path in paths if PATH.fullmatch(path)}
        for point in entry_points(group=GROUP):
            if point.name in list(Method) or point.name in found or not NAME.fullmatch(point.name):
                why = f"must match {NAME.pattern}" if not NAME.fullmatch(point.name) else "the name is taken"
                log.warning("method %r of package %s is ignored: %s", point.name, _package(point), why)
            else:
                found[point.name] = point
        return found

    def refresh(self) -> None:
        """Look for entry points again, after packages were installed."""
        self.__dict__.pop("_points", None)

    def __getitem__(self, name: str) -> MethodEntry:
        """The entry of a method.

        Raises:
            KeyError: there is no such method.
            MethodError: it is another package's, and cannot be imported.
        """
        if name not in self._entries and name in self._points:
            point = self._points[name]
            self._entries[name] = _loaded(point.value, f"method {name!r} of package {_package(point)}")
        return self._entries[name]

    def __setitem__(self, name: str, entry: MethodEntry) -> None:
        """Add a method to this process, under a name of its own."""
        self._entries[name] = entry

    def __delitem__(self, name: str) -> None:
        del self._entries[name]

    def __iter__(self) -> Iterator[str]:
        yield from self._entries
        yield from (name for name in self._points if name not in self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries or name in self._points

    def __len__(self) -> int:
        return len(set(self._entries) | set(self._points))

    def package(self, name: str) -> str:
        """The distribution that a method comes from."""
        return _package(self._points[name]) if name in self._points else self[name].model.__module__.partition(".")[0]

    def named(self, name: object) -> Method | str:
        """The name of a method as configurations hold it: of `Method` for one of this package.

        An importable path, ``package.module:ENTRY``, names the `MethodEntry` there; it is imported. So this is for
        names that a user gives, and `known` for those that a file says.

        Raises:
            ValueError: there is no such method.
        """
        if isinstance(name, str) and name not in self and PATH.fullmatch(name):
            self._entries[name] = _loaded(name, f"method {name!r}")
        return self.known(name)

    def known(self, name: object) -> Method | str:
        """`named`, of the methods that are known already: nothing that a file says is imported.

        Raises:
            ValueError: there is no such method, or it cannot be imported.
        """
        if not isinstance(name, str) or name not in self:
            raise ValueError(f"method = {name!r}{did_you_mean(name, self)}{_from_elsewhere(name)}")
        self[name]  # raises where it cannot be imported
        return Method(name) if name in list(Method) else str(name)

    def with_option(self, option: str) -> list[str]:
        """Names of the methods that have an option; those that cannot be imported are left out."""
        found = []
        for name in self:
            try:
                options: Any = self[name].options
            except MethodError as error:
                log.warning("%s", error)
                continue
            if option in (field.name for field in fields(options)):
                found.append(str(name))
        return found


def _from_elsewhere(name: object) -> str:
    if isinstance(name, str) and PATH.fullmatch(name):
        return f"; to use it, set HALTSCALE_METHODS={name} where that module can be imported"
    return "; if another package adds it, install that"


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist else point.value


def _loaded(path: str, what: str) -> MethodEntry:
    """The entry at an importable path."""
    module, _, attribute = path.partition(":")
    try:
        found = functools.reduce(getattr, attribute.split("."), importlib.import_module(module))
    except Exception as error:  # whatever a stranger's module raises
        raise MethodError(f"{what} cannot be imported ({type(error).__name__}: {error}): mend or remove it") from error
    if not isinstance(found, MethodEntry):
        raise MethodError(f"{what} must be a haltscale.model.MethodEntry (got {type(found).__name__} at {path})")
    return found
