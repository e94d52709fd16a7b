"""Requests of an administrator to a running distributor: what its analyzers are, and changes to them.

Every response is one of three things: the document that was asked for, a refusal (``NotDoneError``, permanent: it would
be the same another time), or none that is of use (``NotDoneError``).
"""

from __future__ import annotations

from http import HTTPStatus
from http.client import HTTPException
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import quote

import msgspec

from fastdist.client.connection import Connection, describe
from fastdist.errors import UNDECODABLE, Fault
from fastdist.http.models import Analyzer, Analyzers
from fastdist.http.responses import Problem, Reloaded

if TYPE_CHECKING:
    from fastdist.client.connection import Response, Target
    from fastdist.http.models import FieldError

MAX_RESPONSE = 1 << 24  # bytes

Kind = TypeVar("Kind", Analyzer, Analyzers, Reloaded)


class NotDoneError(Exception):
    """What was asked for was not done; ``lines`` say why. ``permanent``: another try would end like this one."""

    def __init__(self, *lines: str, permanent: bool = False) -> None:
        super().__init__(lines[0])
        self.lines, self.permanent = lines, permanent


class Admin:
    """Asks one distributor. All methods raise NotDoneError."""

    def __init__(self, target: Target) -> None:
        self._connection, self._has_token = Connection(target), target.token is not None

    def reload(self) -> Reloaded:
        """Have the configuration read again."""
        return self._ask("POST", "/admin/reload", Reloaded)

    def analyzers(self) -> list[Analyzer]:
        """Return what is known of all analyzers."""
        return self._ask("GET", "/analyzers", Analyzers).analyzers

    def change(self, name: str, **changes: float | str) -> Analyzer:
        """Change the weight or the state of an analyzer."""
        return self._ask("PATCH", f"/analyzers/{quote(name, safe='')}", Analyzer, msgspec.json.encode(changes))

    def reset(self, name: str) -> Analyzer:
        """Undo all that was changed of an analyzer: it is as the configuration has it."""
        return self._ask("DELETE", f"/analyzers/{quote(name, safe='')}/override", Analyzer)

    def _ask(self, method: str, path: str, kind: type[Kind], body: bytes | None = None) -> Kind:
        headers = {"Content-Type": "application/json"} if body else {}
        try:
            response = self._connection.request(method, path, body, headers, MAX_RESPONSE)
        except (OSError, HTTPException) as error:
            raise NotDoneError(describe(error)) from None
        finally:
            self._connection.close()
        if response.status != HTTPStatus.OK:
            raise self._refusal(response)
        try:
            return msgspec.json.decode(response.content, type=kind)
        except UNDECODABLE as error:
            raise NotDoneError(f"{path}: {error}; is that the URL of a distributor?", permanent=True) from None

    def _refusal(self, response: Response) -> NotDoneError:
        permanent = HTTPStatus.BAD_REQUEST <= response.status < HTTPStatus.INTERNAL_SERVER_ERROR
        try:
            problem = msgspec.json.decode(response.content, type=Problem)
        except UNDECODABLE:
            text = f"it answers {response.status}; is that the URL of a distributor?"
            return NotDoneError(text, permanent=permanent)
        first = response.text
        if response.status == HTTPStatus.UNAUTHORIZED:
            known = (
                "the token that was given is not one" if self._has_token else "give one by --token or FASTDIST_TOKEN"
            )
            first = f"{first}; {known}"
        faults = [] if problem.errors is msgspec.UNSET else problem.errors
        return NotDoneError(first, *(" ".join(_line(fault).split()) for fault in faults), permanent=permanent)


def _line(fault: FieldError) -> str:
    """Return what is wrong with a field, and where: in a file as ``check`` says it, else by the pointer."""
    if fault.line is not msgspec.UNSET and fault.file is not msgspec.UNSET:
        return str(Fault(fault.detail, file=fault.file, line=fault.line))
    # A fault of a configuration names its path itself: "analyzers[0].weight: must be >= 0".
    names_itself = not fault.pointer or fault.detail.startswith(fault.pointer.lstrip("/").partition("/")[0])
    return fault.detail if names_itself else f"{fault.pointer}: {fault.detail}"
