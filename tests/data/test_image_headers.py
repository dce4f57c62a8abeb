"""What is read of a picture before it is decoded: made files of every format, and those that would cost too much."""

import contextlib
import io
import struct
import time
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from intrafusion.data import image_headers
from intrafusion.data._decode_worker import decode, pixels_of

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8)
SHADE = Image.fromarray(PIXELS[..., 0])


def saved(kind: str, image: Image.Image | None = None, **options: Any) -> bytes:
    buffer = io.BytesIO()
    (image or Image.fromarray(PIXELS)).save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, bits: int, colour: int, *extra: bytes) -> bytes:
    """A PNG whose header claims any size."""
    about = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"".join([
        b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", about), *extra, chunk(b"IDAT", zlib.compress(bytes(99))), chunk(b"IEND", b""),
    ])  # fmt: skip


def jpeg(width: int, height: int, scans: int, **options: Any) -> bytes:
    """A JPEG of another claimed size, with further scans of nothing."""
    content = saved("JPEG", options.pop("image", SHADE), progressive=True, **options)
    place = content.index(b"\xff\xc2")
    content = content[: place + 5] + struct.pack(">HH", height, width) + content[place + 9 :]
    scan = b"\xff\xda\x00\x08\x01\x01\x00\x01\x3f\x00"
    return content[:-2] + scan * scans + content[-2:]


def tiff(*tags: tuple[int, int, int, int], more: bytes = b"") -> bytes:
    """tags: each of number, type, count, value."""
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4) + more


def sized(width: int, height: int, **others: int) -> list[tuple[int, int, int, int]]:
    return [(256, 4, 1, width), (257, 4, 1, height), *((int(tag[1:]), 4, 1, value) for tag, value in others.items())]


def frames(kind: str, count: int) -> bytes:
    shades = [Image.new("L", (4, 4), number % 256) for number in range(count)]
    return saved(kind, shades[0], save_all=True, append_images=shades[1:])


def turned(content: bytes, tags: int) -> bytes:
    """A JPEG whose Exif has so many tags, each of which says that it is all of the Exif."""
    exif = b"Exif\0\0" + tiff(*((number, 2, 60_000, 8) for number in range(1, tags)))
    return content[:2] + b"\xff\xe1" + struct.pack(">H", 2 + len(exif)) + exif + content[2:]


GOOD = {
    "PNG": saved("PNG"),
    "PNG with a comment, a profile and Exif": saved("PNG", icc_profile=b"x" * 999, exif=b"Exif\0\0II*\0"),
    "PNG of a palette": saved("PNG", Image.fromarray(PIXELS).quantize(9), transparency=3),
    "PNG of one bit": saved("PNG", SHADE.convert("1")),
    "PNG of 16 bits": saved("PNG", Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 257)),
    "APNG": frames("PNG", 5),
    "JPEG": saved("JPEG"),
    "JPEG of CMYK": saved("JPEG", Image.fromarray(PIXELS).convert("CMYK")),
    "JPEG in scans": saved("JPEG", progressive=True),
    "JPEG with restarts": saved("JPEG", restart_marker_blocks=1),
    "JPEG with a preview in its Exif": turned(saved("JPEG"), 1000),
    "GIF": saved("GIF"),
    "GIF of frames": frames("GIF", 5),
    "GIF with a comment": saved("GIF", comment=b"x" * 999),
    "GIF of a palette": saved("GIF", Image.fromarray(PIXELS).quantize(9), transparency=3),
    "WebP": saved("WEBP"),
    "WebP without loss": saved("WEBP", lossless=True),
    "WebP with alpha, a profile and Exif": saved(
        "WEBP", Image.fromarray(PIXELS).convert("RGBA"), icc_profile=b"x" * 99, exif=b"Exif\0\0II*\0"
    ),
    "WebP of frames": frames("WEBP", 5),
    "TIFF": saved("TIFF"),
    "TIFF of 16 bits": saved("TIFF", Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 257)),
    "TIFF, packed": saved("TIFF", compression="tiff_lzw"),
    "TIFF of frames": frames("TIFF", 5),
    "BMP": saved("BMP"),
    "BMP of a palette": saved("BMP", Image.fromarray(PIXELS).quantize(9)),
    "PPM": saved("PPM"),
    "PGM": saved("PPM", SHADE),
}  # fmt: skip

