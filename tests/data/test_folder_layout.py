"""Folders of pictures as people have them: from a path and from a zip, the same pictures with the same labels."""

import io
import json
import os
import zipfile
from pathlib import Path

import own_files as files
import pytest
from PIL import Image

import intrafusion as itf
from intrafusion.cli.main import main
from intrafusion.data.folder_layout import in_archive, is_picture, layout_of, on_disk
from intrafusion.studies.uploads import take_data

SIZE = (3, 8, 8)
PLAIN = {"cat/0.png": 1, "cat/1.png": 2, "dog/0.png": 3}
ALL = ("cat", "dog"), [(1, 0), (2, 0), (3, 1)]  # classes; shade and label of each picture
JUNK = ("Thumbs.db", "desktop.ini", ".DS_Store", "._0.png", "notes.txt", "README", "boxes.csv", "about.JSON")
SPLITS = {"train/cat/0.png": 1, "train/dog/0.png": 2, "test/dog/0.png": 3}


def below(root: str, tree: dict) -> dict:
    return {f"{root}/{name}": content for name, content in tree.items()}


def splits(train: str, test: str) -> dict:
    return {name.replace("train/", f"{train}/").replace("test/", f"{test}/"): shade for name, shade in SPLITS.items()}


CASES: dict[str, tuple[dict, tuple]] = {  # files, a number for a picture's shade; classes, and what the test split holds
    "two class folders": (PLAIN, ALL),
    **{f"{name} in a class folder": (PLAIN | {f"cat/{name}": b"x"}, ALL) for name in JUNK},
    **{f"{name} beside the classes": (PLAIN | {name: b"x"}, ALL) for name in JUNK},
    "resource forks of macOS": (PLAIN | {"__MACOSX/cat/._0.png": b"x", "__MACOSX/._cat": b"x"}, ALL),
    "thumbnails of Synology": (PLAIN | {"@eaDir/x.jpg": 9, "cat/@eaDir/0.png/SYNOPHOTO_THUMB_M.jpg": 9}, ALL),
    "a hidden folder of pictures": (PLAIN | {".thumbnails/0.png": 9, "cat/.ipynb_checkpoints/0.png": 9}, ALL),
    "a folder of text": (PLAIN | {"docs/readme.txt": b"x"}, ALL),
    "suffixes in capitals": ({"cat/0.PNG": 1, "cat/1.Png": 2, "dog/0.PNG": 3}, ALL),
    "suffixes of other formats": ({"cat/0.ppm": 1, "cat/1.tif": 2, "dog/0.bmp": 3}, ALL),
    "folders in class folders": (
        {"cat/0.png": 1, "cat/more/deep/1.png": 2, "dog/more/0.png": 3}, ALL,
    ),
    "a folder images in each class": ({"cat/images/0.png": 1, "cat/images/1.png": 2, "dog/images/0.png": 3}, ALL),
    "one wrapping folder": (below("pets", PLAIN), ALL),
    "wrapping folders, one in another": (below("data/pets/raw", PLAIN) | {"data/README.md": b"x"}, ALL),
    "a wrapping folder called images": (below("images", PLAIN), ALL),
    "one class": ({"cat/0.png": 1}, (("cat",), [(1, 0)])),
    "a class called train beside others": (
        {"car/0.png": 1, "train/0.png": 2, "tram/0.png": 3}, (("car", "train", "tram"), [(1, 0), (2, 1), (3, 2)])
    ),
    "classes with words of splits in their names": (
        {"stress test/0.png": 1, "crash test/0.png": 2}, (("crash test", "stress test"), [(1, 1), (2, 0)])
    ),
    "classes with such words and folders in them": (
        {"stress test/a/0.png": 1, "crash test/a/0.png": 2}, (("crash test", "stress test"), [(1, 1), (2, 0)])
    ),
    "a class called train, of a folder images as the others": (
        {"car/images/0.png": 1, "train/images/0.png": 2}, (("car", "train"), [(1, 0), (2, 1)])
    ),
    **{
        f"{train} and {test}": (splits(train, test), (("cat", "dog"), [(3, 1)]))
        for train, test in (
            ("train", "test"), ("train", "val"), ("train", "valid"), ("train", "validation"), ("Train", "Test"),
            ("TRAIN", "VAL"),
            ("training", "testing"), ("training_set", "test_set"), ("seg_train/seg_train", "seg_test/seg_test"),
            ("set/train", "set/val"), ("a/b/Training", "a/b/Validation"),
        )
    },
    "a test and a validation split": (
        SPLITS | {"val/cat/0.png": 9, "val/dog/0.png": 9}, (("cat", "dog"), [(3, 1)])
    ),
    "a test split without labels beside a validation split": (
        splits("train", "val") | {"test/0.png": 9, "test/1.png": 9}, (("cat", "dog"), [(3, 1)])
    ),
    "a test split of images without labels": (
        splits("train", "val") | {"test/images/0.png": 9}, (("cat", "dog"), [(3, 1)])
    ),
    "a folder beside the splits": (SPLITS | {"unlabelled/x/0.png": 9}, (("cat", "dog"), [(3, 1)])),
    "a class that only the training split has": (
        {"train/ape/0.png": 1, "train/dog/0.png": 2, "test/dog/0.png": 3}, (("ape", "dog"), [(3, 1)])
    ),
    "Tiny ImageNet": (
        {
            "tiny/train/n01/images/n01_0.JPEG": 1, "tiny/train/n01/n01_boxes.txt": b"x", "tiny/train/n02/images/n02_0.JPEG": 2,
            "tiny/val/images/val_0.JPEG": 3, "tiny/val/images/val_1.JPEG": 4, "tiny/test/images/test_0.JPEG": 9,
            "tiny/val/val_annotations.txt": b"val_0.JPEG\tn02\t0\t0\t9\t9\nval_1.JPEG\tn01\t0\t0\t9\t9\n",
            "tiny/wnids.txt": b"n01",
        },
        (("n01", "n02"), [(3, 1), (4, 0)]),
    ),
    "one folder with a list": (
        {"a.png": 1, "b.png": 2, "c.png": 3, "labels.csv": b"file,class\na.png,cat\nb.png,small dog\nc.png,cat\n"},
        (("cat", "small dog"), [(1, 0), (2, 1), (3, 0)]),
    ),
    "numbers": ({f"{n}/0.png": n for n in range(12)}, (tuple(map(str, range(12))), [(n, n) for n in range(12)])),
    "numbers with zeros before": (
        {f"{n:05}/0.ppm": n for n in range(12)}, (tuple(f"{n:05}" for n in range(12)), [(n, n) for n in range(12)])
    ),
    "numbers from 1": ({f"{n}/0.png": n for n in (1, 2, 10)}, (("1", "2", "10"), [(1, 0), (2, 1), (10, 2)])),
    "GTSRB": (
        below("GTSRB/Final_Training/Images", {f"{n:05}/{n:05}_0.ppm": n for n in range(3)} | {"00000/GT-00000.csv": b"x"})
        | {"GTSRB/Readme.txt": b"x"}, (("00000", "00001", "00002"), [(0, 0), (1, 1), (2, 2)]),
    ),
    "GTSRB with both splits": (
        {f"{split}/Images/0000{n}/0.ppm": n for split in ("Final_Training", "Final_Test") for n in range(3)},
        (("00000", "00001", "00002"), [(0, 0), (1, 1), (2, 2)]),
    ),
    "numbers in the splits": (
        {"train/2/0.png": 1, "train/10/0.png": 2, "test/10/0.png": 3}, (("2", "10"), [(3, 1)])
    ),
    "names with accents and spaces": (
        {"café au lait/0.png": 1, "Zoë/0.png": 2, "łódź/0.png": 3},
        (("Zoë", "café au lait", "łódź"), [(2, 0), (1, 1), (3, 2)]),
    ),
    "one name in two spellings of Unicode": (
        {"train/caf\u00e9/0.png": 1, "train/dog/0.png": 2, "test/cafe\u0301/0.png": 3}, (("caf\u00e9", "dog"), [(3, 0)])
    ),
}  # fmt: skip


