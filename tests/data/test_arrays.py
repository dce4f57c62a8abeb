"""Arrays as people have them: what can be read in one way alone gives the same pixels and labels; the rest is refused."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import intrafusion as itf
from intrafusion.cli.main import main
from intrafusion.data.arrays import Reading, role_of, splits_of
from intrafusion.studies.uploads import take_data

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (6, 9, 12, 3), dtype=np.uint8)
COLOUR[0, 0, 0], COLOUR[1, 0, 0] = 0, 255
GREY = COLOUR[:, :, :9, :1]
LABELS = np.array([2, 0, 1, 2, 2, 0])
ONE_HOT = np.eye(3, dtype=np.int64)[LABELS]
FIRST = (0, 3, 1, 2)


def save(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def read(path: Path, split: str = "test") -> tuple[np.ndarray, list[int]]:
    data = itf.load_data("own", split, path)
    return data.images.permute(0, 2, 3, 1).numpy(), data.labels.tolist()


IMAGES: dict[str, tuple[np.ndarray, np.ndarray]] = {  # images as they are given, and as they are meant
    "as they are": (COLOUR, COLOUR),
    "channels first": (COLOUR.transpose(FIRST), COLOUR),
    "one channel first": (GREY.transpose(FIRST), GREY),
    "two channels first": (COLOUR[:, :, :9, :2].transpose(FIRST), COLOUR[:, :, :9, :2]),
    "one channel last": (GREY, GREY),
    "three channels of three pixels": (COLOUR[:, :3, :3, :1], COLOUR[:, :3, :3, :1]),
    "narrow, of three channels": (COLOUR[:, :5, :7], COLOUR[:, :5, :7]),
    "narrow, of three channels first": (COLOUR[:, :5, :7].transpose(FIRST), COLOUR[:, :5, :7]),
    "grey without channels": (GREY[..., 0], GREY),
    "rows of a square": (GREY.reshape(6, 81), GREY),
    "from 0 to 1": (COLOUR / 255, COLOUR),
    "from 0 to 1 in float32, channels first": ((COLOUR / 255).astype(np.float32).transpose(FIRST), COLOUR),
    "from 0 to 1 in float16": ((COLOUR / 255).astype(np.float16), COLOUR),
    "from 0 to 255 in float32": (COLOUR.astype(np.float32), COLOUR),
    "of int64": (COLOUR.astype(np.int64), COLOUR),
    "of 16 bits": (COLOUR.astype(np.uint16) * 257, COLOUR),
    "of true and false": (COLOUR > 99, np.where(COLOUR > 99, 255, 0)),
    "black": (np.zeros((6, 9, 12, 3)), np.zeros((6, 9, 12, 3))),
    "a little above 1": (COLOUR / 254.9999, COLOUR),
    "Fortran's order": (np.asfortranarray(COLOUR), COLOUR),
}


@pytest.mark.parametrize("case", IMAGES)
def test_images(tmp_path, case):
    given, meant = IMAGES[case]
    pixels, labels = read(save(tmp_path / "x.npz", images=given, labels=LABELS))
    assert pixels.dtype == np.uint8
    assert np.array_equal(pixels, meant)
    assert labels == LABELS.tolist()


@pytest.mark.parametrize("case", IMAGES)
def test_kept_images_are_the_same(tmp_path, case):
    given, meant = IMAGES[case]
    take_data([save(tmp_path / "x.npz", images=given, labels=LABELS, classes=np.array(["a", "b", "c"]))], "mine")
    data = itf.load_data("kept/mine")
    assert np.array_equal(data.images.permute(0, 2, 3, 1).numpy(), meant)
    assert (data.classes, data.notes) == (("a", "b", "c"), ())


LABELLED = {
    "bytes": LABELS.astype(np.uint8), "a column": LABELS[:, None], "a column of floats": LABELS[:, None] / 1,
    "floats": LABELS / 1,
    "float16": LABELS.astype(np.float16), "one-hot": ONE_HOT, "one-hot floats": ONE_HOT / 1, "one-hot truths": ONE_HOT > 0,
}  # fmt: skip


@pytest.mark.parametrize("case", LABELLED)
def test_labels(tmp_path, case):
    data = itf.load_data("own", path=save(tmp_path / "x.npz", images=COLOUR, labels=LABELLED[case]))
    assert data.labels.tolist() == LABELS.tolist()
    assert data.classes == ("0", "1", "2")


def test_one_hot_labels_count_the_classes_that_no_image_has(tmp_path):
    path = save(tmp_path / "x.npz", images=COLOUR, labels=np.eye(5)[LABELS])
    assert itf.load_data("own", path=path).classes == tuple("01234")
    assert itf.load_data(take_data([path], "mine")).classes == tuple("01234")
    with pytest.raises(itf.IntrafusionError, match="5 columns, but cifar10 has 10 classes"):
        itf.load_data("cifar10", path=path)


KEYS: dict[str, tuple[tuple[str, str], tuple[str, str] | None]] = {  # of the test split, and of the training split
    "ours": (("images", "labels"), None),
    "Keras": (("x_test", "y_test"), ("x_train", "y_train")),
    "Keras in capitals": (("X_test", "Y_test"), ("X_train", "Y_train")),
    "MedMNIST": (("test_images", "test_labels"), ("train_images", "train_labels")),
    "validation alone": (("val_images", "val_labels"), ("train_images", "train_labels")),
    "scikit-learn": (("data", "target"), None),
    "scikit-learn's pictures": (("images", "target"), None),
    "PyTorch": (("data", "targets"), None),
    "letters": (("X", "y"), None),
    "data and labels": (("data", "labels"), None),
    "the split behind": (("images_test", "labels_test"), ("images_train", "labels_train")),
    "without a line": (("testX", "testY"), ("trainX", "trainY")),
}


@pytest.mark.parametrize("case", KEYS)
def test_names_of_the_usual_libraries(tmp_path, case):
    test, train = KEYS[case]
    arrays: dict[str, Any] = dict(zip(test, (COLOUR, LABELS), strict=True))
    if train:
        arrays |= dict(zip(train, (COLOUR // 2, LABELS[::-1]), strict=True))
    path = save(tmp_path / "x.npz", **arrays)
    pixels, labels = read(path)
    assert (np.array_equal(pixels, COLOUR), labels) == (True, LABELS.tolist())
    seen = itf.load_calibration("own", path)
    assert seen.split == ("train" if train else "test")
    assert np.array_equal(seen.images.permute(0, 2, 3, 1).numpy(), COLOUR // 2 if train else COLOUR)
    take_data([path], "mine")
    if train:
        assert read(path, "train")[1] == itf.load_data("kept/mine", "train").labels.tolist() == LABELS[::-1].tolist()
    assert itf.load_data("kept/mine").labels.tolist() == LABELS.tolist()


def test_test_images_come_before_validation_images(tmp_path):
    arrays = {f"{split}_images": COLOUR // (n + 1) for n, split in enumerate(("test", "train", "val"))}
    path = save(tmp_path / "x.npz", **arrays, **{f"{split}_labels": LABELS[:, None] for split in ("train", "val", "test")})
    assert np.array_equal(read(path)[0], COLOUR)
    assert np.array_equal(read(path, "train")[0], COLOUR // 2)


def test_a_bunch_of_scikit_learn(tmp_path):
    """Its `data` and `images` are the same numbers; what else it holds is left alone."""
    bunch = {"data": GREY.reshape(6, -1) / 255, "images": GREY[..., 0] / 255, "target": LABELS, "DESCR": "digits",
             "frame": None, "target_names": np.array(["a", "b", "c"]), "feature_names": ["x"]}  # fmt: skip
    data = itf.load_data("own", path=save(tmp_path / "x.npz", **bunch))
    assert np.array_equal(data.images[:, 0].numpy(), GREY[..., 0])
    assert data.classes == ("a", "b", "c")


@pytest.mark.parametrize(("key", "role"), [
    ("images", ("images", "")), ("Y_TRAIN", ("labels", "train")), ("validation_images", ("images", "validation")),
    ("label_names", ("classes", "")), ("train_x_test", None), ("ids", None), ("images2", None), ("xy", None),
])  # fmt: skip
def test_roles(key, role):
    assert role_of(key) == role


def test_splits_of_names():
    assert splits_of(["val_images", "train_images", "train_labels", "x"]) == {"train": "train", "test": "val"}
    assert splits_of(["images", "labels"]) == {}


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "three channels or three rows": ({"images": COLOUR[:, :3, :3]}, "--layout nchw"),
    "three rows, three channels": ({"images": COLOUR[:, :3]}, "--layout nchw"),
    "eight of everything": ({"images": COLOUR[:, :8, :8, :1].repeat(8, 3)}, "--layout nchw"),
    "eight channels or eight rows": ({"images": np.zeros((6, 8, 8, 99), np.uint8)}, "--layout nchw"),
    "two channels or two rows": ({"images": np.zeros((6, 2, 9, 12), np.uint8)}, "--layout nchw"),
    "rows of colours": ({"images": COLOUR[:, :8, :8].reshape(6, -1)}, "--layout nchw"),
    "rows of no square": ({"images": COLOUR[:, :8].reshape(6, -1)}, "not square images"),
    "rows of measurements": ({"images": COLOUR[:, 0, :4, 0]}, "not square images"),
    "channels in neither place": ({"images": np.zeros((6, 20, 9, 20), np.uint8)}, r"not uint8 \(N, 20, 9, 20\)"),
    "from -1 to 1": ({"images": COLOUR / 127.5 - 1}, "from -1 to 1 is ambiguous.*--range BLACK WHITE"),
    "normalised": ({"images": (COLOUR / 255 - 0.5) / 0.2}, "undo any normalisation"),
    "from 0 to 16": ({"images": COLOUR // 16 / 1}, "from 0 to 15 is ambiguous"),
    "from 0 to 16 in integers": ({"images": (COLOUR // 16).astype(int)}, "int64 values from 0 to 15 is ambiguous"),
    "from 0 to 1 in integers": ({"images": (COLOUR > 99).astype(int)}, "int64 values from 0 to 1 is ambiguous"),
    "8 of 16 bits": ({"images": COLOUR.astype(np.uint16)}, "uint16 values from 0 to 255 is ambiguous"),
    "12 of 16 bits": ({"images": COLOUR.astype(np.uint16) * 16}, "uint16 values from 0 to 4080 is ambiguous"),
    "above 255": ({"images": COLOUR * 2.0}, "from 0 to 510 is ambiguous"),
    "NaN": ({"images": np.where(COLOUR > 250, np.nan, COLOUR)}, "NaN"),
    "infinite": ({"images": np.where(COLOUR > 250, np.inf, COLOUR)}, "infinite"),
    "complex": ({"images": COLOUR * 1j}, "images must be uint8"),
    "text": ({"images": COLOUR.astype(str)}, "images must be uint8"),
    "one image": ({"images": COLOUR[0], "labels": LABELS[:1]}, "labels must be integers"),
    "two names of images": ({"x": COLOUR}, "both images and x, either of which may be its images"),
    "two names of labels": ({"y": LABELS}, "both labels and y, either of which may be its labels"),
    "labels of another count": ({"labels": LABELS[:5]}, r"labels must be integers \(6,\)"),
    "one-hot labels of another count": ({"labels": ONE_HOT[:5]}, r"labels must be integers \(6,\)"),
    "probabilities": ({"labels": ONE_HOT * 0.9 + 0.05}, "one-hot"),
    "two labels an image": ({"labels": np.maximum(ONE_HOT, np.eye(3)[0].astype(int))}, "one-hot"),
    "rows of zeros": ({"labels": ONE_HOT * 0}, "one-hot"),
    "one-hot labels of -1": ({"labels": -ONE_HOT}, "one-hot"),
    "labels of fractions": ({"labels": LABELS / 3}, "with fractions such as 0.66"),
    "labels of NaN": ({"labels": np.where(LABELS > 0, np.nan, 0)}, "with fractions such as nan"),
    "labels of many dimensions": ({"labels": LABELS[:, None, None]}, "labels must be integers"),
    "negative labels": ({"labels": LABELS - 1}, "labels range from -1 to 1"),
    "negative labels of floats": ({"labels": LABELS - 1.0}, "labels range from -1 to 1"),
    "vast labels": ({"labels": LABELS * 1e9}, "the limit is 100,000 classes"),
    "labels of text": ({"labels": np.array(list("abcabc"))}, "labels must be integers"),
    "labels of no class": ({"classes": np.array(["a", "b"])}, "labels range from 0 to 2, but own has 2 classes"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("way", ["path", "kept"])
def test_what_is_ambiguous_or_none_is_one_line(tmp_path, case, way):
    changes, match = BAD[case]
    path = save(tmp_path / "x.npz", **({"images": COLOUR, "labels": LABELS} | changes))
    with pytest.raises(itf.IntrafusionError, match=match) as caught:
        itf.load_data("own", path=path) if way == "path" else take_data([path], "mine")
    assert "\n" not in str(caught.value)
    assert "x.npz" in str(caught.value)


def test_a_split_that_is_not_there_is_one_line(tmp_path):
    path = save(tmp_path / "x.npz", x_train=COLOUR, y_train=LABELS)
    with pytest.raises(itf.IntrafusionError, match="has train images but no test images"):
        itf.load_data("own", path=path)
    with pytest.raises(itf.IntrafusionError, match="no test images"):
        take_data([path], "mine")


SETTLED: dict[str, tuple[np.ndarray, Reading, np.ndarray]] = {
    "channels first": (COLOUR[:, :3, :3].transpose(FIRST), Reading("nchw"), COLOUR[:, :3, :3]),
    "channels last": (COLOUR[:, :3, :3], Reading("nhwc"), COLOUR[:, :3, :3]),
    "rows of colours": (COLOUR[:, :8, :8].reshape(6, -1), Reading("nhwc"), COLOUR[:, :8, :8]),
    "rows of colours first": (
        COLOUR[:, :8, :8].transpose(FIRST).reshape(6, -1), Reading("nchw"), COLOUR[:, :8, :8]
    ),
    "from -1 to 1": (COLOUR / 127.5 - 1, Reading(span=(-1, 1)), COLOUR),
    "from 0 to 15": (COLOUR // 17 / 1, Reading(span=(0, 15)), COLOUR // 17 * 17),
    "from 0 to 15 in bytes": (COLOUR // 17, Reading(span=(0, 15)), COLOUR // 17 * 17),
    "8 of 16 bits": (COLOUR.astype(np.uint16), Reading(span=(0, 255)), COLOUR),
    "dark": (COLOUR // 2 / 1, Reading(span=(0, 255)), COLOUR // 2),
    "both": (COLOUR[:, :3, :3].transpose(FIRST) / 127.5 - 1, Reading("nchw", (-1, 1)), COLOUR[:, :3, :3]),
}  # fmt: skip


@pytest.mark.parametrize("case", SETTLED)
def test_what_is_said_settles_it(tmp_path, case):
    given, reading, meant = SETTLED[case]
    name = take_data([save(tmp_path / "x.npz", images=given, labels=LABELS)], "mine", reading=reading)
    assert np.array_equal(itf.load_data(name).images.permute(0, 2, 3, 1).numpy(), meant)


def test_the_command_that_a_refusal_names_works(tmp_path, capsys):
    path = save(tmp_path / "x.npz", images=COLOUR[:, :3, :3].transpose(FIRST) / 127.5 - 1, labels=LABELS)
    with pytest.raises(itf.IntrafusionError) as caught:
        itf.load_data("own", path=path)
    command = re.search("`python -m intrafusion (.*?)`", str(caught.value))
    assert command is not None
    words = command[1].replace("NAME", "mine").split()
    assert main([*words, "--range", "-1", "1"]) == 0, capsys.readouterr().err
    assert np.array_equal(itf.load_data("kept/mine").images.permute(0, 2, 3, 1).numpy(), COLOUR[:, :3, :3])


@pytest.mark.parametrize(("reading", "match"), [
    ({"span": (0, 100)}, "from 0 to 100, not uint8 from 0 to 255"), ({"span": (1, 1)}, "range must go from"),
    ({"span": (0, float("nan"))}, "range must go from"), ({"layout": "chwn"}, "unknown layout 'chwn'"),
    ({"layout": "nchw"}, "as nchw"),
])  # fmt: skip
def test_what_does_not_settle_it_is_one_line(tmp_path, reading, match):
    path = save(tmp_path / "x.npz", images=COLOUR[:, :, :, :2].repeat(9, 1), labels=LABELS)
    with pytest.raises(itf.IntrafusionError, match=match):
        take_data([path], "mine", reading=Reading(**reading))


class TestTold:
    def test_in_one_line_and_once(self, tmp_path, caplog):
        path = save(tmp_path / "x.npz", images=COLOUR.transpose(FIRST) / 255, labels=ONE_HOT)
        told = (
            f"{path}: reading images (6, 3, 9, 12) with channels first as (6, 9, 12, 3), reading float64 images from 0 to 1 as "
            "0 to 255; reading one-hot labels (6, 3) as (6,)"
        )
        for _ in range(2):
            assert itf.load_data("own", path=path).notes == (told,)
        assert [record.getMessage() for record in caplog.records] == [told]

    def test_of_what_is_kept_under_its_name(self, tmp_path, caplog):
        take_data([save(tmp_path / "x.npz", images=COLOUR, labels=LABELS[:, None])], "mine")
        assert [record.getMessage() for record in caplog.records] == ["x.npz: reading labels (6, 1) as (6,)"]

    def test_nothing_where_nothing_was_converted(self, tmp_path, caplog):
        assert itf.load_data("own", path=save(tmp_path / "x.npz", images=COLOUR, labels=LABELS)).notes == ()
        assert caplog.text == ""

    def test_of_pictures_too_dark_for_their_type(self, tmp_path):
        path = save(tmp_path / "x.npz", images=COLOUR // 16, labels=LABELS)
        (note,) = itf.load_data("own", path=path).notes
        assert "the brightest pixel is 15 of 255; if that is white, import them with" in note
        assert "--range 0 15" in note
