"""Messages that are taken out of what a NATS server sends, however it is cut, and the commands that are sent."""

from __future__ import annotations

import asyncio
import itertools
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nats.errors import ConnectionClosedError

from fastdist.settings import Jetstream
from fastdist.storage.jetstream.client import Client, Messages, fields_of, status_of
from fastdist.storage.jetstream.connection import Connection

OURS, THEIRS = b"7", b"3"
HEADERS = b"NATS/1.0 503\r\n\r\n"


class Reader:
    """Notes what ``handler`` is called with, and what is left to others."""

    def __init__(self) -> None:
        self.messages: list[tuple[str, str, bytes, bytes]] = []
        self.others = b""
        self.it = Messages()
        self.it.handlers[OURS] = lambda *message: self.messages.append(message)

    def read(self, *pieces: bytes) -> Reader:
        for piece in pieces:
            self.others += self.it.split(piece)
        return self


def message(number: bytes, subject: str, reply: str, headers: bytes, data: bytes) -> bytes:
    words = [b"HMSG" if headers else b"MSG", subject.encode(), number, *([reply.encode()] if reply else [])]
    sizes = ([len(headers)] if headers else []) + [len(headers + data)]
    return b" ".join([*words, *(b"%d" % size for size in sizes)]) + b"\r\n" + headers + data + b"\r\n"


OF_OURS = [
    ("a.b", "", b"", b"one"),
    ("a.b", "_INBOX.1", b"", b"MSG a.b 7 3\r\nabc\r\n"),  # a packet may look like anything
    ("a.c", "", HEADERS, b""),
    ("a.c", "_INBOX.2", b"NATS/1.0\r\nNats-Msg-Id: x\r\n\r\n", b"\r\n"),
    ("a.c", "", b"", b""),
]
OF_OTHERS = [
    b"PING\r\n",
    b'INFO {"server_id":"MSG 7"}\r\n',
    b"+OK\r\n",
    b"-ERR 'Permissions Violation for Subscription to \"x\"'\r\n",
    message(THEIRS, "a.b", "", b"", b"theirs\r\nMSG a.b 7 3\r\n"),
    message(THEIRS, "a.b", "r", HEADERS, b"theirs"),
]


def test_cut_at_every_byte():
    stream = b"".join(other + message(OURS, *ours) for other, ours in zip(OF_OTHERS, OF_OURS, strict=False))
    whole = Reader().read(stream)
    assert (whole.messages, whole.others) == (OF_OURS, b"".join(OF_OTHERS[: len(OF_OURS)]))
    for cut in range(1, len(stream)):
        reader = Reader().read(stream[:cut], stream[cut:])
        assert (reader.messages, reader.others) == (whole.messages, whole.others), cut
    bytewise = Reader().read(*(stream[at : at + 1] for at in range(len(stream))))
    assert (bytewise.messages, bytewise.others) == (whole.messages, whole.others)


@given(
    st.lists(st.sampled_from(OF_OURS) | st.sampled_from(OF_OTHERS), max_size=12),
    st.lists(st.integers(0, 900), max_size=6),
)
def test_any_order_and_cuts(parts, cuts):
    stream = b"".join(part if isinstance(part, bytes) else message(OURS, *part) for part in parts)
    edges = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    reader = Reader().read(*(stream[a:b] for a, b in itertools.pairwise(edges)))
    assert reader.messages == [part for part in parts if not isinstance(part, bytes)]
    assert reader.others == b"".join(part for part in parts if isinstance(part, bytes))


def test_others_get_whole_lines_and_messages():
    """nats-py reads on from where a line begins."""
    reader = Reader()
    for other in OF_OTHERS:
        assert reader.it.split(other[:-1]) == b""
        assert reader.it.split(other[-1:]) == other