def content(name: str, made: int | bytes) -> bytes:
    if isinstance(made, bytes):
        return made
    buffer, kinds = io.BytesIO(), {".ppm": "PPM", ".tif": "TIFF", ".bmp": "BMP"}
    Image.new("RGB", SIZE[1:], (made, 7, 9)).save(buffer, kinds.get(Path(name).suffix, "PNG"))
    return buffer.getvalue()


def on_a_disk(root: Path, tree: dict) -> Path:
    for name, made in tree.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content(name, made))
    return root


def in_a_zip(path: Path, tree: dict) -> Path:
    return files.pictures(path, {name: content(name, made) for name, made in tree.items()})


def seen(data: itf.ImageData) -> tuple:
    return data.classes, sorted(zip(data.images[:, 0, 0, 0].tolist(), data.labels.tolist(), strict=True))


def expected(case: str) -> tuple:
    classes, pictures = CASES[case][1]
    return classes, sorted(pictures)


@pytest.mark.parametrize("case", CASES)
def test_a_folder(tmp_path, case):
    on_a_disk(tmp_path, CASES[case][0])
    assert seen(itf.load_data("own", path=tmp_path, input_size=SIZE)) == expected(case)


@pytest.mark.parametrize("case", CASES)
def test_a_zip_is_read_like_the_folder(tmp_path, case):
    name = take_data([in_a_zip(tmp_path / "x.zip", CASES[case][0])], "mine")
    assert seen(itf.load_data(name, input_size=SIZE)) == expected(case)


