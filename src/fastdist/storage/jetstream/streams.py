"""Makes what the queue needs on the NATS servers, or says why what is there cannot be used.

Rules:

- Several replicas may do this at once: what another has made meanwhile is as good as our own.
- What would lose packets, or is another service's, is refused with every difference named. It is never altered.
- What may be altered without losing anything (``UPDATED``) is, and everything else of a configuration stays as it is.
- What was deleted while the service runs is not made again before the next start: the packets in it are gone, and that
  is for a person to know.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from fastdist.errors import StartError
from fastdist.storage.jetstream import api
from fastdist.storage.jetstream.api import ApiError, UnavailableError, find, request
from fastdist.storage.jetstream.consumer import NAME

if TYPE_CHECKING:
    from collections.abc import Mapping

    from nats.aio.client import Client

    from fastdist.settings import Jetstream
    from fastdist.storage.jetstream.connection import Connection

TRIES = 5  # until what several make at once is the same for all of them
PAUSE = 0.2  # seconds between them
UNLIMITED = -1
UPDATED = {"max_bytes", "duplicate_window", "ack_wait"}  # settings that a start changes where they differ

# What a stream must not have, whatever made it: each would lose packets, or take them elsewhere.
FORBIDDEN: dict[str, tuple[Any, ...]] = {  # key -> values that are as good as none
    "max_age": (0,),
    "max_msgs": (UNLIMITED, 0),
    "max_msgs_per_subject": (UNLIMITED, 0),
    "max_msg_size": (UNLIMITED, 0),
    "no_ack": (False,),
    "sealed": (False,),
    "mirror": (None,),
    "sources": (None, []),
    "subject_transform": (None,),
    "persist_mode": ("", "default"),
}


def stream_config(settings: Jetstream) -> dict[str, Any]:
    """Return the configuration of the stream of packets."""
    return {
        "name": settings.stream,
        "subjects": [settings.subject],
        "retention": "workqueue",
        "storage": "file",
        "discard": "new",
        "num_replicas": settings.replicas,
        "max_bytes": settings.max_bytes,
        "duplicate_window": _ns(settings.dedup_window),
        "description": "packets of fastdist",
    }


def dead_config(settings: Jetstream) -> dict[str, Any]:
    """Return the configuration of the stream of dead letters."""
    return stream_config(settings) | {
        "name": settings.dead_stream,
        "subjects": [settings.dead_subject],
        "retention": "limits",
        "description": "dead letters of fastdist",
    }


def bucket_config(settings: Jetstream) -> dict[str, Any]:
    """Return the configuration of the stream that is the key-value bucket, as all clients of NATS make one."""
    return {
        "name": f"KV_{settings.bucket}",
        "subjects": [f"$KV.{settings.bucket}.>"],
        "retention": "limits",
        "storage": "file",
        "discard": "new",
        "num_replicas": settings.replicas,
        "max_msgs_per_subject": 1,
        "allow_rollup_hdrs": True,
        "deny_delete": True,
        "allow_direct": True,
        "description": "overrides of fastdist",
    }


def consumer_config(settings: Jetstream) -> dict[str, Any]:
    """Return the configuration of the consumer that all workers share."""
    return {
        "durable_name": NAME,
        "ack_policy": "explicit",
        "deliver_policy": "all",
        "replay_policy": "instant",
        "ack_wait": _ns(settings.ack_wait),
        "max_deliver": UNLIMITED,
        "max_ack_pending": UNLIMITED,  # the default, 1000, would stall all replicas
        "num_replicas": settings.replicas,
    }


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)


async def prepare(connection: Connection) -> None:
    """Have streams, consumer and bucket as they must be.

    Raises StartError where what is there cannot be used, and UnavailableError while nothing can be said: no leader, or
    not as many servers as there are to be copies.
    """
    settings, client = connection.settings, connection.client
    where = f"jetstream: {connection.server}"
    try:
        for config in (stream_config(settings), dead_config(settings), bucket_config(settings)):
            await _have_stream(client, settings, config, where)
        await _have_consumer(client, settings, where)
    except UnavailableError:
        if connection.denied:
            raise StartError(connection.denied) from None
        raise


async def _have_stream(client: Client | None, settings: Jetstream, wanted: dict[str, Any], where: str) -> None:
    name = wanted["name"]
    for attempt in range(TRIES):
        found = await find(client, f"STREAM.INFO.{name}", api.STREAM_NOT_FOUND)
        if found is not None:
            await _fit_stream(client, found["config"], wanted, where)
            return
        if not settings.create:
            raise StartError(f"{where}: there is no stream {name}, and jetstream.create is false")
        try:
            await request(client, f"STREAM.CREATE.{name}", wanted)
        except ApiError as error:
            if error.code != api.STREAM_NAME_EXIST:
                raise _not_made(error, f"stream {name}", where) from error
        if attempt:
            await asyncio.sleep(PAUSE)
    raise UnavailableError(f"stream {name} was made and is not there")


def _not_made(error: ApiError, what: str, where: str) -> Exception:
    """Return what it means that something could not be made."""
    if error.code in {api.NO_PEERS, api.MEMORY_EXCEEDED, api.STORAGE_EXCEEDED}:  # a server that is missing may come
        hint = ""
        if "storage" in str(error):  # without peers, the text alone says what they lack
            hint = "; each server with a copy needs room for jetstream.max_bytes twice: packets and dead letters"
        return UnavailableError(f"{what} cannot be made: {error}{hint}")
    hint = "; for one server there is jetstream.replicas = 1" if error.code == api.NOT_CLUSTERED else ""
    return StartError(f"{where}: {what} cannot be made: {error}{hint}")


async def _fit_stream(client: Client | None, found: dict[str, Any], wanted: dict[str, Any], where: str) -> None:
    if differences := stream_differences(found, wanted):
        raise StartError(f"{where}: stream {wanted['name']} cannot be used: {'; '.join(differences)}")
    if changes := _changes(found, wanted):
        try:
            await request(client, f"STREAM.UPDATE.{wanted['name']}", found | changes)
        except ApiError as error:
            what = f"stream {wanted['name']}"
            raise StartError(f"{where}: {what} cannot be changed ({_said(changes)}): {error}") from error


def stream_differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Return in what a stream differs from what must be, each as text."""
    fixed = [key for key in wanted if key not in UPDATED | {"name", "description"}]
    differences = [
        f"{key} is {_text(found.get(key))}, not {_text(wanted[key])}" for key in fixed if found.get(key) != wanted[key]
    ]
    for key, harmless in FORBIDDEN.items():
        value = found.get(key)
        if key not in wanted and value is not None and value not in harmless:
            differences.append(f"{key} is {_text(value)}")
    return differences