BAD: dict[str, tuple[bytes, str]] = {
    "PNG of one bit and 100 million pixels": (png(10_000, 10_000, 1, 0), "10000x10000 pixels"),
    "PNG of 16 bits": (png(8000, 8000, 16, 2), "of 6 bytes"),
    "PNG of no pixels": (png(0, 8, 8, 0), "0x8 pixels"),
    "PNG of no known colours": (png(8, 8, 8, 5), "is invalid"),
    "PNG with comments that unpack": (
        png(8, 8, 8, 0, *[chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(1 << 20)))] * 5), "bytes of comments",
    ),
    "PNG with a profile that unpacks": (png(8, 8, 8, 0, chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(9 << 20)))), "bytes of"),
    "PNG of 30,000 chunks": (png(8, 8, 8, 0, *[chunk(b"tEXt", b"")] * 30_000), "20,000 chunks"),
    "APNG of 10,000 frames": (png(8, 8, 8, 0, *[chunk(b"fcTL", bytes(26))] * 10_000), "1,000 frames"),
    "JPEG of 200 scans": (jpeg(30, 20, 200), "scans"),
    "JPEG of 30 scans of 16 million pixels": (jpeg(4000, 4000, 30), "scans"),
    "JPEG in scans of 128 million pixels": (jpeg(12_000, 10_700, 0), "12000x10700"),
    "JPEG without pixels": (b"\xff\xd8\xff\xe0\x00\x02\xff\xd9", "ends before its pixels"),
    "JPEG of 30,000 segments": (b"\xff\xd8" + b"\xff\xfe\x00\x02" * 30_000, "20,000 segments"),
    "GIF of 2,000 frames": (frames("GIF", 2000), "1,000 frames"),
    "GIF whose frame is larger than its screen": (
        GOOD["GIF"].replace(b"," + struct.pack("<HHHH", 0, 0, 30, 20), b"," + struct.pack("<HHHH", 60_000, 0, 30, 60_000)),
        "60030x60000",
    ),
    "WebP of 268 million pixels": (
        b"RIFF\0\0\0\0WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + b"\xfe\x3f\0\xfe\x3f\0", "16383x16383",
    ),
    "TIFF of a vast picture": (tiff(*sized(60_000, 60_000)), "60000x60000"),
    "TIFF of vast tiles": (tiff(*sized(8, 8, t322=60_000, t323=60_000)), "60000x60000"),
    "TIFF of many samples": (tiff(*sized(8000, 8000, t277=6)), "of 6 bytes"),
    "TIFF of JPEGs": (tiff(*sized(8, 8, t259=7)), "compression is not supported"),
    "TIFF with a tag twice": (tiff(*sized(8, 8), (256, 4, 1, 60_000)), "tag 256 twice"),
    "TIFF of tags that overlap": (tiff(*sized(8, 8), *((60_000 + n, 2, 1 << 20, 8) for n in range(9))), "tags are larger"),
    "BMP of a vast picture": (b"BM" + bytes(12) + struct.pack("<IiiHHI", 40, 60_000, -60_000, 1, 24, 0), "60000x60000"),
    "BMP of runs": (b"BM" + bytes(12) + struct.pack("<IiiHHI", 40, 8, 8, 1, 8, 1), "compressed BMP"),
    "PPM of a vast picture": (b"P6 60000 # wide\n 60000 255\n", "60000x60000"),
    "PPM that Pillow reads in Python": (b"P5 4000 4000 254\n", "is not 255"),
    "PPM of digits": (b"P3 4 4 255\n" + b"1 " * 48, "its format is not"),
    "an icon": (saved("ICO"), "its format is not"),
    "a file of the Macintosh": (saved("ICNS", Image.new("RGB", (16, 16))), "its format is not"),
}  # fmt: skip


@pytest.mark.parametrize("kind", GOOD)
def test_a_good_picture_has_the_pixels_that_pillow_reads(kind, tmp_path):
    content = GOOD[kind]
    name, bare = image_headers.first(content)
    with Image.open(io.BytesIO(content)) as whole, Image.open(io.BytesIO(bare), formats=[name]) as read:
        assert np.array_equal(np.asarray(whole.convert("RGBA")), np.asarray(read.convert("RGBA")))
        assert getattr(read, "n_frames", 1) == 1 or name == "TIFF"
        assert not {"exif", "icc_profile", "comment"} & {*read.info} or name == "TIFF"
    (tmp_path / "x").write_bytes(content)
    assert decode(tmp_path / "x", (8, 8), "RGB", "always").shape == (8, 8, 3)


@pytest.mark.parametrize("kind", BAD)
def test_a_costly_picture_is_refused_before_it_is_decoded(kind, tmp_path, monkeypatch):
    content, said = BAD[kind]
    (tmp_path / "x").write_bytes(content)
    monkeypatch.setattr(Image, "open", None)
    with pytest.raises(ValueError, match=said):
        decode(tmp_path / "x", (8, 8), "RGB", "always")


def test_a_jpeg_in_scans_may_be_as_large_as_its_sampling_permits():
    """30 million pixels with colours of half the width and height hold 180 MB, without that 270."""
    image = Image.new("RGB", (32, 32))
    image_headers.first(jpeg(6000, 5000, 0, image=image, subsampling=2))
    with pytest.raises(ValueError, match=r"save it with one scan \(not progressive\)"):
        image_headers.first(jpeg(6000, 5000, 0, image=image, subsampling=0))


@pytest.mark.parametrize("kind", GOOD)
def test_what_is_said_of_a_damaged_picture_names_no_object_of_ours(kind):
    content = bytearray(GOOD[kind])
    for at in range(4, min(60, len(content)), 3):
        damaged = bytes(content[:at] + b"\xff" + content[at + 1 :])
        with contextlib.suppress(ValueError):
            pixels_of(damaged, (8, 8), "RGB", "always")
        try:
            pixels_of(damaged[: at + 8], (8, 8), "RGB", "always")
        except ValueError as error:
            assert "object at" not in str(error)  # noqa: PT017


def test_fill_bytes_of_a_jpeg_are_passed_over_once():
    """Tried as the first of a marker each, two million take a minute."""
    began = time.process_time()
    with pytest.raises(ValueError, match="ends before its pixels"):
        image_headers.first(b"\xff\xd8" + b"\xff" * 2_000_000)
    assert time.process_time() - began < 15


@pytest.mark.parametrize("kind", GOOD)
def test_a_cut_picture_is_a_line_or_what_is_left(kind):
    for at in range(0, len(GOOD[kind]), 1 + len(GOOD[kind]) // 60):
        try:
            image_headers.first(GOOD[kind][:at])
        except ValueError as error:
            assert str(error).isprintable()  # noqa: PT017
