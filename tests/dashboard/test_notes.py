"""Pinned views: kept beside the store, in order, whatever is in them and whoever writes at the same time."""

import multiprocessing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pages import open_page, text

from haltscale.dashboard import html_report
from haltscale.dashboard.notes import MOST_TEXT, MOST_TITLE, NoteError, Notes
from haltscale.platform.store import RunStore, StoreError

STUDY = "quick"
HOSTILE = "<script>alert(1)</script> ![x](http://evil.example/x.png) **bold** :red[x] \x00\x1b"


@pytest.fixture
def notes(author, monkeypatch, tmp_path):
    monkeypatch.setenv("HALTSCALE_HOME", str(tmp_path / "home"))
    return Notes(author.store, STUDY)


def pin(notes, title, **more):
    return notes.add(**{"title": title, "text": "", "page": "compute", "query": {"study": [STUDY]}, **more})


def titles(notes):
    return [note.title for note in notes.all()[0]]


def test_notes_come_back_as_written_in_their_order_and_never_in_the_store(notes, author):
    author.plan([])
    before = sorted(Path(author.store.root).rglob("*"))
    first = pin(notes, " one ", text="why", query={"study": [STUDY], "size": ["0.6m", "1.8m"]})
    pin(notes, "two")
    pin(notes, "three")
    (read, *_), damaged = notes.all()
    assert read == first
    assert (read.title, read.query["size"], damaged) == ("one", ["0.6m", "1.8m"], [])
    assert sorted(Path(author.store.root).rglob("*")) == before
    assert titles(Notes(RunStore(f"{author.store.root}/"), STUDY)) == ["one", "two", "three"]
    assert titles(Notes(author.store, "another")) == []


@given(st.lists(st.tuples(st.integers(0, 4), st.sampled_from([-1, 1])), max_size=40))
def test_moving_is_what_moving_in_a_list_is(moves):
    import tempfile

    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("HALTSCALE_HOME", folder)
        notes = Notes(RunStore(f"{folder}/runs"), STUDY)
        expected = [str(place) for place in range(5)]
        for title in expected:
            pin(notes, title)
        for place, by in moves:
            notes.move(notes.all()[0][place], by)
            if 0 <= place + by < 5:
                expected[place], expected[place + by] = expected[place + by], expected[place]
            assert titles(notes) == expected


def test_a_change_and_a_removal(notes):
    kept, gone = pin(notes, "kept"), pin(notes, "gone")
    notes.change(kept, title="new", text="words")
    notes.remove(gone)
    notes.remove(gone)
    assert [(note.title, note.text) for note in notes.all()[0]] == [("new", "words")]
    with pytest.raises(NoteError, match="another reader has removed"):
        notes.change(gone, title="back", text="")
    assert titles(notes) == ["new"]


@pytest.mark.parametrize(
    ("title", "text"), [("", ""), ("  ", "x"), ("t" * (MOST_TITLE + 1), ""), ("t", "x" * (MOST_TEXT + 1))]
)
def test_what_is_no_note_is_refused_with_what_to_do(notes, title, text):
    with pytest.raises(NoteError, match=r"needs a title|shorten it"):
        pin(notes, title, text=text)
    assert titles(notes) == []


def test_a_damaged_note_costs_no_other(notes):
    kept = pin(notes, "kept")
    broken = pin(notes, "broken")
    (notes.folder / f"{broken.id}.json").write_text('{"schema": 1, "tit')
    (notes.folder / f"{'0' * 32}.json").write_text('{"schema": 1, "query": 3}')
    (notes.folder / "other.json").write_text("{}")
    found, damaged = notes.all()
    assert found == [kept]
    assert len(damaged) == 3


def test_a_study_cannot_name_another_folder(author):
    with pytest.raises(StoreError):
        Notes(author.store, "../other")


def _many(root: str, home: str, who: int) -> None:
    import os

    os.environ["HALTSCALE_HOME"] = home
    notes = Notes(RunStore(root), STUDY)
    for index in range(10):
        note = pin(notes, f"{who}-{index}")
        notes.move(note, -1)


def test_readers_that_pin_at_once_lose_nothing(notes, author, tmp_path):
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_many, args=(author.store.root, str(tmp_path / "home"), who)) for who in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(120)
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    found, damaged = notes.all()
    assert sorted(note.title for note in found) == sorted(f"{who}-{index}" for who in range(3) for index in range(10))
    assert damaged == []
    assert not list(notes.folder.glob("*.partial"))


def test_a_report_has_the_pinned_views_in_order_escaped(notes, author):
    author.finished_study()
    pin(notes, "Second thought", page="halting")
    first = pin(notes, HOSTILE, text=HOSTILE, query={"study": [STUDY], "size": ["0.6m"]})
    notes.move(first, -1)
    body = html_report.document(author.store, STUDY).split("<body>")[1]
    assert "<script>alert" not in body
    assert "<img" not in body
    assert body.index("alert(1)") < body.index("Second thought")
    assert "How many latent steps the tokens got" in body
    assert "Recommendation" not in body
    assert "size=0.6m" in body
    figure = body[body.index("<figure") : body.index("</figure>")]
    assert "0.6m" in figure
    assert "4.2m" not in figure, "the pinned filter holds"


def test_a_pinned_page_that_is_gone_is_said(notes, author):
    author.finished_study()
    pin(notes, "old", page="gone")
    assert "the page must be one of" in html_report.document(author.store, STUDY)


def test_a_view_is_pinned_edited_moved_and_removed_on_the_pages(notes, author):
    author.finished_study()
    page = open_page("compute", size="0.6m")
    page.text_input(key="pin-title").set_value("Small runs")
    page.text_area(key="pin-text").set_value(HOSTILE)
    page.button[0].click().run()
    assert not page.exception
    (note,), _ = notes.all()
    assert (note.page, note.title, note.query) == ("compute", "Small runs", {"study": [STUDY], "size": ["0.6m"]})
    pin(notes, "Other")
    shown = open_page("notes")
    assert [header.value for header in shown.header][:2] == ["1. Small runs", "2. Other"]
    assert "**bold**" not in "".join(block.value for block in shown.markdown)
    shown.button(key=f"move-{note.id}-1").click().run()
    assert titles(notes) == ["Other", "Small runs"]
    shown.button(key=f"remove-{note.id}").click().run()
    assert titles(notes) == ["Other"]
    assert "Small runs" not in text(shown)
