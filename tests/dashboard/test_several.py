"""Studies share an axis where their corpora are the same, and are refused plainly where they are not."""

import math

import pytest
from pages import charts, open_page, text

from haltscale.dashboard import data, several

FIRST, SECOND, FOREIGN, UNNAMED = "quick", "second", "foreign", "unnamed"
PRINTS = {FIRST: "aaaa", SECOND: "aaaa", FOREIGN: "bbbb", UNNAMED: None}


@pytest.fixture
def studies(author):
    """Four studies of three sizes: vanilla, and adaptive whose loss is 0.5 lower in the second."""
    losses = {"0.6m": 5.0, "1.8m": 4.5, "4.2m": 4.0}
    for study, fingerprint in PRINTS.items():
        keys = []
        for size, loss in losses.items():
            for method in ("vanilla", "adaptive"):
                keys.append(f"{method}-{size}".replace(".", "_"))
                author.begin(keys[-1], method=method, size=size, study=study)
                better = 0.5 if (study, method) == (SECOND, "adaptive") else 0.0
                spec = author.store.read_json(author.store.path(study, keys[-1], "spec.json"))
                record = {name: spec[name] for name in ("label", "key", "identity")}
                record |= {"study": study, "loss": loss - better, "tokens": 1_000_000, "flops_realised": 1e13 * loss}
                author.store.write_json(author.store.path(study, keys[-1], "record.json"), record)
        document = {"name": study, "runs": keys, "corpus": {"name": "sotu"}}
        if fingerprint:
            document["corpus"]["fingerprint"] = fingerprint
        author.store.write_json(author.store.path(study, None, "study.json"), document)
    return {study: data.load_study(author.store, study) for study in PRINTS}


def test_only_studies_of_one_corpus_agree(studies):
    view, *others = studies.values()
    kept, refused = several.agreeing(view, others)
    assert [one.name for one in kept] == [FIRST, SECOND]
    assert set(refused) == {FOREIGN, UNNAMED}
    assert "bbbb" in refused[FOREIGN]
    assert "aaaa" in refused[FOREIGN]
    kept, refused = several.agreeing(studies[UNNAMED], [studies[FIRST]])
    assert (len(kept), list(refused)) == (1, [FIRST])


def test_the_runs_of_two_studies_keep_their_study(studies):
    runs = several.joined([studies[FIRST], studies[SECOND]])
    assert runs["key"].is_unique
    assert runs.groupby("study").size().to_dict() == {FIRST: 6, SECOND: 6}
    assert all(study in label for study, label in zip(runs["study"], runs["label"], strict=True))


def test_an_arm_of_one_study_against_that_of_another(studies):
    views = {name: studies[name] for name in (FIRST, SECOND)}
    found = several.across(views, (FIRST, "adaptive"), (SECOND, "adaptive"), "flops_realised")
    assert found.comparison.points["difference"].tolist() == pytest.approx([0.5] * 3)
    same = several.across(views, (FIRST, "vanilla"), (SECOND, "vanilla"), "tokens")
    assert same.comparison.points["difference"].tolist() == pytest.approx([0.0] * 3)
    assert math.isclose(same.comparison.overall.value, 0.0, abs_tol=1e-12)


def test_the_page_draws_what_agrees_and_refuses_the_rest(studies):
    page = open_page("compute", study=FIRST, studies=[SECOND, FOREIGN])
    figure = charts(page)[1]
    marked = {trace["name"]: trace["marker"]["symbol"] for trace in figure["data"] if trace["mode"] == "markers"}
    assert set(marked) == {f"{method} · {study}" for method in ("vanilla", "adaptive") for study in (FIRST, SECOND)}
    assert set(marked[f"vanilla · {FIRST}"]) != set(marked[f"vanilla · {SECOND}"]), "the marker says the study"
    assert FOREIGN not in str(figure)
    assert "Not compared" in text(page)
    assert "their losses do not compare" in text(page)
    assert "adaptive of quick has a higher loss than adaptive of second" in text(page)
    alone = open_page("compute", study=FIRST, studies=[FOREIGN])
    assert len(charts(alone)) == 1
    assert "their losses do not compare" in text(alone)
