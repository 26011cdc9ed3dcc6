"""Corpora: what is refused at a glance, and what is in their fingerprint."""

import json
import shutil

import pytest

from haltscale.platform.corpora.corpus import MOST_WEIGHTED_SOURCES, PreparedCorpus
from haltscale.platform.corpora.order import Mixture
from haltscale.platform.corpora.sources import RECIPES, Source
from haltscale.platform.corpora.tokenization import BytePairs, Pretrained


def only(problems: list[str]) -> str:
    assert len(problems) == 1, problems
    return problems[0]


# ---- what is refused ------------------------------------------------------------------------------------------------


def test_a_sound_corpus_has_no_problems(corpus):
    assert corpus().problems() == []


def test_a_missing_folder(corpus, tmp_path):
    problem = only(corpus(folder=tmp_path / "nowhere").problems())
    assert str(tmp_path / "nowhere") in problem
    assert "does not exist" in problem


def test_an_empty_folder(corpus, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "no *.txt" in only(corpus(folder=tmp_path / "empty").problems())


def test_a_relative_folder(corpus):
    assert "not an absolute path" in only(corpus(folder="texts").problems())


def test_too_few_documents(corpus):
    problem = only(corpus(validation_documents=5).problems())
    assert "6 documents" in problem
    assert "7" in problem
    assert corpus(validation_documents=4).problems() == []


def test_everything_wrong_comes_at_once(corpus):
    found = corpus(vocab_size=256, probe_document="none.txt", validation_documents=9, source={"weight": 0}).problems()
    assert len(found) == 4, found
    assert all("tiny" in problem for problem in found)


@pytest.mark.parametrize("weight", [0, -1.5, float("inf"), "much"])
def test_a_weight_that_is_none(corpus, weight):
    problem = only(corpus(source={"weight": weight}).problems())
    assert "source texts: weight must be" in problem
    assert "above 0" in problem


def test_weights_are_for_all_sources_or_none(corpus, documents):
    sources = {"a": Source(path=str(documents), weight=1), "b": Source(path=str(documents))}
    assert only(corpus(sources=sources).problems()).endswith("without one: b")
    many = {f"s{n}": Source(path=str(documents), weight=1) for n in range(MOST_WEIGHTED_SOURCES + 1)}
    assert "at most 32" in only(corpus(sources=many).problems())


def test_a_name_that_is_no_folder(corpus):
    assert "names a folder" in only(corpus(name="a/b").problems())


def test_a_dataset_that_cannot_be_found_is_told(corpus, monkeypatch):
    import huggingface_hub

    def unreachable(*_, **__):
        raise ConnectionError("no network here")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)
    problem = only(corpus(sources={"pile": RECIPES["pile"]}).problems())
    assert "source pile: dataset 'monology/pile-uncopyrighted' cannot be found (ConnectionError: no network" in problem


def test_no_sources(corpus):
    assert "no sources" in only(corpus(sources={}).problems())


def test_a_tokenizer_that_is_not_there(corpus, tmp_path):
    missing = corpus(tokenizer=Pretrained(name=str(tmp_path / "tokenizer.json")))
    assert "cannot be loaded" in only(missing.problems())
    assert missing.vocab_size == 257  # a study's other problems can still be told
    wrong = corpus(tokenizer=Pretrained(name="bytes", end_of_text="</s>"))
    assert "'<|endoftext|>'" in only(wrong.problems())


def test_token_arrays_need_their_tokenizer(corpus, tmp_path):
    (tmp_path / "a.bin").write_bytes(b"\0" * 64)
    tokens = {"ids": Source(path=str(tmp_path / "a.bin"), format="uint16")}
    assert "name their tokenizer" in only(corpus(sources=tokens).problems())
    assert corpus(sources=tokens, tokenizer=Pretrained(name="bytes")).problems() == []
    (tmp_path / "a.bin").write_bytes(b"\0" * 63)
    assert "not a whole number of uint16" in only(
        corpus(
            sources={"ids": Source(path=str(tmp_path / "a.bin"), format="uint16")}, tokenizer=Pretrained(name="bytes")
        ).problems()
    )


# ---- fingerprint ----------------------------------------------------------------------------------------------------


def test_the_fingerprint_does_not_depend_on_the_folder(corpus, documents, tmp_path):
    moved = shutil.copytree(documents, tmp_path / "elsewhere")
    assert corpus(folder=moved).fingerprint == corpus().fingerprint
    assert corpus(name="other").fingerprint == corpus().fingerprint  # the name stands beside it in a run's key


@pytest.mark.parametrize(
    "changes",
    [
        {"vocab_size": 301},
        {"validation_documents": 3},
        {"probe_document": "document-0.txt"},
        {"probe_characters": 9},
        {"remove_duplicates": False},
        {"tokenizer": Pretrained(name="bytes")},
        {"tokenizer": BytePairs(vocab_size=300, sample_bytes=99)},
        {"source": {"documents": 3}},
        {"source": {"min_characters": 3}},
        {"source": {"keep": "builtins:len"}},
        {"source": {"format": "lines"}},
        {"source": {"invalid_utf8": "replace"}},
    ],
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


def test_weights_are_in_the_run_s_key_but_not_in_what_is_prepared(corpus, documents):
    def mixed(*weights: float | None):
        return corpus(sources={str(n): Source(path=str(documents), weight=w) for n, w in enumerate(weights)})

    assert mixed(1, 2).cache(16) == mixed(2, 1).cache(16) == mixed(None, None).cache(16)
    assert len({mixed(*weights).fingerprint for weights in [(1, 2), (2, 1), (None, None)]}) == 3
    assert mixed(5).fingerprint == mixed(None).fingerprint


def test_hashes_are_remembered_until_a_file_changes(corpus, documents, home, monkeypatch):
    import os

    from haltscale.platform.corpora import sources

    for path in documents.rglob("*.txt"):
        os.utime(path, (1e9, 1e9))
    first = corpus().fingerprint
    monkeypatch.setattr(sources.hashlib, "file_digest", lambda *_: pytest.fail("a file was read again"))
    assert corpus().fingerprint == first
    monkeypatch.undo()
    monkeypatch.setenv("HALTSCALE_HOME", str(home))
    (documents / "document-0.txt").write_text((documents / "document-0.txt").read_text().replace("the", "eht"))
    assert corpus().fingerprint != first


def test_the_cache_is_below_the_home_folder(corpus, home):
    folder = corpus().cache(128)
    assert folder.parent == home / "corpora"
    assert corpus().fingerprint in folder.name
    assert folder != corpus().cache(256)


# ---- what was prepared ----------------------------------------------------------------------------------------------


def test_nothing_prepared_is_none(tmp_path):
    assert PreparedCorpus.open(tmp_path / "nowhere") is None
    (tmp_path / "corpus.json").write_text('{"rows": 3')
    assert PreparedCorpus.open(tmp_path) is None


def test_the_mixture_is_made_of_rows_and_weights(tmp_path):
    (tmp_path / "corpus.json").write_text(json.dumps({"rows": 9, "sources": {"a": {"rows": 4}, "b": {"rows": 5}}}))
    plain = PreparedCorpus.open(tmp_path)
    assert plain is not None
    assert plain.mixture == Mixture((9,))
    mixed = PreparedCorpus.open(tmp_path, {"b": 3, "a": 1})
    assert mixed is not None
    assert (mixed.mixture.rows, list(map(float, mixed.mixture.weights))) == ((4, 5), [0.25, 0.75])
