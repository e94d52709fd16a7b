"""Protocols of log agents: from their requests to packets, and from what became of those to their responses.

A protocol is a module with a subclass of ``base.Protocol``, and a line in ``table.PROTOCOLS``. It has a name (that of
``server.protocols``), routes, the credentials that its clients send, and three kinds of functions:

- ``take(request, limits)`` converts a request with records. It is a generator that yields after about a millisecond of
  work, so that others have their turn, and returns a ``Batch``: packets, and the response for when all of them are
  stored. ``base.finish`` runs it to its end, in a thread or a process. It raises ``Refused``.
- ``reply(request, obstacle)`` answers a request without records: probes, what clients ask before they send.
- ``refuse(request, refused)`` writes whatever is wrong in the protocol's own shape: what ``take`` has raised, and what
  its caller has found (no room, no token, too large, ...).

All are pure: no sockets, no clock, no settings but ``Limits``. Values go in and come out, and can be pickled.
"""
