"""[jetstream]: what is refused and how that is said, what is warned of, and that secrets show up nowhere."""

from __future__ import annotations

import base64
import binascii
import subprocess
import sys

import pytest

from fastdist import facts
from fastdist.cli import effective
from fastdist.config import load, reloadable, without_effect
from fastdist.errors import ConfigError, StartError
from fastdist.settings import Config, Jetstream, Queue
from fastdist.storage import jetstream
from fastdist.storage.jetstream import login

NOT_A_PAIR = "which must not be encrypted, in PEM form"
JETSTREAM = '[queue]\nbackend = "jetstream"\n[jetstream]\n'


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "fastdist.toml"
        path.write_text(text)
        return path

    return write


@pytest.fixture
def problems_of(write):
    def problems_of(text, **environ):
        with pytest.raises(ConfigError) as caught:
            load(write(text), environ, {})
        return caught.value.problems

    return problems_of


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("servers = []", "servers: at least one is needed"),
        ('servers = ["nats://a", "http://b"]', "servers[1]: must be a nats:// or tls:// URL"),
        ('servers = ["localhost:4222"]', "servers[0]: must be a nats:// or tls:// URL"),
        ('servers = ["nats://:4222"]', "servers[0]: must have the form nats://host[:port], without a path"),
        ('servers = ["nats://a/b"]', "servers[0]: must have the form nats://host[:port], without a path"),
        ('servers = ["nats://a:99999"]', "servers[0]: must have a port from 1 to 65535"),
        (
            'servers = ["nats://u:hush@a"]',
            "servers[0]: must have no user name or password: they have settings of their own",
        ),
        ('stream = "a.b"', "stream: must be 1..64 characters of A-Z a-z 0-9 _ -"),
        ('stream = ""', "stream: must be 1..64 characters of A-Z a-z 0-9 _ -"),
        ("replicas = 2", "replicas: must be 1, 3 or 5"),
        ("replicas = true", "replicas: must be 1, 3 or 5"),
        ('replicas = "3"', "replicas: must be 1, 3 or 5"),
        ('create = "yes"', 'create: expected true or false, got string "yes"'),
        ("create = 1", "create: expected true or false, got integer 1"),
        ('max_bytes = "1KiB"', "max_bytes: must be >= 1MiB"),
        ('ack_wait = "10ms"', "ack_wait: must be >= 1s"),
        ("claim = 10", "claim: must be >= 64"),
        ("bundle_packets = 0", "bundle_packets: must be >= 1"),
        (
            'dedup_window = "2s"',
            "dedup_window: must be >= jetstream.publish_timeout, so that what is tried again is known",
        ),
        ('user = "u"', "password: missing: jetstream.user is set, and a user needs a password"),
        ('password = "hush"', "user: missing: jetstream.password is set, and a password needs a user"),
        ('tls_cert = "c"', "tls_key: missing: jetstream.tls_cert is set, and a certificate needs its key"),
        ('tls_key = "k"', "tls_cert: missing: jetstream.tls_key is set, and a key needs its certificate"),
        ('token = "hush"\nnkey = "n"', "nkey: token is set as well, and there may be one way to log in at most"),
        ("password = 12345", "password: expected a string, got integer"),
        ("server = 1", "server: unknown key; did you mean 'servers'?"),
    ],
)
def test_problems_are_named_by_their_path(problems_of, line, problem):
    problems = problems_of(f"[jetstream]\n{line}")
    assert f"jetstream.{problem}" in problems
    assert "hush" not in str(problems)
    assert "12345" not in str(problems)


def test_every_setting_may_be_a_variable(write):
    environ = {
        "FASTDIST_QUEUE__BACKEND": "jetstream",
        "FASTDIST_JETSTREAM__USER": "me",
        "FASTDIST_JETSTREAM__PASSWORD": "12345",
        "FASTDIST_JETSTREAM__CREATE": "false",
        "FASTDIST_JETSTREAM__REPLICAS": "1",
    }
    loaded = load(write(""), environ, {})
    assert loaded.config.queue.backend == "jetstream"
    assert loaded.config.jetstream == Jetstream(user="me", password="12345", create=False, replicas=1)
    for text in (repr(loaded), repr(loaded.config), repr(loaded.config.jetstream), effective.as_toml(loaded)):
        assert "12345" not in text
    shown = effective.as_toml(loaded)
    assert 'password = "********"                   # environment FASTDIST_JETSTREAM__PASSWORD; masked\n' in shown
    assert 'token = ""                              # default\n' in shown


