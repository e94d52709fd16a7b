"""Connecting: ways to log in, TLS, servers that are not there, and what is said of each."""

from __future__ import annotations

import asyncio
import base64
import json
import signal
import socket

import nkeys
import pytest
import trustme
from harness import Service, in_loop, prepared, service, until
from nacl.signing import SigningKey
from nats_servers import Servers, running
from proxy import Proxy

from fastdist.errors import StartError
from fastdist.settings import Jetstream
from fastdist.storage.jetstream import connection as module
from fastdist.storage.jetstream import streams
from fastdist.storage.jetstream.connection import Connection

PASSWORD = "hush-hush"


class Key:
    """An NKey: its seed and public key as text."""

    def __init__(self, kind):
        signing = SigningKey.generate()
        prefix = {"operator": 14 << 3, "account": 0, "user": 20 << 3}[kind]
        self.seed = self._text(bytes([(18 << 3) | (prefix >> 5), (prefix & 31) << 3]) + signing.encode())
        self.public = self._text(bytes([prefix]) + signing.verify_key.encode())
        self.signing = signing

    @staticmethod
    def _text(raw):
        return base64.b32encode(raw + nkeys.crc16(raw).to_bytes(2, "little")).rstrip(b"=").decode()

    def jwt(self, subject, claims):
        """Return a signed claim about a key, as NATS has it."""

        def part(value):
            return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=")

        body = {"jti": subject, "iat": 1, "iss": self.public, "name": "test", "sub": subject}
        text = part({"typ": "JWT", "alg": "ed25519-nkey"}) + b"." + part(body | {"nats": claims | {"version": 2}})
        return (text + b"." + base64.urlsafe_b64encode(self.signing.sign(text).signature).rstrip(b"=")).decode()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with certificates: of the servers, of clients, and a CA that has made neither."""
    folder = tmp_path_factory.mktemp("pem")
    ours, other = trustme.CA(), trustme.CA()
    ours.cert_pem.write_to_path(folder / "ca.pem")
    other.cert_pem.write_to_path(folder / "other-ca.pem")
    for name, made in (
        ("server", ours.issue_cert("127.0.0.1", "localhost")),
        ("client", ours.issue_cert("client")),
        ("stranger", other.issue_cert("client")),
        ("elsewhere", ours.issue_cert("elsewhere.example")),
    ):
        made.private_key_pem.write_to_path(folder / f"{name}.key")
        (folder / f"{name}.pem").write_bytes(b"".join(pem.bytes() for pem in made.cert_chain_pems))
    return folder


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    """Servers that ask for a login, by its kind; and what to log in with."""
    folder = tmp_path_factory.mktemp("guarded")
    operator, account, user = Key("operator"), Key("account"), Key("user")
    limits = {"subs": -1, "data": -1, "payload": -1, "imports": -1, "exports": -1, "wildcards": True, "conn": -1}
    storage = {"mem_storage": -1, "disk_storage": -1, "streams": -1, "consumer": -1, "leaf": -1}
    account_jwt = operator.jwt(account.public, {"type": "account", "limits": limits | storage})
    everything = {"subs": -1, "data": -1, "payload": -1, "pub": {}, "sub": {}, "type": "user"}
    jwt = account.jwt(user.public, everything)
    (folder / "user.creds").write_text(
        f"-----BEGIN NATS USER JWT-----\n{jwt}\n------END NATS USER JWT------\n\n"
        f"-----BEGIN USER NKEY SEED-----\n{user.seed}\n------END USER NKEY SEED------\n"
    )
    (folder / "user.nk").write_text(user.seed)
    (folder / "other.nk").write_text(Key("user").seed)
    extras = {
        "user": f'authorization {{ user: me, password: "{PASSWORD}" }}',
        "token": f'authorization {{ token: "{PASSWORD}" }}',
        "nkey": f"authorization {{ users: [{{ nkey: {user.public} }}] }}",
        "credentials": (
            f"operator: {operator.jwt(operator.public, {'type': 'operator'})}\n"
            f"resolver: MEMORY\nresolver_preload {{ {account.public}: {account_jwt} }}"
        ),
    }
    # With operators JetStream wants a system account, and logging in is all that is looked at there.
    servers = {
        kind: Servers(folder / kind, extra=extra, jetstream=kind != "credentials") for kind, extra in extras.items()
    }
    with running(*servers.values()):
        yield servers, folder


@pytest.fixture
def guarded_by(guarded, request):
    servers, folder = guarded
    return servers[request.param], folder, request.param


RIGHT = {
    "user": lambda _: {"user": "me", "password": PASSWORD},
    "token": lambda _: {"token": PASSWORD},
    "nkey": lambda folder: {"nkey": str(folder / "user.nk")},
    "credentials": lambda folder: {"credentials": str(folder / "user.creds")},
}
WRONG = [
    ("user", {"user": "me", "password": "wrong-secret"}),
    ("user", {}),
    ("token", {"token": "wrong-secret"}),
    ("nkey", {"nkey": "other.nk"}),
    ("credentials", {"nkey": "user.nk"}),
]


@pytest.mark.parametrize("guarded_by", RIGHT, indirect=True)
@in_loop
async def test_each_way_to_log_in_is_taken(guarded_by, name):
    servers, folder, kind = guarded_by
    async with service(servers.settings(name, **RIGHT[kind](folder)), prepare=kind != "credentials") as made:
        assert made.connection.is_connected


@pytest.mark.parametrize(("guarded_by", "given"), WRONG, indirect=["guarded_by"])
@in_loop
async def test_wrong_login_ends_a_start(guarded_by, given, name, capfd):
    servers, folder, _ = guarded_by
    given = {key: str(folder / value) if key == "nkey" else value for key, value in given.items()}
    with pytest.raises(StartError) as caught:
        await Connection(servers.settings(name, **given), "test").start()
    text = str(caught.value)
    assert text.startswith(f"jetstream: {servers.all[0].url}: authorization: the server has refused the login: ")
    assert "\n" not in text
    assert ("no login is configured" in text) == (not given)
    output = capfd.readouterr()
    assert "wrong-secret" not in text + output.out + output.err


@in_loop
async def test_what_is_not_allowed_ends_a_start(tmp_path, name):
    rights = f'publish: ["{name}.*", "_INBOX.>"], subscribe: ["_INBOX.>"]'
    users = f'users: [{{ user: me, password: "{PASSWORD}", permissions: {{ {rights} }} }}]'
    servers = Servers(tmp_path, extra=f"authorization {{ {users} }}")
    servers.start()
    try:
        async with service(servers.settings(name, user="me", password=PASSWORD), prepare=False) as made:
            with pytest.raises(StartError, match=r"authorization: permissions violation.*stream\.info") as caught:
                await prepared(made.connection)
            assert PASSWORD not in str(caught.value)
    finally:
        servers.end()


@in_loop
async def test_the_documented_rights_are_enough(tmp_path, name):
    publish = ["$JS.API.>", f"$JS.ACK.{name}.>", f"{name}.*", f"$KV.{name}_STATE.>", "_INBOX.>"]
    rights = f'publish: {json.dumps(publish)}, subscribe: ["_INBOX.>"]'
    users = f'users: [{{ user: me, password: "{PASSWORD}", permissions: {{ {rights} }} }}]'
    servers = Servers(tmp_path, extra=f"authorization {{ {users} }}")
    servers.start()
    try:
        async with service(servers.settings(name, user="me", password=PASSWORD), keep=False) as made:
            made.consumer.start()
            await made.publish_all(["a", "b"])
            await until(lambda: len(made.claims) == 2 and not made.consumer.unconfirmed, "both settled")
            assert made.connection.denied == ""
    finally:
        servers.end()


# ---- TLS


def tls(files, *, verify=False, certificate="server"):
    asks = f"verify: true, ca_file: {files}/ca.pem" if verify else "timeout: 5"
    return f"tls {{ cert_file: {files}/{certificate}.pem, key_file: {files}/{certificate}.key, {asks} }}"


class Encrypted:
    """Servers with TLS: one asks for a client's certificate, one has that of another host, one has none."""

    def __init__(self, folder, files):
        extras = {
            "plain": "",
            "tls": tls(files),
            "verify": tls(files, verify=True),
            "elsewhere": tls(files, certificate="elsewhere"),
        }
        self.files = files
        self.by_kind = {kind: Servers(folder / kind, extra=extra) for kind, extra in extras.items()}

    def settings(self, kind, name, *, ca="ca", client=None, scheme="tls"):
        servers = self.by_kind[kind]
        urls = tuple(url.replace("nats://", f"{scheme}://") for url in servers.urls)
        given = {"tls_cert": f"{self.files}/{client}.pem", "tls_key": f"{self.files}/{client}.key"} if client else {}
        return servers.settings(name, servers=urls, tls_ca=f"{self.files}/{ca}.pem" if ca else "", **given)