async def _have_consumer(client: Client | None, settings: Jetstream, where: str) -> None:
    wanted = consumer_config(settings)
    stream = settings.stream
    for _ in range(TRIES):
        found = await find(client, f"CONSUMER.INFO.{stream}.{NAME}", api.CONSUMER_NOT_FOUND)
        if found is not None:
            await _fit_consumer(client, stream, found["config"], wanted, where)
            return
        if not settings.create:
            raise StartError(f"{where}: stream {stream} has no consumer {NAME}, and jetstream.create is false")
        try:
            await request(client, f"CONSUMER.DURABLE.CREATE.{stream}.{NAME}", {"stream_name": stream, "config": wanted})
        except ApiError as error:
            if await find(client, f"CONSUMER.INFO.{stream}.{NAME}", api.CONSUMER_NOT_FOUND) is None:
                raise _not_made(error, f"consumer {NAME} of stream {stream}", where) from error
    raise UnavailableError(f"consumer {NAME} was made and is not there")


async def _fit_consumer(
    client: Client | None, stream: str, found: dict[str, Any], wanted: dict[str, Any], where: str
) -> None:
    fixed = [key for key in wanted if key not in UPDATED]
    # Not set is 0 there for the number of copies, which is then that of the stream.
    differences = [
        f"{key} is {_text(found.get(key))}, not {_text(wanted[key])}"
        for key in fixed
        if found.get(key) != wanted[key] and not (key == "num_replicas" and not found.get(key))
    ]
    differences += [
        f"{key} is {_text(found[key])}"
        for key in ("deliver_subject", "filter_subject", "filter_subjects", "backoff", "pause_until", "headers_only")
        if found.get(key) and found[key] not in (stream_subject(stream), [stream_subject(stream)])
    ]
    if differences:
        raise StartError(f"{where}: consumer {NAME} of stream {stream} cannot be used: {'; '.join(differences)}")
    if changes := _changes(found, wanted):
        body = {"stream_name": stream, "config": found | changes}
        try:
            await request(client, f"CONSUMER.DURABLE.CREATE.{stream}.{NAME}", body)
        except ApiError as error:
            raise StartError(f"{where}: consumer {NAME} cannot be changed ({_said(changes)}): {error}") from error


def stream_subject(stream: str) -> str:
    """Return the subject of a stream's packets."""
    return f"{stream}.packets"


def _changes(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    return {key: wanted[key] for key in UPDATED & wanted.keys() if found.get(key) != wanted[key]}


def _text(value: object) -> str:
    return "not set" if value is None else " and ".join(map(str, value)) if isinstance(value, list) else str(value)


def _said(changes: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} to {value}" for key, value in sorted(changes.items()))
