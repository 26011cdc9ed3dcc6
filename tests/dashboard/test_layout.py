"""Small pieces that all pages share."""

from haltscale.dashboard import layout


def test_text_from_the_store_is_shown_literally():
    assert layout.plain("**a** [b](c) :red[d] $e$") == (r"\*\*a\*\* \[b\]\(c\) \:red\[d\] \$e\$")


def test_the_home_folder_is_written_short(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    assert layout.short("/home/ada/haltscale/runs") == "~/haltscale/runs"
    assert layout.short("/home/adalbert/runs") == "/home/adalbert/runs"
    assert layout.short("s3://bucket/runs") == "s3://bucket/runs"
