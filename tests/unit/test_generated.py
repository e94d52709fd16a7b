"""What is made from other files is current."""

from __future__ import annotations

import runpy
import tomllib
from pathlib import Path

import pytest
from msgspec import NODEFAULT

from fastdist import config, facts
from fastdist.settings import Config

ROOT = Path(__file__).parent.parent.parent
DOCUMENTS = runpy.run_path(str(ROOT / "scripts" / "generate_settings.py"))["documents"]()


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_generated_files_are_current(path):
    assert path.read_text() == DOCUMENTS[path], "run `make generated`"


def test_example_is_the_default_config():
    loaded = config.load(ROOT / "fastdist.example.toml", {}, {})
    assert loaded.config == Config()
    assert "default" not in loaded.sources.values()


LOGINS = {"jetstream.token", "jetstream.credentials", "jetstream.nkey"}  # of which one may be set, or user and password


@pytest.mark.parametrize("login", ["jetstream.user", *sorted(LOGINS)])
def test_every_setting_has_a_valid_example(login, monkeypatch):
    monkeypatch.setattr("fastdist.credentials.tokens", lambda *_: ["a-token-in-a-file"])
    document = {}
    others = LOGINS - {login} | ({"jetstream.user", "jetstream.password"} if login in LOGINS else set())
    for path in facts.FACTS.keys() - {"analyzers"} - others:
        about, (section, key) = facts.FACTS[path], path.split(".")
        assert about.summary
        assert about.examples or about.default not in ("", (), NODEFAULT)
        document.setdefault(section, {})[key] = about.examples[0] if about.examples else about.default
    analyzer = document.pop("analyzers[]")
    analyzer |= tomllib.loads(f"headers = {analyzer['headers']}") | {"endpoint": "https://analyzer.example"}
    document["analyzers"] = [analyzer]
    config._Reader({}, {"A1_AUTHORIZATION": "Bearer a-token"}).config(document)
