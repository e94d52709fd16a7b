"""CRC-32C for Python, to read files of format 1 with."""


def checksum(bytes data, uint32_t seed=0):
    """Return the CRC-32C of ``data``; ``seed`` is that of what stands before it."""
    return crc32c(seed, <const char *>data, <size_t>len(data))
