"""Requests that a trusted proxy passes on: their client is who the proxy says, not the proxy.

What the addresses in X-Forwarded-For mean is decided in Python (``fastdist.net.proxies``), which is asked only when the field
is another than in the request before.
"""


cdef int find_client(IngestBase connection, RequestHead head, Filled *filled) except -1:
    """Note whose request this is, before limits are looked at."""
    cdef Span value = filled.forwarded
    cdef bytes before = connection.forwarded
    if value.p == NULL and head.forwarded is not None:
        value.p = <const uchar *>PyBytes_AS_STRING(head.forwarded)
        value.n = len(head.forwarded)
    if value.n != len(before) or (value.n and memcmp(value.p, PyBytes_AS_STRING(before), value.n) != 0):
        connection.forwarded = value.p[:value.n] if value.n else b""
        connection.client_changed(connection.forwarded)
    return 0
