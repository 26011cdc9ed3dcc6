"""What users' files really hold, case by case: the right documents and tokens, or a sentence that says what to do."""

import csv
import gzip
import json
import lzma
import os
import sys
from collections import Counter
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from haltscale.platform.corpora import shard_jobs
from haltscale.platform.corpora.corpus import Corpus, CorpusError, PreparedCorpus, RowReader
from haltscale.platform.corpora.formats import Format
from haltscale.platform.corpora.prepare import prepare
from haltscale.platform.corpora.sources import Source
from haltscale.platform.corpora.tokenization import BytePairs, Pretrained


def document(number: int) -> str:
    return (
        f"Entry {number}. The ferry left the harbour at dawn, and nobody on the quay had expected the fog to lift. " * 4
    )


def write_texts(folder: Path, count: int = 8) -> Path:
    folder.mkdir()
    for number in range(count):
        (folder / f"{number:02d}.txt").write_text(document(number))
    return folder


def corpus_of(path, tokenizer=None, **more) -> Corpus:
    source = Source(path=path, **more)
    tokenizer = tokenizer or Pretrained(name="bytes")
    return Corpus(name="foreign", sources={"s": source}, tokenizer=tokenizer, validation_documents=2)


def counts_of(prepared: PreparedCorpus) -> dict:
    return prepared.counts["sources"]["s"]


def rows_of(prepared: PreparedCorpus) -> list[list[int]]:
    return RowReader(prepared.folder).read(np.arange(prepared.rows)).tolist()


def refusal(corpus: Corpus) -> str:
    with pytest.raises(CorpusError) as refused:
        prepare(corpus, 32)
    return str(refused.value)


# ---- state in tokenizer files ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pairs() -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<pad>", "[EOS]"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([document(number) for number in range(20)], trainer)
    return made


def changed(made: Tokenizer, path: Path, change) -> Pretrained:
    again = Tokenizer.from_str(made.to_str())
    again = change(again) or again
    path.write_text(again.to_str())
    return Pretrained(name=path, end_of_text="[EOS]")


def with_dropout(made: Tokenizer) -> Tokenizer:
    document = json.loads(made.to_str())
    document["model"]["dropout"] = 0.5
    return Tokenizer.from_str(json.dumps(document))


def with_post_processor(made: Tokenizer) -> None:
    made.post_processor = processors.TemplateProcessing(single="[EOS] $A $A", special_tokens=[("[EOS]", 1)])


STATES = {
    "truncation": lambda made: made.enable_truncation(16),
    "padding": lambda made: made.enable_padding(length=300, pad_id=0, pad_token="<pad>"),
    "dropout": with_dropout,
    "post-processor": with_post_processor,
}


@pytest.mark.parametrize("state", STATES)
def test_state_saved_in_a_tokenizer_file_is_not_obeyed(pairs, tmp_path, state):
    path = write_texts(tmp_path / "texts")
    plain = prepare(corpus_of(path, changed(pairs, tmp_path / "plain.json", lambda _: None)), 32)
    tokenizer = changed(pairs, tmp_path / "state.json", STATES[state])
    corpus = Corpus(name="state", sources={"s": Source(path=path)}, tokenizer=tokenizer, validation_documents=2)
    prepared = prepare(corpus, 32)
    assert rows_of(prepared) == rows_of(plain)
    assert [d.tokens.tolist() for d in prepared.validation()] == [d.tokens.tolist() for d in plain.validation()]
    if state in ("truncation", "padding", "dropout"):  # older versions obeyed these: the fingerprint must not be theirs
        assert (
            corpus.fingerprint
            == corpus_of(path, Pretrained(name=tmp_path / "plain.json", end_of_text="[EOS]")).fingerprint
        )


