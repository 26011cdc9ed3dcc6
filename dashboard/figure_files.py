"""A study's figures as files for a paper: ``haltscale figures STUDY --out DIR``."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from haltscale.dashboard import export, headless
from haltscale.dashboard.export import ExportError, Width
from haltscale.dashboard.notes import Notes
from haltscale.platform.durable import write_durably
from haltscale.platform.store import RunStore, StoreError

VIEWS: tuple[tuple[str, Mapping[str, str]], ...] = (
    ("answer", {}),
    ("answer", {"equal": "tokens"}),
    ("compute", {"fits": "true", "frontier": "true"}),
    ("compute", {"axis": "training tokens"}),
    ("compute", {"view": "IsoFLOP"}),
    ("compute", {"view": "Multipliers"}),
    ("compute", {"view": "Value of a latent step"}),
    ("compute", {"view": "Size and data"}),
    ("sensitivity", {}),
    ("halting", {}),
    ("tokens", {}),
    ("cost", {}),
    ("evaluations", {}),
    ("live", {}),
)
"""The pages with figures, and the choices that have figures of their own."""


def charts(store: RunStore, study: str) -> Iterator[headless.Chart]:
    """Every figure of the pages over a study, each once, and those of its pinned views.

    Raises:
        StoreError: there is no such study.
    """
    if study not in store.studies():
        known = ", ".join(store.studies()) or "none"
        raise StoreError(f"no study {study!r} in {store.root}; there are: {known}")
    seen: set[str] = set()
    for page, query in VIEWS:
        for chart in headless.draw(store.root, page, {"study": study, **query}).charts:
            if chart.name not in seen:
                seen.add(chart.name)
                yield chart
    for place, note in enumerate(Notes(store, study).all()[0], start=1):
        for chart in headless.draw(store.root, note.page, {**note.query, "study": study}).charts:
            yield replace(chart, name=f"pinned-{place}-{chart.name}")


def write(
    store: RunStore, study: str, folder: Path, *, widths: Sequence[Width], formats: Sequence[str]
) -> Iterator[Path]:
    """Write a study's figures and their data to a folder; yields each file once it is there.

    Raises:
        StoreError: there is no such study.
        ExportError: pictures are asked for and this machine cannot draw.
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with export.drawing() if formats else contextlib.nullcontext():
        for chart in charts(store, study):
            made = export.files(
                f"{study}-{chart.name}", chart.figure, chart.behind, chart.about, widths=widths, formats=formats
            )
            for name, content in made:
                write_durably(folder / name, content)
                yield folder / name


def main(argv: Sequence[str] | None = None) -> int:
    """Write the files; what is wrong ends with a sentence and exit code 1."""
    parser = argparse.ArgumentParser(
        prog="haltscale figures",
        description="Write a study's figures as SVG, PDF and PNG at the widths of a paper, and their data as CSV and "
        "Parquet; study, keys and commits stand inside each file.",
        epilog="example: haltscale figures quickstart --out figures --width single --format pdf",
    )
    parser.add_argument("study", help="a study in the store")
    parser.add_argument("--out", type=Path, help="the folder to write to (default: STUDY-figures)")
    parser.add_argument("--store", help="root of the run store: a folder or an fsspec URL")
    parser.add_argument(
        "--format", action="append", choices=[*export.FORMATS, "data"],
        help="once or more; data: CSV and Parquet only, which are always written (default: svg, pdf and png)",
    )  # fmt: skip
    parser.add_argument(
        "--width", action="append", choices=[str(one) for one in Width],
        help=f"once or more: {', '.join(one.named for one in Width)} (default: both)",
    )  # fmt: skip
    options = parser.parse_args(argv)
    formats = [kind for kind in options.format or export.FORMATS if kind != "data"]
    if formats and not export.can_draw():
        if options.format:
            sys.stderr.write(f"error: {export.NEEDS}\n")
            return 1
        sys.stderr.write(f"the data only: {export.NEEDS}\n")
        formats = []
    target = options.out or Path(f"{options.study}-figures")
    try:
        for path in write(
            RunStore(options.store), options.study, target,
            widths=[Width(one) for one in options.width or Width], formats=formats,
        ):  # fmt: skip
            sys.stdout.write(f"{path}\n")
    except (StoreError, ExportError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    except OSError as error:
        sys.stderr.write(f"error: {target} cannot be written ({error}): name another folder with --out\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
