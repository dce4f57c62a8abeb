"""Zip archives are bounded by their last record and their directory, before either costs anything."""

import struct
import zipfile
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import own_files as files
import pytest

import intrafusion as itf
from intrafusion.data.arrays import read_arrays
from intrafusion.runtime import safe_zip
from intrafusion.studies.uploads import take_data


def directory(count: int) -> bytes:
    """The directory of so many empty files."""
    entry = struct.pack("<4s4B4HL2L5H2L", b"PK\x01\x02", 20, 0, 20, 0, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0)
    return b"".join(entry + b"%07d" % number for number in range(count))


def record(said: int, size: int, start: int = 0) -> bytes:
    return struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, said, said, size, start, 0)


def record64(said: int, size: int, found_at: int) -> bytes:
    whole = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, said, said, size, 0)
    return whole + struct.pack("<4sLQL", b"PK\x06\x07", 0, found_at, 1) + record(65535, 0xFFFFFFFF, 0xFFFFFFFF)


@pytest.mark.parametrize("end", [
    lambda size: record(3000, size), lambda size: record(5, size), lambda size: record64(3000, size, size),
    lambda size: record64(5, size, size),
], ids=["as it says", "a record that lies", "zip64", "zip64 that lies"])  # fmt: skip
def test_members_are_counted_before_the_directory_is_read(tmp_path, monkeypatch, end):
    entries = directory(3000)
    (tmp_path / "d.zip").write_bytes(entries + end(len(entries)))
    monkeypatch.setattr(safe_zip, "MEMBERS", 2999)
    monkeypatch.setattr(zipfile, "ZipFile", None)
    with pytest.raises(itf.IntrafusionError, match=r"has 3,000 files; the limit is 2,999"):
        take_data([tmp_path / "d.zip"], "mine")


def test_records_of_zip64_must_agree(tmp_path):
    entries = directory(3)
    (tmp_path / "d.zip").write_bytes(entries + record64(3, len(entries), 7))
    with pytest.raises(itf.IntrafusionError, match="end records are inconsistent"):
        take_data([tmp_path / "d.zip"], "mine")


def test_a_directory_of_few_and_endless_names_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(safe_zip, "MEMBERS", 10)
    (tmp_path / "d.zip").write_bytes(bytes(2 << 20) + record(3, 2 << 20))
    with pytest.raises(itf.IntrafusionError, match="a directory of 2 MiB"):
        take_data([tmp_path / "d.zip"], "mine")


def packed(path: Path, count: int, size: int, name: str = "cat/%d.png") -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for number in range(count):
            archive.writestr(name % number, bytes(size))
    return path


@pytest.mark.parametrize(("count", "size", "taken"), [
    (1, 16_000, False), (1, 4000, True), (1, 8000, True), (300, 8000, False),
])  # fmt: skip
def test_small_members_have_a_ratio_too(tmp_path, monkeypatch, count, size, taken):
    path = packed(tmp_path / "d.zip", count, size)
    monkeypatch.setattr(safe_zip, "_EXCESS", 1 << 19)
    expected = nullcontext() if taken else pytest.raises(itf.IntrafusionError, match="the limit is 200 times")
    with expected, safe_zip.open_zip(path) as (_, infos):
        assert len(infos) == count


def test_sorted_labels_may_shrink(tmp_path):
    images, labels = np.random.default_rng(0).integers(0, 256, (9000, 8, 8, 1), np.uint8), np.sort(np.arange(9000) % 3)
    np.savez_compressed(tmp_path / "d.npz", images=images, labels=labels)
    assert len(itf.load_data(take_data([tmp_path / "d.npz"], "mine"))) == 9000


def test_members_that_lie_over_one_another_are_refused(tmp_path):
    """One megabyte of data, which the directory names forty times."""
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("cat/0000000.png", np.random.default_rng(0).bytes(1 << 20))
    content = (tmp_path / "x.zip").read_bytes()
    place = content.index(b"PK\x01\x02")
    entry, data = content[place : content.index(b"PK\x05\x06")], content[:place]
    entries = b"".join(entry.replace(b"0000000", b"%07d" % number) for number in range(40))
    (tmp_path / "d.zip").write_bytes(data + entries + record(40, len(entries), place))
    with pytest.raises(itf.IntrafusionError, match="overlap"):
        take_data([tmp_path / "d.zip"], "mine")


def test_arrays_have_few_members_and_dimensions(tmp_path):
    np.savez(tmp_path / "many.npz", **{f"a{number}": np.zeros(1) for number in range(70)})
    np.savez(tmp_path / "deep.npz", images=files.PIXELS[(None,) * 6], labels=files.LABELS)
    for name, said in (("many", "has 70 files"), ("deep", "has 10 dimensions")):
        with pytest.raises(itf.IntrafusionError, match=said):
            read_arrays(tmp_path / f"{name}.npz", "test")
        with pytest.raises(itf.IntrafusionError, match=r"has 70 files|has 10 dimensions"):
            take_data([tmp_path / f"{name}.npz"], "mine")
