"""Corpora: the split, the fingerprint, what is refused, and packed rows against a plain list."""

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from haltscale.platform import ray_data
from haltscale.platform.corpus import END_OF_TEXT, Corpus, PreparedCorpus, RowReader

# ---- documents and their split --------------------------------------------------------------------------------------


def test_documents_are_found_below_the_folder_in_a_fixed_order(corpus, documents):
    (documents / "notes.md").write_text("no document")
    names = [corpus().document_name(path) for path in corpus().documents]
    assert names == [
        *("below/document-3.txt", "document-0.txt", "document-1.txt"),
        *("document-2.txt", "document-4.txt", "document-5.txt"),
    ]


@pytest.mark.parametrize("held_out", [1, 2, 3])
def test_documents_are_split_whole(corpus, held_out):
    tiny = corpus(validation_documents=held_out)
    train, validation, probe = tiny.split
    assert len(validation) == held_out
    assert probe not in train
    assert probe not in validation
    assert not set(train) & set(validation)
    assert sorted([*train, *validation, probe]) == sorted(tiny.documents)
    assert train == [path for path in tiny.documents if path in train]  # in the corpus's order


def test_the_probe_can_be_named(corpus):
    for name in ("document-4.txt", "below/document-3.txt"):
        train, validation, probe = corpus(probe_document=name).split
        assert corpus().document_name(probe) == name
        assert len(train) + len(validation) == 5


def test_the_split_does_not_depend_on_where_the_folder_is(corpus, documents, tmp_path):
    moved = shutil.copytree(documents, tmp_path / "elsewhere")
    here, there = corpus(), corpus(folder=str(moved))
    for mine, theirs in zip(here.split[:2], there.split[:2], strict=True):
        assert list(map(here.document_name, mine)) == list(map(there.document_name, theirs))


def test_holding_out_more_keeps_what_was_held_out(corpus):
    """So that losses of studies with other held-out sets stay roughly comparable."""
    assert set(corpus(validation_documents=1).split[1]) < set(corpus(validation_documents=3).split[1])


# ---- what is refused ------------------------------------------------------------------------------------------------


def only(problems: list[str]) -> str:
    assert len(problems) == 1, problems
    return problems[0]


def test_a_sound_corpus_has_no_problems(corpus):
    assert corpus().problems() == []


def test_a_missing_folder(corpus, tmp_path):
    problem = only(corpus(folder=str(tmp_path / "nowhere")).problems())
    assert str(tmp_path / "nowhere") in problem
    assert "does not exist" in problem


def test_an_empty_folder(corpus, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "no *.txt" in only(corpus(folder=str(tmp_path / "empty")).problems())


def test_a_file_that_is_not_utf8_is_named_with_the_byte(corpus, documents):
    (documents / "document-1.txt").write_bytes(b"caf\xc3\xa9, caf\xe9 again")
    problem = only(corpus().problems())
    assert "document-1.txt" in problem
    assert "byte 10" in problem


def test_too_few_documents(corpus):
    problem = only(corpus(validation_documents=5).problems())
    assert "6 documents" in problem
    assert "7" in problem
    assert corpus(validation_documents=4).problems() == []


def test_everything_wrong_comes_at_once(corpus, documents):
    (documents / "document-1.txt").write_bytes(b"\xff")
    (documents / "document-2.txt").write_bytes(b"ok\xff")
    found = corpus(vocab_size=256, probe_document="none.txt", validation_documents=0).problems()
    assert len(found) == 5
    assert all("tiny" in problem for problem in found)


# ---- fingerprint ----------------------------------------------------------------------------------------------------


def test_the_fingerprint_does_not_depend_on_the_folder(corpus, documents, tmp_path):
    moved = shutil.copytree(documents, tmp_path / "elsewhere")
    assert corpus(folder=str(moved)).fingerprint == corpus().fingerprint
    assert corpus(name="other").fingerprint == corpus().fingerprint  # the name stands beside it in a run's key


@pytest.mark.parametrize(
    "changes",
    [{"vocab_size": 301}, {"validation_documents": 3}, {"probe_document": "document-0.txt"}, {"probe_characters": 9}],
)
def test_the_fingerprint_changes_with_what_is_prepared(corpus, changes):
    assert corpus(**changes).fingerprint != corpus().fingerprint


def test_the_fingerprint_changes_with_contents_and_names(corpus, documents):
    seen = {corpus().fingerprint}
    (documents / "document-0.txt").write_text("something else")
    seen.add(corpus().fingerprint)
    (documents / "document-0.txt").rename(documents / "document-9.txt")
    seen.add(corpus().fingerprint)
    (documents / "document-9.txt").unlink()
    seen.add(corpus().fingerprint)
    assert len(seen) == 4
    (documents / "notes.md").write_text("no document")
    assert corpus().fingerprint in seen


def test_the_cache_is_below_the_home_folder(corpus, home):
    folder = corpus().cache(128)
    assert folder.parent == home / "corpora"
    assert corpus().fingerprint in folder.name
    assert folder != corpus().cache(256)


# ---- packed rows ----------------------------------------------------------------------------------------------------


def packed(documents: list[list[int]], context: int) -> list[list[int]]:
    """Rows of a stream, one after another, each beginning with the last token of the one before."""
    stream = list(itertools.chain(*documents))
    rows = []
    while len(stream) >= context + 1:
        rows.append(stream[: context + 1])
        stream = stream[context:]
    return rows


streams = st.lists(st.lists(st.integers(0, 2**16), min_size=1, max_size=25), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(documents=streams, context=st.integers(1, 7), rows_per_part=st.integers(1, 4), data=st.data())
def test_packing_and_reading_against_a_plain_list(tmp_path_factory, documents, context, rows_per_part, data):
    folder = tmp_path_factory.mktemp("rows")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray_data, "ROWS_PER_PART", rows_per_part)
        packer = ray_data.RowPacker(folder, context)
        for document in documents:
            packer.add(np.array(document, dtype=np.int64))
        rows = packer.close()
    expected = packed(documents, context)
    assert rows == len(expected)
    assert packer.tokens == sum(map(len, documents))
    if not expected:
        return
    reader = RowReader(folder)
    everything = reader.read(np.arange(rows))
    assert everything.dtype == np.int64
    assert everything.tolist() == expected
    ids = data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=20))
    assert reader.read(np.array(ids)).tolist() == [expected[index] for index in ids]


