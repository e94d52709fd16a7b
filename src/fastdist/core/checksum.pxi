"""CRC-32C for Python: of framed snappy, of messages of a stream, of documents in shared memory, of files of format 1."""


def checksum(bytes data, uint32_t seed=0):
    """Return the CRC-32C of ``data``; ``seed`` is that of what stands before it."""
    return crc32c(seed, <const char *>data, <size_t>len(data))
