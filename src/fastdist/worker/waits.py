"""What emitters are answered that wait for deliveries (``Prefer: wait``)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Protocol

from fastdist.http.responses import Accepted, Delivered, json_response, problem
from fastdist.protocols.base import Reason, Refused

if TYPE_CHECKING:
    from collections.abc import Collection

    from msgspec import UnsetType

    from fastdist._core import PendingResponse
    from fastdist.exchange import Response
    from fastdist.protocols.base import Batch
    from fastdist.worker.agents import AgentRequest


class Emitter(Protocol):
    """A connection; ``awaited``: the sequences of all packets that it waits for."""

    awaited: set[int]


class Waiting(ABC):
    """An emitter that waits for deliveries; ``left``: the sequences of the packets that are not delivered yet."""

    def __init__(self, connection: Emitter, pending: PendingResponse, sequences: Collection[int]) -> None:
        self.connection, self.pending, self.left = connection, pending, set(sequences)

    @abstractmethod
    def delivered(self, analyzer: str) -> Response:
        """Return the response when all are delivered, the last one to ``analyzer``."""

    @abstractmethod
    def dead_letter(self) -> Response:
        """Return the response when one has become a dead letter."""

    @abstractmethod
    def lost(self) -> Response:
        """Return the response when one was damaged in the queue."""

    @abstractmethod
    def stored(self) -> Response:
        """Return the response when the time is over, in which they were not delivered."""


class PacketWait(Waiting):
    """The wait for a packet of POST /logs."""

    def __init__(
        self,
        connection: Emitter,
        pending: PendingResponse,
        sequence: int,
        packet_id: str,
        messages: int | UnsetType,
    ) -> None:
        super().__init__(connection, pending, (sequence,))
        self.packet_id, self.messages = packet_id, messages

    def delivered(self, analyzer: str) -> Response:
        """Return 200."""
        return json_response(Delivered(packet_id=self.packet_id, messages=self.messages, analyzer=analyzer))

    def dead_letter(self) -> Response:
        """Return 502."""
        return problem(502, f"packet {self.packet_id} could not be delivered and is now among the dead letters")

    def lost(self) -> Response:
        """Return 500."""
        detail = f"packet {self.packet_id} was accepted, but is lost: the queue's file was damaged; send it again"
        return problem(500, detail)

    def stored(self) -> Response:
        """Return 202."""
        return json_response(Accepted(packet_id=self.packet_id, messages=self.messages), 202)


class BatchWait(Waiting):
    """The wait for all packets of an agent's request; delivered or stored, its success reads the same."""

    def __init__(
        self,
        connection: Emitter,
        pending: PendingResponse,
        sequences: Collection[int],
        agent: AgentRequest,
        batch: Batch,
    ) -> None:
        super().__init__(connection, pending, sequences)
        self.agent, self.batch = agent, batch

    def delivered(self, analyzer: str) -> Response:  # noqa: ARG002
        """Return the success."""
        return self.agent.stored(self.batch)

    def dead_letter(self) -> Response:
        """Return the protocol's 502."""
        detail = "not all records could be delivered; some are now among the dead letters"
        return self.agent.refused(Refused(Reason.DEAD_LETTER, detail))

    def lost(self) -> Response:
        """Return the protocol's 500."""
        detail = "not all records will be delivered: the queue's file was damaged; send them again"
        return self.agent.refused(Refused(Reason.FAULT, detail))

    def stored(self) -> Response:
        """Return the success."""
        return self.agent.stored(self.batch)
