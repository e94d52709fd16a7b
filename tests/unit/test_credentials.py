"""Headers for analyzers and files of tokens: where values come from, what is refused, and that none is ever shown."""

from __future__ import annotations

import os
import pickle

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdist import credentials, ipc
from fastdist.cli import effective
from fastdist.config import load, warnings
from fastdist.errors import ConfigError
from fastdist.settings import Analyzer, ClientTls, Config, Header, Security

SECRET = "s3cret-of-a-test"
ANALYZER = '[[analyzers]]\nid = "a"\nendpoint = "http://h/x"\nweight = 1\n'


@pytest.fixture
def load_text(tmp_path):
    """Return ``load_text(text, environ)``: load a file with that in it."""

    def load_text(text, environ=None):
        path = tmp_path / "fastdist.toml"
        path.write_text(text)
        return load(path, environ or {}, {})

    return load_text


def with_headers(lines):
    return f"{ANALYZER}[analyzers.headers]\n{lines}\n"


def headers_of(loaded):
    return [(header.name, header.value) for header in loaded.config.analyzers[0].headers]


def problems_of(load_text, text, environ=None):
    with pytest.raises(ConfigError) as caught:
        load_text(text, environ)
    assert SECRET not in str(caught.value)
    return caught.value.problems


# ---- headers


def test_values_are_read_byte_for_byte(load_text, tmp_path):
    (tmp_path / "a1").write_bytes(b"Bearer \xff\xe9\t=\r\n")
    text = f"""
        Authorization = {{ env = "A1_TOKEN" }}
        "X-File!" = {{ file = "{tmp_path}/a1" }}
        x-key = 'Ünï "q" \\ ~'
    """
    assert headers_of(load_text(with_headers(text), {"A1_TOKEN": "Basic \udce9:=="})) == [
        ("Authorization", b"Basic \xe9:=="),
        ("X-File!", b"Bearer \xff\xe9\t="),
        ("x-key", 'Ünï "q" \\ ~'.encode()),
    ]


@pytest.mark.parametrize(
    ("held", "value"), [(b"v", b"v"), (b"v\n", b"v"), (b"v\r\n", b"v"), (b"a b\n", b"a b"), (b"\xe9", b"\xe9")]
)
def test_line_end_behind_value_is_not_its(tmp_path, held, value):
    (tmp_path / "file").write_bytes(held)
    assert credentials.header("X", {"file": str(tmp_path / "file")}, {}).value == value


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        ('Content-Length = "1"', "Content-Length: cannot be set: fastdist itself sends it with each request"),
        ('host = "h"', "host: cannot be set: fastdist itself sends it with each request"),
        ('Content-Type = "x"', "Content-Type: cannot be set: fastdist itself sends it with each request"),
        ('X-PACKET-ID = "x"', "X-PACKET-ID: cannot be set: fastdist itself sends it with each request"),
        ('X-Packet-Ids = "x"', "X-Packet-Ids: cannot be set: fastdist itself sends it with each request"),
        ('X-Packet-Count = "1"', "X-Packet-Count: cannot be set: fastdist itself sends it with each request"),
        ('X-Attempt = "1"', "X-Attempt: cannot be set: fastdist itself sends it with each request"),
        ('User-Agent = "x"', "User-Agent: cannot be set: fastdist itself sends it with each health check"),
        ('Accept = "x"', "Accept: cannot be set: fastdist itself sends it with each health check"),
        ('Transfer-Encoding = "chunked"', "Transfer-Encoding: cannot be set: it is about the form of the body"),
        ('Content-Encoding = "gzip"', "Content-Encoding: cannot be set: it is about the form of the body"),
        ('Trailer = "x"', "Trailer: cannot be set: it is about the form of the body"),
        ('Connection = "close"', "Connection: cannot be set: it is about the connection"),
        ('Keep-Alive = "x"', "Keep-Alive: cannot be set: it is about the connection"),
        ('TE = "x"', "TE: cannot be set: it is about the connection"),
        ('Upgrade = "h2c"', "Upgrade: cannot be set: it is about the connection"),
        ('Proxy-Authorization = "x"', "Proxy-Authorization: cannot be set: it is about the connection"),
        ('Expect = "100-continue"', "Expect: cannot be set: it is about the connection"),
        ('"X Y" = "x"', '"X Y": is no name of a header'),
        ('"X:Y" = "x"', '"X:Y": is no name of a header'),
        ('"" = "x"', '"": is no name of a header'),
        ('"X\\r\\nY" = "x"', '"X\\r\\nY": is no name of a header'),
        ('"Ä" = "x"', ": is no name of a header"),
        (f'X = "{SECRET}\\r\\nHost: evil"', "X: it holds a line end or another control character"),
        (f'X = "{SECRET}\\n"', "X: it holds a line end or another control character"),
        (f'X = "{SECRET}\\u0000"', "X: it holds a line end or another control character"),
        (f'X = " {SECRET}"', "X: it begins or ends with a space or a tab"),
        (f'X = "{SECRET}\\t"', "X: it begins or ends with a space or a tab"),
        ('X = ""', "X: must not be empty"),
        ("X = 1", 'X: expected text, { env = "NAME" } or { file = "PATH" }'),
        (f'X = ["{SECRET}"]', "X: expected text"),
        (f'X = {{ value = "{SECRET}" }}', "X: expected text"),
        ("X = {}", "X: expected text"),
        ('X = { env = "A", file = "b" }', "X: expected text"),
        ("X = { env = 1 }", "X: expected text"),
        ('X = { env = "NOT_SET" }', 'X: the environment variable "NOT_SET" is not set, or empty'),
        ('X = { env = "EMPTY" }', 'X: the environment variable "EMPTY" is not set, or empty'),
        ('X = { env = "LINES" }', 'X: the environment variable "LINES" holds a line end'),
        ('X = { file = "/no/such/file" }', "X: /no/such/file cannot be read: No such file or directory"),
        ('X = { file = "/" }', "X: / cannot be read: Is a directory"),
        ('X = { file = "/dev/null" }', "X: /dev/null is empty"),
        ('X = { file = "a\\nb" }', "X: file: must have no control characters"),
        (f'x = "1"\nX = "{SECRET}"', "X: is there twice"),
    ],
)
def test_unusable_header_is_named(load_text, lines, problem):
    environ = {"EMPTY": "", "LINES": f"{SECRET}\nX: y"}
    (found,) = problems_of(load_text, with_headers(lines), environ)
    assert found.startswith("analyzers[0].headers.")
    assert problem in found
    assert "\n" not in found


