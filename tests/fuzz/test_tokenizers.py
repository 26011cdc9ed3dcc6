"""Whatever a tokenizer file carries: the document's tokens and nothing else, no forged boundary, or a sentence."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from haltscale.platform.corpora.corpus import Corpus, CorpusError
from haltscale.platform.corpora.formats import SourceError
from haltscale.platform.corpora.pipeline import probe_text
from haltscale.platform.corpora.prepare import prepare
from haltscale.platform.corpora.sources import Source
from haltscale.platform.corpora.tokenization import Pretrained, TokenizerError, encode, exact, plain_json
from haltscale.platform.inference.export import write_tokenizer

fuzz = settings.get_profile("fuzz")
SENTENCES = ["the ferry left the harbour at dawn", "nobody on the quay had expected fog", "naïve 東京 🙂 the end"] * 4


def _byte_pairs(end: str) -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=[end], initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(SENTENCES, trainer)
    return made


def _words(end: str) -> Tokenizer:
    made = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.train_from_iterator(SENTENCES, trainers.WordLevelTrainer(special_tokens=["[UNK]", end], show_progress=False))
    return made


def _word_pieces(end: str) -> Tokenizer:
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=150, special_tokens=["[UNK]", end], show_progress=False)
    made.train_from_iterator(SENTENCES, trainer)
    return made


def _unigram(end: str) -> Tokenizer:
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=90, special_tokens=["<unk>", end], unk_token="<unk>", show_progress=False
    )
    made.train_from_iterator(SENTENCES, trainer)
    return made


KINDS = {"byte-pairs": _byte_pairs, "words": _words, "word-pieces": _word_pieces, "unigram": _unigram}
END = "</s>"
PRISTINE = {name: make(END).to_str() for name, make in KINDS.items()}
texts_ = st.text("the fry🙂é \n.Q", max_size=40) | st.sampled_from(SENTENCES)


@st.composite
def states(draw, text: str) -> str:
    """A tokenizer.json with state of the kinds that their files are saved with."""
    made = Tokenizer.from_str(text)
    if draw(st.booleans()):
        side = draw(st.sampled_from(["left", "right"]))
        made.enable_truncation(draw(st.integers(1, 9)), direction=side)
    if draw(st.booleans()):
        made.enable_padding(pad_id=1, pad_token=END, length=draw(st.none() | st.integers(1, 30)))
    end = made.token_to_id(END)
    made.post_processor = draw(
        st.sampled_from(
            [
                processors.TemplateProcessing(single=f"{END} $A {END}", special_tokens=[(END, end)]),
                processors.TemplateProcessing(single="$A $A", special_tokens=[]),
                processors.BertProcessing((END, end), (END, end)),
                processors.RobertaProcessing((END, end), (END, end)),
                processors.ByteLevel(trim_offsets=True),
            ]
        )
    )
    document = json.loads(made.to_str())
    if document["model"]["type"] == "BPE":
        document["model"]["dropout"] = draw(st.none() | st.floats(0.1, 1.0))
    return json.dumps(document)


@fuzz
@given(data=st.data(), kind=st.sampled_from(list(KINDS)), texts=st.lists(texts_, max_size=4))
def test_saved_state_changes_no_token(data, kind, texts):
    pristine = Tokenizer.from_str(PRISTINE[kind])
    expected = [pristine.encode(text, add_special_tokens=False).ids for text in texts]
    made = exact(data.draw(states(PRISTINE[kind])), END)
    assert [ids.tolist() for ids in encode(made, texts, made.token_to_id(END))] == expected
    assert plain_json(PRISTINE[kind]) == PRISTINE[kind], "a file without state stays as it is, and so does its hash"


@fuzz
@given(data=st.data(), kind=st.sampled_from(list(KINDS)), text=texts_)
def test_an_export_puts_end_of_text_before_the_same_tokens(tmp_path_factory, data, kind, text):
    made = exact(data.draw(states(PRISTINE[kind])), END)
    end, folder = made.token_to_id(END), tmp_path_factory.mktemp("export")
    write_tokenizer(made, end, 8, folder)
    exported = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert exported.encode(text).ids == [end, *encode(made, [text], end)[0].tolist()]


@fuzz
@given(
    kind=st.sampled_from(list(KINDS)),
    end=st.sampled_from([END, "<|endoftext|>", "the", "[EOS]", "$A:0", " ", "é"]),
    added=st.sampled_from(["special", "plain", "none"]),
    parts=st.lists(st.sampled_from(["END", "the ferry", " ", "\n", "é", "qu", "ENDEND", " END "]), max_size=6),
)
def test_no_text_forges_a_boundary(kind, end, added, parts):
    document = json.loads(KINDS[kind](end).to_str())
    for token in document["added_tokens"]:
        token["special"] = added == "special"
    if added == "none":
        document["added_tokens"] = []
    made = exact(json.dumps(document), end)
    text = "".join(parts).replace("END", end)
    place = made.token_to_id(end)
    try:
        (ids,) = encode(made, [text], place)
    except TokenizerError as error:
        assert "name another end_of_text" in str(error)
        assert end in text or kind != "byte-pairs"
        return
    assert place not in ids.tolist()
    if kind == "byte-pairs":
        assert made.decode(ids.tolist(), skip_special_tokens=False) == text


@fuzz
@given(kind=st.sampled_from(list(KINDS)), text=texts_, data=st.data(), characters=st.integers(1, 50))
def test_the_pieces_of_the_probe_are_its_text(kind, text, data, characters):
    made = exact(data.draw(states(PRISTINE[kind])), END)
    probe = probe_text(f"{text} {END}", made, made.token_to_id(END), characters)
    assert len(probe["pieces"]) == len(probe["tokens"]) - 1
    assert "".join(probe["pieces"]) == probe["text"] or len(probe["tokens"]) == 1
    assert probe["tokens"].count(made.token_to_id(END)) == 1


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts") / "texts"
    folder.mkdir()
    for number, text in enumerate([*SENTENCES, *(f"{text} again" for text in SENTENCES)]):
        (folder / f"{number:02d}.txt").write_text(f"{text} {number}", encoding="utf-8")
    return folder


replacements = (
    st.none() | st.booleans() | st.integers(-2, 1 << 40) | st.text(max_size=3) | st.just([]) | st.just({}) | st.just("")
)


@st.composite
def damaged(draw, text: str) -> str:
    """A tokenizer.json that is cut, or in which one value is another, is gone, or stands twice."""
    document = json.loads(text)
    if draw(st.integers(0, 4)) == 0:
        return text[: draw(st.integers(0, len(text)))]
    parent, child, key = None, document, None
    for _ in range(draw(st.integers(1, 4))):
        if not isinstance(child, dict | list) or not child:
            break
        keys = sorted(child) if isinstance(child, dict) else list(range(len(child)))
        parent, key = child, draw(st.sampled_from(keys))
        child = parent[key]
    if draw(st.booleans()):
        del parent[key]
    else:
        parent[key] = draw(replacements)
    return json.dumps(document)


@fuzz
@given(data=st.data(), kind=st.sampled_from(list(KINDS)), end=st.sampled_from([END, "the", "[UNK]", ""]))
def test_a_damaged_tokenizer_is_a_sentence(tmp_path_factory, path, monkeypatch, data, kind, end):
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HALTSCALE_HOME", str(home))
    (home / "tokenizer.json").write_text(data.draw(damaged(PRISTINE[kind])))
    tokenizer = Pretrained(name=home / "tokenizer.json", end_of_text=end)
    corpus = Corpus(name="t", sources={"s": Source(path=path)}, tokenizer=tokenizer, validation_documents=1)
    try:
        prepared = prepare(corpus, 4)
    except (CorpusError, SourceError) as error:
        assert str(error).strip()
    else:
        end_id = exact(tokenizer.json, end).token_to_id(end)
        for document in prepared.validation():
            assert (document.tokens == end_id).sum() == 1
            assert document.tokens[0] == end_id


def test_added_tokens_that_are_not_special_are_the_documents_own():
    """As GPT-NeoX has runs of white space: they are part of its vocabulary, not state beside it."""
    made = Tokenizer.from_str(PRISTINE["byte-pairs"])
    made.add_tokens([AddedToken("   ", special=False)])
    own = exact(made.to_str(), END)
    assert encode(own, ["the   end"])[0].tolist() == made.encode("the   end").ids
    assert made.token_to_id("   ") in made.encode("the   end").ids
