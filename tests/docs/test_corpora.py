"""The example of docs/corpora.md runs, and its tables name what there is."""

import gzip
import json
import re

import pytest

from haltscale.platform.corpora.formats import Format
from haltscale.platform.corpora.sources import RECIPES

from jobs import ROOT

PAGE = (ROOT / "docs" / "corpora.md").read_text(encoding="utf-8")


def test_the_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HALTSCALE_HOME", str(tmp_path / "home"))
    (tmp_path / "notes").mkdir()
    for number in range(14):
        (tmp_path / "notes" / f"{number}.txt").write_text(f"note {number}: the state of the union is strong " * 20)
    rows = [json.dumps({"body": f"page {number} of the web, as strong as it is long " * 20}) for number in range(14)]
    (tmp_path / "web.jsonl.gz").write_bytes(gzip.compress("\n".join(rows).encode()))
    code, needed, streamed = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert len([line for line in code.splitlines() if line]) <= 10
    names: dict[str, object] = {}
    exec(compile(code.replace("/data", str(tmp_path)), "docs/corpora.md", "exec"), names)
    generated: dict[str, object] = {}
    exec(compile(needed.replace("40_000", "500"), "docs/corpora.md", "exec"), generated)
    assert generated["corpus"].problems() == []
    streamed = streamed.replace("s3://bucket/web/*.jsonl", str(tmp_path / "notes"))
    exec(compile(streamed, "docs/corpora.md", "exec"), names)
    assert names["corpus"].problems() == []
    assert names["corpus"].segment_tokens == 16_000_000
    printed = capsys.readouterr().out
    assert "no problems found" in printed
    assert "'overlapping_windows': " in printed


@pytest.mark.parametrize("name", [*(kind for kind in Format if kind is not Format.AUTO), *RECIPES])
def test_formats_and_recipes_are_named(name):
    assert f"`{name}`" in PAGE or f'"{name}"' in PAGE
