"""The configuration: the defaults, where values come from, every problem and its words, and the way to workers."""

from __future__ import annotations

import contextlib
import math
import os
import re
import tomllib

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastdist import ipc, tomlfile
from fastdist._core import round_capacity
from fastdist.config import load, reloadable, warnings
from fastdist.config_rules import MIN_PART
from fastdist.errors import ConfigError
from fastdist.protocols import table
from fastdist.settings import PROTOCOLS, Analyzer, Config, Delivery, Retry, Server

# The documented configuration, word for word: every value in it is the default.
DOCUMENTED = """
[server]
host = "0.0.0.0"
port = 3000
workers = 0
max_body = "10MiB"
max_header = "16KiB"
header_timeout = "10s"
body_timeout = "30s"
keepalive_timeout = "75s"
max_connections = 10000
drain_timeout = "30s"
validation = "schema"
protocols = ["json", "otlp", "loki", "splunk", "elasticsearch"]
trusted_proxies = []
proxy_protocol = "off"

[[analyzers]]
id = "A1"
endpoint = "http://127.0.0.1:3001/analyze"
weight = 0.1
health = "/health"

[[analyzers]]
id = "A2"
endpoint = "http://127.0.0.1:3002/analyze"
weight = 0.4

[[analyzers]]
id = "A3"
endpoint = "http://127.0.0.1:3003/analyze"
weight = 0.2

[[analyzers]]
id = "A4"
endpoint = "http://127.0.0.1:3004/analyze"
weight = 0.3

[distribution]
strategy = "even"
by = "packets"

[queue]
durability = "disk"
path = "fastdist-data"
capacity = "256MiB"
sync_interval = "500ms"
backend = "ring"

[jetstream]
servers = ["nats://127.0.0.1:4222"]
stream = "FASTDIST"
replicas = 3
create = true
max_bytes = "1GiB"
ack_wait = "30s"
dedup_window = "2m"
publish_timeout = "5s"
claim = 4096
bundle_packets = 64
bundle_bytes = "256KiB"
user = ""
password = ""
token = ""
credentials = ""
nkey = ""
tls_ca = ""
tls_cert = ""
tls_key = ""

[delivery]
mode = "single"
batch_packets = 64
batch_bytes = "1MiB"
linger = "2ms"
connections = 32
pipeline = 1
spill_after = "1s"
timeout = "5s"
connect_timeout = "1s"
max_age = "60s"

[retry]
base = "100ms"
cap = "30s"
max_attempts = 0

[health]
interval = "2s"
timeout = "1s"
rise = 2
fall = 3
slow_start = "0s"

[dead_letters]
max_bytes = 0
max_age = 0
path = ""

[limits]
rate = 0
burst = 0
client_rate = 0
client_burst = 0

[security]
tokens = []
tokens_file = ""
admin_tokens = []
admin_tokens_file = ""
cors_origins = []
tls_cert = ""
tls_key = ""

[admin]
listen = ""
tls = "on"
"""

ID_RULE = 'must be 1..64 characters of A-Z a-z 0-9 . _ -, and neither "." nor ".."'
ANALYZERS = """
[[analyzers]]
id = "one"
endpoint = "http://one:9000/in"
weight = 1

[[analyzers]]
id = "two"
endpoint = "http://two:9000/in"
weight = 3
"""


@pytest.fixture
def write(tmp_path):
    """Write a configuration file and return its path."""

    def write(text):
        path = tmp_path / "fastdist.toml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


