"""What Python does not tell of files, or only slowly: when one was made, whether it has its name, schedstat.

An inode's number may be that of a deleted file soon after; together with the time of its birth it is unique.
"""

from libc.errno cimport ENOENT, ENOTDIR
from libc.stdlib cimport strtoull
from posix.stat cimport fstat, stat, struct_stat
from posix.unistd cimport pread


cdef extern from "<fcntl.h>" nogil:
    int AT_EMPTY_PATH

cdef extern from "<sys/stat.h>" nogil:
    unsigned int STATX_BTIME
    struct statx_timestamp:
        int64_t tv_sec
        uint32_t tv_nsec
    struct statx_result "statx":
        uint32_t stx_mask
        statx_timestamp stx_btime
    int statx(int folder, const char *path, int flags, unsigned int mask, statx_result *result)


def birth_ns(int fd):
    """Return when an open file was made, in ns since 1970; 0 where that is not known: some file systems, sandboxes."""
    cdef statx_result result
    cdef int failed
    with nogil:
        failed = statx(fd, "", AT_EMPTY_PATH, STATX_BTIME, &result)
    if failed or not result.stx_mask & STATX_BTIME:
        return 0
    return result.stx_btime.tv_sec * 1_000_000_000 + result.stx_btime.tv_nsec


def has_name(int fd, path):
    """Whether the open file is the one that is found under this path. Raises OSError when that cannot be seen."""
    cdef bytes encoded = os.fsencode(path)
    cdef const char *name = encoded
    cdef struct_stat opened, found
    cdef int failed
    with nogil:
        failed = fstat(fd, &opened) or stat(name, &found)
    if not failed:
        return opened.st_ino == found.st_ino and opened.st_dev == found.st_dev
    if errno == ENOENT or errno == ENOTDIR:
        return False
    raise OSError(errno, os.strerror(errno), path)


def busy_ns(int fd):
    """Return for how many ns a thread has run or waited for a processor, as its schedstat, open as ``fd``, says; or -1."""
    cdef char[100] text
    cdef char *first = text
    cdef char *second
    cdef char *end
    cdef Py_ssize_t n = pread(fd, text, sizeof(text) - 1, 0)
    cdef int64_t ran, waited
    if n <= 0:
        return -1
    text[n] = 0
    ran = strtoull(first, &second, 10)
    waited = strtoull(second, &end, 10)
    return ran + waited if second != first and end != second else -1