@pytest.mark.parametrize("line", [b"MSG\r\n", b"MSG a 7\r\n", b"MSG a 7 x\r\n", b"MSG a 7 r -1\r\n", b"\r\n", b" \r\n"])
def test_malformed_lines_are_left_to_others(line):
    reader = Reader().read(line + message(OURS, *OF_OURS[0]))
    assert (reader.messages, reader.others) == (OF_OURS[:1], line)


def test_a_fault_costs_one_message():
    reader = Reader()

    def fail_once(*received):
        reader.messages.append(received)
        if len(reader.messages) == 1:
            raise KeyError("a fault")

    reader.it.handlers[OURS] = fail_once
    reader.read(b"".join(message(OURS, *ours) for ours in OF_OURS))
    assert reader.messages == OF_OURS


def test_headers_are_read():
    assert status_of(HEADERS) == "503"
    assert status_of(b"NATS/1.0\r\nNats-Msg-Id: 404\r\n\r\n") == ""
    assert status_of(b"") == ""
    end = b"NATS/1.0 409 Batch Completed\r\nNats-Pending-Messages: 3\r\nNats-Pending-Bytes: 0\r\n\r\n"
    assert status_of(end) == "409"
    assert fields_of(end)["Description"] == "Batch Completed"
    assert fields_of(end)["Nats-Pending-Messages"] == "3"


def connected_client():
    """Return a client, and what it writes."""
    client, written = Client(must_encrypt=False), []
    client.transport.write = written.append
    client._status = Client.CONNECTED
    return client, written


def test_commands_leave_in_one_write():
    async def run():
        client, written = connected_client()
        client.take("in.*", print)
        client.send("a.b", b"data", "in.1")
        client.send("a.b", b"\r\n", "in.2", "an id")
        client.send("a.c", b"")
        assert written == []
        await asyncio.sleep(0)
        headers = b"NATS/1.0\r\nNats-Msg-Id: an id\r\n\r\n"
        assert b"".join(written).split(b"SUB in.*  1\r\n") == [
            b"",
            b"PUB a.b in.1 4\r\ndata\r\n"
            + b"HPUB a.b in.2 %d %d\r\n" % (len(headers), len(headers) + 2)
            + headers
            + b"\r\n\r\n"
            + b"PUB a.c  0\r\n\r\n",
        ]
        assert (len(written), client.unsent) == (1, 0)

    asyncio.run(run())


def test_what_is_pending_is_not_unsent():
    """It leaves within this iteration: no connection has to be given up for it."""

    async def run():
        client, written = connected_client()
        client.send("a.b", b"data")
        assert client.unsent == 0
        assert written == [b"PUB a.b  4\r\ndata\r\n"]

    asyncio.run(run())


def test_nothing_is_sent_after_the_end():
    async def run():
        client, written = connected_client()
        client.send("a.b", b"given up")
        client._status = Client.CLOSED
        await asyncio.sleep(0)
        assert written == []
        with pytest.raises(ConnectionClosedError):
            client.send("a.b", b"late")

    asyncio.run(run())


# ---- servers that others have named


def test_learnt_servers_keep_the_given_name():
    """However many connections ago it was that the first one named them."""
    made = Connection(Jetstream(servers=("tls://nats-1.example:4222",)), "test")
    cluster = ["tls://10.0.0.1:4222", "tls://10.0.0.2:4222", "tls://10.0.0.3:4222"]
    made.server = "tls://nats-1.example:4222"
    for server in (cluster[1], cluster[2], cluster[1]):
        others = [urlsplit(url) for url in cluster if url != made.server]
        made._learn(SimpleNamespace(discovered_servers=others))
        made.server = server
        names = dict(made._servers())
        assert names.pop("tls://nats-1.example:4222") is None
        assert names.keys() >= {url for url in cluster if url != "tls://10.0.0.1:4222"}
        assert set(names.values()) == {"nats-1.example"}
    known = dict(made._servers())
    made._learn(SimpleNamespace(discovered_servers=[]))  # it is the only one that is there
    assert dict(made._servers()) == known
