"""The search through a run's held-out tokens."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, models

from haltscale.dashboard.search import Order, search
from haltscale.platform.store import StoreError

VOCABULARY = {"the": 0, "<script>": 1, "union": 2, "Union": 3}


@pytest.fixture
def events(tmp_path):
    path = tmp_path / "events-00000001.parquet"
    count = 6
    table = pa.table(
        {
            "document": pa.array([0, 0, 0, 1, 1, 1], pa.uint32()),
            "position": pa.array(range(count), pa.uint32()),
            "token_id": pa.array([0, 1, 2, 3, 0, 2], pa.int32()),
            "steps": pa.array([0, 3, 1, 2, 3, 0], pa.uint8()),
            "expected_steps": pa.array([0.0, 2.5, 1.0, 1.5, 2.9, 0.0], pa.float32()),
            "nll": pa.array([0.1, 9.0, 2.0, 3.0, 5.0, 0.2], pa.float32()),
            "nll_by_step": pa.array([[0.1], [8.0, 9.0], [3.0, 2.0], None, [5.5, 5.0], None], pa.list_(pa.float32())),
            "confidence": pa.array([0.9] * count, pa.float32()),
            "frequency": pa.array([0] * count, pa.uint8()),
            "token_class": pa.array(["word"] * 5 + ["space"]),
        }
    )
    documents = {b"haltscale": b'{"documents": ["first", "second"]}'}
    pq.write_table(table.replace_schema_metadata(documents), path)
    return path


@pytest.fixture
def tokenizer(tmp_path):
    path = tmp_path / "tokenizer.json"
    Tokenizer(models.WordLevel(VOCABULARY, unk_token="the")).save(str(path))
    return path


@pytest.mark.parametrize(
    ("order", "positions"),
    [
        (Order.STEPS, [4, 1, 3]),
        (Order.SURPRISED, [1, 4, 3]),
        (Order.GAINED, [2, 4, 0]),
        (Order.LOST, [1, 0, 4]),
    ],
)
def test_the_first_in_each_order(events, tokenizer, order, positions):
    assert search(events, tokenizer, order, limit=3)["position"].tolist() == positions


def test_tokens_by_their_text_and_class(events, tokenizer):
    found = search(events, tokenizer, Order.STEPS, text="UNION")
    assert found["token"].tolist() == ["Union", "union", "union"]
    assert found["document"].tolist() == ["second", "first", "second"]
    assert search(events, tokenizer, Order.STEPS, text="union", token_class="space")["position"].tolist() == [5]
    assert search(events, tokenizer, Order.STEPS, text="' OR 1=1 --").empty


def test_ids_stand_for_texts_without_a_tokenizer(events, tmp_path):
    assert search(events, tmp_path / "none.json", Order.STEPS)["token"].iloc[0] == "#0"


def test_a_damaged_file_says_so(events, tokenizer):
    events.write_bytes(b"PAR1 half")
    with pytest.raises(StoreError, match="cannot be searched"):
        search(events, tokenizer, Order.STEPS)
