"""Files and folders are there whole or not at all, and what killed processes leave of them goes."""

import errno
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

import intrafusion as itf
from intrafusion.runtime import stale_files
from intrafusion.runtime.access import check_room
from intrafusion.runtime.atomic_write import atomic_path
from intrafusion.runtime.paths import home
from intrafusion.runtime.processes import birth


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class TestWhole:
    @pytest.mark.parametrize("name", ["a", "a.b.safetensors", "ü" * 100, "x" * 250, "[*]?"])
    def test_it_is_there_once_the_block_has_ended(self, tmp_path, name):
        path = tmp_path / "new" / name
        with atomic_path(path) as part:
            part.write_text("new")
            assert not path.exists()
            assert part.parent == path.parent
        assert (path.read_text(), names(path.parent)) == ("new", [name])

    def test_a_folder_is_there_with_all_that_is_in_it(self, tmp_path):
        with atomic_path(tmp_path / "a") as part:
            (part / "deep").mkdir(parents=True)
            (part / "deep" / "file").write_text("x")
            assert not (tmp_path / "a").exists()
        assert (tmp_path / "a" / "deep" / "file").read_text() == "x"
        assert names(tmp_path) == ["a"]

    @pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), RuntimeError("torch"), KeyboardInterrupt(), KeyError()])
    def test_an_error_leaves_what_was_there(self, tmp_path, error):
        path = tmp_path / "a"
        path.write_text("old")

        def write() -> None:
            with atomic_path(path) as part:
                part.write_text("half")
                raise error

        with pytest.raises(BaseException, match=r".*") as caught:
            write()
        assert isinstance(caught.value, itf.IntrafusionError if isinstance(error, OSError | RuntimeError) else type(error))
        assert (path.read_text(), names(tmp_path)) == ("old", ["a"])

    def test_a_folder_in_its_place_is_one_line(self, tmp_path):
        (tmp_path / "a" / "inside").mkdir(parents=True)
        with (
            pytest.raises(itf.IntrafusionError, match=r"cannot write .*/a: ") as caught,
            atomic_path(tmp_path / "a") as part,
        ):
            part.write_text("x")
        assert "\n" not in str(caught.value)
        assert names(tmp_path) == ["a"]

    def test_what_cannot_be_brought_to_the_disk_does_not_take_its_place(self, tmp_path, monkeypatch):
        def fail(descriptor):
            raise OSError(errno.ENOSPC, "No space left on device")

        (tmp_path / "a").write_text("old")
        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(itf.IntrafusionError, match="is full; free some space"), atomic_path(tmp_path / "a") as part:
            part.write_text("new")
        assert (tmp_path / "a").read_text() == "old"


@pytest.fixture(scope="module")
def gone() -> list[str]:
    """Names as a process made them which has ended."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        mark = f"{process.pid}-{birth(process.pid)}-{stale_files.mark().split('-', 2)[2]}"
        process.kill()
    return [
        f".taking-{mark}",
        f".mine.safetensors.{mark}.part",
        f"intrafusion-upload-{mark}-x",
        f"intrafusion-export-{mark}-x",
    ]


@pytest.fixture
def temporaries(tmp_path, monkeypatch) -> Path:
    """The system's temporary folder, of this test alone."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return tmp_path / "tmp"


def lay(names: list[str], temporaries: Path) -> list[Path]:
    """Folders with a file of 1 MiB each, where such names lie."""
    placed = [
        (temporaries if name.startswith("intrafusion-") else home() / "models" if name.endswith(".part") else home()) / name
        for name in names
    ]
    for path in placed:
        path.mkdir(parents=True)
        (path / "copy").write_bytes(b"0" * (1 << 20))
    return placed


class TestLeftovers:
    def test_those_of_a_process_that_has_ended_go(self, gone, temporaries):
        left = lay(gone, temporaries)
        assert {*stale_files.temporary()} == {*left}
        stale_files.remove_stale()
        assert not any(path.exists() for path in left)

    def test_those_of_a_process_that_runs_stay(self, temporaries):
        ours = lay([f".taking-{stale_files.mark()}", f"intrafusion-upload-{stale_files.mark()}-x"], temporaries)
        for path in ours:
            os.utime(path / "copy", (0, 0))
            os.utime(path, (0, 0))
        stale_files.remove_stale()
        assert all(path.exists() for path in ours)

    def test_a_number_that_is_used_again_is_another_process(self, temporaries):
        pid, born, rest = stale_files.mark().split("-", 2)
        (left,) = lay([f".taking-{pid}-{int(born or 0) - 1}-{rest}"], temporaries)
        stale_files.remove_stale()
        assert not left.exists() or not born  # where the system does not say when a process began

    @pytest.mark.parametrize(
        "name",
        [
            ".taking-abcd1234",
            "mine.part",
            "w.safetensors.part123",
            ".x.1-2-0123abcd-0123abcd.part",
            "intrafusion-upload-abcd",
        ],
    )
    @pytest.mark.parametrize(("age", "stays"), [(60, True), (7200, False)])
    def test_those_that_nobody_can_ask_about_go_after_an_hour_without_a_change(self, temporaries, name, age, stays):
        (path,) = lay([name], temporaries)
        for one in (path / "copy", path):
            os.utime(one, (time.time() - age,) * 2)
        stale_files.remove_stale()
        assert path.exists() is stays

    def test_nothing_else_goes(self, temporaries):
        kept = lay(["apart", "models-part", "intrafusion-other"], temporaries)
        for path in kept:
            os.utime(path, (0, 0))
        assert not [*stale_files.temporary()]
        stale_files.remove_stale()
        assert all(path.exists() for path in kept)

    def test_a_link_is_not_followed(self, gone, temporaries, tmp_path):
        (tmp_path / "theirs").mkdir()
        (tmp_path / "theirs" / "file").write_text("x")
        home().mkdir(parents=True, exist_ok=True)
        (home() / gone[0]).symlink_to(tmp_path / "theirs")
        stale_files.remove_stale()
        assert (tmp_path / "theirs" / "file").exists()
        assert not (home() / gone[0]).is_symlink()

    def test_writing_the_same_again_removes_them(self, gone, tmp_path):
        left = tmp_path / gone[1].replace("mine.safetensors", "out")
        left.mkdir()
        with atomic_path(tmp_path / "out") as part:
            part.mkdir()
        assert names(tmp_path) == ["out"]

    def test_they_count_towards_what_is_kept(self, gone, temporaries, monkeypatch):
        monkeypatch.setenv("INTRAFUSION_PUBLIC", "1")
        monkeypatch.setenv("INTRAFUSION_KEPT_MB", str(len(gone)))
        check_room()
        lay(gone, temporaries)
        with pytest.raises(itf.IntrafusionError, match="reached its limit"):
            check_room()
