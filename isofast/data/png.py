"""Whether a PNG is whole: Pillow stops reading at the last row, and other decoders do not."""

import struct
import zlib

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
# first pixel and step, across and down, of the seven passes of an interlaced picture
_PASSES = (
    (0, 8, 0, 8),
    (4, 8, 0, 8),
    (0, 4, 4, 8),
    (2, 4, 0, 4),
    (0, 2, 2, 4),
    (1, 2, 0, 2),
    (0, 1, 1, 2),
)
_PIECE = 1 << 20


def png_problem(content: bytes) -> str:
    """Say what is wrong with the container of a PNG that Pillow has read; "" where it is whole.

    Every chunk has its checksum, the last one is IEND, and the image data are as long as the
    header says (PNG specification, sections 5 and 8). What follows IEND is nobody's concern.
    """
    try:
        return _problem(memoryview(content))
    except (struct.error, KeyError):
        return "damaged PNG: a header of another length, or an unknown colour type"


def _problem(content: memoryview) -> str:
    header = b""
    data: list[memoryview] = []
    place = len(_SIGNATURE)
    while True:
        # length (4), name (4), what it holds, checksum (4)
        if place + 12 > len(content):
            return "PNG cut short: it ends without a whole IEND"
        length = int.from_bytes(content[place : place + 4], "big")
        end = place + 8 + length
        if end + 4 > len(content):
            return "PNG cut short: it ends inside a chunk"
        name = bytes(content[place + 4 : place + 8])
        if zlib.crc32(content[place + 4 : end]) != int.from_bytes(content[end : end + 4], "big"):
            return f"damaged PNG: the checksum of {name.decode('ascii', 'replace')} is wrong"
        if name == b"IHDR":
            header = bytes(content[place + 8 : end])
        elif name == b"IDAT":
            data.append(content[place + 8 : end])
        elif name == b"IEND":
            return _data_problem(data, _expected_bytes(header))
        place = end + 4


def _data_problem(data: list[memoryview], expected: int) -> str:
    inflate = zlib.decompressobj()
    found = 0
    try:
        for piece in data:
            rest: bytes | memoryview = piece
            # in pieces and never far beyond what is needed: a few bytes can inflate to anything
            while rest and found <= expected and not inflate.eof:
                found += len(inflate.decompress(rest, _PIECE))
                rest = inflate.unconsumed_tail
    except zlib.error as error:
        return f"damaged PNG: {error}"
    # all are there; libpng lets more than enough pass
    if found > expected or (found == expected and inflate.eof):
        return ""
    return f"PNG cut short: {found:,} of {expected:,} bytes of image data, or no end of them"


def _expected_bytes(header: bytes) -> int:
    """Bytes of all rows, each with the byte that names its filter."""
    width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", header)
    bits = depth * _CHANNELS[colour]
    if not interlaced:
        return int(height * (1 + (width * bits + 7) // 8))
    sizes = ((len(range(x, width, dx)), len(range(y, height, dy))) for x, dx, y, dy in _PASSES)
    return sum(down * (1 + (across * bits + 7) // 8) for across, down in sizes if across)
