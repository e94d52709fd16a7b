"""Changes that an administrator requests from a worker, and that the supervisor carries out."""

from __future__ import annotations

import asyncio
import itertools
from http import HTTPStatus
from typing import TYPE_CHECKING

from fastdist import ipc
from fastdist.http import stats
from fastdist.http.responses import ChangedSetting, Reloaded, json_response, problem
from fastdist.ipc import Action, Message

if TYPE_CHECKING:
    from collections.abc import Callable

    from fastdist.exchange import Response
    from fastdist.http.api import Api

TIMEOUT = 15.0  # seconds that the supervisor has to carry out a change


class AdminRequests:
    """Requests that the supervisor, at the other end of ``control``, has yet to reply to."""

    def __init__(self, control: asyncio.StreamWriter, api: Api) -> None:
        self._control, self._api = control, api
        self._pending: dict[int, Callable[[Message], None]] = {}  # by id
        self._numbers = itertools.count(1)

    def send(self, action: Action, done: Callable[[Response], None]) -> None:
        """Send a change to the supervisor; ``done`` gets the response."""
        number = next(self._numbers)
        late = Message("reply", id=number, status=HTTPStatus.GATEWAY_TIMEOUT)
        timer = asyncio.get_running_loop().call_later(TIMEOUT, self.replied, late)

        def respond(reply: Message) -> None:
            timer.cancel()
            try:
                response = self._response(action, reply)
            except Exception as error:  # noqa: BLE001  (the client must get a response)
                response = self._api.faults.response(error)
            done(response)

        self._pending[number] = respond
        ipc.send(self._control, Message("request", id=number, action=action))

    def replied(self, reply: Message) -> None:
        """Pass on the supervisor's reply; it may be too late."""
        if respond := self._pending.pop(reply.id, None):
            respond(reply)

    def _response(self, action: Action, reply: Message) -> Response:
        if reply.status == HTTPStatus.OK and action.name == "reload":
            changed = [ChangedSetting(**each) for each in reply.body["changed"]]
            needs_restart, masked = reply.body["needs_restart"], reply.body["masked"]
            return json_response(Reloaded(changed=changed, needs_restart=needs_restart, masked=masked))
        if reply.status == HTTPStatus.OK:
            analyzer = stats.analyzer(self._api.snapshot(), action.analyzer)
            return json_response(analyzer) if analyzer else problem(404, f"{action.analyzer!r} was removed meanwhile")
        if reply.status == HTTPStatus.GATEWAY_TIMEOUT:
            return problem(503, "the supervisor has not answered in time")
        if isinstance(reply.body, list):
            errors = [{"pointer": "", **each} for each in reply.body]
            return problem(reply.status, "the new configuration cannot be used; the old one stays", errors=errors)
        return problem(reply.status, str(reply.body))