def test_rows_lie_in_several_parts_with_running_ids(tmp_path, monkeypatch):
    monkeypatch.setattr(ray_data, "ROWS_PER_PART", 3)
    packer = ray_data.RowPacker(tmp_path, 2)
    for first in range(0, 40, 5):
        packer.add(np.arange(first, first + 5))
    assert packer.close() == 19
    parts = [pq.read_table(part) for part in sorted(tmp_path.glob("part-*.parquet"))]
    assert len(parts) > 3
    assert list(itertools.chain(*[part["seq_id"].to_pylist() for part in parts])) == list(range(19))


def test_the_reader_reads_again_what_it_no_longer_keeps(tmp_path, monkeypatch):
    monkeypatch.setattr(ray_data, "ROWS_PER_PART", 1)
    monkeypatch.setattr(RowReader, "KEEP", 2)
    packer = ray_data.RowPacker(tmp_path, 1)
    for token in range(9):
        packer.add(np.array([token]))
    packer.close()
    reader = RowReader(tmp_path)
    for index in [0, 5, 3, 0, 7, 5, 0]:
        assert reader.read(np.array([index])).tolist() == [[index, index + 1]]
        assert len(reader._kept) <= 2


@pytest.mark.parametrize("ids", [[-1], [0, 3], [3]])
def test_a_row_that_does_not_exist_is_refused(tmp_path, ids):
    packer = ray_data.RowPacker(tmp_path, 2)
    packer.add(np.arange(7))
    assert packer.close() == 3
    with pytest.raises(IndexError, match="not all in"):
        RowReader(tmp_path).read(np.array(ids))


def test_a_window_of_steps_is_read_for_its_rank(tmp_path):
    """The function that Ray Data's tasks run, against the rows themselves."""
    packer = ray_data.RowPacker(tmp_path, 2)
    packer.add(np.arange(23))
    rows = packer.close()
    window = {"first": np.array([2]), "steps": np.array([3])}
    shared = {"folder": str(tmp_path), "seed": 5, "rows": rows, "batch": 4, "world": 2}
    ids = ray_data.global_batches(seed=5, rows=rows, batch=4, first_step=2, steps=3)
    for rank in (0, 1):
        table = ray_data._read_window(window, rank=rank, **shared)
        assert table["step"].to_pylist() == [2, 3, 4]
        assert table["seq_ids"].to_pylist() == ids.tolist()
        for step, tokens in enumerate(table["tokens"].to_pylist()):
            first, second = ids[step, 2 * rank : 2 * rank + 2] * 2
            assert tokens == [first, first + 1, first + 2, second, second + 1, second + 2]


# ---- tokenizer and probe --------------------------------------------------------------------------------------------


def test_the_tokenizer_is_deterministic_and_loses_nothing(corpus):
    paths = corpus().split[0]
    one, other = (ray_data.train_tokenizer(paths, 290) for _ in range(2))
    assert one.to_str() == other.to_str()
    assert one.get_vocab_size() == 290
    assert one.token_to_id(END_OF_TEXT) == 0
    text = " the state\n\n of  naïve 東京 🙂 unions "
    assert one.decode(one.encode(text, add_special_tokens=False).ids) == text


