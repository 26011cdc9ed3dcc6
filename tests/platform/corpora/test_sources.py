"""Sources: every format gives the same documents however it is cut; what is broken is named, skips are counted."""

import csv
import gzip
import json
from collections import Counter
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from haltscale.platform.corpora import formats, sources
from haltscale.platform.corpora.corpus import Corpus, CorpusError
from haltscale.platform.corpora.formats import Format, SourceError
from haltscale.platform.corpora.prepare import prepare
from haltscale.platform.corpora.sources import RECIPES, Source, hugging_face
from haltscale.platform.corpora.tokenization import Pretrained

TEXTS = [f'document {n}: naïve 東京, "quoted"\nsecond line {"x" * n}' for n in range(12)]


def everything(source: Source, **more) -> tuple[list[tuple[str, object]], Counter]:
    """All documents of all shards, and what was skipped."""
    skipped: Counter[str] = Counter()
    found = [document for shard in source.shards() for document in source.bare().documents_of(shard, skipped, **more)]
    return found, skipped


def texts_of(source: Source) -> list[str]:
    return [str(text) for _, text in everything(source)[0]]


def jsonl(texts, **more) -> bytes:
    return "".join(json.dumps({"text": text, **more}, ensure_ascii=False) + "\n" for text in texts).encode()


def write_jsonl(path: Path, texts) -> None:
    path.write_bytes(jsonl(texts))


def write_csv(path: Path, texts) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerows([["id", "text"], *enumerate(texts)])


def write_parquet(path: Path, texts) -> None:
    pq.write_table(pa.table({"text": texts, "id": range(len(texts))}), path, row_group_size=3)


def write_gzip(path: Path, texts) -> None:
    path.write_bytes(gzip.compress(jsonl(texts[:5])) + gzip.compress(jsonl(texts[5:])))


def write_zstd(path: Path, texts) -> None:
    path.write_bytes(pa.Codec("zstd").compress(jsonl(texts)).to_pybytes())


def write_texts(path: Path, texts) -> None:
    path.mkdir()
    for number, text in enumerate(texts):
        (path / f"{number:02d}.txt").write_text(text, encoding="utf-8")


WRITERS = {
    "a.jsonl": write_jsonl,
    "a.ndjson": write_jsonl,
    "a.csv": write_csv,
    "a.parquet": write_parquet,
    "a.jsonl.gz": write_gzip,
    "a.jsonl.zst": write_zstd,
    "texts": write_texts,
}


# ---- every format ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard_bytes", [1, 300, 1 << 20])
@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_documents(tmp_path, monkeypatch, name, shard_bytes):
    monkeypatch.setattr(sources, "SHARD_BYTES", shard_bytes)
    WRITERS[name](tmp_path / name, TEXTS)
    source = Source(path=str(tmp_path / name))
    assert [*source.problems(), *source.file_problems()] == []
    found, skipped = everything(source)
    assert [text for _, text in found] == TEXTS
    assert len({name for name, _ in found}) == len(TEXTS)
    assert not skipped
    whole, _ = everything(Source(path=str(tmp_path)))  # a folder; names are relative to it
    assert [text for _, text in whole] == TEXTS


