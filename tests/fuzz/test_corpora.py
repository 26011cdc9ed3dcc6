"""Whatever files hold: every document comes out or is counted, or a sentence names the file. Never a traceback."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import shutil
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from haltscale.platform.corpora import formats, shard_jobs, sources
from haltscale.platform.corpora.corpus import Corpus, CorpusError, RowReader
from haltscale.platform.corpora.csv_rows import CsvError, CsvScanner
from haltscale.platform.corpora.formats import SourceError
from haltscale.platform.corpora.prepare import prepare
from haltscale.platform.corpora.sources import Source, read_json_lines
from haltscale.platform.corpora.tokenization import Pretrained

fuzz = settings.get_profile("fuzz")

COMPRESSIONS = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: pa.Codec("zstd").compress(content).to_pybytes(),
    ".zstd": lambda content: pa.Codec("zstd").compress(content).to_pybytes(),
}
unicode_texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
awkward_texts = st.text("ab é\n\r\t,;\"'\\{}[]\ufeff\x00\u2028東🙂", max_size=30)
texts_ = st.lists(unicode_texts | awkward_texts, min_size=1, max_size=8)


@pytest.fixture
def folder(tmp_path_factory):
    """A new folder for every example: what is drawn takes it from here."""
    return lambda: tmp_path_factory.mktemp("fuzz")


def everything(source: Source) -> tuple[list[str], Counter]:
    counted: Counter[str] = Counter()
    found = [str(text) for shard in source.shards() for _, text in source.bare().documents_of(shard, counted)]
    return found, counted


def left_out(counted: Counter) -> int:
    return sum(count for reason, count in counted.items() if reason not in shard_jobs.ALTERED)


def as_jsonl(texts: list[str], ascii_only: bool) -> bytes:
    return "".join(json.dumps({"text": text}, ensure_ascii=ascii_only) + "\n" for text in texts).encode()


def as_csv(texts: list[str], dialect: dict) -> bytes:
    written = io.StringIO(newline="")
    csv.writer(written, **dialect).writerows([["id", "text"], *([n, text] for n, text in enumerate(texts))])
    return written.getvalue().encode()


def as_parquet(texts: list[str], kind: pa.DataType) -> bytes:
    written = io.BytesIO()
    pq.write_table(pa.table({"id": range(len(texts)), "text": pa.array(texts).cast(kind)}), written, row_group_size=3)
    return written.getvalue()


def as_arrow(texts: list[str], kind: pa.DataType, stream: bool) -> bytes:
    written = io.BytesIO()
    table = pa.table({"text": pa.array(texts, kind)})
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(written, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    return written.getvalue()


TEXT_TYPES = [pa.string(), pa.large_string(), pa.string_view()]


@st.composite
def sound_files(draw) -> tuple[str, bytes, list[str], dict]:
    """(name, contents, texts, options of the source) of a file as a library writes it."""
    texts, options = draw(texts_), {}
    kind = draw(st.sampled_from(["jsonl", "ndjson", "csv", "tsv", "parquet", "arrow", "feather"]))
    if kind in ("jsonl", "ndjson"):
        content = as_jsonl(texts, draw(st.booleans()))
    elif kind in ("csv", "tsv"):
        # what stands between is read with one kind of line end, as text always was
        texts = [text.replace("\r\n", "\n").replace("\r", " ") for text in texts]
        end = draw(st.sampled_from(["\n", "\r\n"]))
        options = {"quoting": "double"}
        delimiter = draw(st.sampled_from([None, ";", "|"]))
        options |= {"delimiter": delimiter} if delimiter else {}
        content = as_csv(texts, {"lineterminator": end, "delimiter": delimiter or (kind == "csv" and ",") or "\t"})
    elif kind == "parquet":
        content = as_parquet(texts, draw(st.sampled_from(TEXT_TYPES)))
    else:
        content = as_arrow(texts, draw(st.sampled_from(TEXT_TYPES)), draw(st.booleans()))
    suffix = ""
    if kind in ("jsonl", "ndjson", "csv", "tsv"):
        content = (formats.BOM if draw(st.booleans()) else b"") + content
        suffix = draw(st.sampled_from(list(COMPRESSIONS)))
    return f"a.{kind}{suffix}", COMPRESSIONS[suffix](content), texts, options


@fuzz
@given(file=sound_files(), shard_bytes=st.integers(1, 200), chunk=st.integers(4, 90))
def test_what_a_library_writes_is_read_whole(folder, file, shard_bytes, chunk):
    name, content, texts, options = file
    path = folder() / name
    path.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "SHARD_BYTES", shard_bytes)
        patch.setattr(formats, "CHUNK_BYTES", chunk)
        source = Source(path=path, **options)
        assert source.file_problems() == []
        found, counted = everything(source)
    assert found == [text for text in texts if text]
    assert counted["empty"] == len(texts) - len(found)
    assert left_out(counted) == counted["empty"]


@fuzz
@given(
    texts=st.lists(unicode_texts | awkward_texts, min_size=6, max_size=12),
    kind=st.sampled_from(["texts", "jsonl", "parquet"]),
    remove_duplicates=st.booleans(),
    least=st.integers(0, 3),
    context=st.integers(1, 6),
)
def test_documents_in_are_documents_out_and_counted(
    folder, monkeypatch, texts, kind, remove_duplicates, least, context
):
    place = folder()
    monkeypatch.setenv("HALTSCALE_HOME", str(place / "home"))
    path = place / f"a.{kind}"
    if kind == "texts":
        path.mkdir()
        for number, text in enumerate(texts):
            (path / f"{number:02d}.txt").write_bytes(text.encode())
    else:
        path.write_bytes(as_jsonl(texts, True) if kind == "jsonl" else as_parquet(texts, pa.string_view()))
    corpus = Corpus(
        name="fuzz",
        sources={"s": Source(path=path, min_characters=least)},
        tokenizer=Pretrained(name="bytes"),
        validation_documents=1,
        remove_duplicates=remove_duplicates,
    )
    try:
        prepared = prepare(corpus, context)
    except CorpusError as error:
        assert "usable documents" in str(error) or "do not fill one row" in str(error)
        return
    counts = prepared.counts["sources"]["s"]
    kept = counts["train_documents"] + prepared.counts["validation_documents"] + 1
    assert kept + counts["duplicates"] + sum(counts["skipped"].values()) == len(texts)
    unmarked = [text.removeprefix("\ufeff") if kind == "texts" else text for text in texts]
    usable = [text for text in unmarked if len(text) >= max(1, least) and len(text.encode()) > 1]
    usable = list(set(usable)) if remove_duplicates else usable
    assert kept == len(usable)
    held_out = sum(document.bytes for document in prepared.validation())
    # the probe's document is not trained on either; its text is there as far as it is shown, and here that is all of it
    probe = max((len(text.encode()) for text in usable if text.startswith("".join(prepared.probe().pieces))), default=0)
    total = sum(len(text.encode()) for text in usable)
    assert total - held_out - probe <= counts["train_bytes"] <= total - held_out


# ---- damage ---------------------------------------------------------------------------------------------------------


@st.composite
def damaged(draw, content: bytes) -> bytes:
    """Bytes with a part cut off, cut out, doubled, overwritten or inserted."""
    first, second = sorted(draw(st.tuples(*[st.integers(0, len(content))] * 2)))
    with_ = draw(
        st.binary(max_size=8) | st.sampled_from([b"\n", b'"', b"\x00", b"\xff\xfe", formats.BOM, b"{}", b"\r"])
    )
    return draw(
        st.sampled_from(
            [
                content[:first],
                content[first:],
                content[:first] + content[second:],
                content[:second] + content[first:],
                content[:first] + with_ + content[first + len(with_) :],
                content[:first] + with_ + content[first:],
                content + with_,
                b"",
            ]
        )
    )


@fuzz
@given(data=st.data(), file=sound_files(), invalid=st.sampled_from(["error", "replace"]))
def test_a_damaged_file_is_read_or_named(folder, data, file, invalid):
    name, content, _, options = file
    content = data.draw(damaged(content))
    path = folder() / name
    path.write_bytes(content)
    source = Source(path=path, invalid_utf8=invalid, **options)
    problems = source.file_problems()
    try:
        found, counted = everything(source)
    except SourceError as error:
        assert str(path) in str(error)
        return
    assert not problems, "a glance refuses what is read"
    if name in ("a.jsonl", "a.ndjson"):
        lines = [
            line for line in content.removeprefix(formats.BOM).split(b"\n") if line.decode(errors="replace").strip()
        ]
        assert len(found) + left_out(counted) == len(lines)


@fuzz
@given(
    lines=st.lists(st.text('{}[]":,text0\\u \ud83d\n', max_size=14).map(lambda t: t.encode("utf-8", "surrogatepass")))
)
def test_json_lines_are_those_of_the_json_module(folder, lines):
    path = folder() / "a.jsonl"
    path.write_bytes(b"\n".join(lines))
    expected: list | None = []
    for line in b"\n".join(lines).split(b"\n"):
        try:
            text = line.decode()
            if text.strip():
                expected.append(json.loads(text))
        except ValueError:
            expected = None
            break
    try:
        found = [row for _, row in read_json_lines(path, ("text",))]
    except SourceError as error:
        assert str(path) in str(error)
        assert expected is None or "more than once" in str(error)
    else:
        assert json.dumps(found) == json.dumps(expected)


csv_parts = st.lists(st.sampled_from(['"', '""', ",", "\n", "\r\n", "a", '"a"']), max_size=20).map("".join)


def scanned(content: bytes, chunk: int, **options) -> CsvScanner:
    chunks = iter([content[n : n + chunk] for n in range(0, len(content), chunk)])
    values = {"offset": 0, "delimiter": b",", "quotes": True, "reject_swallowed_rows": False, "longest": 1 << 20}
    return CsvScanner(chunks, **(values | options))


@fuzz
@given(text=st.text('ab",\n\r', max_size=40) | csv_parts, chunk=st.integers(1, 9), quotes=st.booleans())
def test_rows_of_csv_are_those_of_the_csv_module(text, chunk, quotes):
    lines = io.StringIO(text.replace("\r\n", "\n"), newline="")
    try:
        quoting = csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE
        expected = [row for row in csv.reader(lines, strict=True, quoting=quoting) if row]
    except csv.Error:
        expected = None
    has_other_line_ends = "\r" in text.replace("\r\n", "\n")
    try:
        found = [[cell.content.decode() for cell in row] for row in scanned(text.encode(), chunk, quotes=quotes).rows()]
    except CsvError:
        assert expected is None or len({len(row) for row in expected}) > 1 or has_other_line_ends
    else:
        assert found == expected or has_other_line_ends


@fuzz
@given(
    texts=st.lists(st.text('ab"\n', max_size=30), min_size=1, max_size=6),
    longest=st.integers(4, 20),
    chunk=st.integers(1, 9),
)
def test_a_long_cell_costs_its_own_row_and_no_other(texts, longest, chunk):
    scanner = scanned(as_csv(texts, {"lineterminator": "\n"}), chunk, longest=longest)
    rows = []
    for row in scanner.rows():
        assert sum(map(len, scanner._parts)) <= longest + 1, "no more of a cell is held"
        rows.append(row[1].content)
    assert rows[1:] == [text.encode() if len(text.encode()) <= longest else None for text in texts]


# ---- columns, listings, options -------------------------------------------------------------------------------------

ARROW_TYPES = [
    *TEXT_TYPES,
    *(pa.binary(), pa.large_binary(), pa.binary_view()),
    *(pa.dictionary(pa.int32(), pa.string()), pa.dictionary(pa.int8(), pa.large_string())),
    *(pa.null(), pa.int64(), pa.float32(), pa.bool_(), pa.timestamp("us"), pa.date32(), pa.decimal128(5, 2)),
    *(pa.list_(pa.string()), pa.large_list(pa.string()), pa.struct({"text": pa.string()}), pa.binary(4)),
    *(pa.map_(pa.string(), pa.string()), pa.list_(pa.float32(), 2)),
]


@fuzz
@given(data=st.data(), kind=st.sampled_from(ARROW_TYPES), suffix=st.sampled_from(["parquet", "arrow"]))
def test_a_column_of_any_type_is_read_or_refused(folder, data, kind, suffix):
    texts = data.draw(st.lists(st.none() | unicode_texts, min_size=1, max_size=6))
    try:
        column = pa.array(texts).cast(kind)
        is_text = True
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        try:
            column, is_text = pa.nulls(len(texts), kind), False
        except pa.ArrowNotImplementedError:
            assume(False)
    path = folder() / f"a.{suffix}"
    table = pa.table({"text": column})
    try:
        if suffix == "parquet":
            pq.write_table(table, path)
        else:
            with pa.ipc.new_file(path, table.schema) as writer:
                writer.write_table(table)
    except pa.ArrowException:
        assume(False)
    source = Source(path=path)
    try:
        found, counted = everything(source)
    except SourceError as error:
        assert not is_text or kind not in ARROW_TYPES[:8]
        assert str(path) in str(error)
        assert source.file_problems() == [str(error)]
    else:
        assert source.file_problems() == []
        assert len(found) + left_out(counted) == len(texts)
        if is_text:
            assert found == [text for text in texts if text]


file_names = st.binary(min_size=1, max_size=12).filter(lambda name: not set(name) & {0, ord("/")} and name.strip(b"."))


@fuzz
@given(
    names=st.lists(file_names, min_size=1, max_size=6, unique=True), odd=st.sampled_from(["plain", "[v2]", "a*b", "?"])
)
def test_every_file_of_a_folder_is_read_or_counted(folder, names, odd):
    root = folder() / odd
    (root / "below").mkdir(parents=True)
    expected = set()
    for number, name in enumerate(names):
        for suffix in (b".txt", b".md"):
            place = os.fsencode(root / "below" if number % 2 else root) + b"/" + name + suffix
            with open(place, "wb") as file:
                file.write(b"text of %d" % number)
        expected.add(f"text of {number}")
    source = Source(path=root)
    assert source.file_problems() == []
    found, _ = everything(source)
    assert sorted(found) == sorted(expected)
    assert sum(source.other_files.values()) == len(names)
    given_format = Source(path=f"{root}/*/*.md", format="text")
    assert len(everything(given_format)[0]) == len(names) // 2 if len(names) > 1 else given_format.file_problems()


@fuzz
@given(
    options=st.fixed_dictionaries(
        {},
        optional={
            name: st.none()
            | st.integers(-2, 3)
            | st.floats()
            | st.text(max_size=6)
            | st.binary(max_size=3)
            | st.just([])
            for name in Source.__dataclass_fields__
        },
    )
)
def test_whatever_a_source_is_given_is_a_sentence(folder, options):
    path = folder() / "a.jsonl"
    path.write_bytes(as_jsonl(["one", "two"], True))
    source = Source(**{"path": str(path), **options})
    corpus = Corpus(name="fuzz", sources={"s": source}, tokenizer=Pretrained(name="bytes"), validation_documents=1)
    problems = corpus.problems()
    assert all(isinstance(problem, str) and problem.isprintable() for problem in problems)
    if not problems:
        try:
            prepare(corpus, 2)
        except CorpusError as error:
            assert str(error)


# ---- half-written caches --------------------------------------------------------------------------------------------


class PowerCutError(Exception):
    """The machine is gone."""


@pytest.fixture(scope="module")
def cut_off(tmp_path_factory):
    """A corpus, the homes in which it was prepared and half prepared, and its rows."""
    place = tmp_path_factory.mktemp("caches")
    path = place / "a.jsonl"
    path.write_bytes(as_jsonl([f"document {n} " * (n % 3 + 1) for n in range(12)], True))
    corpus = Corpus(
        name="c", sources={"s": Source(path=path)}, tokenizer=Pretrained(name="bytes"), validation_documents=1
    )

    def stopped(function, jobs):
        for number, job in enumerate(jobs):
            if function is shard_jobs.pack_shard and number == 2:
                raise PowerCutError
            yield function(job)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "SHARD_BYTES", 120)
        patch.setenv("HALTSCALE_HOME", str(place / "half"))
        with pytest.raises(PowerCutError):
            prepare(corpus, 4, run=stopped)
        patch.setenv("HALTSCALE_HOME", str(place / "whole"))
        prepared = prepare(corpus, 4)
    return corpus, place, RowReader(prepared.folder).read(np.arange(prepared.rows)).tolist()


@fuzz
@given(data=st.data(), is_published=st.booleans())
def test_a_half_written_cache_is_made_again_or_named(cut_off, folder, monkeypatch, data, is_published):
    corpus, place, expected = cut_off
    home = folder() / "home"
    shutil.copytree(place / ("whole" if is_published else "half"), home)
    monkeypatch.setenv("HALTSCALE_HOME", str(home))
    monkeypatch.setattr(sources, "SHARD_BYTES", 120)
    victim = data.draw(st.sampled_from(sorted(file for file in home.rglob("*") if file.is_file())))
    content = victim.read_bytes()
    victim.write_bytes(data.draw(st.sampled_from([b"", content[: len(content) // 2], b"null", b"[]", b"{}"])))
    try:
        prepared = prepare(corpus, 4)
        found = RowReader(prepared.folder).read(np.arange(prepared.rows)).tolist()
        prepared.validation(), prepared.probe(), prepared.token_counts()
    except CorpusError as error:
        assert is_published and victim.name in str(error), "what is not published is made again"  # noqa: PT018
    else:
        assert found == expected