@pytest.mark.parametrize("case", [case for case, (tree, _) in CASES.items() if any("rain" in name for name in tree)])
def test_the_training_split_is_what_criteria_look_at(tmp_path, case):
    tree = CASES[case][0]
    training = [shade for name, shade in tree.items() if "rain" in name.lower() and isinstance(shade, int)]
    is_split = "class called train" not in case and case != "GTSRB"
    found = itf.load_calibration("own", on_a_disk(tmp_path, tree), input_size=SIZE)
    assert found.split == ("train" if is_split else "test")
    if is_split:
        assert sorted(found.images[:, 0, 0, 0].tolist()) == sorted(training)


REFUSED: dict[str, tuple[dict, str]] = {
    "no pictures": ({"cat/notes.txt": b"x"}, "without images"),
    "nothing": ({"notes.txt": b"x"}, "no class folders"),
    "pictures without classes": ({"0.png": 1, "1.png": 2}, "no class folders"),
    "images without classes": ({"images/0.png": 1}, "no class folders"),
    "training images alone": ({"train/cat/0.png": 1, "train/dog/0.png": 1}, "training images but no test images"),
    "two splits of one name": (SPLITS | {"Train/cat/0.png": 1}, "both Train and train|both train and Train"),
    "splits without classes": ({"train/cat.0.png": 1, "train/dog.0.png": 2, "test1/3.png": 3}, "no class folders"),
    "images beside boxes": ({"JPEGImages/0.png": 1, "Annotations/0.xml": b"x"}, "no class folders"),
    "a list of other classes": (
        {"train/cat/0.png": 1, "val/0.png": 2, "val/labels.csv": b"0.png,wolf\n"}, "'wolf' is not one of the class folders",
    ),
    "a list that lacks a picture": ({"0.png": 1, "1.png": 2, "labels.csv": b"0.png,cat\n"}, "has no label for 1 of 2 images"),
    "folders without end": ({"/".join(["a"] * 70) + "/0.png": 1, "b/0.png": 1}, "more than 64 folders"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_classes_is_one_line(tmp_path, case):
    tree, match = REFUSED[case]
    with pytest.raises(itf.IntrafusionError, match=match) as caught:
        itf.load_data("own", path=on_a_disk(tmp_path, tree), input_size=SIZE)
    assert "\n" not in str(caught.value)


def test_the_split_that_is_not_there_is_one_line(tmp_path):
    on_a_disk(tmp_path, {"test/cat/0.png": 1, "test/dog/0.png": 2})
    with pytest.raises(itf.IntrafusionError, match="test images but no training images"):
        itf.load_data("own", "train", tmp_path, input_size=SIZE)


class TestTold:
    TREE = PLAIN | {
        "cat/Thumbs.db": b"x", "notes.txt": b"x", "@eaDir/0.jpg": 9, "docs/a.txt": b"x", "x.png": 9, "dog/more/1.png": 4,
    }  # fmt: skip
    TOLD = (
        "skipped 2 files that are not images (notes.txt, Thumbs.db); "
        "skipped 2 folders without images (@eaDir, docs); skipped 1 image outside class folders (x.png); "
        "included the images of 1 inner folder (more)"
    )

    def test_in_one_line_and_once(self, tmp_path, caplog):
        on_a_disk(tmp_path, self.TREE)
        for _ in range(2):
            data = itf.load_data("own", path=tmp_path, input_size=SIZE)
            assert data.notes == (f"{tmp_path}: {self.TOLD}",)
        assert [record.getMessage() for record in caplog.records] == [*data.notes]

    def test_of_a_zip_alike_under_its_name(self, tmp_path):
        told: list[str] = []
        take_data([in_a_zip(tmp_path / "pets.zip", self.TREE)], "mine", tell=told.append)
        assert told == [f"pets.zip: {self.TOLD}"]
        assert itf.load_data("kept/mine", input_size=SIZE).notes == ()

    @pytest.mark.parametrize(("tree", "match"), [
        ({f"{n}/0.png": n for n in (1, 2, 10)}, "classes are numbered 1 to 10; their labels are 0 to 2, in this order"),
        (SPLITS | {"val/cat/0.png": 9, "extra/a/0.png": 9}, r"skipped 2 folders next to the splits \(extra, val\)"),
        ({"cat/0.png": 1}, "all images are of one class, cat"),
        (PLAIN | {f"cat/{n}.txt": b"x" for n in range(5)}, r"5 files that are not images \(0.txt, 1.txt, 2.txt, …\)"),
        (PLAIN | {"cat/a\nb.txt": b"x"}, r"1 file that is not an image \(a\\nb.txt\)"),
    ])  # fmt: skip
    def test_kinds(self, tmp_path, tree, match):
        (note,) = itf.load_data("own", path=on_a_disk(tmp_path, tree), input_size=SIZE).notes
        assert note.isprintable()
        with pytest.raises(AssertionError, match=match):
            raise AssertionError(note)

    def test_nothing_where_all_counts(self, tmp_path, caplog):
        on_a_disk(tmp_path, SPLITS)
        assert itf.load_data("own", path=tmp_path, input_size=SIZE).notes == ()
        assert caplog.text == ""

    def test_by_the_command_line_beside_its_rows(self, tmp_path, capsys, caplog):
        on_a_disk(tmp_path, PLAIN | {"cat/notes.txt": b"x"})
        assert main(["data", "own", "--data-path", str(tmp_path), "--json"]) == 0
        assert caplog.text.count("skipped 1 file that is not an image (notes.txt)") == 1
        assert json.loads(capsys.readouterr().out)["names"] == ["cat", "dog"]


class TestLinks:
    def test_are_followed_but_not_around(self, tmp_path):
        elsewhere = on_a_disk(tmp_path / "elsewhere", {"a/0.png": 3})
        on_a_disk(tmp_path / "d", {"cat/0.png": 1, "cat/1.png": 2})
        (tmp_path / "d" / "dog").symlink_to(elsewhere / "a")
        (tmp_path / "d" / "cat" / "around").symlink_to(tmp_path / "d")
        (tmp_path / "d" / "cat" / "nowhere.png").symlink_to(tmp_path / "nowhere")
        (elsewhere / "a" / "self").symlink_to("self")
        (elsewhere / "a" / "back").symlink_to(elsewhere)
        assert seen(itf.load_data("own", path=tmp_path / "d", input_size=SIZE)) == ALL

    def test_a_folder_that_cannot_be_listed_is_one_line(self, tmp_path, monkeypatch):
        on_a_disk(tmp_path, PLAIN)
        real = os.scandir
        monkeypatch.setattr(os, "scandir", lambda path: real("/nowhere" if str(path).endswith("dog") else path))
        with pytest.raises(itf.IntrafusionError, match=r"cannot list .*dog: No such file"):
            itf.load_data("own", path=tmp_path, input_size=SIZE)


class TestZips:
    def test_of_windows_with_backslashes(self, tmp_path):
        path = tmp_path / "x.zip"
        with zipfile.ZipFile(path, "w") as archive:
            for name, made in below("pets", PLAIN).items():
                info = zipfile.ZipInfo(name)
                info.filename = name.replace("/", "\\")
                archive.writestr(info, content(name, made))
        assert seen(itf.load_data(take_data([path], "mine"), input_size=SIZE)) == ALL

    def test_of_macos_whose_names_are_not_declared_as_unicode(self, tmp_path):
        path = in_a_zip(tmp_path / "y.zip", {"caf??/0.png": 1, "dog/0.png": 3})
        path.write_bytes(path.read_bytes().replace(b"caf??", "café".encode()))
        assert itf.load_data(take_data([path], "mine"), input_size=SIZE).classes == ("café", "dog")

    @pytest.mark.parametrize("word", ["../../evil", "a/b", "a\\b", ".hidden", "@eaDir", "x" * 300, "a\tb"])
    def test_a_list_names_no_folder_elsewhere(self, tmp_path, word):
        path = in_a_zip(tmp_path / "x.zip", {"0.png": 1, "1.png": 2, "labels.csv": f"0.png,{word}\n1.png,dog\n".encode()})
        with pytest.raises(itf.IntrafusionError, match=r"invalid name|a class name of 300 characters"):
            take_data([path], "mine")
        assert not (tmp_path / "evil").exists()

    def test_validation_pictures_are_not_mixed_with_the_test_split(self, tmp_path):
        tree = SPLITS | {"val/cat/9.png": 9}
        name = take_data([in_a_zip(tmp_path / "x.zip", tree)], "mine")
        assert seen(itf.load_data(name, input_size=SIZE)) == (("cat", "dog"), [(3, 1)])


def test_of_one_split_the_other_is_not_listed(tmp_path):
    """A million training pictures are not looked at to read the test split."""
    on_a_disk(tmp_path, {f"train/{c}/{n}.png": 1 for c in "ab" for n in range(2)} | {"test/a/0.png": 1, "test/b/0.png": 1})
    tree = on_disk(tmp_path)
    layout = layout_of(tree)
    assert [layout.splits[split].name for split in ("train", "test")] == ["train", "test"]
    assert "_listed" not in vars(tree.folders["train"].folders["b"])


@pytest.mark.parametrize("case", CASES)
def test_pictures_come_as_image_folder_walks(tmp_path, case):
    """The order of torchvision.datasets.ImageFolder, for the same classes."""
    tree = in_archive((name, name) for name in CASES[case][0])
    layout = layout_of(tree)
    split = layout.at("test", "x")
    for of_class in split.holding:
        walked = list(of_class.walk())
        assert walked == sorted(walked, key=lambda name: (name.rpartition("/")[0], name))
        assert all(is_picture(name.rpartition("/")[2]) for name in walked)
