"""A thread that syncs a file. It never takes the interpreter, so it does not wait for a busy event loop, or make it wait."""

ctypedef int (*sync_function)(int fd) noexcept nogil

cdef extern from "syncing.h" nogil:
    ctypedef struct syncing "fd_syncing":
        int event
    syncing *start_syncing "fd_syncing_start"(int fd, sync_function sync)
    void request_sync "fd_syncing_request"(syncing *thread, int64_t position)
    int64_t take_synced "fd_syncing_take"(syncing *thread, int *error)
    void end_syncing "fd_syncing_end"(syncing *thread, bint wait)
    void release_syncing "fd_syncing_release"(syncing *thread)


@cython.final
cdef class SyncThread:
    """Runs fdatasync on ``fd``, which stays the caller's, whenever that was requested; ``close`` ends it.

    ``fileno`` is readable when there is something for ``take``. ``sync``: the address of a C function that is called in
    place of fdatasync, ``int sync(int fd)``; it returns 0 or an errno. Raises OSError if no thread can be started.
    """

    cdef syncing *thread
    cdef bint ended

    def __cinit__(self, int fd, size_t sync=0):
        self.thread = start_syncing(fd, <sync_function>sync)
        if self.thread == NULL:
            raise OSError(errno, os.strerror(errno))

    def fileno(self):
        """Return what the event loop watches. It is closed with this object."""
        return self.thread.event

    def request(self, int64_t position):
        """Request that what was written up to ``position`` (at least 0) be synced: by a sync that begins after this call.

        While one runs, the next begins as soon as it ends and covers the latest request.
        """
        if position < 0:
            raise ValueError("a position is not negative")
        if not self.ended:
            request_sync(self.thread, position)

    def take(self):
        """Return what has become of requests since the last call: up to where syncs have succeeded (-1: none has), errno.

        An errno other than 0 is that of a sync that has failed after those. All that was requested till now is withdrawn
        then, and nothing more is synced before the next request.
        """
        cdef int error = 0
        cdef int64_t position = take_synced(self.thread, &error)
        return position, error

    def close(self):
        """End the thread; wait for the sync that is running, if there is one. ``take`` returns what has become of it."""
        if not self.ended:
            self.ended = True
            with nogil:
                end_syncing(self.thread, True)

    def __dealloc__(self):
        if self.thread != NULL:
            if not self.ended:
                end_syncing(self.thread, False)
            release_syncing(self.thread)
