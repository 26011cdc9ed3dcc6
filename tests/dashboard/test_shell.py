"""The cached store reads a file again exactly when it has changed."""

import pytest

from haltscale.dashboard import shell
from haltscale.platform.store import RunStore, StoreError

STUDY = "quick"


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """The paths that were really read."""
    seen: list[str] = []
    for name in ("read_json", "read_lines"):
        read = getattr(RunStore, name)
        monkeypatch.setattr(RunStore, name, lambda self, path, read=read: (seen.append(path), read(self, path))[1])
    return seen


def test_an_unchanged_file_is_read_once_and_a_changed_one_again(author, reads):
    author.begin("k")
    author.train("k", progress=0.3)
    author.status("k", step=100)
    reads.clear()
    for _ in range(3):
        view = shell.store().run(STUDY, "k")
        rows = shell.store().metrics(STUDY, "k")
    assert sorted(path.rsplit("/", 1)[-1] for path in reads) == ["metrics.jsonl", "spec.json", "status.json"]
    assert len(rows) == 60

    reads.clear()
    author.status("k", step=200)
    author.store.append_lines(author.store.path(STUDY, "k", "metrics.jsonl"), [{"step": 999, "loss": 1.0}])
    assert shell.store().run(STUDY, "k").status["step"] == 200 != view.status["step"]
    assert len(shell.store().metrics(STUDY, "k")) == 61
    assert sorted(path.rsplit("/", 1)[-1] for path in reads) == ["metrics.jsonl", "status.json"]


def test_damage_is_not_remembered(author):
    author.begin("k")
    path = author.store.path(STUDY, "k", "status.json")
    author.store.fs.pipe_file(path, b"{")
    with pytest.raises(StoreError):
        shell.store().read_json(path)
    author.status("k", step=7)
    assert shell.store().read_json(path)["step"] == 7


def test_text_from_the_store_is_shown_literally():
    assert shell.plain("**a** [b](c) :red[d] $e$") == (r"\*\*a\*\* \[b\]\(c\) \:red\[d\] \$e\$")


def test_the_home_folder_is_written_short(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    assert shell.short("/home/ada/haltscale/runs") == "~/haltscale/runs"
    assert shell.short("/home/adalbert/runs") == "/home/adalbert/runs"
    assert shell.short("s3://bucket/runs") == "s3://bucket/runs"