def test_file_with_lines_is_refused(load_text, tmp_path):
    (tmp_path / "file").write_text(f"{SECRET}\nHost: evil\n")
    (problem,) = problems_of(load_text, with_headers(f'X = {{ file = "{tmp_path}/file" }}'))
    assert problem.startswith(f"analyzers[0].headers.X: {tmp_path}/file holds a line end")
    (tmp_path / "file").write_text("x" * (credentials.MAX_VALUE + 1))
    (problem,) = problems_of(load_text, with_headers(f'X = {{ file = "{tmp_path}/file" }}'))
    assert "has more than 8192 bytes" in problem


@pytest.mark.parametrize("value", [f'"{SECRET}"', f'["{SECRET}"]', "1", "true"])
def test_headers_have_to_be_a_table(load_text, value):
    (problem,) = problems_of(load_text, f"{ANALYZER}headers = {value}\n")
    assert problem.startswith("analyzers[0].headers: expected a table, got ")


@given(st.text(max_size=20), st.binary(max_size=30))
def test_what_is_taken_adds_one_line(name, value):
    try:
        header = credentials.header(name, value.decode("utf-8", "surrogateescape"), {})
    except ValueError:
        return
    lines = Analyzer(id="a", endpoint="http://h", weight=1, headers=(header,)).header_lines
    assert lines == name.encode("ascii") + b": " + value + b"\r\n"
    assert not {byte for byte in lines[:-2] if byte < 32 and byte != 9}
    assert lines.count(b"\n") == 1


def test_reload_renews_values(load_text, tmp_path):
    file = tmp_path / "a1"
    file.write_text("old")
    before = load_text(with_headers(f'X = {{ file = "{file}" }}'))
    file.write_text("new\n")
    assert headers_of(before.reload()) == [("X", b"new")]
    file.unlink()
    with pytest.raises(ConfigError, match="cannot be read"):
        before.reload()


def test_values_reach_workers():
    header = Header("X", b"\xff\x80")
    tls = ClientTls(b"1", b"\xff", b"3")
    config = Config(analyzers=(Analyzer(id="a", endpoint="http://h", weight=1, headers=(header,), tls=tls),))
    fd = os.memfd_create("settings")
    try:
        ipc.write_settings(fd, ipc.Settings(1, {}, config))
        assert ipc.read_settings(fd).config == config
    finally:
        os.close(fd)


# ---- nothing is shown


