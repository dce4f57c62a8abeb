import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from complaints import complaint
from PIL import Image

import intrafusion as itf
from intrafusion.data import datasets as data
from intrafusion.data.datasets import CIFAR10_CLASSES, ImageData, normalise, stratified_split
from intrafusion.data.image_folder import folder_labels

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
LABELS = np.array([3, 0, 9, 3, 1, 5])


def picture(size: tuple[int, int] = (32, 32), mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def folders(root: Path, counts: dict[str, int], size: tuple[int, int] = (32, 32)) -> Path:
    """`counts[name]` pictures in each class folder, the number of each in its red channel."""
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", size, (number, 7, 9)).save(root / name / f"{number:03}.png")
    return root


def refused(match: str | None, **arguments: object) -> str:
    with pytest.raises(itf.IntrafusionError, match=match) as caught:
        itf.load_data(**arguments)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


class TestDigits:
    def test_splits_are_those_of_scikit_learn(self):
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        pixels, labels = load_digits(return_X_y=True)
        parts = train_test_split(pixels, labels, test_size=597, stratify=labels, random_state=0)
        for split, pixels, labels in (("train", *parts[::2]), ("test", *parts[1::2])):
            data = itf.load_data("digits", split)
            assert data.labels.tolist() == labels.tolist()
            assert np.array_equal(data.images.flatten(1).numpy(), np.rint(pixels * 255 / 16))

    @pytest.mark.parametrize("seed", range(3))
    @pytest.mark.parametrize("sizes", [(5, 5, 5, 5), (7, 5, 3, 9), (40, 2, 11, 1)])
    def test_chance_rounds_as_in_scikit_learn(self, sizes, seed):
        from sklearn.model_selection import train_test_split

        labels = np.random.RandomState(seed).permutation(np.repeat(np.arange(4), sizes))
        if min(sizes) == 1:
            labels = labels % 3
        theirs = train_test_split(np.arange(len(labels)), test_size=6, stratify=labels, random_state=seed)
        assert [rows.tolist() for rows in stratified_split(labels, 6, seed)] == [rows.tolist() for rows in theirs]

    def test_images_are_one_channel_uint8_and_the_same_each_time(self):
        first, second = itf.load_data("digits"), itf.load_data("digits")
        assert first.images.shape == (597, 1, 8, 8)
        assert first.images.dtype == torch.uint8
        assert first.labels.dtype == torch.int64
        assert first.classes == tuple("0123456789")
        assert (int(first.images.min()), int(first.images.max())) == (0, 255)
        assert torch.equal(first.images, second.images)
        assert torch.equal(first.labels, second.labels)


class TestSubset:
    numbers = torch.arange(50)
    images = ImageData("digits", "test", numbers.view(-1, 1, 1, 1).expand(-1, 1, 2, 2).byte(), numbers, ("a",))

    @pytest.mark.parametrize("limit", [1, 7, 49])
    def test_draws_limit_images_without_replacement_with_their_labels(self, limit):
        drawn = self.images.subset(limit, seed=3)
        assert len(drawn) == len(drawn.images) == len(set(drawn.labels.tolist())) == limit
        assert torch.equal(drawn.images[:, 0, 0, 0].long(), drawn.labels)

    @pytest.mark.parametrize("limit", [None, 50, 51])
    def test_everything_is_everything(self, limit):
        assert self.images.subset(limit) is self.images

    def test_seed_decides(self):
        assert torch.equal(self.images.subset(20, 5).labels, self.images.subset(20, 5).labels)
        assert not torch.equal(self.images.subset(20, 5).labels, self.images.subset(20, 6).labels)

    @pytest.mark.parametrize("limit", [0, -1])
    def test_no_images_are_refused(self, limit):
        with pytest.raises(itf.IntrafusionError, match="limit"):
            self.images.subset(limit)

    def test_batches_cover_everything_in_order(self):
        sizes, labels = zip(*((len(i), n) for i, n in self.images.batches(16)), strict=True)
        assert sizes == (16, 16, 16, 2)
        assert torch.equal(torch.cat(labels), self.numbers)


class TestCalibration:
    def test_images_are_of_the_training_split(self):
        seen = itf.load_calibration("digits", limit=30, seed=2)
        assert (seen.split, len(seen)) == ("train", 30)
        assert torch.equal(seen.images, itf.load_data("digits", "train").subset(30, 2).images)

    def test_a_subset_lets_go_of_the_rest(self):
        assert itf.load_calibration("digits", limit=3).images.untyped_storage().nbytes() == 3 * 64

    @pytest.mark.parametrize(("files", "path", "split"), [
        (["cifar10_train.npz", "cifar10_test.npz"], "cifar10_test.npz", "train"),
        (["cifar10_train.npz", "cifar10_test.npz"], ".", "train"),
        (["cifar10_test.npz"], "cifar10_test.npz", "test"),
        (["cifar10_test.npz"], ".", "test"),
        (["pictures.npz"], "pictures.npz", "test"),
    ])  # fmt: skip
    def test_the_training_split_beside_the_test_split_is_found(self, tmp_path, files, path, split):
        for file in files:
            value = 7 if "train" in file else 9
            np.savez(tmp_path / file, images=np.full((4, 32, 32, 3), value, np.uint8), labels=np.arange(4))
        seen = itf.load_calibration("cifar10", tmp_path / path, limit=2)
        assert seen.split == split
        assert seen.images.unique().tolist() == [7 if split == "train" else 9]

    def test_folders_with_a_training_split(self, tmp_path):
        for split, shade in (("train", 10), ("val", 200)):
            (tmp_path / split / "tench").mkdir(parents=True)
            Image.new("RGB", (40, 40), (shade,) * 3).save(tmp_path / split / "tench" / "a.png")
        seen = itf.load_calibration("imagenet", tmp_path, input_size=32)
        assert (seen.split, seen.images.unique().tolist()) == ("train", [10])

    def test_no_images_are_one_line(self, tmp_path):
        with pytest.raises(itf.IntrafusionError) as caught:
            itf.load_calibration("cifar10", tmp_path / "nowhere.npz")
        assert "nowhere.npz" in str(caught.value)


def test_normalise_follows_the_formula():
    mean, std = (0.1, 0.5, 0.9), (0.2, 0.3, 1.5)
    pixels = IMAGES.transpose(0, 3, 1, 2)
    expected = (pixels / 255.0 - np.reshape(mean, (1, 3, 1, 1))) / np.reshape(std, (1, 3, 1, 1))
    images = torch.from_numpy(pixels)
    actual = normalise(images, mean, std)
    assert actual.dtype == torch.float32
    np.testing.assert_allclose(actual.numpy(), expected, atol=1e-5)
    assert np.array_equal(images.numpy(), IMAGES.transpose(0, 3, 1, 2))


class TestNpz:
    @pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.int16])
    @pytest.mark.parametrize("channels", [1, 3])
    def test_images_and_labels_arrive_as_they_are(self, tmp_path, dtype, channels):
        np.savez(tmp_path / "x.npz", images=IMAGES[..., :channels], labels=LABELS.astype(dtype))
        images = itf.load_data("cifar10", path=tmp_path / "x.npz")
        assert np.array_equal(images.images.permute(0, 2, 3, 1).numpy(), IMAGES[..., :channels])
        assert images.labels.tolist() == LABELS.tolist()
        assert images.classes == CIFAR10_CLASSES

    def test_classes_of_the_file_are_kept(self, tmp_path):
        np.savez_compressed(tmp_path / "x.npz", images=IMAGES, labels=LABELS % 2, classes=np.array(["cat", "dog"]))
        assert itf.load_data("cifar10", path=tmp_path / "x.npz").classes == ("cat", "dog")

    def test_folder_may_hold_both_splits(self, tmp_path):
        np.savez(tmp_path / "cifar10_train.npz", images=IMAGES[:4], labels=LABELS[:4])
        np.savez(tmp_path / "cifar10_test.npz", images=IMAGES[4:], labels=LABELS[4:])
        assert len(itf.load_data("cifar10", "train", path=tmp_path)) == 4
        assert len(itf.load_data("cifar10", "test", path=str(tmp_path))) == 2

    BAD = {  # noqa: RUF012
        "no labels": ({"images": IMAGES}, "has no labels"),
        "no images": ({"labels": LABELS}, "has no images"),
        "nothing": ({}, "has no images and no labels"),
        "images from -1 to 1": ({"images": IMAGES / 127.5 - 1, "labels": LABELS}, "images must be uint8"),
        "flat images": ({"images": IMAGES.reshape(6, -1), "labels": LABELS}, "images must be uint8"),
        "two channels": ({"images": IMAGES[..., :2], "labels": LABELS}, "images must be uint8"),
        "four channels": ({"images": np.zeros((6, 8, 8, 4), np.uint8), "labels": LABELS}, "images must be uint8"),
        "label too large": ({"images": IMAGES, "labels": LABELS + 1}, "10 classes"),
        "label negative": ({"images": IMAGES, "labels": LABELS - 1}, "from -1 to 8; number the classes from 0"),
        "float labels": ({"images": IMAGES, "labels": LABELS / 2}, "labels must be integers"),
        "text labels": ({"images": IMAGES, "labels": LABELS.astype(str)}, "labels must be integers"),
        "truth labels": ({"images": IMAGES, "labels": LABELS > 2}, "labels must be integers"),
        "too few labels": ({"images": IMAGES, "labels": LABELS[:5]}, "labels must be integers"),
        "soft labels": ({"images": IMAGES, "labels": np.eye(10)[LABELS] * 0.9 + 0.01}, "labels must be integers"),
        "no image": ({"images": IMAGES[:0], "labels": LABELS[:0]}, "no images"),
        "object images": ({"images": np.array([None] * 6), "labels": LABELS}, "not a readable"),
        "object labels": ({"images": IMAGES, "labels": LABELS.astype(object)}, "not a readable"),
        "object classes": (
            {"images": IMAGES, "labels": LABELS, "classes": np.array(CIFAR10_CLASSES, object)},
            "not a readable",
        ),
    }

    @pytest.mark.parametrize(("arrays", "match"), BAD.values(), ids=BAD)
    def test_bad_arrays_are_one_line(self, tmp_path, arrays, match):
        np.savez(tmp_path / "x.npz", **arrays)
        assert "x.npz" in refused(match, name="cifar10", path=tmp_path / "x.npz")

    def test_damaged_files_are_one_line(self, tmp_path):
        import io
        import zipfile

        buffer = io.BytesIO()
        np.savez_compressed(buffer, images=IMAGES // 32, labels=LABELS)
        whole = buffer.getvalue()
        middle = len(whole) // 3
        array = io.BytesIO()
        np.save(array, IMAGES)
        foreign = io.BytesIO()
        with zipfile.ZipFile(foreign, "w") as archive:
            archive.writestr("images", "no array")
            archive.writestr("labels", "no array")
        damaged = {
            "half": whole[: len(whole) // 2],
            "without its end": whole[:-10],
            "with a hole": whole[:middle] + bytes(200) + whole[middle + 200 :],
            "empty": b"",
            "text": b"no images here",
            "a pickle": b"\x80\x04N.",
            "a lone array": array.getvalue(),
            "a zip of other things": foreign.getvalue(),
        }
        path, complaints = tmp_path / "x.npz", {}
        for name, content in damaged.items():
            path.write_bytes(content)
            complaints[name] = complaint(path, lambda: itf.load_data("cifar10", path=path))
        assert complaints == dict.fromkeys(damaged)


class TestClassFolders:
    def test_cifar10_class_names_decide_the_labels(self, tmp_path):
        images = itf.load_data("cifar10", path=folders(tmp_path, {"truck": 2, "airplane": 1, "cat": 1}))
        assert Counter(images.labels.tolist()) == {9: 2, 0: 1, 3: 1}
        assert images.classes == CIFAR10_CLASSES
        assert images.images.shape == (4, 3, 32, 32)
        assert images.images[:, :, 5, 5].tolist() == [[0, 7, 9], [0, 7, 9], [0, 7, 9], [1, 7, 9]]

    def test_ten_other_names_are_taken_in_their_order(self, tmp_path):
        names = [f"class{letter}" for letter in "jihgfedcba"]
        images = itf.load_data("cifar10", path=folders(tmp_path, dict.fromkeys(names, 1)))
        assert images.labels.tolist() == list(range(10))
        assert images.classes == tuple(sorted(names))

    NUMBERED = {  # noqa: RUF012  # dataset, folders; labels
        "CIFAR-10": ("cifar10", range(10), range(10)),
        "some of CIFAR-10": ("cifar10", (9, 2, 5), (2, 5, 9)),
        "CIFAR-100": ("cifar100", range(100), range(100)),
        "some of CIFAR-100, with zeros before": ("cifar100", ("07", "70", "007"), (7, 7, 70)),
        "ImageNet-V2": ("imagenet", (0, 1, 10, 100, 999, 2), (0, 1, 2, 10, 100, 999)),
        "Imagenette by its places in ImageNet": ("imagenette", (701, 0, 569), (0, 569, 701)),
    }

    @pytest.mark.parametrize("case", NUMBERED)
    def test_numbers_are_labels_where_the_classes_are_known(self, tmp_path, case):
        name, numbers, labels = self.NUMBERED[case]
        for number in numbers:
            (tmp_path / str(number)).mkdir()
            Image.new("RGB", (32, 32), (int(number) % 256, 0, 0)).save(tmp_path / str(number) / "x.png")
        data = itf.load_data(name, path=tmp_path, input_size=32)
        assert sorted(data.labels.tolist()) == [*labels]
        assert data.images[:, 0, 5, 5].tolist() == (data.labels % 256).tolist()

    @pytest.mark.parametrize(("name", "numbers", "match"), [
        ("cifar10", range(1, 11), "numbered 1 to 10, but labels of cifar10 range from 0 to 9"),
        ("cifar100", (100,), "numbered 100 to 100"), ("imagenet", (1000,), "labels of imagenet range from 0 to 999"),
        ("imagenette", range(10), "are not ImageNet classes"),
    ])  # fmt: skip
    def test_numbers_that_are_no_labels_are_one_line(self, tmp_path, name, numbers, match):
        refused(match, name=name, path=folders(tmp_path, {str(number): 1 for number in numbers}))

    def test_a_wrapping_folder_and_splits_of_any_case(self, tmp_path):
        folders(tmp_path / "imagenette2" / "Train", {"n01440764": 1})
        folders(tmp_path / "imagenette2" / "VAL", {"n01440764": 2, "n03394916": 1})
        (tmp_path / "imagenette2" / "noisy_imagenette.csv").write_text("path,label\n")
        assert itf.load_data("imagenette", path=tmp_path, input_size=16).labels.tolist() == [0, 0, 566]
        assert len(itf.load_data("imagenette", "train", tmp_path, input_size=16)) == 1

    def test_labels_json_beside_is_not_told_as_passed_over(self, tmp_path):
        (tmp_path / "labels.json").write_text(json.dumps({"my fish": 1}))
        assert itf.load_data("imagenet", path=folders(tmp_path, {"my fish": 1}), input_size=16).notes == ()

    @pytest.mark.parametrize(("name", "split", "folder"), [
        ("cifar10", "train", "train"), ("cifar10", "test", "test"), ("imagenette", "test", "val"),
        ("imagenet", "train", "train"),
    ])  # fmt: skip
    def test_split_folders_are_found(self, tmp_path, name, split, folder):
        of_class = "cat" if name == "cifar10" else "tench"
        other = "train" if split == "test" else "val"
        folders(tmp_path / folder, {of_class: 2})
        folders(tmp_path / other, {of_class: 3})
        assert len(itf.load_data(name, split, path=tmp_path, input_size=16)) == 2

    IMAGENET = {"n01440764": 0, "tench": 0, "goldfish": 1, "n01443537": 1, "n15075141": 999}  # noqa: RUF012

    @pytest.mark.parametrize(("folder", "label"), IMAGENET.items())
    def test_imagenet_folders_are_wordnet_ids_or_class_names(self, tmp_path, folder, label):
        images = itf.load_data("imagenet", path=folders(tmp_path, {folder: 1}), input_size=16)
        assert images.labels.tolist() == [label]
        assert len(images.classes) == 1000
        assert images.classes[1] == "goldfish"

    def test_labels_json_decides(self, tmp_path):
        (tmp_path / "labels.json").write_text(json.dumps({"my fish": 1, "other": 999, "unused": 3}))
        images = itf.load_data("imagenet", path=folders(tmp_path, {"my fish": 1, "other": 2}), input_size=16)
        assert images.labels.tolist() == [1, 999, 999]

    LABELS_JSON = {  # noqa: RUF012
        "not JSON": "{",
        "a list": '["tench"]',
        "a word for a label": '{"tench": "first"}',
        "null for a label": '{"tench": null}',
        "a label of no class": '{"tench": 1000}',
    }

    @pytest.mark.parametrize("text", LABELS_JSON.values(), ids=LABELS_JSON)
    def test_broken_labels_json_is_one_line(self, tmp_path, text):
        (tmp_path / "labels.json").write_text(text)
        folders(tmp_path, {"tench": 1})
        assert "labels.json" in refused(None, name="imagenet", path=tmp_path, input_size=16)

    def test_hidden_files_and_folders_are_passed_over(self, tmp_path):
        folders(tmp_path, {"cat": 2, ".thumbnails": 1})
        (tmp_path / "cat" / ".DS_Store").write_bytes(bytes(10))
        assert len(itf.load_data("cifar10", path=tmp_path)) == 2

    def test_wrong_folders_are_one_line(self, tmp_path):
        (tmp_path / "empty").mkdir()
        refused("no class folders", name="cifar10", path=tmp_path / "empty")
        refused("2 class folders", name="cifar10", path=folders(tmp_path / "two", {"a": 1, "b": 1}))
        refused("10 class folders", name="cifar100", path=folders(tmp_path / "ten", dict.fromkeys(CIFAR10_CLASSES, 1)))
        refused("without images", name="cifar10", path=folders(tmp_path / "bare", {"cat": 0, "dog": 0}))
        refused("unicorn", name="imagenet", path=folders(tmp_path / "horned", {"tench": 1, "unicorn": 1}))

    @pytest.mark.filterwarnings("ignore:.*EXIF:UserWarning")
    @pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "bmp", "tiff", "webp"])
    def test_damaged_pictures_are_one_line_and_named(self, tmp_path, suffix):
        folders(tmp_path, {"cat": 1})
        path = tmp_path / "cat" / f"damaged.{suffix}"
        picture().save(path)
        whole, complaints = path.read_bytes(), {}
        damaged = {
            "text": b"no picture",
            "empty": b"",
            "head": whole[:10],
            "half": whole[: len(whole) // 2],
            "most": whole[: len(whole) * 9 // 10],
        }
        for name, content in damaged.items():
            path.write_bytes(content)
            complaints[name] = complaint(path, lambda: itf.load_data("cifar10", path=tmp_path))
        assert complaints == dict.fromkeys(damaged)

    @pytest.mark.parametrize("size", [(31, 32), (32, 33), (1, 1)])
    def test_cifar_pictures_must_have_cifars_size(self, tmp_path, size):
        message = refused(None, name="cifar10", path=folders(tmp_path, {"cat": 1}, size))
        assert f"{size[0]}x{size[1]}" in message

    @pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "1", "CMYK"])
    def test_every_kind_of_picture_becomes_rgb(self, tmp_path, mode):
        folders(tmp_path, {"cat": 0})
        suffix = "tiff" if mode == "CMYK" else "png"
        picture(mode=mode).save(tmp_path / "cat" / f"x.{suffix}")
        images = itf.load_data("cifar10", path=tmp_path)
        expected = np.asarray(picture(mode=mode).convert("RGB"))
        assert np.array_equal(images.images[0].permute(1, 2, 0).numpy(), expected)

    @pytest.mark.parametrize(("limit", "expected"), [
        (1, [1, 0, 0]), (3, [1, 1, 1]), (4, [2, 1, 1]), (6, [3, 1, 2]), (9, [4, 1, 4]), (99, [5, 1, 4]),
    ])  # fmt: skip
    def test_limit_spreads_over_the_classes(self, tmp_path, limit, expected):
        folders(tmp_path, {"airplane": 5, "automobile": 1, "bird": 4})
        images = itf.load_data("cifar10", path=tmp_path, limit=limit)
        assert torch.bincount(images.labels, minlength=3).tolist() == expected
        for label in range(3):  # a class gives its first pictures
            assert images.images[images.labels == label, 0, 0, 0].tolist() == list(range(expected[label]))

    def test_more_than_memory_holds_is_refused_before_decoding(self, tmp_path, monkeypatch):
        folders(tmp_path, {"cat": 1, "dog": 2})
        (tmp_path / "cat" / "000.png").write_text("would fail if it were opened")
        monkeypatch.setattr(data, "_MEMORY_LIMIT", 2 * 32 * 32 * 3)
        refused("memory", name="cifar10", path=tmp_path)

    @pytest.mark.parametrize("size", [(18, 18), (36, 72), (72, 36), (8, 8)])
    def test_crop_is_torchvisions_resize_and_centre_crop(self, tmp_path, size):
        from torchvision import transforms

        folders(tmp_path, {"tench": 0})
        picture(size).save(tmp_path / "tench" / "x.png")
        ours = itf.load_data("imagenet", path=tmp_path, input_size=16).images[0].permute(1, 2, 0).numpy()
        theirs = transforms.Compose([transforms.Resize(18), transforms.CenterCrop(16)])(picture(size))
        assert np.array_equal(ours, np.asarray(theirs))

    @pytest.mark.parametrize("size", [(1, 1), (17, 19), (300, 20), (20, 301)])
    @pytest.mark.parametrize("side", [16, 15])
    def test_any_size_is_cropped_to_the_models_input(self, tmp_path, size, side):
        images = itf.load_data("imagenet", path=folders(tmp_path, {"tench": 1}, size), input_size=side)
        assert images.images.shape == (1, 3, side, side)
        assert images.images.flatten(2).float().std(2).max() == 0  # a plain picture stays plain to its edges