@pytest.mark.parametrize("how", ["an added token that is not special", "a word of the vocabulary"])
def test_a_text_forges_no_boundary_however_the_tokenizer_has_it(pairs, tmp_path, how):
    if how == "a word of the vocabulary":
        words = {"<unk>": 0, "[EOS]": 1, "one": 2, "two": 3, "[": 4, "EOS]": 5}
        made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
        made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    else:
        made = Tokenizer.from_str(pairs.to_str().replace("[EOS]", "[END]"))
        made.add_tokens([AddedToken("[EOS]", special=False)])
    tokenizer = changed(made, tmp_path / "t.json", lambda _: None)
    (tmp_path / "texts").mkdir()
    for number in range(8):
        (tmp_path / "texts" / f"{number}.txt").write_text(f"one [EOS] two {'one ' * (number + 2)}" * 4)
    prepared = prepare(corpus_of(tmp_path / "texts", tokenizer), 8)
    end = made.token_to_id("[EOS]")
    assert all(
        (each.tokens == end).tolist() == [True, *[False] * (len(each.tokens) - 1)] for each in prepared.validation()
    )
    assert prepared.token_counts()[end] == prepared.counts["train_documents"]
    assert prepared.probe().tokens.tolist().count(end) == 1


def test_unknown_words_that_become_end_of_text_are_refused(tmp_path):
    made = Tokenizer(models.WordLevel({"[EOS]": 0, "The": 1}, unk_token="[EOS]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = changed(made, tmp_path / "t.json", lambda _: None)
    message = refusal(corpus_of(write_texts(tmp_path / "texts"), tokenizer))
    assert "document 00.txt" in message
    assert "becomes the end-of-text token '[EOS]'" in message


def test_what_a_tokenizer_cannot_express_is_counted(tmp_path):
    words = {"<unk>": 0, "[EOS]": 1, "The": 2, "ferry": 3, "left": 4}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = changed(made, tmp_path / "t.json", lambda _: None)
    prepared = prepare(corpus_of(write_texts(tmp_path / "texts"), tokenizer), 8)
    unknown = sum(word not in words for number in range(8) for word in document(number).split())
    assert counts_of(prepared)["altered"] == {"unknown_tokens": unknown}
    letters = Tokenizer(
        models.BPE(vocab={"[EOS]": 0, **{letter: n + 1 for n, letter in enumerate("Tehfry")}}, merges=[])
    )
    letters.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    prepared = prepare(corpus_of(tmp_path / "texts", changed(letters, tmp_path / "l.json", lambda _: None)), 8)
    dropped = sum(not letter.isspace() and letter not in "Tehfry" for n in range(8) for letter in document(n))
    assert counts_of(prepared)["altered"] == {"dropped_characters": dropped}


def test_a_tokenizer_that_fails_names_the_document(tmp_path):
    made = Tokenizer(models.WordLevel({"[EOS]": 0, "The": 1}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = changed(made, tmp_path / "t.json", lambda _: None)
    message = refusal(corpus_of(write_texts(tmp_path / "texts"), tokenizer))
    assert f"document 00.txt of {tmp_path / 'texts'} cannot be tokenised" in message
    assert "[UNK]" in message


@pytest.mark.parametrize("name", ["tokenizer.json", "./tokenizer.json", "~/t", "a/b/c"])
def test_a_relative_tokenizer_is_not_looked_for_on_the_hub(name, monkeypatch):
    monkeypatch.setattr(Tokenizer, "from_pretrained", lambda *_, **__: pytest.fail("asked the Hub"), raising=False)
    assert "absolute path" in Pretrained(name=name).problems()[0]


def test_the_probe_keeps_its_spaces_and_its_words(pairs, tmp_path):
    """With a post-processor that trims offsets, as GPT-NeoX has; and a special token is letters there, too."""

    def trimmed(made: Tokenizer) -> None:
        made.post_processor = processors.ByteLevel(trim_offsets=True)

    (tmp_path / "texts").mkdir()
    for number in range(8):
        (tmp_path / "texts" / f"{number}.txt").write_text(f"The ferry [EOS] left, naïve {number}. " * 9)
    prepared = prepare(corpus_of(tmp_path / "texts", changed(pairs, tmp_path / "t.json", trimmed)), 8)
    probe = prepared.probe()
    text = (tmp_path / "texts" / probe.name).read_text()
    assert "".join(probe.pieces) == text
    assert " ferry" in probe.pieces
    assert probe.tokens.tolist().count(1) == 1
    assert prepared.end_of_text == "[EOS]"


# ---- CSV and TSV ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("3,We packed bread, cheese, and a map", r"line 5: the row has at least 3 cells, the header has 2"),
        ("first line of a text that", r"line 5: the row has 1 cells, the header has 2"),
        ('3,"it ends" and goes on', "line 5: text follows the closing quotation mark of a cell"),
        ('3,"it never ends', "line 5: the quoted cell that begins here never ends"),
    ],
)
def test_a_row_that_does_not_fit_its_header_is_refused(tmp_path, row, said):
    (tmp_path / "a.csv").write_text("id,text\n" + "".join(f"{n},{n} words\n" for n in range(3)) + row + "\n")
    message = refusal(corpus_of(tmp_path / "a.csv"))
    assert f"{tmp_path}/a.csv is not valid CSV: {said}" in message


@pytest.mark.parametrize("suffix", ["tsv", "csv"])
def test_stray_quotation_marks_merge_no_rows(tmp_path, suffix):
    sign = "\t" if suffix == "tsv" else ","
    texts = [f"text {n} of some words" for n in range(12)]
    texts[3], texts[9] = '"It began with a quote', 'and ended with one"'
    path = tmp_path / f"a.{suffix}"
    path.write_text(f"id{sign}text\n" + "".join(f"{n}{sign}{text}\n" for n, text in enumerate(texts)))
    message = refusal(corpus_of(path))
    assert "line 5: a quoted cell spans lines that look like rows of their own" in message
    assert "quoting='none'" in message
    letters = Source(path=path, quoting="none")
    found = [str(text) for shard in letters.shards() for _, text in letters.documents_of(shard, Counter())]
    assert found == texts
    merged = Source(path=path, quoting="double")
    assert len([text for shard in merged.shards() for text in merged.documents_of(shard, Counter())]) == 6


def test_cells_that_span_lines_are_read_whatever_they_hold(tmp_path):
    texts = ["one\ntwo, with a comma\nthree", 'a "quote", and\n\nan empty line', "tabs\tin\nit\t"]
    for suffix, sign in (("csv", ","), ("tsv", "\t")):
        with open(tmp_path / f"a.{suffix}", "w", newline="") as file:
            csv.writer(file, delimiter=sign).writerows(
                [["id", "more", "text"], *([n, "x", t] for n, t in enumerate(texts))]
            )
        source = Source(path=tmp_path / f"a.{suffix}")
        assert [text for _, text in source.documents_of(source.shards()[0], Counter())] == texts


def test_a_long_cell_is_counted_and_two_columns_of_a_name_are_refused(tmp_path):
    long = "\n".join("a line of it" for _ in range(20_000))
    with open(tmp_path / "a.csv", "w", newline="") as file:
        csv.writer(file).writerows([["id", "text"], *([n, document(n)] for n in range(6)), [9, long], [7, document(7)]])
    prepared = prepare(corpus_of(tmp_path / "a.csv", longest_document_bytes=100_000), 32)
    assert counts_of(prepared)["skipped"] == {"too_long": 1}
    assert prepared.counts["train_documents"] == 7 - 2 - 1
    (tmp_path / "b.csv").write_text("text,text\na,b\n")
    assert "has 2 columns called 'text'" in refusal(corpus_of(tmp_path / "b.csv"))
    pq.write_table(
        pa.Table.from_arrays([pa.array(["x"]), pa.array(["y"])], names=["text", "text"]), tmp_path / "b.parquet"
    )
    assert "b.parquet has 2 columns called 'text'" in refusal(corpus_of(tmp_path / "b.parquet"))
    (tmp_path / "b.jsonl").write_text('{"text": "a", "text": "b"}\n')
    assert "has the field 'text' more than once" in refusal(corpus_of(tmp_path / "b.jsonl"))


def test_a_cache_of_csv_from_before_is_made_again_under_its_fingerprint(tmp_path):
    with open(tmp_path / "a.csv", "w", newline="") as file:
        csv.writer(file).writerows([["id", "text"], *([n, document(n)] for n in range(8))])
    corpus = corpus_of(tmp_path / "a.csv")
    prepared = prepare(corpus, 32)
    rows = rows_of(prepared)
    (prepared.folder / "corpus.json").write_text(json.dumps({**prepared.counts, "revision": 1, "rows": 1}))
    again = prepare(corpus_of(tmp_path / "a.csv"), 32)
    assert again.folder == prepared.folder
    assert (again.counts["revision"], rows_of(again)) == (2, rows)


# ---- files, formats, paths ------------------------------------------------------------------------------------------


def test_a_byte_order_mark_is_no_text(tmp_path):
    plain = prepare(corpus_of(write_texts(tmp_path / "plain")), 32)
    (tmp_path / "marked").mkdir()
    for path in (tmp_path / "plain").iterdir():
        (tmp_path / "marked" / path.name).write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    corpus = corpus_of(tmp_path / "marked")
    prepared = prepare(corpus, 32)
    assert rows_of(prepared) == rows_of(plain)
    assert counts_of(prepared)["altered"] == {"byte_order_mark": 8}
    assert prepared.losses() == ["s: 5 documents to train on; altered: 8 byte order mark"]
    source = corpus.sources["s"]
    assert "without its byte order mark" in source._local_contents()["00.txt"], "older caches hold the mark as text"


@pytest.mark.parametrize(
    "name", ["a.jsonl.gz", "b.jsonl.bz2", "c.jsonl.xz", "d.jsonl.zst", "e.jsonl.zstd", "f.jsonl.lz4"]
)
def test_an_empty_compressed_file_is_damage(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    (tmp_path / "z.jsonl.gz").write_bytes(gzip.compress(b"".join(b'{"text": "some %d"}\n' % n for n in range(9))))
    assert f"{name} cannot be read, it may be cut short (it is empty" in refusal(corpus_of(tmp_path))


def test_xz_is_read_and_archives_are_refused_by_name(tmp_path):
    lines = "".join(json.dumps({"text": document(n)}) + "\n" for n in range(8)).encode()
    (tmp_path / "a.jsonl.xz").write_bytes(lzma.compress(lines[:500]) + lzma.compress(lines[500:]))
    assert prepare(corpus_of(tmp_path), 32).counts["train_documents"] == 5
    (tmp_path / "a.jsonl.xz").write_bytes(lzma.compress(lines)[:-20])
    assert "a.jsonl.xz cannot be read" in refusal(corpus_of(tmp_path))
    for name in ("b.jsonl.zip", "b.jsonl.7z", "b.tar.gz"):
        (tmp_path / name).write_bytes(b"x")
    problem = "\n".join(corpus_of(tmp_path).problems())
    assert "b.jsonl.zip is an archive" in problem
    assert "b.jsonl.7z is an archive" in problem


def test_files_that_are_not_read_are_counted(tmp_path):
    write_texts(tmp_path / "texts")
    for name in ("README.md", "notes.md", "a.docx", "LICENSE"):
        (tmp_path / "texts" / name).write_text("x")
    prepared = prepare(corpus_of(tmp_path / "texts"), 32)
    assert counts_of(prepared)["other_files"] == {".docx": 1, ".md": 2, "LICENSE": 1}


@pytest.mark.parametrize("name", ["part-{}.json.gz", "part-{}.JSONL", "part-{}", "part-{}.jsonl.ZST"])
def test_a_format_that_is_given_wins_over_suffixes(tmp_path, name):
    for number in range(2):
        lines = "".join(json.dumps({"text": document(9 * number + n)}) + "\n" for n in range(5)).encode()
        packed = {"gz": gzip.compress(lines), "ST": pa.Codec("zstd").compress(lines).to_pybytes()}.get(name[-2:], lines)
        (tmp_path / name.format(number)).write_bytes(packed)
    for path in (tmp_path, f"{tmp_path}/part-*"):
        assert prepare(corpus_of(path, format=Format.JSONL), 32).counts["train_documents"] == 10 - 3


@pytest.mark.parametrize("name", ["set [v2]", "what now?", "a*b", "[x]"])
def test_a_path_that_exists_is_that_path(tmp_path, name):
    path = write_texts(tmp_path / name)
    (tmp_path / "set v").mkdir()
    assert len(Source(path=path).files) == 8
    assert [file.name for file in Source(path=path / "00.txt").files] == ["00.txt"]
    assert len(Source(path=f"{path}/0*.txt").files) == 8
    assert len(Source(path=f"{path}/0[1-3].txt").files) == 3


def test_paths_may_be_paths(pairs, tmp_path):
    pairs.save(str(tmp_path / "tokenizer.json"))
    for name in (tmp_path / "tokenizer.json", tmp_path, str(tmp_path)):
        corpus = corpus_of(tmp_path / "texts", Pretrained(name=name, end_of_text="[EOS]"))
        assert corpus.tokenizer.problems() == []
    texts = write_texts(tmp_path / "texts")
    assert corpus_of(texts).fingerprint == corpus_of(str(texts)).fingerprint


def test_two_saves_of_one_dataset_in_a_folder_are_refused(tmp_path):
    for name in ("train-00000-of-00001", "train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        pq.write_table(pa.table({"text": [f"{name} {n}" for n in range(9)]}), tmp_path / f"{name}.parquet")
    assert "train is there in 00001 and in 00002 parts" in corpus_of(tmp_path).problems()[0]
    assert corpus_of(f"{tmp_path}/train-*-of-00002.parquet").problems() == []


def test_links_to_nowhere_pipes_and_circles(tmp_path):
    path = write_texts(tmp_path / "texts")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "more.txt").write_text(document(99))
    (path / "linked").symlink_to(tmp_path / "elsewhere")
    (path / "circle").symlink_to(path)
    assert len(Source(path=path).files) == 9
    assert prepare(corpus_of(path), 32).counts["train_documents"] == 9 - 3
    (path / "gone.txt").symlink_to(tmp_path / "nowhere")
    os.mkfifo(path / "pipe.txt")
    message = refusal(corpus_of(path))
    assert "gone.txt cannot be read: No such file or directory (a link to nowhere)" in message
    assert "pipe.txt is not a regular file" in message
    with pytest.raises(CorpusError, match=r"gone\.txt"):
        _ = corpus_of(path).fingerprint


def test_the_hub_is_asked_once_for_a_datasets_commit(monkeypatch):
    """A name on the Hub looks like a path, but there are no local files that could change while it is prepared."""
    asked = []

    class Commit:
        sha = "c0ffee"

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: asked.append(1) or Commit)
    rows = datasets.Dataset.from_dict({"text": [document(n) for n in range(8)]}).to_iterable_dataset()
    monkeypatch.setattr(Source, "load_hugging_face", lambda _: rows)
    corpus = corpus_of("organisation/name", format="hugging-face")
    assert prepare(corpus, 32).counts["train_documents"] == 5
    assert len(asked) == 1


def test_text_in_utf16_is_named_for_what_it_is(tmp_path):
    (tmp_path / "texts").mkdir()
    for number in range(8):
        (tmp_path / "texts" / f"{number}.txt").write_bytes(document(number).encode("utf-16"))
    assert "it looks like UTF-16" in refusal(corpus_of(tmp_path / "texts"))


def test_names_that_are_no_utf8(tmp_path):
    (tmp_path / "texts").mkdir()
    for number in range(8):
        with open(os.fsencode(tmp_path / "texts") + b"/caf\xe9%02d.txt" % number, "w") as file:
            file.write(document(number))
    prepared = prepare(corpus_of(tmp_path / "texts"), 32)
    names = {*prepared.validation_names(), prepared.probe().name}
    assert all(name.startswith("caf\\udce9") for name in names)
    one = sorted(names)[0]
    named = Corpus(
        name="named",
        sources={"s": Source(path=tmp_path / "texts")},
        tokenizer=Pretrained(name="bytes"),
        validation_documents=2,
        probe_document=one.replace("\\udce9", "\udce9"),
    )
    with open(os.fsencode(tmp_path / "texts") + b"/caf\xe9.txt", "wb") as file:
        file.write(b"\xff")
    assert "caf\\udce9.txt is not UTF-8" in refusal(corpus_of(tmp_path / "texts"))
    os.unlink(os.fsencode(tmp_path / "texts") + b"/caf\xe9.txt")
    assert prepare(named, 32).probe().name == one


def test_a_predicate_that_raises_names_the_document(tmp_path, monkeypatch):
    (tmp_path / "foreign_keep.py").write_text("def keep(text): return 1 / (len(text) - len(text))\nnumber = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    path = write_texts(tmp_path / "texts")
    message = refusal(corpus_of(path, keep="foreign_keep:keep"))
    assert (
        f"keep 'foreign_keep:keep' fails on document 00.txt of {path} (ZeroDivisionError: division by zero)" in message
    )
    assert "is not a function" in corpus_of(path, keep="foreign_keep:number").problems()[0]
    (tmp_path / "foreign_broken.py").write_text("1 / 0")
    assert "ZeroDivisionError" in corpus_of(path, keep="foreign_broken:keep").problems()[0]
    sys.modules.pop("foreign_keep")


def test_a_choice_in_words_is_the_choice(tmp_path):
    """`error` in words once took the branch of `replace`."""
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    source = Source(path=tmp_path, invalid_utf8="error")
    assert source == Source(path=tmp_path)
    with pytest.raises(ValueError, match="not UTF-8"):
        list(source.documents_of(source.shards()[0], Counter()))
    assert (
        "invalid_utf8 must be one of error, replace (got 'ignore')"
        in Source(path="/x", invalid_utf8="ignore").problems()
    )


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": 3},
        {"validation_documents": "2"},
        {"validation_documents": True},
        {"probe_characters": 2.5},
        {"probe_document": None},
        {"sources": ["/data"]},
        {"sources": {"s": "/data"}},
        {"tokenizer": "bytes"},
    ],
)
def test_a_field_of_another_type_is_a_sentence(tmp_path, wrong):
    values = {"name": "x", "sources": {"s": Source(path=tmp_path)}, "tokenizer": Pretrained(name="bytes"), **wrong}
    (problem,) = Corpus(**values).problems()
    assert f"{next(iter(wrong))} must be " in problem
    assert " must be " in refusal(Corpus(**values))


def test_preparing_says_everything_that_is_wrong_at_once(tmp_path):
    sources = {"a": Source(path=tmp_path / "nowhere"), "b": Source(path="relative")}
    corpus = Corpus(name="x", sources=sources, tokenizer=BytePairs(vocab_size="many"), validation_documents=2)
    message = refusal(corpus)
    assert "vocab_size must be a whole number (got 'many')" in message
    assert "nowhere does not exist" in message
    assert "path 'relative' is not an absolute path" in message


def test_files_without_a_byte_are_counted(tmp_path):
    (tmp_path / "texts").mkdir()
    for name in ("a", "b"):
        (tmp_path / "texts" / f"{name}.jsonl").write_bytes(b"")
    lines = "".join(json.dumps({"text": document(n)}) + "\n" for n in range(8))
    (tmp_path / "texts" / "c.jsonl").write_text(lines)
    assert counts_of(prepare(corpus_of(tmp_path / "texts"), 32))["altered"] == {"empty_file": 2}


# ---- stale and half-written caches ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tokens-000000.json", "tokens-000000.parquet", "packed-000000.npy"])
@pytest.mark.parametrize("content", [b"", b"{"])
def test_a_half_written_file_of_a_cut_off_preparation_is_made_again(tmp_path, name, content, caplog):
    path = write_texts(tmp_path / "texts")
    whole = prepare(corpus_of(path), 32)
    rows = rows_of(whole)

    def cut_off(function, jobs):
        if function is shard_jobs.pack_shard:
            list(map(function, jobs))
            raise KeyboardInterrupt
        return map(function, jobs)

    whole.folder.rename(whole.folder.with_name("elsewhere"))
    with pytest.raises(KeyboardInterrupt):
        prepare(corpus_of(path), 32, run=cut_off)
    (Path(f"{whole.folder}.partial") / "work" / name).write_bytes(content)
    assert rows_of(prepare(corpus_of(path), 32)) == rows
    assert name.split(".")[0] in caplog.text


def test_a_shard_of_files_that_have_changed_since_is_not_used(tmp_path):
    path = write_texts(tmp_path / "texts")
    rows = rows_of(whole := prepare(corpus_of(path), 32))
    whole.folder.rename(whole.folder.with_name("elsewhere"))
    first, before = path / "00.txt", (path / "00.txt").stat()

    def cut_off(function, jobs):
        if function is shard_jobs.pack_shard:
            raise KeyboardInterrupt
        first.write_text("another text that is not the fingerprint's")  # while it is prepared
        yield from map(function, jobs)

    with pytest.raises(KeyboardInterrupt):
        prepare(corpus_of(path), 32, run=cut_off)
    first.write_text(document(0))  # brought back, with its old time
    os.utime(first, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert rows_of(prepare(corpus_of(path), 32)) == rows


def test_a_source_that_changes_while_it_is_prepared_publishes_nothing(tmp_path):
    path = write_texts(tmp_path / "texts")
    corpus = corpus_of(path)

    def changing(function, jobs):
        if function is shard_jobs.pack_shard:
            (path / "00.txt").write_text("another text")
        return map(function, jobs)

    with pytest.raises(CorpusError, match="source s has changed while it was prepared"):
        prepare(corpus, 32, run=changing)
    assert not corpus.cache(32).exists()


@pytest.mark.parametrize(
    "name", ["parts.json", "probe.json", "token_counts.npy", "validation.parquet", "part-000000.parquet"]
)
def test_a_damaged_published_file_is_named(tmp_path, name):
    path = write_texts(tmp_path / "texts")
    folder = prepare(corpus_of(path), 32).folder
    (folder / name).write_bytes((folder / name).read_bytes()[:9])

    def open_and_read():
        prepared = prepare(corpus_of(path), 32)
        return prepared.probe(), prepared.token_counts(), prepared.validation_names()

    with pytest.raises(CorpusError, match=rf"{name} is damaged .*: remove its folder and prepare it again"):
        open_and_read()


def test_what_is_published_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """The order that a power cut needs: contents, then names, then the folder's name."""
    calls = []
    real_sync, real_rename = os.fsync, Path.rename

    def synced(descriptor):
        calls.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}")))
        real_sync(descriptor)

    def renamed(self, target):
        calls.append(("rename", str(target)))
        return real_rename(self, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    folder = prepare(corpus_of(write_texts(tmp_path / "texts")), 32).folder
    revealed = calls.index(("rename", str(folder)))
    ready = f"{folder}.partial/ready"
    before = {place for what, place in calls[:revealed] if what == "sync"}
    assert {f"{ready}/{file.name}" for file in folder.iterdir()} <= before
    assert ready in before
    assert ("sync", str(folder.parent)) in calls[revealed:]


def test_sound_corpora_keep_their_fingerprints(tmp_path):
    """Of the version before: what was prepared, and the runs that were trained on it, stay."""
    (tmp_path / "texts").mkdir()
    for number in range(6):
        (tmp_path / "texts" / f"{number}.txt").write_text(f"text {number}")
    with open(tmp_path / "a.csv", "w", newline="") as file:
        csv.writer(file).writerows([["id", "text"], *([n, f"text {n}"] for n in range(6))])
    assert corpus_of(tmp_path / "texts").fingerprint == FINGERPRINTS["texts"]
    assert corpus_of(tmp_path / "a.csv").fingerprint == FINGERPRINTS["csv"]


FINGERPRINTS = {"texts": "7fba7d2cc092", "csv": "e6ef3ceaf6eb"}