def test_the_probe_is_cut_at_white_space(corpus, documents):
    tiny = corpus(probe_document="document-0.txt", probe_characters=30)
    tokenizer = ray_data.train_tokenizer(tiny.split[0], 300)
    probe = ray_data._probe(tiny, tiny.split[2], tokenizer)
    whole = (documents / "document-0.txt").read_text()
    assert whole.startswith(probe["text"])
    assert len(probe["text"]) <= 30
    assert whole[len(probe["text"])] == " "
    assert probe["tokens"][0] == 0
    assert len(probe["pieces"]) == len(probe["tokens"]) - 1
    assert "".join(probe["pieces"]) == probe["text"]


def test_the_pieces_make_up_a_text_with_characters_of_several_tokens(corpus, documents):
    """A character that no merge covers is several byte tokens; together they add it to the text once."""
    (documents / "document-0.txt").write_text("the naïve — 東京 🙂 union")
    tiny = corpus(probe_document="document-0.txt")
    probe = ray_data._probe(tiny, tiny.split[2], ray_data.train_tokenizer(tiny.split[0], 300))
    assert "".join(probe["pieces"]) == probe["text"]


# ---- reading what was prepared --------------------------------------------------------------------------------------


def test_nothing_prepared_is_none(tmp_path):
    assert PreparedCorpus.open(tmp_path / "nowhere") is None
    (tmp_path / "corpus.json").write_text('{"rows": 3')
    assert PreparedCorpus.open(tmp_path) is None


def prepared_without_ray(corpus: Corpus, context: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> PreparedCorpus:
    """Prepare with the real code, tokenising in this process where Ray Data would."""

    def tokenised(paths, tokenizer):
        for path in paths:
            yield np.array([0, *tokenizer.encode(path.read_text(encoding="utf-8")).ids])

    monkeypatch.setattr(ray_data, "_tokenised", tokenised)
    folder.mkdir()
    ray_data._write_corpus(corpus, context, folder)
    found = PreparedCorpus.open(folder)
    assert found is not None
    return found


def test_a_prepared_corpus_holds_what_its_documents_hold(corpus, tmp_path, monkeypatch):
    tiny = corpus()
    prepared = prepared_without_ray(tiny, 8, tmp_path / "prepared", monkeypatch)
    train, validation, probe = tiny.split
    tokenizer = ray_data.Tokenizer.from_file(str(prepared.folder / "tokenizer.json"))
    documents = prepared.validation()
    assert [document.name for document in documents] == [tiny.document_name(path) for path in validation]
    for document, path in zip(documents, validation, strict=True):
        assert document.bytes == path.stat().st_size
        assert document.tokens[0] == 0
        assert tokenizer.decode(document.tokens[1:].tolist()) == path.read_text()
    stream = [[0, *tokenizer.encode(path.read_text()).ids] for path in train]
    expected = packed(stream, 8)
    assert prepared.rows == len(expected)
    assert RowReader(prepared.folder).read(np.arange(prepared.rows)).tolist() == expected
    counts = prepared.counts
    assert counts["train_tokens"] == sum(map(len, stream))
    assert counts["train_bytes"] == sum(path.stat().st_size for path in train)
    assert counts["validation_bytes"] == sum(path.stat().st_size for path in validation)
    assert counts["validation_tokens"] == sum(len(document.tokens) - 1 for document in documents)
    assert (counts["name"], counts["context"], counts["fingerprint"]) == ("tiny", 8, tiny.fingerprint)
    assert prepared.probe().name == tiny.document_name(probe)
    assert prepared.probe().bytes == len("".join(prepared.probe().pieces).encode())


def test_a_corpus_that_fills_no_row_is_refused(corpus, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="do not fill one row of 100001"):
        prepared_without_ray(corpus(), 100_000, tmp_path / "prepared", monkeypatch)


def test_a_broken_preparation_leaves_nothing_behind(corpus, home, monkeypatch):
    def broken(corpus, context, folder):
        (folder / "part-00000.parquet").write_text("half")
        raise RuntimeError("the disk is full")

    monkeypatch.setattr(ray_data, "_write_corpus", broken)
    with pytest.raises(RuntimeError, match="disk is full"):
        ray_data.prepare(corpus(), 16)
    assert list((home / "corpora").iterdir()) == []


def test_what_was_prepared_is_opened_and_not_prepared_again(corpus, monkeypatch):
    folder = corpus().cache(16)
    folder.mkdir(parents=True)
    (folder / "corpus.json").write_text(json.dumps({"rows": 7}))
    monkeypatch.setattr(ray_data, "_write_corpus", None)
    assert ray_data.prepare(corpus(), 16).rows == 7


def test_of_two_preparations_at_once_the_first_to_end_stays(corpus, home, monkeypatch):
    def write(corpus, context, folder):
        (folder / "corpus.json").write_text(json.dumps({"rows": 2}))
        first = corpus.cache(context)  # meanwhile somebody else has published
        first.mkdir(parents=True)
        (first / "corpus.json").write_text(json.dumps({"rows": 1}))

    monkeypatch.setattr(ray_data, "_write_corpus", write)
    assert ray_data.prepare(corpus(), 16).rows == 1
    assert [path.name for path in (home / "corpora").iterdir()] == [corpus().cache(16).name]
