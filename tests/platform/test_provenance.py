"""Where a result came from."""

import json
import re
import subprocess

import pytest

from haltscale.platform import provenance


def test_versions_of_what_matters():
    found = provenance.versions()
    assert set(found) >= {"python", "haltscale", "torch", "deepspeed", "ray", "tokenizers"}
    assert all(re.match(r"\d+\.\d+", version) for version in found.values())


def test_a_package_that_is_missing_is_left_out(monkeypatch):
    monkeypatch.setattr(provenance, "PACKAGES", ("torch", "no-such-package"))
    assert set(provenance.versions()) == {"python", "torch"}


def test_the_machine_is_told_in_general_terms():
    found = provenance.machine()
    assert json.dumps(found)
    assert found["threads"] >= 1
    assert set(found) == {"cpu", "threads", "gpu"}  # no host name, no user, no path


def git(folder, *arguments):
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository of its own, in the place of the one that this file lies in."""
    git(tmp_path, "init", "-q")
    (tmp_path / "platform").mkdir()
    (tmp_path / "platform" / "provenance.py").write_text("")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "first")
    git(tmp_path, "tag", "-a", "v1", "-m", "a tag is not what identifies a commit")
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "platform" / "provenance.py"))
    return tmp_path


def test_the_commit_and_whether_the_code_was_changed_since(checkout):
    commit = git(checkout, "rev-parse", "HEAD")
    assert provenance.git_commit() == commit
    (checkout / "platform" / "provenance.py").write_text("changed")
    assert provenance.git_commit() == f"{commit}-dirty"


def test_a_job_is_told_its_commit(checkout, monkeypatch):
    monkeypatch.setenv("HALTSCALE_GIT_COMMIT", "abc123")
    assert provenance.git_commit() == "abc123"


def test_no_repository_no_git_no_commit(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "provenance.py"))
    assert provenance.git_commit() == ""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.git_commit() == ""