@pytest.fixture(scope="module")
def encrypted(tmp_path_factory, files):
    made = Encrypted(tmp_path_factory.mktemp("tls"), files)
    with running(*made.by_kind.values()):
        yield made


@pytest.mark.parametrize("scheme", ["tls", "nats"])
@in_loop
async def test_it_works_over_tls(encrypted, name, scheme):
    async with service(encrypted.settings("tls", name, scheme=scheme), keep=False) as made:
        made.consumer.start()
        await made.publish_all([f"m{number}" for number in range(100)], bytes(100_000))
        await until(lambda: len(made.claims) == len(made.stored("yes")) == 100, "all claimed")


@in_loop
async def test_a_clients_certificate_is_shown(encrypted, name):
    async with service(encrypted.settings("verify", name, client="client")) as made:
        assert (await made.publish("a")).stored == "yes"


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        ("tls", {"ca": "other-ca"}),
        ("tls", {"ca": None}),
        ("tls", {"ca": "other-ca", "scheme": "nats"}),
        ("elsewhere", {"why": "certificate: IP address mismatch"}),
        ("verify", {}),
        ("verify", {"client": "stranger"}),
        ("plain", {"why": "certificate: the server does not ask for TLS, and tls:// does"}),
    ],
)
@in_loop
async def test_failed_verification_ends_a_start(encrypted, name, kind, given):
    why = given.get("why", "certificate: ")
    settings = encrypted.settings(kind, name, **{key: value for key, value in given.items() if key != "why"})
    with pytest.raises(StartError) as caught:
        await Connection(settings, "test").start()
    assert str(caught.value).startswith(f"jetstream: {settings.servers[0]}: {why}")
    assert "\n" not in str(caught.value)


