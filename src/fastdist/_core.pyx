"""The compiled core: from the bytes of an emitter to a record in the ring, and from there to an analyzer.

The way of a packet. ``Poller`` (transport.pxi) reads a connection's bytes into a buffer that all share, and hands them to
the protocol, ``IngestBase`` (ingest.pxi). That finds the request's head (http.pxi), has the body checked by one pass
over its bytes (packet_scan.pxi), and pushes it to the ``PacketRing`` (ring.pxi): one record, which is queue, store and
in-flight table at once, and 202 is written into a buffer of responses. When some connections have been read their records
are written to the ring's file (ringfile.pxi) in one piece, and the responses leave (outbox.pxi), with durability fsync
when a ``SyncThread`` (syncing.pxi) has synced them. Once in an event-loop iteration ``DispatchBase`` (dispatch.pxi)
claims what was pushed and written, has an analyzer picked for each packet (pick.pxi), and lets it join the waiting list
of that analyzer's ``PoolBase`` (pool.pxi). ``ReplyBase`` (upstream.pxi) writes requests with the bodies out of the ring,
and a 2xx has the record finished.

Memory. A ring's records and marks, counters, states and limits lie in mappings that other processes see too. A ring's
file is mapped for reading only and may be damaged at any time: what is needed of a claimed packet is in its entry, in
this process's own memory. A packet is known by its handle, the number of its entry, and lists are chained through the
entries. Shared words have one writer each, or are changed by an atomic operation of bits.h. Everything else belongs to
one object of one process and is freed with it. A ``Span`` points into a buffer of its caller's and is good for that
call only.

Python. What happens for every packet makes no Python object and calls nothing of Python; ``nogil`` and ``noexcept``
functions cannot raise, and return what happened. What is seldom (a response that is an error, a failure of an analyzer)
is up to Python classes that derive from those here, and may close the connection that is calling them. Nothing here
imports from the rest of fastdist.

The parts are included in the order in which they need one another, and include nothing themselves.
"""

cimport cython
from cpython.buffer cimport PyBUF_READ, PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.dict cimport PyDict_GetItem
from cpython.mem cimport PyMem_Free
from cpython.memoryview cimport PyMemoryView_FromMemory
from cpython.object cimport PyObject
from cpython.ref cimport Py_XDECREF, Py_XINCREF
from cpython.unicode cimport PyUnicode_AsUTF8AndSize, PyUnicode_DecodeUTF8
from libc.errno cimport EAGAIN, EBUSY, EFAULT, EFBIG, EINTR, EIO, errno
from libc.math cimport INFINITY, log
from libc.stdint cimport INT64_MAX, int32_t, int64_t, uint16_t, uint32_t, uint64_t, uint8_t
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memchr, memcmp, memcpy, memmove, memset, strlen
from posix.mman cimport (
    MAP_ANONYMOUS, MAP_FAILED, MAP_FIXED, MAP_NORESERVE, MAP_PRIVATE, MAP_SHARED, PROT_NONE, PROT_READ, PROT_WRITE, mmap, munmap,
)
from posix.unistd cimport close

import asyncio
import os
import re
import socket
import time
from collections import deque, namedtuple
from http import HTTPStatus
from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser, HttpResponseParser

include "core/bits.pxi"
include "core/buffers.pxi"
include "core/counters.pxi"
include "core/limiter.pxi"
include "core/pick.pxi"
include "core/ringfile.pxi"
include "core/ages.pxi"
include "core/ring.pxi"
include "core/recovery.pxi"
include "core/bundles.pxi"
include "core/analyzer_states.pxi"
include "core/files.pxi"
include "core/syncing.pxi"
include "core/checksum.pxi"
include "core/http.pxi"
include "core/chunks.pxi"
include "core/packet_scan.pxi"
include "core/values.pxi"
include "core/protobuf.pxi"
include "core/record_mapping.pxi"
include "core/connection_life.pxi"
include "core/transport.pxi"
include "core/outbox.pxi"
include "core/intake.pxi"
include "core/ingest.pxi"
include "core/proxies.pxi"
include "core/batches.pxi"
include "core/pool.pxi"
include "core/upstream.pxi"
include "core/dispatch.pxi"
