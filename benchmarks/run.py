"""Run the benchmarks and write benchmarks/RESULTS.md, marking what changed since the last table.

    python benchmarks/run.py              everything, as listed in COMMANDS; about an hour on 2 cores
    python benchmarks/run.py models       the commands of one or more groups
    python benchmarks/run.py --list       what there is

Use a machine that does nothing else. Figures are kept in benchmarks/results.json; a figure whose new median lies
outside the last table's lowest and highest is marked. Groups that are not run keep their figures, with their dates.
"""

import argparse
import datetime
import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from figures import KEPT_IN, Figure, machine

FOLDER = Path(__file__).parent
KEPT = FOLDER / "results.json"

COMMANDS: dict[str, list[str]] = {
    "models": [
        "benchmarks/model_speed.py tax llama litgpt decode prompt rate small methods",
        "benchmarks/model_memory.py",
    ],
    "data": ["benchmarks/data.py --repeats 4"],
    "training": [
        "benchmarks/training.py --repeats 2",
        "benchmarks/training.py --method adaptive --stages 1 --workers 1 --repeats 2",
    ],
    "evaluation": [
        "benchmarks/evaluation.py --repeats 2",
        "benchmarks/evaluation.py --workers 2 --tokens 200000 --repeats 4",
    ],
    "studies": [
        "benchmarks/studies.py",
        "benchmarks/sweep.py",
        "benchmarks/sweep.py --tokens 750000 --repeats 1 --at-most 1.06",
    ],
    "laws": ["benchmarks/scaling_laws.py time coverage"],
    "dashboard": ["benchmarks/dashboard.py --repeats 2"],
}
"""Group -> scripts with their arguments, run from the top of the repository."""

Kept = dict[str, Any]


def measure(command: str) -> list[Figure]:
    """Run one command, showing what it prints; its figures.

    Raises:
        subprocess.CalledProcessError: the command failed.
    """
    with tempfile.NamedTemporaryFile(suffix=".jsonl") as file:
        arguments = [sys.executable, *shlex.split(command)]
        subprocess.run(arguments, check=True, cwd=FOLDER.parent, env=os.environ | {KEPT_IN: file.name})
        return [Figure(**json.loads(line)) for line in Path(file.name).read_text().splitlines()]


def verdict(figure: Figure) -> str:
    """Whether the aim was met, and by how much not."""
    low, high = figure.at_least, figure.at_most
    if low is not None:
        return f"≥ {low:g}: " + ("met" if figure.median >= low else f"missed by {low - figure.median:.2g}")
    if high is not None:
        return f"≤ {high:g}: " + ("met" if figure.median <= high else f"missed by {figure.median - high:.2g}")
    return ""


def change(figure: Figure, before: Figure | None) -> str:
    """A mark where the median left the spread of the last table."""
    if before is None or min(before.values) <= figure.median <= max(before.values):
        return ""
    return f"**{'up' if figure.median > before.median else 'down'}** from {before.median:.3g}"


def table(kept: Kept) -> str:
    """RESULTS.md."""
    lines = [
        "# Results",
        "",
        "Written by `make bench`; [README.md](README.md) says what is measured, how to read it and what limits it.",
        "Medians, with the lowest and the highest repeat in brackets. Ratios carry over to other machines better than",
        "rates do.",
    ]
    for group, content in kept.items():
        lines += ["", f"## {group.capitalize()} · {content['date']}", "", content["machine"], ""]
        for command, rows in content["commands"].items():
            lines += [
                f"`python {command}`",
                "",
                "| Figure | Median | Aim | Since the last table | |",
                "|---|---|---|---|---|",
            ]
            for row in rows:
                figure, mark = Figure(**row["figure"]), row["change"]
                spread = f"{min(figure.values):.3g} to {max(figure.values):.3g}, {len(figure.values)}"
                median = f"{figure.median:.3g}{' ' + figure.unit if figure.unit else ''} [{spread}]"
                lines.append(f"| {figure.name} | {median} | {verdict(figure)} | {mark} | {figure.detail} |")
            lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def run_group(group: str, last: Kept) -> Kept:
    """Measure one group; `last` is what the last table held of it."""
    before = {
        row["figure"]["name"]: Figure(**row["figure"]) for rows in last.get("commands", {}).values() for row in rows
    }
    commands = {}
    for command in COMMANDS[group]:
        print(f"--- python {command}", flush=True)
        commands[command] = [
            {"figure": vars(figure), "change": change(figure, before.get(figure.name))} for figure in measure(command)
        ]
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return {"date": today, "machine": machine(os.cpu_count() or 1), "commands": commands}


def main() -> None:
    """Run the groups that were named, or all, and write the table after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", help=f"{', '.join(COMMANDS)}; all if none is named")
    parser.add_argument("--list", action="store_true", help="show the commands and stop")
    arguments = parser.parse_args()
    if arguments.list:
        for group, commands in COMMANDS.items():
            print(f"{group}:", *(f"  python {command}" for command in commands), sep="\n")
        return
    if unknown := [name for name in arguments.groups if name not in COMMANDS]:
        parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(COMMANDS)}")
    kept: Kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    for group in arguments.groups or COMMANDS:
        kept[group] = run_group(group, kept.get(group, {}))
        KEPT.write_text(json.dumps(kept, indent=1) + "\n")
        (FOLDER / "RESULTS.md").write_text(table(kept))


if __name__ == "__main__":
    main()