@in_loop
async def test_no_password_leaves_before_tls(encrypted, name):
    proxy = await Proxy(encrypted.by_kind["plain"].all[0].port).start()
    settings = Jetstream(servers=(proxy.url.replace("nats://", "tls://"),), stream=name, user="me", password=PASSWORD)
    with pytest.raises(StartError, match="certificate"):
        await Connection(settings, "test").start()
    assert bytes(proxy.sent) == b""
    await proxy.stop()


# ---- servers that are not there


@in_loop
async def test_no_server_is_no_error(tmp_path, name, capfd):
    servers = Servers(tmp_path)
    made = Service(servers.settings(name))
    assert not await made.connection.start()
    assert not made.connection.is_connected
    assert made.connection.max_payload == 0
    assert made.connection.last_error.startswith(f"jetstream: {servers.all[0].url}: Connect")
    assert servers.all[0].url in capfd.readouterr().out
    servers.start()
    try:
        await made.connection.wait()
        assert made.connection.last_error == ""
        await prepared(made.connection)
        assert (await made.publish("a")).stored == "yes"
        servers.all[0].kill()
        await until(lambda: not made.connection.is_connected, "the loss")
        servers.start()
        assert (await made.publish("b")).stored == "yes"
        assert made.connection.reconnects == 1
    finally:
        servers.end()
        await made.connection.close()


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"INFO {\r\n", b"INFO []\r\n"])
@in_loop
async def test_what_is_no_nats_server_is_none(name, answer):
    async def serve(_, writer):
        writer.write(answer)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    made = Connection(Jetstream(servers=(f"nats://127.0.0.1:{port}",), stream=name), "test")
    assert not await made.start()
    assert made.last_error.startswith(f"jetstream: nats://127.0.0.1:{port}: ")
    await made.close()
    server.close()


@in_loop
async def test_one_that_says_nothing_is_no_server(monkeypatch, name):
    monkeypatch.setattr(module, "CONNECT_TIMEOUT", 0.2)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        url = f"nats://127.0.0.1:{listener.getsockname()[1]}"
        made = Connection(Jetstream(servers=(url,), stream=name), "test")
        assert not await made.start()
        assert made.last_error == f"jetstream: {url}: no answer"
        await made.close()


@in_loop
async def test_one_that_answers_is_enough(one, name):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        urls = (f"nats://127.0.0.1:{closed.getsockname()[1]}", *one.urls)
        for _ in range(5):  # the order is chance
            async with service(one.settings(name, servers=urls), prepare=False) as made:
                assert made.connection.server == one.urls[0]


@in_loop
async def test_later_refusals_do_not_end_it(tmp_path, name):
    servers = Servers(tmp_path)
    servers.start()
    try:
        async with service(servers.settings(name)) as made:
            servers.all[0].kill()
            servers.all[0].extra = "authorization { user: me, password: changed }"
            servers.all[0].start()
            await until(lambda: "authorization" in made.connection.last_error, "a refused login")
            servers.all[0].kill()
            servers.all[0].extra = ""
            servers.all[0].start()
            await made.connection.wait()
            assert (await made.publish("a")).stored == "yes"
    finally:
        servers.end()


@in_loop
async def test_a_silent_server_is_left(tmp_path, name):
    """Stopped, it takes what is sent as long as its system has room; pings say that it is not there."""
    servers = Servers(tmp_path)
    servers.start()
    try:
        async with service(servers.settings(name)) as made:
            servers.all[0].signal(signal.SIGSTOP)
            await until(lambda: not made.connection.is_connected, "the loss")
            servers.all[0].signal(signal.SIGCONT)
            await made.connection.wait()
            assert (await made.publish("a")).stored == "yes"
    finally:
        servers.end()


@in_loop
async def test_what_is_sent_at_the_end_arrives(one, name, monkeypatch):
    monkeypatch.setattr(module, "FLUSH_TIMEOUT", 30.0)  # a busy machine may need more than a second
    async with service(one.settings(name)) as made, service(one.settings(name)) as other:
        got = []

        async def take(message):
            got.append(message.data)

        client, sender = other.connection.client, made.connection.client
        await client.subscribe("elsewhere", cb=take)
        client.write()  # or the server may see what flush asks before the subscription
        await client.flush()
        for number in range(50):
            await sender.publish("elsewhere", b"%d" % number)
        await made.connection.close()
        await until(lambda: len(got) == 50, f"all messages; last errors: {sender.last_error}, {client.last_error}")


@in_loop
async def test_streams_cannot_be_made_without_one(name, tmp_path):
    made = Connection(Servers(tmp_path).settings(name), "test")
    assert not await made.start()
    with pytest.raises(streams.UnavailableError, match="no server is connected"):
        await streams.prepare(made)
    await made.close()
