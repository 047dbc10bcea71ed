"""What is still in a damaged file, found by its checksum, whatever leads to it or not.

SQLite reaches a row through pages that a single flipped bit can close. Here the bytes of the file
are searched for what looks like a row (https://www.sqlite.org/fileformat2.html); the checksums of
what is found say whether it is one.
"""

import re
import zlib
from collections.abc import Collection, Iterator

PAGE = 4096
MOST_ENDS = 64
"""Places at which a list of lists may end that are looked at."""
_HEADER = re.compile(rb"[\x03-\x0f](?=[\x0d-\xff])")
_WIDTHS = {0: 0, 1: 1, 2: 2, 3: 3, 4: 4, 5: 6, 6: 8, 8: 0, 9: 0}
"""How many bytes a whole number takes, by its kind."""


def windows(data: bytes, size: int, checksums: Collection[int]) -> dict[int, bytes]:
    """Return, by their CRC-32, those `size` bytes that have one of these checksums."""
    found: dict[int, bytes] = {}
    view = memoryview(data)
    for at in range(len(data) - size + 1):
        checksum = zlib.crc32(view[at : at + size])
        if checksum in checksums:
            found.setdefault(checksum, data[at : at + size])
    return found


def sealed_lists(data: bytes) -> Iterator[bytes]:
    """Yield the JSON lists of lists that stand behind their CRC-32, with it."""
    for found in re.finditer(rb"\[\[", data):
        at = found.start()
        checksum = int.from_bytes(data[max(at - 4, 0) : at], "little")
        end = at
        # Two brackets may also be in a text.
        for _ in range(MOST_ENDS):
            end = data.find(b"]]", end) + 2
            if end == 1:
                break
            if zlib.crc32(data[at:end]) == checksum:
                yield data[at - 4 : end]
                break


def blobs(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield the name and the body of each row of a name, perhaps a number, and a body."""
    for found in _HEADER.finditer(data):
        at = found.start()
        kinds = _kinds(data, at)
        if kinds is None:
            continue
        name, *numbers, body = kinds
        before = data[at] + (name - 13) // 2 + sum(_WIDTHS[number] for number in numbers)
        size = before + (body - 12) // 2
        for has_number in (True, False):
            if not _is_announced(data, at, size, has_number):
                continue
            stored = _payload(data, at, size, has_number)
            if stored is not None:
                yield stored[data[at] : data[at] + (name - 13) // 2], stored[before:]
                break


def _kinds(data: bytes, at: int) -> list[int] | None:
    """Return what a row's header says of its columns: a text, perhaps a number, bytes."""
    end = at + data[at]
    if end > len(data):
        return None
    kinds, place = [], at + 1
    while place < end:
        kind, place = _varint(data, place, end)
        kinds.append(kind)
    if place != end or len(kinds) not in (2, 3):
        return None
    name, *numbers, body = kinds
    is_right = name >= 13 and name % 2 and body >= 12 and not body % 2
    return kinds if is_right and all(number in _WIDTHS for number in numbers) else None


def _is_announced(data: bytes, at: int, size: int, has_number: bool) -> bool:
    """Whether the size of a row stands before it, and perhaps its number between."""
    wanted = _encoded(size)
    for width in range(1, 10) if has_number else (0,):
        start = at - width - len(wanted)
        if start < 0:
            return False
        if data[start : start + len(wanted)] != wanted:
            continue
        if not width or _varint(data, at - width, at)[1] == at:
            return True
    return False


def _payload(data: bytes, at: int, size: int, has_number: bool) -> bytes | None:
    """Return a row; what does not fit its page is in a chain of others."""
    most = PAGE - 35 if has_number else (PAGE - 12) * 64 // 255 - 23
    if size <= most:
        return data[at : at + size]
    least = (PAGE - 12) * 32 // 255 - 23
    here = least + (size - least) % (PAGE - 4)
    here = here if here <= most else least
    parts, left = [data[at : at + here]], size - here
    link = at + here
    while left:
        number = int.from_bytes(data[link : link + 4], "big")
        link = (number - 1) * PAGE
        if not 1 < number <= len(data) // PAGE:
            return None
        part = data[link + 4 : link + 4 + min(left, PAGE - 4)]
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def _varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    """Return a number and where it ends."""
    value = 0
    while at < end:
        value = value << 7 | data[at] & 0x7F
        at += 1
        if data[at - 1] < 0x80:
            return value, at
    return value, end + 1


def _encoded(value: int) -> bytes:
    groups = [value & 0x7F]
    while value := value >> 7:
        groups.append(value & 0x7F | 0x80)
    return bytes(groups[::-1])
