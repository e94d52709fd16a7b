"""A connection's life: the states it may be in, and what may follow each. Nothing else decides what comes next.

Theory of operation. Each kind of connection has two states, one for each direction. A table, {state: states that may
follow}, lists them in the order of the enum that numbers them. ``set_reading`` and ``set_writing`` change them: a move that
is not in the table is an error of the program, which is reported and costs the connection (checked builds raise it); an
emitter's is then put into its last states whatever the table says (``break_off``).
Bits besides the states belong to the request or reply that is read, and are set back with it in one place; or
they say in which list a connection is; or mirror what the transport was told.

An emitter's connection reads requests and writes responses (ingest.pxi). Reading goes round from IDLE through HEAD, and BODY
or CHUNKS if there is a body, back to IDLE. What has to wait for its turn stays in its state and in a buffer (``held``); only
a body that was put together is WHOLE then. What follows the request is known from its head on (``after``): IDLE, or that it
is the last. If the emitter said so (Connection: close), the connection is ENDED. Else it may have sent more, and to close at
once would send a reset, which may destroy the response before it is read: so what comes is read and dropped until the
emitter's end (DISCARDING). That is how a fault, a time-out and draining end a connection.

Writing is AT_ONCE until a response has to wait, and again when all that are WAITING have left, in order. Once the last one
is WRITTEN our side is shut down (or the connection closed), and only the emitter's end is awaited. So these go together:

                                        AT_ONCE         WAITING   WRITTEN   LOST
    IDLE, HEAD, BODY, CHUNKS, WHOLE     yes             yes       no        no
    DISCARDING                          within a call   yes       yes       no
    ENDED                               within a call   yes       yes       yes

``held``: before DISCARDING only. ``answered`` (the request was refused by its head, and its body is passed over): in BODY and
CHUNKS. ``invites`` (the body is asked for by a 100 that waits): in BODY and CHUNKS while WAITING.

An analyzer's connection sends requests and reads replies (upstream.pxi). Reading goes round from HEAD through a body, whose
length is known (also if it is 0), or which is chunked (CHUNKED before its first byte, CHUNKS in it), or ends with the
connection (TO_CLOSE). OVER is behind the last reply: what follows was not asked for. Writing is OPEN for requests while there is
room. A 2xx that comes before its request is written whole counts when it is (EARLY until then: no more may be sent, since
nothing behind it has left). It is LEAVING when no request may follow: the connection is to be replaced, or the analyzer has
said that it closes; then it is CLOSED behind the last reply. CLOSED comes with every failure at once.

                                        OPEN   EARLY   LEAVING   CLOSED
    HEAD                                yes    yes     yes       yes
    LENGTH, CHUNKED, CHUNKS             yes    yes     yes       yes
    TO_CLOSE, OVER                      no     no      yes       yes
"""

cdef enum Reading:
    IDLE = 0                 # between requests
    HEAD                     # in a head, which may be whole and have to wait for its turn
    BODY                     # in a body of known length
    CHUNKS                   # in a chunked body
    WHOLE                    # the body is whole, in `body`, and its response has to wait for its turn
    DISCARDING               # no further request is read: what comes is dropped
    ENDED                    # nothing more comes, or need be read

cdef enum Responding:
    AT_ONCE = 0              # responses leave with the read that brings their requests
    WAITING                  # one has to wait: it and all behind it are in `responses`
    WRITTEN                  # the last one is
    LOST                     # there is no connection any more

cdef enum Replying:
    REPLY_HEAD = 0           # between replies, or in a head
    REPLY_LENGTH             # in a body of known length
    REPLY_CHUNKED            # before a chunked body
    REPLY_CHUNKS             # in a chunked body
    REPLY_TO_CLOSE           # in a body that ends with the connection
    REPLY_OVER               # the last reply was read

cdef enum Sending:
    OPEN = 0                 # requests are taken while there is room
    EARLY                    # a request was answered before it is written whole
    LEAVING                  # no more is taken; closed behind the last reply
    CLOSED                   # nothing is sent or read any more

cdef enum:
    MAX_STATES = 8           # of one direction

cdef extern from *:
    """
    #ifdef FASTDIST_CHECKED
    enum { CHECKED = 1 };
    #else
    enum { CHECKED = 0 };
    #endif
    """
    enum: CHECKED


@cython.final
cdef class Life:
    """The tables of one kind of connection: for each state the names of those that may follow."""

    cdef readonly dict reading, writing
    cdef uint32_t[MAX_STATES] reads, writes  # the same: a bit for each that may follow

    def __cinit__(self, *, dict reading, dict writing):
        self.reading, self.writing = reading, writing
        self.note(reading, self.reads)
        self.note(writing, self.writes)

    cdef int note(self, dict table, uint32_t *moves) except -1:
        cdef list names = list(table)
        cdef int state, following
        for state in range(len(names)):
            for name in table[names[state]]:
                following = names.index(name)
                moves[state] |= <uint32_t>1 << following
        return 0


cdef Life EMITTER_LIFE = Life(
    reading={
        "IDLE": ("HEAD", "DISCARDING", "ENDED"),
        "HEAD": ("IDLE", "BODY", "CHUNKS", "WHOLE", "DISCARDING", "ENDED"),
        "BODY": ("IDLE", "WHOLE", "DISCARDING", "ENDED"),
        "CHUNKS": ("IDLE", "WHOLE", "DISCARDING", "ENDED"),
        "WHOLE": ("IDLE", "DISCARDING", "ENDED"),
        "DISCARDING": ("ENDED",),
        "ENDED": (),
    },
    writing={
        "AT_ONCE": ("WAITING", "WRITTEN", "LOST"),
        "WAITING": ("AT_ONCE", "WRITTEN", "LOST"),
        "WRITTEN": ("LOST",),
        "LOST": (),
    },
)
cdef Life ANALYZER_LIFE = Life(
    reading={
        "HEAD": ("LENGTH", "CHUNKED", "TO_CLOSE", "OVER"),
        "LENGTH": ("HEAD", "OVER"),
        "CHUNKED": ("HEAD", "CHUNKS", "OVER"),
        "CHUNKS": ("HEAD", "OVER"),
        "TO_CLOSE": ("OVER",),
        "OVER": (),
    },
    writing={
        "OPEN": ("EARLY", "LEAVING", "CLOSED"),
        "EARLY": ("OPEN", "LEAVING", "CLOSED"),
        "LEAVING": ("CLOSED",),
        "CLOSED": (),
    },
)


cdef class Connection(Receiver):
    """A protocol that has a state for each direction."""

    cdef readonly Life life
    cdef int reading                 # Reading or Replying
    cdef int writing                 # Responding or Sending

    @property
    def state(self):
        """The names of both states."""
        return tuple(self.life.reading)[self.reading], tuple(self.life.writing)[self.writing]

    @cython.final
    cdef inline int set_reading(self, int state) except -1:
        if unlikely(not self.life.reads[self.reading] >> state & 1):
            return self.forbid(self.life.reading, self.reading, state)
        self.reading = state
        return 0

    @cython.final
    cdef inline int set_writing(self, int state) except -1:
        if unlikely(not self.life.writes[self.writing] >> state & 1):
            return self.forbid(self.life.writing, self.writing, state)
        self.writing = state
        return 0

    cdef int forbid(self, dict table, int before, int after) except -1:
        names = tuple(table)
        error = AssertionError(f"a connection may not go from {names[before]} to {names[after]}")
        if CHECKED:
            raise error
        return self.break_off(error)

    cdef int break_off(self, error) except -1:
        """Close the connection for an error of the program, and tell of it."""
        raise error