@pytest.mark.parametrize("name", WRITERS)
def test_names_do_not_depend_on_how_a_file_is_cut(tmp_path, monkeypatch, name):
    WRITERS[name](tmp_path / name, TEXTS)
    whole = everything(Source(path=str(tmp_path / name)))
    monkeypatch.setattr(sources, "SHARD_BYTES", 1)
    monkeypatch.setattr(formats, "CHUNK_BYTES", 7)
    assert everything(Source(path=str(tmp_path / name))) == whole


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lines=st.lists(st.text("abé\r ", max_size=8), max_size=12),
    last=st.booleans(),
    cut=st.integers(1, 40),
    data=st.data(),
)
def test_lines_however_they_are_cut(tmp_path_factory, monkeypatch, lines, last, cut, data):
    monkeypatch.setattr(sources, "SHARD_BYTES", cut)
    monkeypatch.setattr(formats, "CHUNK_BYTES", data.draw(st.integers(1, 30)))
    path = tmp_path_factory.mktemp("lines") / "a.txt"
    path.write_bytes("\n".join(lines).encode() + (b"\n" if last else b""))
    expected = [line.removesuffix("\r") for line in lines]
    assert texts_of(Source(path=str(path), format=Format.LINES)) == [line for line in expected if line]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    documents=st.lists(st.lists(st.integers(1, 60000), max_size=9), max_size=9),
    leading=st.booleans(),
    cut=st.integers(4, 60),
    kind=st.sampled_from([Format.UINT16, Format.UINT32]),
)
def test_token_arrays_are_divided_at_end_of_text(tmp_path_factory, monkeypatch, documents, leading, cut, kind):
    """With end-of-text before each document or behind it, wherever shards and reads begin."""
    monkeypatch.setattr(sources, "SHARD_BYTES", cut)
    monkeypatch.setattr(formats, "CHUNK_BYTES", 4 * max(1, cut // 5))
    flat = [token for each in documents for token in ([0, *each] if leading else [*each, 0])]
    path = tmp_path_factory.mktemp("tokens") / "a.bin"
    np.array(flat, dtype=formats.TOKEN_FORMATS[kind]).tofile(path)
    if not flat:
        return
    found, _ = everything(Source(path=str(path), format=kind))
    assert [tokens.tolist() for _, tokens in found] == [each for each in documents if each]
    for name, tokens in found:
        at = int(name.split("@")[1])
        assert flat[at : at + len(tokens)] == tokens.tolist()


def test_token_arrays_as_the_authors_store_them_are_trained_on(tmp_path):
    documents = [[n + 1, *range(5, 30)] for n in range(9)]
    np.array([token for each in documents for token in [*each, 0]], dtype="<u2").tofile(tmp_path / "train.bin")
    source = Source(path=str(tmp_path / "train.bin"), format=Format.UINT16)
    corpus = Corpus(name="ids", sources={"ids": source}, tokenizer=Pretrained(name="bytes"), validation_documents=2)
    prepared = prepare(corpus, 8)
    assert prepared.counts["train_tokens"] == 6 * 27
    assert all(document.bytes >= 26 for document in prepared.validation())


def test_a_token_outside_the_vocabulary_is_named(tmp_path):
    np.array([5, 6, 0, 7, 999, 8], dtype="<u2").tofile(tmp_path / "a.bin")
    with pytest.raises(SourceError, match=r"a\.bin: token 999 at 4 is not in a vocabulary of 257"):
        everything(Source(path=str(tmp_path / "a.bin"), format=Format.UINT16), vocab_size=257)


def test_token_files_that_are_no_bare_arrays_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(9, dtype=np.uint16))
    (tmp_path / "b.bin.gz").write_bytes(gzip.compress(b"12"))
    (tmp_path / "c.bin").write_bytes(b"123")
    problems = Source(path=str(tmp_path), format=Format.UINT16).file_problems()
    assert [problem.split(" ")[0].rsplit("/")[-1] for problem in problems] == ["a.npy", "b.bin.gz", "c.bin"]
    for problem, reason in zip(problems, ["NumPy header", "compressed", "not a whole number"], strict=True):
        assert reason in problem


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
def test_remote_files_through_fsspec(compression):
    fs = fsspec.filesystem("memory")
    content = jsonl(TEXTS)
    packed = {"": content, ".gz": gzip.compress(content), ".zst": pa.Codec("zstd").compress(content).to_pybytes()}
    name = f"/corpus{len(compression)}/a.jsonl{compression}"
    fs.pipe(name, packed[compression])
    source = Source(path=f"memory:/{name.rsplit('/', 1)[0]}")
    assert source.file_problems() == []
    assert texts_of(source) == TEXTS
    first = source.identity()["contents"]
    assert Source(path=source.path).identity()["contents"] == first
    fs.rm(name)
    assert "does not exist" in Source(path=source.path).file_problems()[0]


def test_a_glob_takes_what_matches(tmp_path):
    for name in ("a.jsonl", "b.jsonl", "c.csv"):
        WRITERS[name.replace("b", "a").replace("c.", "a.")](tmp_path / name, [f"from {name}"])
    assert texts_of(Source(path=f"{tmp_path}/*.jsonl")) == ["from a.jsonl", "from b.jsonl"]
    assert "do not determine one format" in Source(path=str(tmp_path)).file_problems()[0]
    assert texts_of(Source(path=str(tmp_path), format=Format.CSV)) == ["from c.csv"]


def test_hugging_face_datasets_stream(tmp_path, monkeypatch):
    """The real loader, on a local folder in the format that the Hub serves."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for number in range(3):
        write_parquet(tmp_path / f"train-{number:05d}-of-00003.parquet", TEXTS[number * 4 : number * 4 + 4])
    source = hugging_face(str(tmp_path))
    assert len(source.shards()) == 3
    assert texts_of(source) == TEXTS
    before = source.identity()
    write_parquet(tmp_path / "train-00002-of-00003.parquet", ["other"])
    assert hugging_face(str(tmp_path)).identity() != before
    with pytest.raises(SourceError, match="has no field 'body'; available: 'text', 'id'"):
        everything(hugging_face(str(tmp_path), text_field="body"))


def test_recipes_are_descriptions():
    assert {"pile", "fineweb-edu", "wikitext-103", "c4"} == set(RECIPES)
    assert all(source.problems() == [] and source.kind is Format.HUGGING_FACE for source in RECIPES.values())


# ---- filters --------------------------------------------------------------------------------------------------------


def test_filters_and_nulls_are_counted(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(["long enough", "short", "much too long for the filter", "", None, "capitaL"]) + b"\n")
    source = Source(path=str(path), min_characters=6, max_characters=15, keep="tests_predicate:lower")
    import sys
    import types

    module = types.ModuleType("tests_predicate")
    module.lower = str.islower  # type: ignore[attr-defined]
    sys.modules["tests_predicate"] = module
    assert source.problems() == []
    found, skipped = everything(source)
    assert [text for _, text in found] == ["long enough"]
    assert skipped == {"filtered": 3, "empty": 1, "null": 1}
    del sys.modules["tests_predicate"]
    assert "is not an importable module:function" in source.problems()[0]


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_null_rows_are_counted(tmp_path, name):
    WRITERS[name](tmp_path / name, ["one", None, "two", None])
    found, skipped = everything(Source(path=str(tmp_path / name)))
    assert [text for _, text in found] == ["one", "two"]
    assert skipped == {"null": 2}


# ---- what is broken -------------------------------------------------------------------------------------------------


def refused(source: Source) -> str:
    with pytest.raises(SourceError) as refusal:
        everything(source)
    return str(refusal.value)


@pytest.mark.parametrize(
    ("name", "place"), [("a.txt", "byte 13"), ("a.jsonl", "byte 37"), ("a.csv", "byte 24"), ("a.parquet", "#1")]
)
def test_invalid_utf8_is_named_or_replaced(tmp_path, name, place):
    path = tmp_path / name
    good, bad = b"fine", b"caf\xc3\xa9; caf\xe9."
    if name == "a.txt":
        path.write_bytes(b"fin" + bad)
    elif name == "a.jsonl":
        path.write_bytes(b'{"text": "fine"}\n{"text": "' + bad + b'"}\n')
    elif name == "a.csv":
        path.write_bytes(b"text\nfine\n" + b"xx  " + bad + b"\n")
    else:
        column = pa.Array.from_buffers(pa.string(), 2, pa.array([good, bad], pa.binary()).buffers())
        pq.write_table(pa.table({"text": column}), path)
    message = refused(Source(path=str(path)))
    assert name in message
    assert "is not UTF-8" in message
    assert place in message
    found, skipped = everything(Source(path=str(path), invalid_utf8="replace"))
    assert str(found[-1][1]).endswith("café; caf\ufffd.")
    assert skipped == {"replaced_utf8": 1}


def test_half_a_surrogate_pair_is_no_text(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "half \\ud83d of it"}\n')
    assert "not UTF-8 (character 5" in refused(Source(path=str(tmp_path / "a.jsonl")))
    found, skipped = everything(Source(path=str(tmp_path / "a.jsonl"), invalid_utf8="replace"))
    assert found[0][1] == "half \ufffd of it"
    assert skipped == {"replaced_utf8": 1}


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
@pytest.mark.parametrize("kept", [0.4, 0.9])
def test_a_file_that_is_cut_short_is_named(tmp_path, name, kept):
    WRITERS[name](tmp_path / name, [f"{n} {np.random.default_rng(n).bytes(99).hex()}" for n in range(5000)])
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: int(len(content) * kept)])
    source = Source(path=str(tmp_path / name))
    message = (source.file_problems() or [""])[0] or refused(source)
    assert name in message
    assert "cannot be read, it may be cut short" in message
    with pytest.raises(CorpusError, match="cut short"):
        prepare(Corpus(name="cut", sources={"a": source}, tokenizer=Pretrained(name="bytes")), 8)


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet", "a.jsonl.gz"])
def test_a_missing_field_names_those_that_are_there(tmp_path, name):
    WRITERS[name](tmp_path / name, TEXTS)
    (problem,) = Source(path=str(tmp_path / name), text_field="body").file_problems()
    assert "has no field 'body'; available: " in problem
    assert "'text'" in problem


def test_a_later_row_without_the_field_names_its_place(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(["fine"]) + b'{"title": "no text"}\n')
    assert "the line at byte 17 has no field 'text'; available: 'title'" in refused(
        Source(path=str(tmp_path / "a.jsonl"))
    )


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b'{"text": "x"}\n{"text": \n', "is not valid JSON in the line at byte 14"),
        (b'["text"]\n', "the line at byte 0 is not an object"),
        (b'{"text": 5}\n', "field 'text' is int, not text"),
    ],
)
def test_broken_json_lines(tmp_path, content, complaint):
    (tmp_path / "a.jsonl").write_bytes(content)
    assert complaint in refused(Source(path=str(tmp_path / "a.jsonl")))


def test_a_column_that_is_no_text(tmp_path):
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "a.parquet")
    assert "field 'text' is int64, not text" in refused(Source(path=str(tmp_path / "a.parquet")))


def test_empty_files_are_counted_and_empty_corpora_refused(tmp_path):
    write_texts(tmp_path / "texts", ["a text", "", "another", "", "third", "x"])
    found, skipped = everything(Source(path=str(tmp_path / "texts")))
    assert len(found) == 4
    assert skipped == {"empty": 2}
    corpus = Corpus(
        name="few",
        sources={"texts": Source(path=str(tmp_path / "texts"))},
        tokenizer=Pretrained(name="bytes"),
        validation_documents=2,
    )
    with pytest.raises(CorpusError, match=r"3 usable documents \(skipped: 2 empty, 1 too_short\), but 2 validation"):
        prepare(corpus, 4)
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_bytes(b"")
    nothing = Corpus(name="none", sources={"a": Source(path=f"{tmp_path}/*.jsonl")}, tokenizer=Pretrained(name="bytes"))
    with pytest.raises(CorpusError, match="0 usable documents"):
        prepare(nothing, 4)


def test_a_long_line_is_never_held(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "CHUNK_BYTES", 64)
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl(["before", "x" * 5000, "after"]))
    found, skipped = everything(Source(path=str(path), longest_document_bytes=1000))
    assert [text for _, text in found] == ["before", "after"]
    assert skipped == {"too_long": 1}
    write_texts(tmp_path / "texts", ["short", "x" * 1001])
    found, skipped = everything(Source(path=str(tmp_path / "texts"), longest_document_bytes=1000))
    assert ([text for _, text in found], skipped) == (["short"], {"too_long": 1})


@pytest.mark.slow
def test_a_line_of_fifty_megabytes(tmp_path):
    """As a document of its own: words, and one run of a letter that no tokenizer could cut."""
    path = tmp_path / "a.jsonl"
    words = "some words and then more " * (1 << 21)
    with open(path, "wb") as file:
        for text in [*(f"document {n} of usual length" for n in range(6)), words, "x" * (50 << 20)]:
            file.write(jsonl([text]))
    corpus = Corpus(
        name="long",
        sources={"a": Source(path=str(path))},
        tokenizer=Pretrained(name="bytes"),
        validation_documents=1,
        probe_document="a.jsonl@0",
    )
    counts = prepare(corpus, 256).counts
    assert counts["train_bytes"] + counts["validation_bytes"] > 100 << 20
    assert counts["sources"]["a"]["skipped"] == {}
