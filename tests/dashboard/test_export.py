"""Figures as files: the right size on paper, what they were made of inside, and a plain word where none can be."""

import io
import json
import xml.etree.ElementTree as ET
import zipfile

import pandas as pd
import plotly.graph_objects as go
import pyarrow.parquet as pq
import pytest

from haltscale.dashboard import export, figure_files
from haltscale.dashboard.export import Provenance, Width
from haltscale.platform import cli

STUDY = "quick"
NASTY = 'a "title" <script>&\x00 λ ]]>'
ABOUT = Provenance(study=STUDY, title=NASTY, keys=["k1", "k2"], commits=["c1", "", "c1"], view="compute?study=quick")
FIGURE = go.Figure(go.Scatter(x=[1, 2], y=[3, 4], name="one")).update_layout(height=540)
FRAME = pd.DataFrame({"key": ["k1", "k2"], "loss": [1.5, 2.5]})


@pytest.fixture
def drawable():
    if not export.can_draw():
        pytest.skip(export.NEEDS)


def test_provenance_lists_keys_commits_and_the_view():
    found = ABOUT.document()
    assert found["keys"] == ["k1", "k2"]
    assert found["training_commits"] == ["c1"]
    assert (found["study"], found["view"]) == (STUDY, "compute?study=quick")
    assert found["drawn_by"].startswith("haltscale")


def test_many_keys_are_cut_and_digested_whatever_their_order():
    keys = [f"k{index}" for index in range(export.MOST_KEYS + 3)]
    found, other = (Provenance(study=STUDY, title="t", keys=one).document() for one in (keys, keys[::-1]))
    assert (found["runs"], len(found["keys"])) == (export.MOST_KEYS + 3, export.MOST_KEYS)
    assert found["keys_sha256"] == other["keys_sha256"]
    fewer = Provenance(study=STUDY, title="t", keys=keys[:-1]).document()
    assert fewer["keys_sha256"] != found["keys_sha256"]


def test_tables_hold_their_data_and_their_provenance():
    table = pq.read_table(io.BytesIO(export.parquet(FRAME, ABOUT)))
    assert table.to_pandas().equals(FRAME)
    assert json.loads(table.schema.metadata[b"haltscale"]) == ABOUT.document()
    assert pd.read_csv(io.BytesIO(export.csv(FRAME))).equals(FRAME)
    beside = json.loads(export.csv_metadata("x.csv", ABOUT))
    assert (beside["url"], beside["haltscale"]) == ("x.csv", ABOUT.document())


def test_a_machine_without_a_browser_says_what_it_needs(monkeypatch, author, tmp_path, capsys):
    monkeypatch.setattr(export, "browser", lambda: None)
    with pytest.raises(export.ExportError, match=r"haltscale\[figures\]"):
        export.picture(FIGURE, "svg", Width.SINGLE, ABOUT)
    author.plan([])
    asked = [STUDY, "--store", author.store.root, "--out", str(tmp_path / "out"), "--format", "pdf"]
    assert figure_files.main(asked) == 1
    assert "haltscale[figures]" in capsys.readouterr().err


def test_an_unknown_format_is_refused():
    with pytest.raises(ValueError, match=r"must be one of svg, pdf, png \(got 'gif'\)"):
        export.picture(FIGURE, "gif", Width.SINGLE, ABOUT)


@pytest.mark.browser
def test_pictures_have_the_width_of_a_column_and_their_provenance_inside(drawable):
    import pypdf
    from PIL import Image

    with export.drawing():
        drawn = {
            (kind, width): export.picture(FIGURE, kind, width, ABOUT) for kind in export.FORMATS for width in Width
        }
    for width in Width:
        inches = width.millimetres / 25.4
        root = ET.fromstring(drawn["svg", width])
        assert float(root.get("width").removesuffix("in")) == pytest.approx(inches, abs=1e-3)
        said = root.find("{http://www.w3.org/2000/svg}metadata").text
        assert json.loads(said.replace("\\u0000", "\ufffd"))["keys"] == ["k1", "k2"]
        assert "λ" in root.find("{http://www.w3.org/2000/svg}title").text
        (page,) = (document := pypdf.PdfReader(io.BytesIO(drawn["pdf", width]))).pages
        assert float(page.mediabox.width) == pytest.approx(72 * inches, abs=0.1)
        assert json.loads(document.metadata["/Provenance"]) == ABOUT.document()
        assert "3.4" in page.extract_text(), "text stays text"
        with Image.open(io.BytesIO(drawn["png", width])) as image:
            assert image.width == pytest.approx(inches * export.DPI, abs=2)
            assert json.loads(image.text["Provenance"]) == ABOUT.document()
    packed = export.archive(lambda: export.files("n", FIGURE, FRAME, ABOUT, formats=()))
    with zipfile.ZipFile(io.BytesIO(packed)) as archive:
        assert set(archive.namelist()) == {"n.csv", "n.csv-metadata.json", "n.parquet"}


def test_a_study_becomes_data_files_that_say_what_they_are(author, tmp_path, capsys):
    keys = author.finished_study()
    out = tmp_path / "figures"
    asked = [STUDY, "--store", author.store.root, "--out", str(out), "--format", "data"]
    assert figure_files.main(asked) == 0
    written = {path.name for path in out.iterdir()}
    assert f"{STUDY}-compute-scaling-realised-flops_realised.csv" in written
    assert any("-halting-steps-share" in name for name in written)
    assert {name.rsplit(".", 1)[-1] for name in written} == {"csv", "json", "parquet"}
    table = pq.read_table(out / f"{STUDY}-compute-scaling-realised-flops_realised.parquet")
    about = json.loads(table.schema.metadata[b"haltscale"])
    assert sorted(about["keys"]) == sorted(keys)
    assert about["view"].startswith("compute?study=quick")
    assert table.num_rows == len(keys)


def test_an_unknown_study_is_a_sentence(author, tmp_path, capsys):
    author.plan([])
    asked = ["other", "--store", author.store.root, "--out", str(tmp_path), "--format", "data"]
    assert figure_files.main(asked) == 1
    assert "no study 'other'" in capsys.readouterr().err


def test_the_command_line_hands_the_figures_over(monkeypatch):
    called: list[list[str]] = []
    monkeypatch.setattr(cli.os, "execv", lambda path, arguments: called.append(arguments))
    cli.main(["figures", STUDY, "--out", "x", "--width", "single"])
    assert called[0][1:] == ["-m", "haltscale.dashboard.figure_files", STUDY, "--out", "x", "--width", "single"]