def test_no_value_is_in_any_text(load_text, tmp_path):
    for name in ("header", "tokens"):
        (tmp_path / name).write_text(f"{SECRET}-{name}\n")
    text = (
        ANALYZER.replace("/x", f"/x?key={SECRET}") + f'health = "/up?key={SECRET}"\n'
        f'[analyzers.headers]\nX-A = "{SECRET}"\nX-B = {{ env = "B" }}\nX-C = {{ file = "{tmp_path}/header" }}\n'
        f'[security]\ntokens = ["{SECRET}"]\ntokens_file = "{tmp_path}/tokens"\n'
        f'admin_tokens_file = "{tmp_path}/tokens"\n'
    )
    loaded = load_text(text, {"B": SECRET})
    (analyzer,) = loaded.config.analyzers
    analyzer = msgspec.structs.replace(analyzer, tls=ClientTls(key=SECRET.encode()))
    shown = [effective.as_toml(loaded), effective.as_toml(loaded, changed=True), repr(loaded), repr(loaded.config)]
    shown += [repr(analyzer), str(analyzer), repr(analyzer.headers), repr(analyzer.tls), repr(loaded.config.security)]
    shown += [*effective.warnings(loaded.config), *warnings(loaded.config)]
    for each in shown:
        assert SECRET not in each, each
    assert SECRET in str(pickle.dumps([header.value for header in analyzer.headers])), "there is one to be hidden"


def test_config_shows_where_values_are_from(load_text, tmp_path):
    (tmp_path / "a1").write_text(SECRET)
    lines = f'"X!" = "{SECRET}"\nX-B = {{ env = "B" }}\nX-C = {{ file = "{tmp_path}/a1" }}'
    loaded = load_text(with_headers(lines), {"B": SECRET})
    shown = effective.as_toml(loaded)
    assert (
        f'[analyzers.headers]\n"X!" = "********"\nX-B = {{ env = "B" }}\nX-C = {{ file = "{tmp_path}/a1" }}\n' in shown
    )
    again = load_text(shown, {"B": SECRET})
    assert headers_of(again) == [("X!", b"********"), ("X-B", SECRET.encode()), ("X-C", SECRET.encode())]


def test_queries_are_shown_as_dots(load_text):
    shown = effective.as_toml(load_text(ANALYZER.replace("/x", "/x?key=1") + 'health = "https://c/?k=2"\n'))
    assert 'endpoint = "http://h/x?..."\nweight = 1\nhealth = "https://c/?..."\n' in shown


def test_values_sent_back_are_masked():
    headers = (Header("Authorization", b"Bearer abcdefgh"), Header("X", b"7"))
    analyzer = Analyzer(id="a", endpoint="http://h", weight=1, headers=headers)
    told = analyzer.without_secrets("HTTP 302, Location: /abcdefgh/7 for Bearer abcdefgh")
    assert told == "HTTP 302, Location: /***/7 for ***"
    for cut in range(6, 15):
        assert analyzer.without_secrets("X-Echo: Bearer abcdefgh"[: 8 + cut]) == "X-Echo: ***"
    assert analyzer.without_secrets("for abcdefg") == "for ***"
    assert analyzer.without_secrets("nothing of that") == "nothing of that"
    plain = Analyzer(id="a", endpoint="http://h", weight=1)
    assert plain.without_secrets("Bearer abcdefgh") == "Bearer abcdefgh"


def test_queries_sent_back_are_masked():
    endpoint, health = "http://h/x?key=k%C3%A9y-of-mine&v=1", "/ok?only-the-key"
    analyzer = Analyzer(id="a", endpoint=endpoint, weight=1, health=health)
    told = analyzer.without_secrets("Cannot POST /x?key=k%C3%A9y-of-mine&v=1, k\u00e9y-of-mine, only-the-key")
    assert told == "Cannot POST /x?key=***&v=1, ***, ***"
    assert analyzer.without_secrets("/x?key=k%C3%A9") == "/x?key=***"
    assert analyzer.without_secrets("nothing of that") == "nothing of that"


def test_values_sent_back_as_json_are_masked():
    analyzer = Analyzer(id="a", endpoint="http://h", weight=1, headers=(Header("X", b'ab"cd\\ef/gh'),))
    assert analyzer.without_secrets(r'{"X": "ab\"cd\\ef/gh"}') == '{"X": "***"}'
    assert analyzer.without_secrets(r'{"X": "ab\"cd\\ef\/gh"}') == '{"X": "***"}', "as PHP writes a slash"


# ---- files of tokens


def security(tmp_path, tokens=None, admin=None, more=""):
    text = "[security]\n"
    for name, held in (("tokens", tokens), ("admin_tokens", admin)):
        if held is not None:
            (tmp_path / name).write_bytes(held)
            text += f'{name}_file = "{tmp_path / name}"\n'
    return ANALYZER + text + more


def test_tokens_are_read_from_files(load_text, tmp_path):
    text = security(tmp_path, b"# of web\nfirst\r\n\nsecond\n", b"third", 'tokens = ["listed", "first"]\n')
    loaded = load_text(text)
    found = loaded.config.security
    assert found.tokens == ("listed", "first", "second")
    assert found.admin_tokens == ("third",)
    file = f"file {tmp_path}/fastdist.toml"
    assert loaded.sources["security.tokens"] == f"{file}; file {tmp_path}/tokens"
    assert loaded.sources["security.admin_tokens"] == f"file {tmp_path}/admin_tokens"
    assert f"; file {tmp_path}/tokens; 3, masked\n" in effective.as_toml(loaded)


