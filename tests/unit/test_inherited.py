"""The variables that a service manager passes sockets with."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from fastdist.errors import StartError
from fastdist.supervisor import activation

ME = str(os.getpid())


@pytest.fixture
def passed(monkeypatch):
    """Return ``passed(*sockets)``: let those be the first of the descriptors that are passed."""
    made = []

    def passed(*sockets):
        fds = [each.fileno() for each in sockets]
        assert fds == list(range(fds[0], fds[0] + len(fds))), "descriptors in a row"
        monkeypatch.setattr(activation, "FIRST", fds[0])
        made.extend(sockets)

    yield passed
    for each in made:
        each.detach()


def listeners(count):
    """Return listening sockets whose descriptors are in a row."""
    end = max(int(path.name) for path in Path("/proc/self/fd").iterdir()) + 10
    found = []
    for number in range(count):
        listener = socket.create_server(("127.0.0.1", 0))
        os.dup2(listener.fileno(), end + number)
        listener.close()
        found.append(socket.socket(fileno=end + number))
    return found


def test_sockets_are_taken_by_name(passed):
    first, admin, second = listeners(3)
    passed(first, admin, second)
    environ = {"LISTEN_PID": ME, "LISTEN_FDS": "3", "LISTEN_FDNAMES": "fastdist.socket:admin:", "HOME": "/"}
    found = activation.inherited(environ)
    addresses = {name: [each.getsockname() for each in sockets] for name, sockets in found.items()}
    assert addresses == {"": [first.getsockname(), second.getsockname()], "admin": [admin.getsockname()]}
    assert environ == {"HOME": "/"}, "workers must not take them for theirs"
    for sockets in found.values():
        for each in sockets:
            assert not os.get_inheritable(each.fileno())
            each.close()


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"LISTEN_PID": ME},
        {"LISTEN_FDS": "1"},
        {"LISTEN_PID": "1", "LISTEN_FDS": "1"},
        {"LISTEN_PID": "", "LISTEN_FDS": "1", "LISTEN_FDNAMES": "a"},
        {"LISTEN_PID": ME, "LISTEN_FDS": "0"},
    ],
)
def test_what_is_not_for_us_is_left_alone(environ):
    assert activation.inherited(environ) == {}
    assert environ == {}


def test_number_of_sockets_must_be_a_number():
    with pytest.raises(StartError, match="LISTEN_FDS is not a number: '-1'"):
        activation.inherited({"LISTEN_PID": ME, "LISTEN_FDS": "-1"})


def test_descriptor_that_is_closed_is_named(monkeypatch):
    monkeypatch.setattr(activation, "FIRST", 1000)
    with pytest.raises(StartError, match='descriptor 1000, "logs", is no socket: Bad file descriptor'):
        activation.inherited({"LISTEN_PID": ME, "LISTEN_FDS": "1", "LISTEN_FDNAMES": "logs"})


@pytest.mark.parametrize(
    ("host", "port", "listens", "warned"),
    [
        ("127.0.0.1", 3000, ("127.0.0.1", 3000), False),
        ("localhost", 3000, ("127.0.0.1", 3000), False),
        ("0.0.0.0", 3000, ("::", 3000, 0, 0), False),
        ("::", 3000, ("0.0.0.0", 3000), False),
        ("127.0.0.1", 0, ("127.0.0.1", 3000), False),
        ("127.0.0.1", 3000, ("127.0.0.1", 3001), True),
        ("127.0.0.1", 3000, ("127.0.0.2", 3000), True),
        ("127.0.0.1", 3000, ("0.0.0.0", 3000), True),
        ("0.0.0.0", 3000, ("127.0.0.1", 3000), True),
        ("nowhere.invalid", 3000, ("127.0.0.1", 3000), True),
    ],
)
def test_other_addresses_are_told(monkeypatch, host, port, listens, warned):
    told = []
    monkeypatch.setattr(activation.log, "warning", lambda text, **more: told.append((text, more)), raising=False)

    class Listener:
        def getsockname(self):
            return listens

    activation.check([Listener()], 1, host, port)
    assert bool(told) == warned
