"""The NATS servers of ``deploy/`` run as their files say, and their user may do what fastdist needs, and no more."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess

import pytest
from harness import Service, ask, dead_letters_from, figures_until, in_loop, patiently, prepared, repeated, until
from msgspec.structs import replace
from nats.aio.client import Client
from nats.errors import Error as NatsError
from nats_servers import BINARY, Server, die_with_parent
from support import ROOT, free_port, wait_until

from fastdist.config import load
from fastdist.errors import StartError
from fastdist.storage.jetstream.connection import Connection
from fastdist.storage.jetstream.dead_stream import DeadStream
from fastdist.storage.jetstream.figures import Watcher
from fastdist.storage.jetstream.state import StateBucket

DEPLOY = ROOT / "deploy"
FILES = {
    "compose": (DEPLOY / "compose" / "nats.conf", DEPLOY / "compose" / "cluster.toml", "nats-{}"),
    "kubernetes": (
        DEPLOY / "kubernetes" / "cluster" / "nats.conf",
        DEPLOY / "kubernetes" / "cluster" / "fastdist.toml",
        "nats-{}.nats",
    ),
}
PASSWORD, ADMIN = "of-a-test", "of-another"
PASSWORDS = {"NATS_PASSWORD": PASSWORD, "NATS_ADMIN_PASSWORD": ADMIN}


class Deployed(Server):
    """A server with a configuration of ``deploy/``, for ports of this machine."""

    def __init__(self, folder, number, text, hosts):
        super().__init__(folder, hosts[number].partition(".")[0])
        self.text, self.hosts = text, hosts

    def write(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        text = self.text
        changes = {
            "0.0.0.0:4222": f"127.0.0.1:{self.port}",
            "0.0.0.0:8222": f"127.0.0.1:{self.monitor}",
            "0.0.0.0:6222": f"127.0.0.1:{self.route}",
            "store_dir: /data": f'store_dir: "{self.folder}/data"',
            **{f"{host}:6222": f"127.0.0.1:{port}" for host, port in zip(self.hosts, self.routes, strict=True)},
        }
        for old, new in changes.items():
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        (self.folder / "nats.conf").write_text(text.replace("/tmp/nats.pid", f"{self.folder}/pid"))

    def start(self):
        self.write()
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [str(BINARY), "--config", str(self.folder / "nats.conf")],
                stdout=log,
                stderr=log,
                env=os.environ | PASSWORDS | {"SERVER_NAME": self.name, "GOMAXPROCS": "1"},
                preexec_fn=die_with_parent,  # noqa: PLW1509  (one call of the system, which takes no lock)
            )


@pytest.fixture(scope="module", params=FILES)
def deployed(request, tmp_path_factory):
    """Return three servers, and the settings that replicas have for them."""
    conf, toml, host = FILES[request.param]
    settings = load(toml, {"FASTDIST_JETSTREAM__PASSWORD": PASSWORD}, {}).config.jetstream
    first = 0 if request.param == "kubernetes" else 1
    hosts = [host.format(number) for number in range(first, first + 3)]
    assert settings.servers == tuple(f"nats://{each}:4222" for each in hosts)
    folder = tmp_path_factory.mktemp("deployed")
    servers = [Deployed(folder, number, conf.read_text(), hosts) for number in range(3)]
    for server in servers:
        server.route = server.route or free_port()
    for server in servers:
        server.routes = [each.route for each in servers]
    try:
        for server in servers:
            server.start()
        wait_until(lambda: all(server.is_healthy() for server in servers), "healthy NATS servers", 60)
        yield servers, replace(settings, servers=tuple(server.url for server in servers))
    finally:
        for server in servers:
            server.end()


@in_loop
async def test_its_user_may_do_all_there_is_to_do(deployed):
    _, settings = deployed
    made = Service(settings, keep=False)
    dead, watcher = DeadStream(made.connection), Watcher(made.connection)
    try:
        assert await made.connection.start()
        await prepared(made.connection)
        large = bytes((10 << 20) + 10_000)  # server.max_body and what is beside it
        for name, data in (("small", b"body"), ("large", large)):  # a busy machine may need more than one time-out
            await repeated(
                lambda each=(name, data): made.publish(*each), lambda it: it.stored == "yes", f"{name} is stored"
            )
        made.consumer.start()
        await repeated(lambda: dead.put(b"{}", 1), lambda it: it.stored == "yes", "a dead letter is stored")
        assert [found.line for found in await patiently(lambda: dead_letters_from(dead))] == [b"{}"]
        await patiently(lambda: dead.remove(1))
        assert await patiently(lambda: dead_letters_from(dead)) == []
        bucket = StateBucket(made.connection)
        revision = await patiently(lambda: bucket.put("overrides", b"{}"))
        assert (await patiently(lambda: bucket.get("overrides"))).revision == revision
        await made.connection.client.publish("_INBOX.another.replica", b"delivered")
        figures = await figures_until(watcher, lambda figures: figures.settled == 2)
        assert (figures.messages, figures.replicas_total, figures.capacity) == (0, 3, settings.max_bytes)
        assert made.connection.denied == ""
    finally:
        await made.consumer.stop(1)
        await made.connection.close()


@in_loop
async def test_its_user_may_do_no_more(deployed):
    _, settings = deployed
    connection = Connection(settings, "test")
    try:
        assert await connection.start()
        for subject in ("FASTDIST", "OTHER.packets", "$SYS.REQ.SERVER.PING", "$KV.OTHER.key"):
            connection.denied = ""
            await connection.client.publish(subject, b"")
            await until(lambda: connection.denied, f"that {subject} is not allowed")
            assert f'Publish to "{subject}"'.lower() in connection.denied.lower()
    finally:
        await connection.close()


@in_loop
async def test_another_password_is_refused(deployed):
    _, settings = deployed
    connection = Connection(replace(settings, password="another"), "test")
    with pytest.raises(StartError, match="authorization"):
        await connection.start()


def test_servers_sync_what_they_acknowledge(deployed):
    servers, settings = deployed
    for server in servers:
        config = server.ask("/jsz?config=true")["config"]
        assert config["sync_always"] is True
        assert config["max_storage"] > 2 * settings.max_bytes
        assert server.ask("/varz")["max_payload"] == 12 << 20


def test_probes_are_answered(deployed):
    servers, _ = deployed
    manifest = (DEPLOY / "kubernetes" / "cluster" / "nats.yaml").read_text()
    probes = set(re.findall(r"path: (/healthz\S*)", manifest))
    assert len(probes) == 3
    for probe in probes:
        assert servers[0].ask(probe) == {"status": "ok"}


@pytest.mark.parametrize("deployed", ["kubernetes"], indirect=True)
@in_loop
async def test_stopped_server_sends_clients_away(deployed):
    """As preStop asks for it: what its clients publish meanwhile is stored."""
    servers, settings = deployed
    made = Service(replace(settings, servers=(servers[0].url,), publish_timeout=30.0))
    try:
        assert await made.connection.start()
        await prepared(made.connection)
        command = [str(BINARY), "--signal", f"ldm={servers[0].folder}/pid"]
        await asyncio.to_thread(subprocess.run, command, check=True)
        number = 0
        while made.connection.server == servers[0].url:
            number += 1
            await made.publish(f"ldm-{number}")
        await made.publish("behind")
        assert len(made.stored("yes")) == number + 1
        await until(lambda: not servers[0].runs, "its end")
        servers[0].start()
    finally:
        await made.connection.close()


@in_loop
async def test_new_server_replaces_a_lost_one(deployed):
    """As docs/cluster.md says: empty, under a new name, and only then is the old one removed."""
    servers, settings = deployed
    made = Service(replace(settings, publish_timeout=60.0))
    watcher = Watcher(made.connection)
    admin = Client()
    try:
        assert await made.connection.start()
        await prepared(made.connection)
        await made.publish_all([f"lost-disk-{number}" for number in range(50)])
        assert len(made.stored("yes")) == 50
        stored = (await figures_until(watcher, lambda figures: figures.has_leader)).messages
        lost = servers[2]
        name = lost.name
        lost.kill()
        lost.wipe()
        lost.name = "nats-new"
        lost.start()
        await until(lost.is_healthy, "that it is healthy")
        await admin.connect([servers[0].url, servers[1].url], user="admin", password=ADMIN)

        async def removed():
            try:
                reply = await admin.request("$JS.API.SERVER.REMOVE", b'{"peer": "%s"}' % name.encode(), timeout=2)
            except NatsError:  # while the servers elect a leader
                return {}
            return json.loads(reply.data)

        await repeated(removed, lambda answer: answer.get("success"), "that the old one is removed")
        for stream in (settings.stream, settings.dead_stream, f"KV_{settings.bucket}"):
            await repeated(
                lambda stream=stream: ask(made.connection, f"STREAM.INFO.{stream}"),
                lambda info: (
                    [each["current"] for each in info["cluster"]["replicas"]] == [True, True]
                    and "nats-new" in str(info["cluster"])
                ),
                f"three copies of {stream}",
            )
        figures = await figures_until(watcher, lambda figures: figures.replicas_current == 3)
        assert figures.messages == stored >= 50
    finally:
        await admin.close()
        await made.connection.close()
