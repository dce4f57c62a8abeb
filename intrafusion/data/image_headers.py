"""Headers of untrusted pictures, read before anything is decoded, to bound what a decoder will need.

`first` passes a decoder only what determines the pixels of the first frame: no comments, profiles, Exif data or later frames,
which it would otherwise read or unpack too. It needs only the standard library.
"""

import re
import struct
import zlib
from collections.abc import Iterator
from math import ceil, prod

PIXELS = 64_000_000  # most pixels of a picture; the largest in ImageNet has 61 million
DECODED = 3 * PIXELS  # most bytes that a decoder holds, computed from the header
FILE = 256 << 20  # most bytes of a file
_PIXEL_SCANS = 5 * PIXELS  # of a JPEG with several scans: most pixels times scans
_SCANS = 100
_SLOW = 1_000_000  # most pixels of formats that Pillow decodes in Python
_PARTS = 20_000  # most chunks, segments or blocks
_FRAMES = 1_000
_BESIDE, _PART = 4 << 20, 1 << 16  # most bytes of comments, profiles and tags; bytes unpacked at once

_PNG, _JPEG, _GIF, _TIFF = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", (b"GIF87a", b"GIF89a"), (b"II*\0", b"MM\0*")
_MARKER = re.compile(rb"\xff([^\x00\xff])", re.DOTALL)  # after fill bytes; \xff+ would retry from each of them
_RESTARTS = range(0xD0, 0xD8)
_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # samples per pixel, by a PNG's colour type
_PACKED = (1, 5, 8, 32773, 32946)  # a TIFF's accepted compressions: none, LZW, Deflate, PackBits
_SIZES = {
    1: 1,
    2: 1,
    3: 2,
    4: 4,
    5: 8,
    6: 1,
    7: 1,
    8: 2,
    9: 4,
    10: 8,
    11: 4,
    12: 8,
    13: 4,
}  # bytes per value, by a TIFF tag's type


def first(content: bytes) -> tuple[str, bytes]:
    """Return Pillow's name of a picture's format, and the parts of the content that its first frame's pixels need.

    Raises ValueError, with a short message, for a picture that would exceed the limits above, and for other formats.
    """
    if len(content) > FILE:
        raise ValueError(f"it is larger than {FILE >> 20} MiB")
    for kind, starts, read in _KINDS:
        if content.startswith(starts):
            try:
                return kind, read(content)
            except (struct.error, IndexError) as error:
                raise ValueError("it is truncated") from error
    raise ValueError(f"its format is not one of {', '.join(kind for kind, _, _ in _KINDS)}")


def _check(width: int, height: int, each: float = 1) -> None:
    """Raise ValueError for a size, or a number of bytes per pixel, beyond the limits."""
    if not 0 < width * height <= PIXELS:
        raise ValueError(f"it has {width}x{height} pixels; the limit is {PIXELS:,}")
    if width * height * each > DECODED:
        raise ValueError(f"it has {width}x{height} pixels of {each:g} bytes; the limit is {DECODED:,} bytes")


def _counted(count: int, most: int, what: str) -> None:
    if count > most:
        raise ValueError(f"it has more than {most:,} {what}")