@pytest.mark.parametrize(
    ("held", "problem"),
    [
        (b"", "holds no token"),
        (b"# only\n\n", "holds no token"),
        (b"good\ns3cret-of-a-test with spaces\n", "line 2: must be visible ASCII without spaces"),
        (b"s3cret-of-a-test\xc3\xa4", "line 1: must be visible ASCII without spaces"),
        (b"a\rs3cret-of-a-test", "line 1: must be visible ASCII without spaces"),
    ],
)
def test_unusable_tokens_file_is_refused(load_text, tmp_path, held, problem):
    (found,) = problems_of(load_text, security(tmp_path, held))
    assert found.startswith(f"security.tokens_file: {tmp_path}/tokens")
    assert problem in found


def test_missing_tokens_file_is_refused(load_text, tmp_path):
    text = security(tmp_path, b"one", b"two")
    (tmp_path / "admin_tokens").unlink()
    (found,) = problems_of(load_text, text)
    where = f"security.admin_tokens_file: {tmp_path}/admin_tokens"
    assert found == f"{where} cannot be read: No such file or directory"


def test_reload_renews_tokens(load_text, tmp_path):
    before = load_text(security(tmp_path, b"one"))
    (tmp_path / "tokens").write_text("two\n")
    assert before.reload().config.security.tokens == ("two",)
    (tmp_path / "tokens").write_text("")
    with pytest.raises(ConfigError, match="holds no token"):
        before.reload()


def test_reload_opens_nothing_by_leaving_out(load_text, tmp_path):
    before = load_text(security(tmp_path, b"one", b"two"))
    before.path.write_text(ANALYZER)
    with pytest.raises(ConfigError) as caught:
        before.reload()
    assert [problem.partition(":")[0] for problem in caught.value.problems] == [
        "security.tokens",
        "security.admin_tokens",
    ]
    before.path.write_text(f"{ANALYZER}[security]\ntokens = []\nadmin_tokens = []\n")
    assert before.reload().config.security == Security()


def test_environment_names_a_tokens_file(load_text, tmp_path):
    (tmp_path / "tokens").write_text("one")
    loaded = load_text(ANALYZER, {"FASTDIST_SECURITY__TOKENS_FILE": str(tmp_path / "tokens")})
    assert loaded.config.security.tokens == ("one",)


# ---- settings of one analyzer


def test_own_settings_replace_those_of_all(load_text):
    text = ANALYZER + 'timeout = "20s"\nconnections = 4\npipeline = 2\nmode = "batch"\n'
    other = ANALYZER.replace('"a"', '"b"')
    config = load_text(f'{text}{other}[delivery]\ntimeout = "7s"\nconnections = 8\n').config
    first, second = (analyzer.delivery(config.delivery) for analyzer in config.analyzers)
    assert (first.timeout, first.connections, first.pipeline, first.mode) == (20.0, 4, 2, "batch")
    assert (first.linger, first.connect_timeout) == (config.delivery.linger, config.delivery.connect_timeout)
    assert second is config.delivery


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("timeout = 0", "timeout: must be >= 1ms"),
        ('timeout = "x"', "timeout: expected a duration"),
        ("connections = 0", "connections: must be >= 1"),
        ("pipeline = 10001", "pipeline: must be <= 10000"),
        ('mode = "both"', "mode: must be one of single, batch"),
        ('ca_file = "x"', "ca_file: needs an https:// endpoint"),
        ('server_name = "x"', "server_name: needs an https:// endpoint"),
        ('server_name = "a b"', "server_name: must be a host name"),
        ('client_cert = "x"\nhealth = "https://h/"', "client_key: missing: analyzers[0].client_cert is set"),
        ('client_key = "x"\nhealth = "https://h/"', "client_cert: missing: analyzers[0].client_key is set"),
        ("linger = 1", "unknown key"),
        ("tls = 1", "unknown key"),
    ],
)
def test_unusable_own_setting_is_named(load_text, line, problem):
    problems = problems_of(load_text, f"{ANALYZER}{line}\n")
    assert any(each.startswith("analyzers[0].") and problem in each for each in problems), problems


def test_own_mode_counts_for_warnings(load_text):
    text = f'{ANALYZER}mode = "batch"\n[delivery]\nbatch_packets = 200\n'
    assert [each.partition(":")[0] for each in warnings(load_text(text).config)] == ["delivery.batch_packets"]
    assert warnings(load_text(text.replace('batch"', 'single"')).config) == []
