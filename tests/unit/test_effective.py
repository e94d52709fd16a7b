"""The configuration in force as it is printed: it can be read again, says where all comes from, and shows no token."""

from __future__ import annotations

import os
import tomllib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdist import config, facts
from fastdist.cli import effective
from fastdist.settings import Config

FILE = """
[server]
port = 8080
max_body = "1.5MiB"

[[analyzers]]
id = "a"
endpoint = "http://h:1/x?y=\\"z"
weight = 1e-7

[[analyzers]]
id = "b"
endpoint = "https://h:2/"
weight = 3
health = "/up"

[security]
tokens = ["first-secret", "second-secret"]
cors_origins = ["https://a.example", "https://b.example"]
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "fastdist.toml"
    path.write_text(FILE)
    return path


def read_again(text, tmp_path):
    path = tmp_path / "again.toml"
    path.write_text(text)
    return config.load(path, {}, {}).config


def test_defaults_read_again_are_defaults(tmp_path):
    text = effective.as_toml(config.load(None, {}, {}))
    assert read_again(text, tmp_path) == Config()
    assert text.startswith("# fastdist, no file, only the environment; 0 of ")
    settings = [line for line in text.splitlines() if " = " in line and "# default" in line]
    assert len(settings) == len(facts.SETTINGS) - 1


def test_set_values_are_read_but_for_tokens(file, tmp_path):
    loaded = config.load(file, {"FASTDIST_QUEUE__DURABILITY": "fsync", "FASTDIST_RETRY__CAP": "1h"}, {"workers": 3})
    again = read_again(effective.as_toml(loaded), tmp_path)
    masked = msgspec.structs.replace(loaded.config.security, tokens=(effective.MASK,) * 2)
    first, second = loaded.config.analyzers
    shown = msgspec.structs.replace(first, endpoint="http://h:1/x?...")
    assert again == msgspec.structs.replace(loaded.config, security=masked, analyzers=(shown, second))


def test_every_value_says_where_it_is_from(file):
    environ = {"PORT": "1", "WORKER_COUNT": "2", "FASTDIST_SERVER__PORT": "5", "FASTDIST_LIMITS__RATE": "1.5"}
    text = effective.as_toml(config.load(file, environ, {"workers": 7, "host": None, "port": None}))
    origins = {line.split(" = ")[0]: line.partition("#")[2].strip() for line in text.splitlines() if " = " in line}
    assert origins["port"] == "environment FASTDIST_SERVER__PORT"
    assert origins["workers"] == "flag --workers"
    assert origins["rate"] == "environment FASTDIST_LIMITS__RATE"
    assert origins["max_body"] == f"file {file}"
    assert origins["host"] == "default"
    assert text.count(f"[[analyzers]]                           # file {file}\n") == 2


def test_tokens_are_masked_and_counted(file):
    for changed in (True, False):
        text = effective.as_toml(config.load(file, {}, {}), changed=changed)
        assert "secret" not in text
        assert f'tokens = ["********", "********"]       # file {file}; 2, masked\n' in text
    assert "admin_tokens = []" in effective.as_toml(config.load(file, {}, {}))


def test_changed_only_shows_just_the_changes(file):
    text = effective.as_toml(config.load(file, {"PORT": "1"}, {}), changed=True)
    document = tomllib.loads(text)
    assert document.keys() == {"server", "analyzers", "security"}
    assert document["server"] == {"port": 1, "max_body": "1.5MiB"}
    assert document["security"].keys() == {"tokens", "cors_origins"}
    assert "default\n" not in text


@given(
    st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1),
    st.floats(0, 365 * 86_400) | st.just("never"),
    st.integers(1024, 2**20),
    st.floats(1e-300, 1e300),
)
def test_any_value_is_read_again_as_it_was(text, spill_after, max_header, weight):
    document = {
        "server": {"max_header": max_header},
        "queue": {"path": text},
        "delivery": {"spill_after": spill_after},
        "analyzers": [{"id": "a", "endpoint": "http://h/", "weight": weight}],
    }
    loaded = config.Loaded(
        config._Reader({}, {}).config(document), dict.fromkeys(facts.SETTINGS, "default"), None, os.environ, {}
    )
    again = config._Reader({}, {}).config(tomllib.loads(effective.as_toml(loaded)))
    assert again == loaded.config


def warned(tmp_path, text):
    path = tmp_path / "fastdist.toml"
    path.write_text(text)
    return list(effective.warnings(config.load(path, {}, {}).config))


def test_ordinary_settings_are_not_warned_of(tmp_path):
    assert warned(tmp_path, "[server]\nworkers = 4\n") == []


def test_queue_part_too_small_for_body_warns(tmp_path):
    (warning,) = warned(tmp_path, "[server]\nworkers = 16\n")
    assert warning.startswith("server.max_body: packets over 8MiB are answered 413 all the same")
    assert warned(tmp_path, "[server]\nworkers = 16\nmax_body = '8MiB'\n") == []


def test_stream_too_small_for_body_warns(tmp_path):
    text = "[server]\nworkers = 64\n[queue]\nbackend = 'jetstream'\n[jetstream]\nmax_bytes = "
    (warning,) = warned(tmp_path, text + "'8MiB'\n")
    assert warning.startswith("server.max_body: packets that jetstream.max_bytes has no room for (8MiB)")
    assert warned(tmp_path, text + "'16MiB'\n") == []


def test_shared_analyzer_endpoint_warns(tmp_path):
    text = "[server]\nworkers = 1\n" + "".join(
        f"[[analyzers]]\nid = '{name}'\nendpoint = 'http://{host}/'\nweight = 1\n"
        for name, host in zip("abc", "xyx", strict=True)
    )
    assert warned(tmp_path, text) == ["analyzers[2].endpoint: the same as analyzers[0].endpoint"]


def test_batching_possible_non_json_warns(tmp_path):
    text = "[server]\nworkers = 1\nvalidation = 'none'\n[delivery]\nmode = 'batch'\nbatch_packets = 200\n"
    assert [line.split(":")[0] for line in warned(tmp_path, text)] == ["delivery.batch_packets", "server.validation"]


def test_trusting_every_client_warns(tmp_path):
    text = "[server]\nworkers = 1\ntrusted_proxies = ['10.0.0.0/8', '0.0.0.0/0', '::/0']\n"
    assert [line.split(":")[0] for line in warned(tmp_path, text)] == [
        "server.trusted_proxies[1]",
        "server.trusted_proxies[2]",
    ]
