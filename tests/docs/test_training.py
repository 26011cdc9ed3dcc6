"""The commands of docs/training.md."""

import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from haltscale.platform.config import RunConfig
from haltscale.platform.execution import ExecutionConfig

PAGE = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
(BLOCK,) = re.findall(r"```sh\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.mark.parametrize("line", BLOCK.splitlines())
def test_command(line: str) -> None:
    program, *arguments = shlex.split(line)
    assert program == "haltscale"
    command = [sys.executable, "-m", "haltscale.platform.cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "vanilla" in done.stdout


def test_the_fields_it_names_exist() -> None:
    known = {field.name for kind in (RunConfig, ExecutionConfig) for field in fields(kind)}
    for name in re.findall(r"`([a-z_]+)=", PAGE):
        assert name in known, name
    for name in ("flops", "warmup_tokens", "keep_last", "max_failures", "on_collapse", "collapse_steps"):
        assert f"`{name}`" in PAGE
        assert name in known
