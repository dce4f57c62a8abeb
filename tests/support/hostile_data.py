"""Image files that are refused, and unusual pictures that are accepted.

Each refused file is (make, expected), with make(folder, sentinel) -> file; `expected` is a part of the error message.
"""

import io
import os
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import own_files as files
from own_files import Touch
from PIL import Image, PngImagePlugin

Make = Callable[[Path, Path], Path]
BEFORE = files.LABELS  # the labels of the six images


def arrays(**changes: Any) -> Make:
    return lambda folder, sentinel: files.npz(
        folder / "d.npz", **{k: v(sentinel) if callable(v) else v for k, v in changes.items()}
    )


def signs(*numbers: int, order: str = "<") -> np.ndarray:
    """Return the names of three classes as an array. The last name consists of these code points."""
    names = [[0x61] * len(numbers), [0x62] * len(numbers), numbers]
    return np.array(names, f"{order}u4").view(f"{order}U{len(numbers)}")[:, 0]


def pack(contents: dict[str, bytes]) -> Make:
    return lambda folder, sentinel: files.pictures(folder / "d.zip", contents)


def picture(kind: str = "PNG", mode: str = "RGB", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (8, 8), options.pop("color", 0)).save(buffer, kind, **options)
    return buffer.getvalue()


def of_array(pixels: np.ndarray, kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def member(kind: int) -> Make:
    """Make a zip that marks one of its files as a device, a pipe or a socket. kind: the file type of `stat`."""

    def make(folder: Path, sentinel: Path) -> Path:
        with zipfile.ZipFile(folder / "d.zip", "w") as archive:
            info = zipfile.ZipInfo("cat/x.png")
            info.external_attr = (kind | 0o644) << 16
            archive.writestr(info, files.picture())
        return folder / "d.zip"

    return make


def array_file(header: bytes, name: str = "images.npy") -> Make:
    """Make an .npz whose array has this header."""

    def make(folder: Path, sentinel: Path) -> Path:
        content = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(64)
        return files.rewritten(files.npz(folder / "x.npz"), folder / "d.npz", lambda found: found.update({name: content}))

    return make


def _text_bomb() -> bytes:
    """Return a picture with a comment that unpacks to 200 MiB."""
    info = PngImagePlugin.PngInfo()
    info.add(b"zTXt", b"x\0\0" + zlib.compress(bytes(200 << 20)))
    return picture(pnginfo=info)


def _lying(folder: Path, sentinel: Path) -> Path:
    """Make a zip whose central directory claims that a picture is smaller than it is."""
    path = files.pictures(folder / "d.zip")
    content = bytearray(path.read_bytes())
    place = content.find(b"PK\x01\x02")
    content[place + 24 : place + 28] = struct.pack("<I", 5)
    path.write_bytes(content)
    return path


def _tar(folder: Path, sentinel: Path) -> Path:
    (folder / "x.png").write_bytes(files.picture())
    with tarfile.open(folder / "d.zip", "w") as archive:
        archive.add(folder / "x.png", "../../x.png")
    return folder / "d.zip"


def _nested(folder: Path, sentinel: Path) -> Path:
    inner = files.bomb(folder / "inner.zip").read_bytes()
    return files.pictures(folder / "d.zip", {"cat/inner.zip": inner})


def _without(folder: Path, sentinel: Path) -> Path:
    return files.rewritten(files.npz(folder / "x.npz"), folder / "d.npz", lambda found: found.update({"labels.npy": b""}))


def _fifo(folder: Path, sentinel: Path) -> Path:
    os.mkfifo(folder / "d.npz")
    return folder / "d.npz"


def _folder(folder: Path, sentinel: Path) -> Path:
    (folder / "d.zip").mkdir()
    return folder / "d.zip"


def packed(contents: dict[str, bytes]) -> Make:
    def make(folder: Path, sentinel: Path) -> Path:
        with zipfile.ZipFile(folder / "d.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in contents.items():
                archive.writestr(name, content)
        return folder / "d.zip"

    return make


def _damaged_bombs() -> bytes:
    """Return a picture with two comments of 3 MiB each, whose data unpack but whose checksums are wrong."""
    info = PngImagePlugin.PngInfo()
    for _ in range(2):
        info.add(b"zTXt", b"x\0\0" + zlib.compress(bytes(3 << 20))[:-4] + b"none")
    return picture(pnginfo=info)


_HEAD = b"{'descr': '|u1', 'fortran_order': False, 'shape': %s, }"
_UNREAD, _ODD = "not a readable image", "has a class folder with an invalid name"
_NO_TEXT = "has a class name that is not valid Unicode"
MORE_DATA: dict[str, tuple[Make, str]] = {
    "labels of fractions": (arrays(labels=BEFORE / 2), "labels must be integers"),
    "labels of true and false": (arrays(labels=BEFORE > 0), "labels must be integers"),
    "labels in two columns": (arrays(labels=np.stack([BEFORE, BEFORE], 1)), "labels must be integers"),
    "one label for all": (arrays(labels=np.int64(0)), "labels must be integers"),
    "labels of text": (arrays(labels=BEFORE.astype(str)), "labels must be integers"),
    "labels of millions of classes": (arrays(labels=BEFORE * 10**12), "the limit is 100,000 classes"),
    "labels far below 0": (arrays(labels=BEFORE - 1e300), "the limit is 100,000 classes"),
    "labels all below 0": (arrays(labels=BEFORE - 9), "labels range from -9 to -7; number the classes from 0"),
    "labels past int64": (arrays(labels=BEFORE.astype(np.uint64) + np.uint64(2**63)), "the limit is 100,000 classes"),
    "fewer labels than images": (arrays(labels=BEFORE[:4]), "labels must be integers"),
    "images of 16 bits in an array": (arrays(images=files.PIXELS.astype(np.uint16)), "images must be uint8"),
    "images of signed bytes": (arrays(images=files.PIXELS.astype(np.int8)), "images must be uint8"),
    "films": (arrays(images=files.PIXELS[..., None]), "images must be uint8"),
    "images of no pixels": (arrays(images=files.PIXELS[:, :0]), ""),
    "images of no channels": (arrays(images=files.PIXELS[..., :0]), "images must be uint8"),
    "images of 99 channels": (arrays(images=np.repeat(files.PIXELS, 99, 3)), "images must be uint8"),
    "classes with code": (arrays(classes=lambda s: np.array([Touch(s)] * 3, dtype=object)), "a pickle"),
    "images with code": (arrays(images=lambda s: np.array([Touch(s)] * 6, dtype=object)), "a pickle"),
    "one class name for all": (arrays(classes=np.array("cat")), "classes must be"),
    "classes in a table": (arrays(classes=np.array([["a", "b", "c"]])), "classes must be"),
    "a header that is code": (array_file(b"__import__('os').getcwd()"), "not a readable archive"),
    "a header that is deep": (array_file(b"(" * 9000), "not a readable archive"),
    "a header of a negative shape": (array_file(_HEAD % b"(-1, 8, 8, 1)"), ""),
    "a header of a shape that overflows": (array_file(_HEAD % (b"(%d,)" % 10**30)), "does not match its shape"),
    "a header of another type": (array_file(_HEAD.replace(b"|u1", b"|V9") % b"(6, 8, 8, 1)"), ""),
    "a header of objects": (array_file(_HEAD.replace(b"|u1", b"|O") % b"(6, 8, 8, 1)"), "a pickle"),
    "an array of nothing": (_without, "not a readable archive"),
    "pixels of 32 bits": (pack({"cat/x.tif": of_array(np.full((8, 8), 70_000, np.int32), "TIFF")}), "32 bits per channel"),
    "pixels of floats": (pack({"cat/x.tif": of_array(np.full((8, 8), 0.5, np.float32), "TIFF")}), "32 bits per channel"),
    "a comment that is a bomb": (pack({"cat/x.png": _text_bomb()}), _UNREAD),
    "half a JPEG": (pack({"cat/x.jpg": picture("JPEG")[:300]}), _UNREAD),
    "half a GIF": (pack({"cat/x.gif": picture("GIF", "P")[:20]}), _UNREAD),
    "half a TIFF": (pack({"cat/x.tif": picture("TIFF")[:60]}), _UNREAD),
    "a picture of nothing": (pack({"cat/x.png": b""}), _UNREAD),
    "text called a picture": (pack({"cat/x.png": b"<svg onload=alert(1)>"}), _UNREAD),
    "a drawing": (pack({"cat/x.svg": b"<svg/>"}), "which is not an image"),
    "a zip in a zip": (_nested, "which is not an image"),
    "a tar called zip": (_tar, "not a readable archive"),
    "a pipe in a zip": (member(stat.S_IFIFO), "a link or device"),
    "a disk in a zip": (member(stat.S_IFBLK), "a link or device"),
    "a socket in a zip": (member(stat.S_IFSOCK), "a link or device"),
    "a size that lies": (_lying, "not a readable archive"),
    "dots in the middle": (pack({"cat/../../x.png": files.picture()}), "outside its folder"),
    "a name of two lines": (pack({"c\nat/x.png": files.picture()}), "outside its folder"),
    "a class that turns the text around": (pack({"c\u202eat/x.png": files.picture()}), _ODD),
    "a class of a long name": (pack({"猫" * 90 + "/x.png": files.picture()}), _ODD),
    "a class of the longest name": (pack({"c" * 400 + "/x.png": files.picture()}), "a class name of 400 characters"),
    "a class name of a number that is no character": (arrays(classes=signs(0x7FFFFFFF, 0x61)), _NO_TEXT),
    "a class name of the first number that is no character": (arrays(classes=signs(0x61, 0x110000)), _NO_TEXT),
    "a class name of half a character": (arrays(classes=signs(0x61, 0xD800)), _NO_TEXT),
    "the same in the other order of bytes": (arrays(classes=signs(0xDFFF, 0x61, order=">")), _NO_TEXT),
    "a class name of 100,000 characters": (arrays(classes=np.array(["a", "b", "c" * 100_000])), "the limit is 200"),
    "a class name of half a character in a list": (
        pack({"x.png": files.picture(), "labels.json": b'{"x.png": "\\ud800"}'}), _NO_TEXT,
    ),
    "a class name of 100,000 characters in a list": (
        pack({"x.png": files.picture(), "labels.csv": b"x.png," + b"c" * 100_000}), "a class name of 100,000 characters",
    ),
    "comments that are bombs, but for their ends": (pack({"cat/x.png": _damaged_bombs()}), "bytes of comments"),
    "folders in folders": (
        pack({f"{n}/{'a/' * 60}x.png": b"" for n in range(1100)}), "more than 60,000 nested folders",
    ),
    "a list of labels of 9 MB": (
        packed({"x.png": files.picture(), "labels.csv": b"".join(b"%07d,1\n" % n for n in range(900_000))}),
        "larger than 8 MiB",
    ),
    "a folder called zip": (_folder, "no file at d.zip"),
    "a pipe called npz": (_fifo, "no file at d.npz"),
}  # fmt: skip


def _palette() -> bytes:
    buffer = io.BytesIO()
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 200, 200, 200] + [0] * 750)
    image.save(buffer, "PNG", transparency=bytes([0, 128]))
    return buffer.getvalue()


def _animated() -> bytes:
    buffer, frames = io.BytesIO(), [Image.new("L", (8, 8), shade) for shade in (200, 50)]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


def _turned() -> bytes:
    """Return a photo whose EXIF orientation says that it is rotated."""
    image, exif = Image.new("L", (8, 8), 200), Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", exif=exif)
    return buffer.getvalue()


TAKEN: dict[str, bytes] = {  # uniform pictures of about 200 of 255, of unusual kinds
    "grey of 16 bits in a PGM": b"P5 8 8 65535\n" + struct.pack(">64H", *[200 * 257] * 64),
    "grey of 16 bits": of_array(np.full((8, 8), 200 * 257, np.uint16), "PNG"),
    "grey of 16 bits in a TIFF": of_array(np.full((8, 8), 200 * 257, np.uint16), "TIFF"),
    "grey": picture(mode="L", color=200),
    "CMYK": picture("JPEG", "CMYK", color=(0, 0, 0, 55)),
    "a palette that lets light through": _palette(),
    "alpha": picture(mode="RGBA", color=(200, 200, 200, 9)),
    "an animation": _animated(),
    "a photo on its side": _turned(),
    "another size": of_array(np.full((31, 17), 200, np.uint8), "PNG"),
}  # fmt: skip