def test_unknown_names_and_missing_paths_are_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("INTRAFUSION_HOME", str(tmp_path / "home"))
    refused("unknown dataset 'mnist'.*digits", name="mnist")
    refused("unknown split 'val'", name="digits", split="val")
    refused("no file at", name="cifar10", path=tmp_path / "nowhere")
    refused("cannot be downloaded", name="imagenet")
    refused("download=True", name="cifar100")
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize("path", ["x" * 300, "~nobody-of-this-name/data"], ids=["too long a name", "no such user"])
def test_impossible_path_is_one_line(path):
    refused(None, name="cifar10", path=path)


@pytest.mark.reference
@pytest.mark.parametrize(("split", "count"), [("test", 10_000), ("train", 50_000)])
def test_reference_cifar_is_balanced(reference, split, count):
    images = itf.load_data("cifar10", split, path=reference(f"data/cifar10_{split}.npz"))
    assert torch.bincount(images.labels).tolist() == [count // 10] * 10
    assert images.images.shape == (count, 3, 32, 32)


@pytest.mark.reference
def test_reference_imagenet_folders_are_the_thousand_classes_in_order(reference):
    folder = reference("data/imagenet_samples")
    files = [path for path in folder.iterdir() if path.is_dir()]
    labels, classes = folder_labels("imagenet", folder, sorted(path.name for path in files))
    assert list(labels.values()) == list(range(1000))
    images = itf.load_data("imagenet", path=folder, limit=3)
    assert images.labels.tolist() == [0, 1, 2]
    assert classes[:2] == ("tench", "goldfish")


@pytest.mark.parametrize(
    ("test", "train"), [("x_test.npz", "x_train.npz"), ("test.npz", "train.npz"), ("x.npz", "x_train.npz")]
)
def test_where_training_images_are_looked_for(tmp_path, test, train):
    images, labels = np.zeros((6, 8, 8, 1), np.uint8), np.array([0, 1, 2, 0, 1, 2])
    np.savez(tmp_path / test, images=images, labels=labels)
    assert itf.load_calibration("own", tmp_path / test).split == "test"
    np.savez(tmp_path / train, images=images + 1, labels=labels)
    assert itf.load_calibration("own", tmp_path / test).split == "train"