def _png(content: bytes) -> bytes:
    width, height, bits, colour = struct.unpack_from(">IIBB", content, 16)
    if content[12:16] != b"IHDR" or colour not in _SAMPLES or bits not in (1, 2, 4, 8, 16):
        raise ValueError("its header is invalid")
    _check(width, height, _SAMPLES[colour] * max(1, bits // 8))
    kept, place, count, frames, beside = [_PNG], len(_PNG), 0, 0, 0
    while place + 12 <= len(content):
        size, kind = struct.unpack_from(">I4s", content, place)
        end = place + 12 + size
        frames += kind == b"fcTL"
        if kind in (b"zTXt", b"iTXt", b"iCCP"):
            beside += _unpacked(content[place + 8 : end - 4])
            _counted(beside, _BESIDE, "bytes of comments and profiles")
        if kind in (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"):
            kept.append(content[place:end])
        _counted(count := count + 1, _PARTS, "chunks")
        _counted(frames, _FRAMES, "frames")
        if kind == b"IEND":
            break
        place = end
    return b"".join(kept)


def _unpacked(chunk: bytes) -> int:
    """Return the unpacked bytes of a chunk after its name, damaged or not; counting stops just above the limit."""
    place = chunk.find(b"\x78", chunk.find(b"\0"))  # first byte of a zlib stream
    count, stream, rest = len(chunk), zlib.decompressobj(), chunk[place:] if place >= 0 else b""
    try:
        while rest and count <= _BESIDE:
            count += len(stream.decompress(rest, _PART))
            rest = stream.unconsumed_tail
    except zlib.error:
        pass
    return count


def _jpeg(content: bytes) -> bytes:
    kept, place, count, progressive, of_frame = [content[:2]], 2, 0, False, 0
    width = height = 0
    sampled = 0.0
    while True:
        if (found := _MARKER.search(content, place)) is None:
            raise ValueError("it ends before its pixels")
        kind, place = found[1][0], found.end()
        if kind in _RESTARTS or kind == 0x01:
            continue
        if kind in (0xD8, 0xD9):
            raise ValueError("it ends before its pixels")
        end = place + struct.unpack_from(">H", content, place)[0]
        if 0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC):
            if kind > 0xC2 or of_frame:
                raise ValueError("this kind of JPEG is not supported; save it as a baseline or progressive JPEG")
            height, width, of_frame = struct.unpack_from(">HHB", content, place + 3)
            sampled = _sampled(content[place + 8 : place + 8 + 3 * of_frame])
            progressive = kind == 0xC2
        if kind == 0xDA:
            break
        if kind in (*range(0xC0, 0xE0), 0xEE) or (kind == 0xE0 and content[place + 2 : place + 6] == b"JFIF"):
            kept.append(content[found.end() - 2 : end])
        _counted(count := count + 1, _PARTS, "segments")
        place = end
    whole = not progressive and content[place + 2] == of_frame  # all components in one scan
    scans = 1 if whole else sum(found[1] == b"\xda" for found in _MARKER.finditer(content, place - 2))
    _check(width, height, of_frame)
    each = of_frame + 2 * sampled  # several scans accumulate coefficients of two bytes
    if not whole and (scans > _SCANS or scans * width * height > _PIXEL_SCANS or width * height * each > DECODED):
        raise ValueError(f"it has {width}x{height} pixels in {scans:,} scans; save it with one scan (not progressive)")
    return b"".join(kept) + content[place - 2 :]


def _sampled(components: bytes) -> float:
    """Return the samples per pixel of a JPEG with these components: fewer if colours are subsampled."""
    sides = [(max(1, both >> 4), max(1, both & 15)) for both in components[1::3]]
    whole = max((wide for wide, _ in sides), default=1) * max((high for _, high in sides), default=1)
    return sum(wide * high for wide, high in sides) / whole


def _gif(content: bytes) -> bytes:
    """Return the screen, the first frame's transparency, and that frame."""
    width, height, flags = struct.unpack_from("<HHB", content, 6)
    place = 13 + _palette(flags)
    kept, count, frames = [content[:place]], 0, 0
    while place < len(content) and (kind := content[place]) in (0x21, 0x2C):
        begin = place
        if kind == 0x2C:
            left, top, wide, high, flags = struct.unpack_from("<HHHHB", content, place + 1)
            _check(max(width, left + wide), max(height, top + high))
            _counted(frames := frames + 1, _FRAMES, "frames")
            place += 11 + _palette(flags)
        else:
            place += 2
        while size := content[place]:
            place += 1 + size
            _counted(count := count + 1, 50 * _PARTS, "blocks")
        place += 1
        if frames == 0 and content[begin + 1] == 0xF9:
            kept[1:] = [content[begin:place]]
        elif frames == 1 and kind == 0x2C:
            kept.append(content[begin:place])
    _check(width, height)
    return b"".join([*kept, b";"])


def _palette(flags: int) -> int:
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0


def _webp(content: bytes) -> bytes:
    if content[8:12] != b"WEBP":
        raise ValueError("it is not a WebP file")
    kept, frames = list[bytes](), 0
    for count, (kind, begin, end) in enumerate(_riff(content)):
        part = content[begin:end]
        if kind == b"VP8X":
            width, height = (int.from_bytes(part[at : at + 3], "little") + 1 for at in (12, 15))
            _check(width, height, 8)
            kept.append(part[:8] + bytes([part[8] & 0x12]) + part[9:])  # flags: only alpha and animation
        elif kind == b"VP8 ":
            width, height = struct.unpack_from("<HH", part, 14)
            _check(width & 0x3FFF, height & 0x3FFF, 8)
            kept.append(part)
        elif kind == b"VP8L":
            sizes = int.from_bytes(part[9:13], "little")
            _check((sizes & 0x3FFF) + 1, (sizes >> 14 & 0x3FFF) + 1, 8)
            kept.append(part)
        elif kind in (b"ANIM", b"ALPH") or (kind == b"ANMF" and not frames):
            kept.append(part)
        _counted(frames := frames + (kind == b"ANMF"), _FRAMES, "frames")
        _counted(count, _PARTS, "chunks")
    whole = b"WEBP" + b"".join(kept)
    return b"RIFF" + len(whole).to_bytes(4, "little") + whole


def _riff(content: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield the chunks of a RIFF file: name, start and end."""
    place = 12
    while place + 8 <= len(content):
        kind, size = struct.unpack_from("<4sI", content, place)
        end = place + 8 + size + size % 2
        yield kind, place, end
        place = end


def _bmp(content: bytes) -> bytes:
    if content[14:18] == b"\x0c\0\0\0":
        width, height, bits = (*struct.unpack_from("<HH", content, 18), struct.unpack_from("<H", content, 24)[0])
        packed = 0
    else:
        width, height, _, bits, packed = struct.unpack_from("<iiHHI", content, 18)
    if packed not in (0, 3):
        raise ValueError("compressed BMP is not supported; save it as PNG")
    _check(abs(width), abs(height), max(1, bits / 8))
    return content


def _ppm(content: bytes) -> bytes:
    head = re.match(rb"P[4-6]" + rb"(?:\s|#[^\n]*\n)+([0-9]{1,9})" * 2, content[:4096])
    if head is None:
        raise ValueError("it is not a binary PPM file (P4, P5 or P6); save it as PNG")
    width, height, most = int(head[1]), int(head[2]), b"255"
    if content[1:2] != b"4":
        said = re.match(rb"(?:\s|#[^\n]*\n)+([0-9]{1,9})", content[head.end() : 4096])
        most = said[1] if said else b""
    _check(width, height, 3 if content[1:2] == b"6" else 1 if most == b"255" else 4)
    if most not in (b"255", b"65535") and width * height > _SLOW:
        raise ValueError(f"its largest value is not 255 or 65535, and it has more than {_SLOW:,} pixels; save it as PNG")
    return content


def _tiff(content: bytes) -> bytes:
    tags = _tags(content)
    width, height = (_number(tags, tag) for tag in (256, 257))
    bits, samples = tags.get(258, (1,)), _number(tags, 277, 1)
    if _number(tags, 259, 1) not in _PACKED:
        raise ValueError("its compression is not supported; save it with LZW, Deflate or none")
    each = samples * max(1, ceil(max(bits) / 8))
    _check(width, height, each)
    if 322 in tags or 323 in tags:
        tile = [_number(tags, tag) for tag in (322, 323)]
        if not all(tile):
            raise ValueError("its tiles have zero size")
        wide, high = (ceil(side / of_tile) * of_tile for side, of_tile in zip((width, height), tile, strict=True))
        _check(wide, high, each)
    return content


def _tags(content: bytes) -> dict[int, tuple[int, ...]]:
    """Return the integers of a TIFF's first directory, by tag.

    Raises ValueError for content that a decoder would read without end.
    """
    order = "<" if content[:1] == b"I" else ">"
    place = struct.unpack_from(f"{order}I", content, 4)[0]
    found: dict[int, tuple[int, ...]] = {}
    held = 0
    for entry in range(struct.unpack_from(f"{order}H", content, place)[0]):
        at = place + 2 + 12 * entry
        tag, kind, count = struct.unpack_from(f"{order}HHI", content, at)
        size = count * _SIZES.get(kind, 1)
        held += size
        if held > _BESIDE:
            raise ValueError(f"its tags are larger than {_BESIDE >> 20} MiB")
        if tag in found:
            raise ValueError(f"it has tag {tag} twice")
        where = at + 8 if size <= 4 else struct.unpack_from(f"{order}I", content, at + 8)[0]
        letter = {1: "B", 3: "H", 4: "I"}.get(kind, "")
        few = min(count, 64) if letter else 0
        found[tag] = struct.unpack_from(f"{order}{few}{letter}", content, where) if few else ()
    _check_chain(content, order, place)
    return found


def _check_chain(content: bytes, order: str, place: int) -> None:
    for _ in range(_FRAMES):
        count = struct.unpack_from(f"{order}H", content, place)[0]
        place = int.from_bytes(content[place + 2 + 12 * count :][:4], "little" if order == "<" else "big")
        if not place:
            return
    _counted(_FRAMES + 1, _FRAMES, "frames")


def _number(tags: dict[int, tuple[int, ...]], tag: int, usual: int = 0) -> int:
    return prod(tags.get(tag, (usual,))[:1]) if tags.get(tag, (usual,)) else usual


_KINDS = (
    ("PNG", _PNG, _png), ("JPEG", _JPEG, _jpeg), ("GIF", _GIF, _gif), ("WEBP", b"RIFF", _webp), ("TIFF", _TIFF, _tiff),
    ("BMP", b"BM", _bmp), ("PPM", (b"P4", b"P5", b"P6"), _ppm),
)  # fmt: skip
