"""The queue as a stream of NATS JetStream, which several replicas of fastdist share (``queue.backend = "jetstream"``).

| module | what it is for |
|---|---|
| ``message`` | what a message of the stream holds: packets as bytes, and back |
| ``login`` | how to log in, and TLS: what is wrong with files, and the options of a connection |
| ``transport``, ``connection`` | one connection to one of the servers at a time, replaced when it is lost |
| ``client`` | nats-py's client, with a short way for messages |
| ``api`` | requests of JetStream's API and their errors |
| ``streams`` | makes the streams at a start, or says why they cannot be used |
| ``publisher`` | stores messages: yes, no or unknown |
| ``consumer`` | claims messages, renews claims, acknowledges or gives back |
| ``dead_stream`` | the stream of dead letters |
| ``state`` | the key-value bucket that replicas share their overrides by |
| ``figures`` | how full the stream is, who leads it, what waits |

Nothing here knows of HTTP, rings or analyzers. What is imported from ``nats`` comes with the extra
``fastdist[jetstream]``; only ``message`` and ``login`` do without it.
"""

from __future__ import annotations

from importlib.util import find_spec

from fastdist.errors import StartError


def require_client() -> None:
    """Raise StartError where the client's library is not installed, with what to install."""
    missing = [package for module, package in (("nats", "nats-py"), ("nkeys", "nkeys")) if find_spec(module) is None]
    if missing:
        raise StartError(
            f'queue.backend = "jetstream" needs {" and ".join(missing)}, not installed here: '
            "pip install 'fastdist[jetstream]'"
        )
