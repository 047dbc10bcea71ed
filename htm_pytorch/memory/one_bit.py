"""A single bit that has flipped, found by the CRC-32 that was taken before.

A CRC is linear: what the sums of the right and the damaged bytes differ in depends on nothing but
which bits have flipped. No two single bits make the same difference, in less than 2**32 of them.
"""

import zlib

_OF_BYTE = [zlib.crc32(bytes([value])) ^ zlib.crc32(b"\0") for value in range(256)]
"""What a byte makes of the sum of nothing."""
_BITS = {_OF_BYTE[1 << bit]: 1 << bit for bit in range(8)}
"""Bits by the difference that each makes in the last byte."""
_LOWEST = {value >> 24: low for low, value in enumerate(_OF_BYTE)}
"""The lowest byte of a sum, by the highest one of the sum that a zero behind it makes."""


def put_right(data: bytes, checksum: int) -> bytes | None:
    """Return the bytes of which `checksum` is the CRC-32: `data`, or with one bit flipped back.

    Where the bit is in the checksum, that is `data`. None where it takes more than one bit.
    """
    difference = zlib.crc32(data) ^ checksum
    if not difference & (difference - 1):
        return data
    for place in range(len(data) - 1, -1, -1):
        bit = _BITS.get(difference)
        if bit is not None:
            right = bytearray(data)
            right[place] ^= bit
            return bytes(right)
        # One zero less behind it.
        low = _LOWEST[difference >> 24]
        difference = ((difference ^ _OF_BYTE[low]) << 8 | low) & 0xFFFFFFFF
    return None