@pytest.fixture(autouse=True, scope="module")
def cores():
    """Have a machine of the same size everywhere: the least capacity depends on that."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.sched_getaffinity", lambda _: range(4))
        yield


@pytest.fixture
def config_of(write):
    """Return the configuration that a file makes."""
    return lambda text: load(write(text), {}, {}).config


@pytest.fixture
def problems_of(write):
    """Return the problems of a file."""

    def problems_of(text, environ=None, flags=None):
        with pytest.raises(ConfigError) as caught:
            load(write(text), environ or {}, flags or {})
        return caught.value.problems

    return problems_of


# ---- defaults and types


def test_empty_config_has_all_defaults():
    loaded = load(None, {}, {})
    assert loaded.config == Config()
    assert loaded.path is None
    assert set(loaded.sources.values()) == {"default"}


def test_documented_values_are_the_defaults(config_of):
    assert config_of(DOCUMENTED) == Config()


def test_the_documentation_has_every_setting():
    document = tomllib.loads(DOCUMENTED)
    assert {"analyzers"} | {f"{s}.{k}" for s, t in document.items() if s != "analyzers" for k in t} == set(
        load(None, {}, {}).sources
    )


def test_values_are_normalised(config_of):
    config = config_of(
        '[server]\nmax_body = 1000\nheader_timeout = "1.5m"\nbody_timeout = 7\n[limits]\nrate = 5\n'
        '[security]\ntokens = ["a", "b"]\n[delivery]\nspill_after = "never"\n' + ANALYZERS
    )
    assert config.server.max_body == 1000
    assert config.server.header_timeout == 90.0
    assert type(config.server.body_timeout) is float
    assert type(config.limits.rate) is float
    assert type(config.analyzers[0].weight) is float
    assert config.security.tokens == ("a", "b")
    assert config.delivery.spill_after == math.inf
    assert [analyzer.id for analyzer in config.analyzers] == ["one", "two"]


@pytest.mark.parametrize(
    ("setting", "value", "expected"),
    [
        ("server.port", "0", 0),
        ("server.port", "65535", 65535),
        ("server.workers", "256", 256),
        ("server.max_header", '"1KiB"', 1024),
        ("server.max_body", "1", 1),
        ("server.drain_timeout", "0", 0.0),
        ("server.header_timeout", '"1ms"', 0.001),
        ("server.host", '"::1"', "::1"),
        ("queue.capacity", '"1MiB"', 2**20),
        ("queue.path", '"/var/lib/früh"', "/var/lib/früh"),
        ("delivery.linger", "0", 0.0),
        ("delivery.spill_after", "0", 0.0),
        ("delivery.spill_after", '"365d"', 365 * 86400.0),
        ("health.slow_start", '"30s"', 30.0),
        ("limits.rate", "0.5", 0.5),
        ("security.cors_origins", '["*"]', ("*",)),
        (
            "security.cors_origins",
            '["https://Example.com:443", "http://[::1]:80"]',
            ("https://example.com", "http://[::1]"),
        ),
        ("security.cors_origins", '["http://localhost:5173"]', ("http://localhost:5173",)),
    ],
)
def test_values_at_their_bounds(config_of, setting, value, expected):
    section, key = setting.split(".")
    config = config_of(f"[{section}]\n{key} = {value}\n")
    assert getattr(getattr(config, section), key) == expected


def test_queue_has_room_for_each_ring(config_of, problems_of, monkeypatch):
    assert round_capacity(1) == MIN_PART
    text = "[server]\nworkers = {}\n[queue]\ncapacity = '1MiB'\n"
    assert config_of(text.format(16)).queue.capacity == 2**20
    assert problems_of(text.format(17)) == [
        "queue.capacity: must be >= 1088KiB: 64KiB for each of 17 workers (server.workers)"
    ]
    assert problems_of("[queue]\ncapacity = '1MiB'\n", {"WORKER_COUNT": "64"}) == [
        "queue.capacity: must be >= 4MiB: 64KiB for each of 64 workers (server.workers)"
    ]
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(32))
    assert problems_of(text.format(0)) == [
        "queue.capacity: must be >= 2MiB: 64KiB for each of 32 workers (one per core here)"
    ]


def test_a_byte_order_mark_is_no_problem(config_of):
    assert config_of(b"\xef\xbb\xbf[server]\nport = 1\n").server.port == 1


def test_a_configuration_is_frozen():
    with pytest.raises(AttributeError):
        Config().server.port = 1  # type: ignore[misc]


# ---- problems


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        # unknown
        ("[server]\nprot = 1", "server.prot: unknown key; did you mean 'port'?"),
        ("[server]\nPORT = 1", "server.PORT: unknown key; did you mean 'port'?"),
        ("[server]\nzzz = 1", "server.zzz: unknown key"),
        ('[server]\n"a\\nb.c" = 1', 'server."a\\nb.c": unknown key'),
        ("[servr]\nport = 1", "servr: unknown section; did you mean 'server'?"),
        ("[[analyzer]]\nid = 'a'", "analyzer: unknown section; did you mean 'analyzers'?"),
        # types
        ("server = 1", "server: expected a table, got integer"),
        ("[server]\nport = 'x'", 'server.port: expected an integer, got string "x"'),
        ("[server]\nport = 3000.0", "server.port: expected an integer, got number 3000.0"),
        ("[server]\nport = true", "server.port: expected an integer, got boolean true"),
        ("[server]\nport = []", "server.port: expected an integer, got a list"),
        ("[server]\nport = 2020-01-01", "server.port: expected an integer, got a date"),
        ("[server]\nhost = 1", "server.host: expected a string, got integer 1"),
        ("[server]\nhost = {}", "server.host: expected a string, got a table"),
        ("[limits]\nrate = true", "limits.rate: expected a number, got boolean true"),
        ("[limits]\nrate = '1'", 'limits.rate: expected a number, got string "1"'),
        ("[limits]\nburst = 1.5", "limits.burst: expected an integer, got number 1.5"),
        ("[retry]\nbase = true", "retry.base: expected a duration such as 500ms, 2s or 1.5m, got boolean true"),
        ("[server]\nmax_body = '5'", "server.max_body: expected a size such as 512B, 16KiB or 10MiB, got '5'"),
        (
            "[delivery]\nspill_after = 'soon'",
            "delivery.spill_after: expected a duration such as 500ms, 2s or 1.5m, or \"never\", got 'soon'",
        ),
        ("[security]\ncors_origins = '*'", "security.cors_origins: expected a list, got string"),
        # enumerations
        ("[delivery]\nmode = 'bulk'", 'delivery.mode: must be one of single, batch; got "bulk"'),
        ("[delivery]\nmode = 1", "delivery.mode: must be one of single, batch; got integer 1"),
        ("[server]\nvalidation = 'x'", 'server.validation: must be one of none, schema, strict; got "x"'),
        ("[distribution]\nstrategy = 'x'", 'distribution.strategy: must be one of even, random, sticky; got "x"'),
        ("[distribution]\nby = 'x'", 'distribution.by: must be one of packets, messages, bytes; got "x"'),
        ("[queue]\ndurability = 'ssd'", 'queue.durability: must be one of memory, disk, fsync; got "ssd"'),
        # bounds
        ("[server]\nport = -1", "server.port: must be >= 0"),
        ("[server]\nport = 65536", "server.port: must be <= 65535"),
        ("[server]\nport = 0xffffffffffffffffffffffff", "server.port: must be <= 65535"),
        ("[server]\nworkers = -1", "server.workers: must be >= 0"),
        ("[server]\nworkers = 257", "server.workers: must be <= 256"),
        ("[server]\nhost = ''", "server.host: must not be empty"),
        (
            "[server]\nhost = '0.0.0..0'",
            "server.host: must be an address or a host name, each part of 1 to 63 characters",
        ),
        (
            f"[server]\nhost = 'a.{'b' * 64}'",
            "server.host: must be an address or a host name, each part of 1 to 63 characters",
        ),
        ('[server]\nhost = "a\\u0000"', "server.host: must have no control characters, and be valid UTF-8"),
        ("[server]\nmax_body = 0", "server.max_body: must be >= 1B"),
        ("[server]\nmax_body = '2GiB'", "server.max_body: must be <= 1GiB"),
        ("[server]\nmax_header = 1023", "server.max_header: must be >= 1KiB"),
        ("[server]\nheader_timeout = 0", "server.header_timeout: must be >= 1ms"),
        ("[server]\nbody_timeout = 0", "server.body_timeout: must be >= 1ms"),
        ("[server]\nkeepalive_timeout = 0", "server.keepalive_timeout: must be >= 1ms"),
        ("[server]\nkeepalive_timeout = '366d'", "server.keepalive_timeout: must be <= 365d"),
        ("[server]\ndrain_timeout = -1", "server.drain_timeout: must not be negative"),
        ("[server]\ndrain_timeout = inf", "server.drain_timeout: is too large"),
        ("[server]\nmax_connections = 0", "server.max_connections: must be >= 1"),
        ("[queue]\npath = ''", "queue.path: must not be empty"),
        ("[queue]\ncapacity = '1MB'", "queue.capacity: must be >= 1MiB"),
        ("[queue]\nsync_interval = 0", "queue.sync_interval: must be >= 1ms"),
        ("[delivery]\nbatch_packets = 0", "delivery.batch_packets: must be >= 1"),
        (
            "[delivery]\nbatch_packets = 1001",
            "delivery.batch_packets: must be <= 1000: X-Packet-Ids has the id of each, and servers refuse long heads",
        ),
        ("[delivery]\nbatch_bytes = 0", "delivery.batch_bytes: must be >= 1B"),
        ("[delivery]\nconnections = 0", "delivery.connections: must be >= 1"),
        ("[delivery]\npipeline = 0", "delivery.pipeline: must be >= 1"),
        ("[delivery]\ntimeout = 0", "delivery.timeout: must be >= 1ms"),
        ("[delivery]\nconnect_timeout = 0", "delivery.connect_timeout: must be >= 1ms"),
        ("[delivery]\nspill_after = '366d'", "delivery.spill_after: must be <= 365d"),
        ("[delivery]\nspill_after = inf", "delivery.spill_after: is too large"),
        ("[retry]\nbase = 0", "retry.base: must be >= 1ms"),
        ("[retry]\nmax_attempts = -1", "retry.max_attempts: must be >= 0"),
        ("[health]\ninterval = 0", "health.interval: must be >= 1ms"),
        ("[health]\ntimeout = 0", "health.timeout: must be >= 1ms"),
        ("[health]\nrise = 0", "health.rise: must be >= 1"),
        ("[health]\nfall = 0", "health.fall: must be >= 1"),
        ("[limits]\nrate = -0.5", "limits.rate: must be >= 0"),
        ("[limits]\nrate = nan", "limits.rate: must be finite"),
        ("[limits]\nclient_burst = -1", "limits.client_burst: must be >= 0"),
        # settings that depend on one another
        ("[retry]\nbase = '31s'", "retry.base: must be <= retry.cap"),
        ("[retry]\ncap = '50ms'", "retry.base: must be <= retry.cap"),
        ("[security]\ntls_cert = 'a.pem'", "security.tls_key: missing: security.tls_cert is set, and TLS needs both"),
        ("[security]\ntls_key = 'a.pem'", "security.tls_cert: missing: security.tls_key is set, and TLS needs both"),
        (
            "[distribution]\nstrategy = 'sticky'\n[server]\nvalidation = 'none'",
            (
                'distribution.strategy: "sticky" needs server.validation = "schema" or "strict": '
                "the emitterId is read there"
            ),
        ),
        (
            "[distribution]\nby = 'messages'\n[server]\nvalidation = 'none'",
            'distribution.by: "messages" needs server.validation = "schema" or "strict": they are counted there',
        ),
        # security
        ("[security]\ntokens = ['']", None),
        ("[security]\ntokens = ['a', 'b c']", None),
        ("[security]\nadmin_tokens = ['ü']", None),
        (
            "[admin]\nlisten = '3001'",
            "admin.listen: must be an address and a port, such as 127.0.0.1:3001 or [::1]:3001",
        ),
        ("[admin]\nlisten = 'a:3000'", "admin.listen: must not be the address of server.host and server.port"),
        (
            "[server]\nhost = '::1'\nport = 1\n[admin]\nlisten = '[::1]:1'",
            "admin.listen: must not be the address of server.host and server.port",
        ),
        ("[admin]\ntls = 'yes'", 'admin.tls: must be one of on, off; got "yes"'),
        (
            "[server]\nproxy_protocol = 'on'",
            "server.proxy_protocol: needs server.trusted_proxies: the header is read from these only",
        ),
        (
            "[server]\ntrusted_proxies = ['10.0.0.1/8']",
            "server.trusted_proxies[0]: must be an address, or a network such as 10.0.0.0/8; host bits are set",
        ),
        ("[security]\ncors_origins = ['*', 'http://a']", 'security.cors_origins: "*" must be alone'),
        ("[security]\ncors_origins = ['http://a', '*']", 'security.cors_origins: "*" must be alone'),
    ],
)
def test_problem_is_one_line_after_its_path(problems_of, text, problem):
    found = problems_of(text)
    assert len(found) == 1
    assert "\n" not in found[0]
    assert re.match(r"[A-Za-z0-9_.\[\]\"\\]+: \w?", found[0])
    if problem:
        assert found == [problem]


URL = "must be an http:// or https:// URL"
FORM = "must have the form http://host[:port][/path]"


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("", URL),
        ("one:9000/in", URL),
        ("ftp://one/in", URL),
        ("/in", URL),
        ("http://", FORM),
        ("http:///in", FORM),
        ("http://:80/in", FORM),
        ("http://one:/in", FORM),
        ("http://one:x/in", FORM),
        ("http://::1/in", FORM),
        ("http://[::1", FORM),
        ("http://[::1]x/in", FORM),
        ("http://[::g]/in", "must have a valid IPv6 address in its brackets"),
        ("http://[]/in", "must have a valid IPv6 address in its brackets"),
        ("http://[fe80::1%eth0]/in", "must have no IPv6 zone"),
        ("http://one:0/in", "must have a port from 1 to 65535"),
        ("http://one:65536/in", "must have a port from 1 to 65535"),
        ("http://a..b/in", "must have a valid host name"),
        ("http://a,b/in", "must have a valid host name"),
        ("http://" + "a" * 64, "must have a valid host name"),
        ("http://" + "a." * 128, "must have a valid host name"),
        ("http://user:hush@one/in", "must have no user name or password"),
        ("http://user@one", "must have no user name or password"),
        ("http://one/in#top", "must have no fragment (#)"),
        ("http://one#", "must have no fragment (#)"),
        ("http://one/a b", "must be visible ASCII characters only (percent-encode the others)"),
        ("http://bücher/in", "must be visible ASCII characters only (percent-encode the others)"),
        ("http://one/\\r\\nX: y", "must have no control characters, and be valid UTF-8"),
    ],
)
def test_urls_that_are_refused(problems_of, url, problem):
    text = '[[analyzers]]\nid = "a"\nweight = 1\nendpoint = "{}"\nhealth = "{}"\n'
    assert problems_of(text.format(url, "/health")) == [f"analyzers[0].endpoint: {problem}"]
    if "://" in url:
        assert problems_of(text.format("http://one/in", url))[0].startswith("analyzers[0].health: ")


@pytest.mark.parametrize("health", ["", "health", "ftp://one/", "/a b", "/a#b", "http://u:p@one/"])
def test_health_urls_that_are_refused(problems_of, health):
    text = f'[[analyzers]]\nid = "a"\nweight = 1\nendpoint = "http://one"\nhealth = "{health}"\n'
    assert [problem.split(": ")[0] for problem in problems_of(text)] == ["analyzers[0].health"]


@pytest.mark.parametrize(
    "origin", ["", "a", "null", "https://a/", "https://a/b", "https://a?b", "https://*.a", "https://", "1://a"]
)
def test_origins_that_are_refused(problems_of, origin):
    found = problems_of(f'[security]\ncors_origins = ["http://ok", "{origin}"]')
    assert [problem.split(": ")[0] for problem in found] == ["security.cors_origins[1]"]


@pytest.mark.parametrize(
    ("text", "problems"),
    [
        ("analyzers = []", ["analyzers: at least one is needed"]),
        ("analyzers = 'a'", ["analyzers: expected a list, got string"]),
        ("[analyzers]\nid = 'a'", ["analyzers: expected a list, got a table"]),
        ("analyzers = ['a']", ["analyzers[0]: expected a table, got string"]),
        (
            "[[analyzers]]\n[[analyzers]]\nid = 'b'",
            [
                "analyzers[0].id: missing",
                "analyzers[0].endpoint: missing",
                "analyzers[0].weight: missing",
                "analyzers[1].endpoint: missing",
                "analyzers[1].weight: missing",
            ],
        ),
        (ANALYZERS + "[[analyzers]]\nid='c'\nendpoint='http://c'\nweight=-1", ["analyzers[2].weight: must be >= 0"]),
        (ANALYZERS.replace("= 3", "= nan"), ["analyzers[1].weight: must be finite"]),
        (ANALYZERS.replace("= 3", "= inf"), ["analyzers[1].weight: must be finite"]),
        (ANALYZERS.replace("= 3", "= -inf"), ["analyzers[1].weight: must be finite"]),
        (ANALYZERS.replace("= 3", "= 0x1" + "0" * 4000), ["analyzers[1].weight: must be finite"]),
        (ANALYZERS.replace("= 3", "= '3'"), ['analyzers[1].weight: expected a number, got string "3"']),
        (ANALYZERS.replace("= 3", "= false"), ["analyzers[1].weight: expected a number, got boolean false"]),
        (ANALYZERS.replace("= 3", "= 0").replace("= 1", "= 0"), ["analyzers: at least one weight must be > 0"]),
        (ANALYZERS.replace("= 3", "= 0").replace("= 1", "= -1"), ["analyzers[0].weight: must be >= 0"]),
        (
            ANALYZERS.replace("= 3", "= 1e308").replace("= 1\n", "= 1e308\n"),
            ["analyzers: the sum of the weights must be finite"],
        ),
        (ANALYZERS.replace("two", "one", 1), ['analyzers[1].id: duplicate of analyzers[0].id, "one"']),
        (
            ANALYZERS.replace("two", "one", 1).replace("= 3", "= -3"),
            ["analyzers[1].weight: must be >= 0", 'analyzers[1].id: duplicate of analyzers[0].id, "one"'],
        ),
        (ANALYZERS + "wieght = 1", ["analyzers[1].wieght: unknown key; did you mean 'weight'?"]),
        *(
            (ANALYZERS.replace('"one"', f'"{bad}"'), [f"analyzers[0].id: {ID_RULE}"])
            for bad in ("", "a b", "a/b", "é", "x" * 65, ".", "..")
        ),
    ],
)
def test_problems_of_analyzers(problems_of, text, problems):
    assert problems_of(text) == problems


def test_problems_follow_the_section_order(problems_of):
    assert problems_of(
        "[securty]\n"
        "[security]\ntokens = 1\n"
        "[retry]\nbase = '1h'\n"
        "[health]\nrise = 0\nfell = 1\n"
        "[server]\nport = 'x'\nworkers = -1\nprot = 1\n"
        "[[analyzers]]\nid = 'a'\nendpoint = 'http://a'\nweight = -1\n",
        {"FASTDIST_SERVER__PROT": "1"},
    ) == [
        'server.port: expected an integer, got string "x"',
        "server.workers: must be >= 0",
        "server.prot: unknown key; did you mean 'port'?",
        "analyzers[0].weight: must be >= 0",
        "retry.base: must be <= retry.cap",
        "health.rise: must be >= 1",
        "health.fell: unknown key; did you mean 'fall'?",
        "security.tokens: expected a list, got integer",
        "securty: unknown section; did you mean 'security'?",
        "FASTDIST_SERVER__PROT: unknown setting; did you mean 'FASTDIST_SERVER__PORT'?",
    ]


def test_joint_rule_ignores_invalid_parts(problems_of):
    assert problems_of("[retry]\nbase = '1h'\ncap = 0\n") == ["retry.cap: must be >= 1ms"]


def test_long_values_shorten_to_one_line(problems_of):
    (problem,) = problems_of(f'[delivery]\nmode = "{"x" * 10_000}\\n"')
    assert len(problem) < 200
    (problem,) = problems_of('[delivery]\nmode = "a\\nb"')
    assert problem == 'delivery.mode: must be one of single, batch; got "a\\nb"'


@pytest.mark.parametrize(
    "text",
    [
        "[security]\ntokens = 'hush'",
        "[security]\ntokens = ['hush ']",
        "[security]\nadmin_tokens = ['hush hush']",
        "[security]\nadmin_tokens = ['hush\\n']".replace("'", '"'),
        "[[analyzers]]\nid = 'a'\nweight = 1\nendpoint = 'http://u:hush@a/'",
    ],
)
def test_no_problem_shows_a_secret(problems_of, text):
    assert "hush" not in "".join(problems_of(text))


def test_token_that_is_a_number_is_not_shown(problems_of):
    assert problems_of("[security]\ntokens = [12345]") == ["security.tokens[0]: expected a string, got integer"]


def test_no_repr_shows_a_token(write):
    loaded = load(write('[security]\ntokens = ["hush"]\nadmin_tokens = ["hush"]'), {"SECRET": "hush"}, {})
    assert loaded.config.security.tokens == ("hush",)
    assert "hush" not in repr(loaded)


# ---- files


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[server]\nport = 1\nhost = = 2", "line 3, column 8: Invalid value"),
        ("[server]\nport =", "end of document: Invalid value"),
        ("[server]\nport = 1\nport = 2", None),
        (b"host = '\xff'", "byte 9: not UTF-8"),
        ("a = 2020-02-31", None),
        ("a = " + "9" * 5000, None),
        ("a = " + "[" * 100_000, None),
    ],
)
def test_what_is_no_toml(write, problems_of, text, problem):
    found = problems_of(text)
    assert len(found) == 1
    assert found[0].startswith(f"{write(text)}: ")
    assert problem is None or found[0].startswith(f"{write(text)}: {problem}")


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError) as caught:
        load(tmp_path / "none.toml", {}, {})
    assert caught.value.problems == [f"{tmp_path / 'none.toml'}: cannot be read: No such file or directory"]


def test_a_directory_is_no_file(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load(tmp_path, {}, {})


@pytest.mark.parametrize("path", ["", "a\0b"])
def test_paths_that_name_no_file(path):
    with pytest.raises(ConfigError):
        load(path, {}, {})


def test_no_file_is_looked_for(tmp_path, monkeypatch):
    (tmp_path / "fastdist.toml").write_text("[server]\nport = 1\n")
    monkeypatch.chdir(tmp_path)
    assert load(None, {}, {}).config == Config()


def test_path_argument_beats_environment(write, tmp_path):
    named = tmp_path / "named.toml"
    named.write_text("[server]\nport = 1\n")
    environ = {"FASTDIST_CONFIG": str(named)}
    assert load(None, environ, {}).config.server.port == 1
    assert load(None, environ, {}).path == named
    assert load(write("[server]\nport = 2\n"), environ, {}).config.server.port == 2
    assert load(None, {"FASTDIST_CONFIG": ""}, {}).path is None


def test_file_problem_names_the_environment():
    with pytest.raises(ConfigError) as caught:
        load(None, {"FASTDIST_CONFIG": "/nowhere"}, {})
    assert caught.value.problems == [
        "/nowhere: cannot be read: No such file or directory (environment FASTDIST_CONFIG)"
    ]


# ---- precedence


def test_flag_beats_environment_file_default(write):
    path = write("[server]\nport = 2\nworkers = 2\nhost = 'file'\n")
    loaded = load(path, {"PORT": "3", "WORKER_COUNT": "3"}, {"port": 4, "workers": None, "host": None})
    assert (loaded.config.server.port, loaded.config.server.workers, loaded.config.server.host) == (4, 3, "file")
    assert loaded.config.server.max_body == 10 * 2**20
    assert loaded.sources["server.port"] == "flag --port"
    assert loaded.sources["server.workers"] == "environment WORKER_COUNT"
    assert loaded.sources["server.host"] == f"file {path}"
    assert loaded.sources["server.max_body"] == "default"
    assert loaded.sources["analyzers"] == "default"


def test_analyzers_and_lists_have_a_source(write):
    path = write("[security]\ntokens = ['a']\n" + ANALYZERS)
    sources = load(path, {}, {}).sources
    assert sources["analyzers"] == sources["security.tokens"] == f"file {path}"
    assert sources["security.admin_tokens"] == "default"


def test_long_name_wins_over_the_short_one():
    environ = {"FASTDIST_SERVER__PORT": "2", "PORT": "1", "FASTDIST_SERVER__WORKERS": "4", "WORKER_COUNT": "3"}
    loaded = load(None, environ, {})
    assert (loaded.config.server.port, loaded.config.server.workers) == (2, 4)
    assert loaded.sources["server.port"] == "environment FASTDIST_SERVER__PORT"


def test_only_the_value_that_wins_is_judged():
    assert load(None, {"PORT": "x"}, {"port": 1}).config.server.port == 1


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("SERVER__PORT", " 8080 ", 8080),
        ("SERVER__HOST", "10", "10"),
        ("SERVER__MAX_BODY", "1MiB", 2**20),
        ("SERVER__MAX_BODY", "1000", 1000),
        ("SERVER__VALIDATION", "strict", "strict"),
        ("SERVER__DRAIN_TIMEOUT", "10", 10.0),
        ("SERVER__DRAIN_TIMEOUT", "1.5", 1.5),
        ("SERVER__DRAIN_TIMEOUT", "500ms", 0.5),
        ("DELIVERY__SPILL_AFTER", "never", math.inf),
        ("LIMITS__CLIENT_RATE", "0.5", 0.5),
        ("LIMITS__CLIENT_RATE", "5", 5.0),
        ("QUEUE__PATH", "/data", "/data"),
        ("SECURITY__TLS_CERT", "", ""),
    ],
)
def test_scalar_settings_from_environment(name, text, value):
    section, key = name.lower().split("__")
    result = getattr(getattr(load(None, {f"FASTDIST_{name}": text}, {}).config, section), key)
    assert result == value
    assert type(result) is type(value)


@pytest.mark.parametrize(
    ("environ", "problem"),
    [
        ({"PORT": "http"}, 'server.port: expected an integer, got string "http" (environment PORT)'),
        ({"PORT": "1.5"}, "server.port: expected an integer, got number 1.5 (environment PORT)"),
        ({"PORT": "٣"}, 'server.port: expected an integer, got string "٣" (environment PORT)'),
        ({"PORT": "1_000"}, 'server.port: expected an integer, got string "1_000" (environment PORT)'),
        ({"PORT": "70000"}, "server.port: must be <= 65535 (environment PORT)"),
        ({"PORT": "9" * 200}, "server.port: must be <= 65535 (environment PORT)"),
        ({"WORKER_COUNT": "-1"}, "server.workers: must be >= 0 (environment WORKER_COUNT)"),
        ({"FASTDIST_LIMITS__RATE": "nan"}, 'limits.rate: expected a number, got string "nan" (environment '),
        (
            {"FASTDIST_LIMITS__RATE": "9" * 400 + ".0"},
            "limits.rate: must be finite (environment FASTDIST_LIMITS__RATE)",
        ),
        ({"FASTDIST_SERVER__HOST": "\udcff"}, "server.host: must have no control characters, and be valid UTF-8 ("),
        ({"FASTDIST_RETRY__BASE": "1h"}, "retry.base: must be <= retry.cap (environment FASTDIST_RETRY__BASE)"),
        (
            {"FASTDIST_SERVER__PROT": "1"},
            "FASTDIST_SERVER__PROT: unknown setting; did you mean 'FASTDIST_SERVER__PORT'?",
        ),
        ({"FASTDIST_ZZZ__QQQQQQQQQQQQ": "1"}, "FASTDIST_ZZZ__QQQQQQQQQQQQ: unknown setting"),
        ({"FASTDIST_ANALYZERS__ID": "1"}, "FASTDIST_ANALYZERS__ID: unknown setting"),
        (
            {"FASTDIST_SECURITY__TOKENS": "hush"},
            "FASTDIST_SECURITY__TOKENS: a list cannot be set in the environment, only in the file",
        ),
    ],
)
def test_problems_of_the_environment(environ, problem):
    with pytest.raises(ConfigError) as caught:
        load(None, environ, {})
    (found,) = caught.value.problems
    assert found.startswith(problem)


def test_a_flag_at_fault_is_named():
    with pytest.raises(ConfigError, match=re.escape("server.port: must be <= 65535 (flag --port)")):
        load(None, {}, {"port": 65536})


def test_empty_and_foreign_variables_ignored():
    environ = {
        "PORT": "",
        "WORKER_COUNT": "",
        "FASTDIST_LIMITS__RATE": "",
        "FASTDIST_PORT": "tcp://10.0.0.1:3000",  # what Kubernetes sets for a service of this name
        "FASTDIST_SERVICE_HOST": "10.0.0.1",
        "OTHER_SERVER__PORT": "1",
    }
    assert load(None, environ, {}).config == Config()


def test_non_table_section_is_also_reported(problems_of):
    assert problems_of("server = 1", {"PORT": "1"}) == ["server: expected a table, got integer"]


# ---- warnings


@pytest.mark.parametrize(
    ("mode", "packets", "warned"), [("batch", 120, False), ("batch", 121, True), ("single", 1000, False)]
)
def test_overlong_batch_head_warns(mode, packets, warned):
    assert [text.split(":")[0] for text in warnings(Config(delivery=Delivery(mode=mode, batch_packets=packets)))] == [
        "delivery.batch_packets"
    ] * warned


@pytest.mark.parametrize(("mode", "most", "warned"), [("batch", 1, True), ("batch", 2, False), ("single", 1, False)])
def test_batch_without_resends_warns(mode, most, warned):
    config = Config(delivery=Delivery(mode=mode), retry=Retry(max_attempts=most))
    assert [text.split(":")[0] for text in warnings(config)] == ["retry.max_attempts"] * warned


# ---- reloading


def test_reload_reads_same_file_flags_env(write):
    path = write("[server]\nport = 1\n[limits]\nrate = 1\n")
    first = load(None, {"FASTDIST_CONFIG": str(path), "WORKER_COUNT": "2"}, {"host": "flag"})
    write("[server]\nport = 5\n[limits]\nrate = 2\n")
    again = first.reload()
    assert first.config.limits.rate == 1
    assert again.config.limits.rate == 2
    server = again.config.server
    assert (server.host, server.port, server.workers) == ("flag", 5, 2)
    assert again.path == path


@pytest.mark.parametrize("name", [".x", "..x", "...", "x.", "x..", "-", "_", "a.b"])
def test_ids_that_are_path_segments_pass(write, name):
    path = write(ANALYZERS.replace('"one"', f'"{name}"'))
    assert load(path, {}, {}).config.analyzers[0].id == name


def test_invalid_reload_keeps_the_old_config(write):
    loaded = load(write("[server]\nport = 1\n"), {}, {})
    write("[server]\nport = -1\n")
    with pytest.raises(ConfigError):
        loaded.reload()
    assert loaded.config.server.port == 1


def test_reload_without_a_file():
    assert load(None, {"PORT": "1"}, {}).reload().config.server.port == 1


def test_reloadable_names_restart_settings(config_of):
    new = config_of(
        "[server]\nport = 1\nmax_body = 1\n[queue]\ndurability = 'memory'\n"
        "[limits]\nrate = 1\n[security]\ntokens = ['a']\ntls_cert = 'c'\ntls_key = 'k'\n" + ANALYZERS
    )
    assert reloadable(Config(), new) == ["server.port", "server.max_body", "queue.durability"]
    assert reloadable(new, new) == []


def test_live_settings_need_no_restart(config_of):
    new = config_of("[limits]\nrate = 1\n[security]\ntokens = ['a']\ntls_cert = 'c'\ntls_key = 'k'\n" + ANALYZERS)
    assert reloadable(Config(), new) == []


# ---- the way to workers


def handed_over(config):
    """Return a configuration as a worker reads it."""
    fd = os.memfd_create("settings")
    try:
        ipc.write_settings(fd, ipc.Settings(1, {}, config))
        return ipc.read_settings(fd).config
    finally:
        os.close(fd)


@pytest.mark.parametrize("text", ["", DOCUMENTED, ANALYZERS, '[delivery]\nspill_after = "never"', "[retry]\nbase=0.1"])
def test_a_configuration_survives_the_wire(config_of, text):
    config = config_of(text)
    assert handed_over(config) == config


def test_the_wire_is_checked_too():
    with pytest.raises(msgspec.ValidationError, match=re.escape("Expected `int` <= 65535 - at `$.config.server.port`")):
        handed_over(Config(server=Server(port=65536)))


@given(
    weights=st.lists(st.floats(min_value=0, max_value=1e300), min_size=1, max_size=5).filter(any),
    rate=st.floats(min_value=0, max_value=1e9),
    spill=st.one_of(st.just(math.inf), st.floats(min_value=0, max_value=1e6)),
)
def test_floats_survive_the_wire_exactly(weights, rate, spill):
    config = Config()
    config = msgspec.structs.replace(
        config,
        analyzers=tuple(Analyzer(id=f"a{i}", endpoint="http://a", weight=w) for i, w in enumerate(weights)),
        limits=msgspec.structs.replace(config.limits, rate=rate),
        delivery=msgspec.structs.replace(config.delivery, spill_after=spill),
    )
    assert handed_over(config) == config


# ---- analyzers' addresses


@pytest.mark.parametrize(
    ("endpoint", "address"),
    [
        ("http://one", ("http", "one", 80, "/", "one")),
        ("http://one/", ("http", "one", 80, "/", "one")),
        ("http://one:80/a/b?c=d&e", ("http", "one", 80, "/a/b?c=d&e", "one")),
        ("http://one:443/", ("http", "one", 443, "/", "one:443")),
        ("https://one", ("https", "one", 443, "/", "one")),
        ("https://one:443", ("https", "one", 443, "/", "one")),
        ("HTTPS://One.Example.:8443/A", ("https", "one.example.", 8443, "/A", "one.example.:8443")),
        ("http://one?x=1", ("http", "one", 80, "/?x=1", "one")),
        ("http://one/a@b:c", ("http", "one", 80, "/a@b:c", "one")),
        ("http://log_sink_1:9000/in", ("http", "log_sink_1", 9000, "/in", "log_sink_1:9000")),
        ("http://127.0.0.1:3001/analyze", ("http", "127.0.0.1", 3001, "/analyze", "127.0.0.1:3001")),
        ("http://[::1]/x", ("http", "::1", 80, "/x", "[::1]")),
        ("https://[0:0::1]:8443", ("https", "::1", 8443, "/", "[::1]:8443")),
    ],
)
def test_an_endpoint_taken_apart(endpoint, address):
    assert msgspec.structs.astuple(Analyzer(id="a", endpoint=endpoint, weight=1.0).address) == address


@pytest.mark.parametrize(
    ("endpoint", "health", "url"),
    [
        ("http://one:9000/in?x", "/health", "http://one:9000/health"),
        ("http://one:80", "/a/b?c=d", "http://one/a/b?c=d"),
        ("https://[::1]:8443/in", "/", "https://[::1]:8443/"),
        ("http://one/in", "//two/x", "http://one//two/x"),
        ("http://one/in", "https://two:1/up", "https://two:1/up"),
    ],
)
def test_the_health_url(config_of, endpoint, health, url):
    text = f'[[analyzers]]\nid = "a"\nweight = 1\nendpoint = "{endpoint}"\nhealth = "{health}"\n'
    (analyzer,) = config_of(text).analyzers
    assert analyzer.health_url == url
    assert url.endswith(analyzer.health_address.path_and_query)


# ---- anything at all

NAMES = [
    *sorted({part for path in load(None, {}, {}).sources for part in path.split(".")}),
    *msgspec.structs.asdict(Config().analyzers[0]),
    "",
    "a b",
    "x",
]
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.dates(),
    st.sampled_from(["1s", "1MiB", "never", "http://a", "*", "none", "batch", "\udcff", 10**400]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES) | st.text(), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=3 * settings().max_examples, deadline=None)
@given(document=st.dictionaries(st.sampled_from(NAMES) | st.text(), VALUES, max_size=5))
@example(document={"analyzers": [{"id": "a", "endpoint": "http://a", "weight": 10**400}]})
@example(document={"server": {"host": "a" * 10**6, "port": 10**400, "x" * 10**5: 1, "header_timeout": [10**400]}})
def test_document_raises_only_config_error(document):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tomlfile, "read", lambda *_: (document, ""))
        try:
            config = load("any.toml", {}, {}).config
        except ConfigError as error:
            problems = error.problems
        else:
            problems = None
            assert handed_over(config) == config
    if problems is not None:
        assert problems
        assert all("\n" not in problem and len(problem) < 600 for problem in problems)


@given(
    st.dictionaries(
        st.sampled_from(["PORT", "WORKER_COUNT", "FASTDIST_LIMITS__RATE", "FASTDIST_QUEUE__CAPACITY"])
        | st.text().map("FASTDIST_{}".format),
        st.text(alphabet="0123456789.+-e_ \nsMiB\udcff٣") | st.text(),
        max_size=3,
    )
)
def test_environment_raises_one_error_kind(environ):
    environ.pop("FASTDIST_CONFIG", None)
    with contextlib.suppress(ConfigError):
        load(None, environ, {})


def test_unknown_protocols_are_refused(config_of):
    assert config_of(f'[server]\nprotocols = ["otlp", "json"]\n{ANALYZERS}').server.protocols == ("otlp", "json")
    assert config_of(f"[server]\nprotocols = []\n{ANALYZERS}").server.protocols == ()
    with pytest.raises(ConfigError) as caught:
        config_of(f'[server]\nprotocols = ["otlp", "syslog"]\n{ANALYZERS}')
    names = "json, otlp, loki, splunk, elasticsearch"
    assert caught.value.problems == [f'server.protocols[1]: must be one of {names}; got "syslog"']


def test_protocols_are_those_of_the_table():
    assert table.NAMES == PROTOCOLS
