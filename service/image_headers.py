"""Width and height of an image from its first bytes, for the formats that data sets are read from. Nothing is decoded."""

from __future__ import annotations

import struct

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
"""Of files that are taken as images, in any case of letters."""
HEAD_BYTES = 1 << 20
"""So much of a file is enough: a JPEG may have long comments before its size."""


def image_size(head: bytes) -> tuple[int, int] | None:
    """Width and height in pixels, or None where the bytes are the beginning of no PNG, JPEG, WebP, BMP or GIF.

    Args:
        head: the first `HEAD_BYTES` of the file, or all of a smaller one.
    """
    try:
        if head.startswith(b"\x89PNG\r\n\x1a\n") and head[12:16] == b"IHDR":
            return struct.unpack_from(">II", head, 16)
        if head[:6] in (b"GIF87a", b"GIF89a"):
            return struct.unpack_from("<HH", head, 6)
        if head.startswith(b"\xff\xd8"):
            return _jpeg(head)
        if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
            return _webp(head)
        if head.startswith(b"BM"):
            return _bmp(head)
    except struct.error:
        return None
    return None


def _jpeg(head: bytes) -> tuple[int, int] | None:
    """By the frame header: the first segment SOF0 to SOF15 but DHT, JPG and DAC."""
    at = 2
    while at + 4 <= len(head):
        if head[at] != 0xFF:
            return None
        marker = head[at + 1]
        if marker == 0xFF:  # padding
            at += 1
            continue
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack_from(">HH", head, at + 5)
            return width, height
        has_no_length = 0xD0 <= marker <= 0xD8 or marker == 0x01
        length = 0 if has_no_length else struct.unpack_from(">H", head, at + 2)[0]
        if marker in (0xD9, 0xDA) or (length < 2 and not has_no_length):
            return None
        at += 2 + length
    return None


def _webp(head: bytes) -> tuple[int, int] | None:
    kind = head[12:16]
    if kind == b"VP8X" and len(head) >= 30:
        return int.from_bytes(head[24:27], "little") + 1, int.from_bytes(head[27:30], "little") + 1
    if kind == b"VP8 " and head[23:26] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", head, 26)
        return width & 0x3FFF, height & 0x3FFF
    if kind == b"VP8L" and head[20:21] == b"\x2f":
        bits = struct.unpack_from("<I", head, 21)[0]
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    return None


def _bmp(head: bytes) -> tuple[int, int] | None:
    header_bytes = struct.unpack_from("<I", head, 14)[0]
    if header_bytes == 12:
        return struct.unpack_from("<HH", head, 18)
    width, height = struct.unpack_from("<ii", head, 18)
    return (width, abs(height)) if width > 0 and header_bytes >= 40 else None