def test_a_flag_in_the_environment_is_a_word(problems_of):
    assert problems_of("", FASTDIST_JETSTREAM__CREATE="1") == [
        'jetstream.create: expected true or false, got string "1" (environment FASTDIST_JETSTREAM__CREATE)'
    ]


def test_settings_of_the_ring_warn_if_given(write):
    given = '[queue]\nbackend = "jetstream"\ncapacity = "1MiB"\ndurability = "fsync"\nsync_interval = 1\n'
    assert [text.split(":")[0] for text in without_effect(load(write(given), {}, {}))] == [
        "queue.capacity",
        "queue.durability",
        "queue.sync_interval",
    ]
    assert without_effect(load(write('[queue]\nbackend = "jetstream"\n'), {}, {})) == []
    assert without_effect(load(write('[queue]\ncapacity = "64MiB"\n'), {}, {})) == []


def test_no_warning_of_capacity_not_in_use():
    texts = list(effective.warnings(Config(queue=Queue(backend="jetstream", capacity=2**20))))
    assert not [text for text in texts if "queue.capacity" in text]


def test_every_change_of_it_needs_a_restart():
    old = Config()
    new = Config(queue=Queue(backend="jetstream"), jetstream=Jetstream(token="t", servers=("nats://other",), claim=100))
    assert reloadable(old, new) == ["queue.backend", "jetstream.servers", "jetstream.claim", "jetstream.token"]
    assert all(about.changes == "restart" for path, about in facts.SETTINGS.items() if "jetstream." in path)


def test_a_reload_may_leave_its_secrets_out(write):
    loaded = load(write('[jetstream]\ntoken = "hush"\n'), {}, {})
    write("")
    assert loaded.reload().config.jetstream.token == ""


# ---- files


def seed(prefix=0x9500, key=bytes(range(32))):
    """Return the seed of a user's NKey: prefix, key and CRC-16, as base 32."""
    raw = prefix.to_bytes(2, "big") + key
    raw += binascii.crc_hqx(raw, 0).to_bytes(2, "little")
    return base64.b32encode(raw).rstrip(b"=")


CREDENTIALS = b"-----BEGIN NATS USER JWT-----\neyJ.a.b\n------END NATS USER JWT------\n\n"


def seed_block(text):
    return b"-----BEGIN USER NKEY SEED-----\n%b\n------END USER NKEY SEED------\n" % text


def test_our_seed_is_one_to_its_library():
    nkeys = pytest.importorskip("nkeys")
    assert seed().startswith(b"SU")
    assert nkeys.from_seed(bytearray(seed())).public_key.startswith(b"U")


def test_right_files_are_no_problem(tmp_path):
    (tmp_path / "nkey").write_bytes(seed() + b"\n")
    (tmp_path / "creds").write_bytes(CREDENTIALS + seed_block(seed()))
    assert login.problems(Jetstream(nkey=str(tmp_path / "nkey"))) == []
    assert login.problems(Jetstream(credentials=str(tmp_path / "creds"))) == []
    assert login.problems(Jetstream()) == []


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("nkey", b"hush", "holds no seed of a user (SU…)"),
        ("nkey", seed(0x9000), "holds no seed of a user (SU…)"),  # an account's
        ("nkey", seed()[:-1] + b"A", "holds no seed of a user (SU…)"),
        ("nkey", None, "cannot be read: No such file or directory"),
        ("credentials", b"", "holds no user JWT"),
        ("credentials", CREDENTIALS, "holds no seed of a user (SU…)"),
        ("credentials", CREDENTIALS + seed_block(b"SUHUSH"), "holds no seed of a user (SU…)"),
        ("credentials", None, "cannot be read: No such file or directory"),
        ("tls_ca", b"hush", "holds no certificate in PEM form"),
        ("tls_ca", None, "cannot be read: No such file or directory"),
    ],
)
def test_wrong_files_are_named_with_faults(tmp_path, name, content, problem):
    path = tmp_path / "file"
    if content is not None:
        path.write_bytes(content)
    assert login.problems(Jetstream(**{name: str(path)})) == [f"jetstream.{name}: {path} {problem}"]


