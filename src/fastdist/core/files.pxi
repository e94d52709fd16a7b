"""What Python does not tell of files: when one was made.

An inode's number may be that of a deleted file soon after; together with the time of its birth it is unique.
"""


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