def test_key_of_another_certificate_is_named(tmp_path):
    trustme = pytest.importorskip("trustme")
    for name in ("one", "two"):
        made = trustme.CA().issue_cert("localhost")
        made.cert_chain_pems[0].write_to_path(tmp_path / f"{name}.pem")
        made.private_key_pem.write_to_path(tmp_path / f"{name}.key")
    one, two = tmp_path / "one.pem", tmp_path / "two.key"
    assert login.problems(Jetstream(tls_cert=str(one), tls_key=str(tmp_path / "one.key"))) == []
    assert login.problems(Jetstream(tls_cert=str(one), tls_key=str(two))) == [
        f"jetstream.tls_cert: {one} and {two} are not a certificate and its key, {NOT_A_PAIR}"
    ]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (Jetstream(), {}),
        (Jetstream(user="u", password="p"), {"user": "u", "password": "p"}),
        (Jetstream(token="t"), {"token": "t"}),
        (Jetstream(credentials="c"), {"user_credentials": "c"}),
        (Jetstream(nkey="n"), {"nkeys_seed": "n"}),
    ],
)
def test_each_way_to_log_in_has_its_options(settings, expected):
    assert login.options(settings) == expected


# ---- commands


def test_check_names_problems_of_its_files(run, write, tmp_path):
    result = run("check", str(write(JETSTREAM + f'nkey = "{tmp_path}/none"\n')))
    assert result.exit_code == 2
    assert result.stderr == f"jetstream.nkey: {tmp_path}/none cannot be read: No such file or directory\n"


def test_check_asks_no_server_and_warns(run, write):
    text = '[queue]\nbackend = "jetstream"\ncapacity = "64MiB"\n[dead_letters]\nmax_bytes = "1MiB"\n'
    result = run("check", str(write(text)))
    assert result.exit_code == 0
    assert 'warning: queue.capacity: has no effect with queue.backend = "jetstream"' in result.stderr
    assert 'warning: dead_letters.max_bytes: has no effect with queue.backend = "jetstream"' in result.stderr
    assert "max_age" not in result.stderr
    assert "dead_letters" not in run("check", str(write('[dead_letters]\nmax_bytes = "1MiB"\n'))).stderr


def test_config_masks_password_and_token(run, write):
    result = run("config", str(write('[jetstream]\nuser = "u"\npassword = "hush"\n')))
    assert result.exit_code == 0
    assert "hush" not in result.output
    assert 'password = "********"' in result.output


def test_missing_library_is_named(monkeypatch):
    monkeypatch.setattr(jetstream, "find_spec", lambda _: None)
    with pytest.raises(StartError, match=r"needs nats-py and nkeys, not installed here: pip install 'fastdist\[jets"):
        jetstream.require_client()


def test_serve_without_library_exits_three(write, tmp_path):
    """In a process where neither can be imported, as without the extra."""
    script = (
        "import sys\nfrom fastdist.storage import jetstream\njetstream.find_spec = lambda name: None\n"
        "sys.argv = ['fastdist', 'serve', '--config', sys.argv[1]]\nfrom fastdist.cli.main import main\nmain()\n"
    )
    command = [sys.executable, "-c", script, str(write(JETSTREAM))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path, check=False)
    assert done.returncode == 3
    assert done.stderr.startswith('fastdist: queue.backend = "jetstream" needs nats-py and nkeys')
    assert "Traceback" not in done.stderr


def test_serve_names_problems_of_its_files(run, write, tmp_path):
    result = run("serve", "--config", str(write(JETSTREAM + f'tls_ca = "{tmp_path}/none"\n')))
    assert result.exit_code == 2
    assert result.stderr == f"jetstream.tls_ca: {tmp_path}/none cannot be read: No such file or directory\n"


def test_library_is_imported_where_in_use():
    """The settings, the check and the format of messages do without it."""
    script = (
        "import sys\nsys.modules['nats'] = sys.modules['nkeys'] = None\n"
        "import fastdist.cli.main, fastdist.supervisor.main, fastdist.worker.main\n"
        "import fastdist.storage.jetstream.login, fastdist.storage.jetstream.message\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
