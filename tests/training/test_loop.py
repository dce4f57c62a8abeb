import itertools
import json
import threading
from collections.abc import Generator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import intrafusion as itf
from intrafusion.data.datasets import ImageData, normalise
from intrafusion.models.architectures import mlp
from intrafusion.models.hub import ARCHITECTURES
from intrafusion.runtime.cancellation import Cancelled, stoppable
from intrafusion.training import loop
from intrafusion.training.augment import shift_and_flip, wobble
from intrafusion.training.embedded_models import RECIPES, make
from intrafusion.training.loop import Recipe, TrainingProgress, train

CARD = ARCHITECTURES["digits-mlp"].card
PICTURES = torch.randint(0, 256, (40, 3, 7, 9), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def few() -> ImageData:
    return itf.load_data("digits", "train").subset(64)


def untouched(images: Tensor, generator: torch.Generator) -> Tensor:
    return images


def trained(data: ImageData, recipe: Recipe) -> tuple[nn.Module, list[TrainingProgress]]:
    torch.manual_seed(1)
    model = mlp((64, 16, 10))
    return model, list(train(model, data, recipe, CARD.mean, CARD.std))


class TestOneCycle:
    @pytest.mark.parametrize("warmup", [0.1, 0.25, 0.5])
    def test_rises_to_one_at_the_end_of_the_warm_up_then_falls_to_zero(self, warmup):
        rates = [loop._one_cycle(step / 1000, warmup) for step in range(1001)]
        peak = round(1000 * warmup)
        assert rates[0] == pytest.approx(0.1)
        assert rates[peak] == pytest.approx(1)
        assert rates[-1] == pytest.approx(0, abs=1e-12)
        assert rates[: peak + 1] == sorted(rates[: peak + 1])
        assert rates[peak:] == sorted(rates[peak:], reverse=True)
        assert max(abs(a - b) for a, b in itertools.pairwise(rates)) < 0.02  # no jump

    def test_warm_up_is_linear_and_the_fall_a_cosine(self):
        assert loop._one_cycle(0.125, 0.25) == pytest.approx(0.55)
        assert loop._one_cycle(0.625, 0.25) == pytest.approx(0.5)

    def test_optimiser_follows_it(self, few, monkeypatch):
        rates = []
        step = torch.optim.SGD.step

        def spy(self, *arguments):
            rates.append(self.param_groups[0]["lr"])
            return step(self, *arguments)

        monkeypatch.setattr(torch.optim.SGD, "step", spy)
        trained(few, Recipe(epochs=5, augment=untouched, lr=0.2, batch=16))
        assert rates == pytest.approx([0.2 * loop._one_cycle(n / 20, 0.25) for n in range(20)])


class TestShiftAndFlip:
    @pytest.mark.parametrize("pixels", [1, 4])
    @pytest.mark.parametrize("seed", [0, 1])
    def test_equals_explicit_crops_of_a_padded_copy(self, pixels, seed):
        actual = shift_and_flip(PICTURES, torch.Generator().manual_seed(seed), pixels)
        assert actual.shape == PICTURES.shape
        assert actual.dtype == torch.uint8
        padded = torch.zeros(40, 3, 7 + 2 * pixels, 9 + 2 * pixels, dtype=torch.uint8)
        padded[:, :, pixels : pixels + 7, pixels : pixels + 9] = PICTURES
        used = set()
        for image, wide in zip(actual, padded, strict=True):
            crops = {
                (top, left, mirrored): crop.flip(-1) if mirrored else crop
                for top in range(2 * pixels + 1)
                for left in range(2 * pixels + 1)
                for mirrored in (False, True)
                for crop in [wide[:, top : top + 7, left : left + 9]]
            }
            matches = [key for key, crop in crops.items() if torch.equal(image, crop)]
            assert len(matches) == 1  # random pixels: no two crops are alike
            used.add(matches[0])
        assert {0, 2 * pixels} <= {top for top, _, _ in used} & {left for _, left, _ in used}
        assert {mirrored for _, _, mirrored in used} == {False, True}

    def test_draws_what_its_generator_says(self):
        generator = torch.Generator().manual_seed(5)
        top, left = (torch.randint(0, 9, (40, 1), generator=generator) for _ in range(2))
        mirrored = torch.rand(40, 1, generator=generator) < 0.5
        actual = shift_and_flip(PICTURES, torch.Generator().manual_seed(5))
        padded = torch.nn.functional.pad(PICTURES, (4, 4, 4, 4))
        for i in range(40):
            crop = padded[i, :, top[i] : top[i] + 7, left[i] : left[i] + 9]
            assert torch.equal(actual[i], crop.flip(-1) if mirrored[i] else crop)


class TestWobble:
    images = PICTURES[:, :1]

    def test_keeps_shape_and_range_and_moves_a_little(self):
        moved = wobble(self.images, torch.Generator().manual_seed(0))
        assert moved.shape == self.images.shape
        assert moved.dtype == torch.float32
        assert float(moved.min()) >= 0
        assert float(moved.max()) <= 255 + 1e-3
        assert not torch.equal(moved, self.images.float())
        assert torch.equal(moved, wobble(self.images, torch.Generator().manual_seed(0)))
        assert not torch.equal(moved, wobble(self.images, torch.Generator().manual_seed(1)))

    def test_moves_nothing_when_asked_for_nothing(self):
        still = wobble(self.images, torch.Generator(), degrees=0, stretch=0, shift=0)
        torch.testing.assert_close(still, self.images.float(), atol=1e-2, rtol=0)

    def test_keeps_a_digit_upright(self):
        bar = torch.zeros(20, 1, 8, 8, dtype=torch.uint8)
        bar[:, :, 1:3] = 255  # lit above the middle
        moved = wobble(bar, torch.Generator().manual_seed(0))
        assert (moved[:, :, :4].sum((1, 2, 3)) > 5 * moved[:, :, 4:].sum((1, 2, 3))).all()


class TestTrain:
    def test_same_seed_same_weights_other_seed_others(self, few):
        recipe = Recipe(epochs=2, augment=wobble, lr=0.05, batch=16)
        (first, one), (second, two) = trained(few, recipe), trained(few, recipe)
        assert one == two
        assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
        assert trained(few, replace(recipe, seed=1))[1] != one

    def test_dropout_is_drawn_by_the_seed_and_disturbs_nobody(self, few):
        recipe, states = Recipe(epochs=2, augment=untouched, lr=0.05, batch=16), []
        for _ in range(2):
            torch.manual_seed(1)
            model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 10))
            torch.rand(len(states))  # somebody else draws, too
            before = torch.get_rng_state()
            list(train(model, few, recipe, CARD.mean, CARD.std))
            assert torch.equal(torch.get_rng_state(), before)
            states.append(model[1].weight)
        assert torch.equal(*states)

    def test_held_out_images_choose_the_moment_that_is_kept(self, few):
        held = itf.load_data("digits", "train").subset(64, seed=1)
        torch.manual_seed(1)
        model = mlp((64, 16, 10))
        moments = list(
            train(
                model,
                few,
                Recipe(epochs=60, augment=untouched, lr=2.0, batch=16),
                CARD.mean,
                CARD.std,
                held=held,
                looks=30,
            )
        )
        assert len(moments) == 30
        best = min(moments, key=lambda moment: moment.held_loss)
        assert loop.judged(model, held, CARD.mean, CARD.std) == pytest.approx((best.held_loss, best.held))

    def test_stopped_at_any_moment_it_goes_on_as_if_it_had_not_been(self, few, tmp_path):
        recipe = Recipe(epochs=3, augment=wobble, lr=0.05, batch=20)
        whole, _ = trained(few, recipe)
        for stop in (1, 2, 5):
            torch.manual_seed(1)
            options = {"looks": 12, "keep": tmp_path / f"{stop}.run"}
            torch.manual_seed(1)
            first = train(mlp((64, 16, 10)), few, recipe, CARD.mean, CARD.std, **options)
            begun = [next(first) for _ in range(stop)]
            first.close()
            assert options["keep"].exists()
            model = mlp((64, 16, 10))  # other weights: the file has the right ones
            moments = list(train(model, few, recipe, CARD.mean, CARD.std, **options))
            assert moments[:stop] == begun
            assert len(moments) == 12
            assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), model.parameters(), strict=True))
            assert not options["keep"].exists()

    def test_asked_to_stop_while_it_looks_at_held_images_it_forgets_no_moment(self, few, tmp_path):
        recipe = Recipe(epochs=3, augment=untouched, batch=16)
        options = {"held": few, "keep": tmp_path / "held.run"}

        def start(**more) -> Generator[TrainingProgress, None, None]:
            torch.manual_seed(1)
            return train(mlp((64, 16, 10)), few, recipe, CARD.mean, CARD.std, **(options | more))

        whole = list(start(keep=None))
        asked = threading.Event()
        with stoppable(asked):
            begun = start(settle=lambda model: asked.set())
            next(begun)
            with pytest.raises(Cancelled):
                next(begun)
        assert list(start()) == whole

    @pytest.mark.parametrize("place", ["_advance", "_moment"])
    def test_broken_off_in_the_middle_of_a_step_it_keeps_no_state_that_it_could_not_go_on_from(
        self, few, tmp_path, monkeypatch, place
    ):
        keep, whole = tmp_path / "broken.run", getattr(loop._Run, place)
        run = train(mlp((64, 16, 10)), few, Recipe(3, untouched, batch=16), CARD.mean, CARD.std, looks=12, keep=keep)
        next(run)

        def broken(run, *given):
            whole(run, *given)
            raise KeyboardInterrupt

        monkeypatch.setattr(loop._Run, place, broken)
        with pytest.raises(KeyboardInterrupt):
            next(run)
        assert not keep.exists()

    def test_the_state_of_another_run_is_refused(self, few, tmp_path):
        keep = tmp_path / "state.run"
        recipe = Recipe(epochs=3, augment=untouched, batch=16)
        first = train(mlp((64, 16, 10)), few, recipe, CARD.mean, CARD.std, keep=keep)
        next(first)
        first.close()
        other = train(mlp((64, 16, 10)), few, replace(recipe, lr=0.01), CARD.mean, CARD.std, keep=keep)
        with pytest.raises(itf.IntrafusionError, match="is the state of another run; remove it"):
            next(other)
        keep.write_bytes(b"nothing")
        with pytest.raises(itf.IntrafusionError, match=r"cannot read .*state.run"):
            next(train(mlp((64, 16, 10)), few, recipe, CARD.mean, CARD.std, keep=keep))

    def test_a_loss_that_is_no_number_is_one_line(self, few):
        with pytest.raises(itf.IntrafusionError, match=r"NaN or infinite after .* choose a learning rate below 1e"):
            trained(few, Recipe(epochs=9, augment=untouched, lr=1e9, batch=16))

    def test_a_full_disk_does_not_hide_that_somebody_stopped(self, few, tmp_path, caplog):
        (tmp_path / "file").write_text("")
        keep = tmp_path / "file" / "below.run"
        first = train(mlp((64, 16, 10)), few, Recipe(epochs=3, augment=untouched), CARD.mean, CARD.std, keep=keep)
        next(first)
        first.close()
        assert "cannot write" in caplog.text

    @pytest.mark.gpu
    def test_on_a_gpu_in_bf16(self, few):
        torch.manual_seed(1)
        model = mlp((64, 16, 10)).cuda()
        *_, last = train(model, few.to("cuda"), Recipe(epochs=30, augment=untouched, lr=0.05, batch=16), CARD.mean, CARD.std)
        assert last.accuracy > 0.8

    def test_loss_falls_and_epochs_report_what_happened(self, few):
        model, epochs = trained(few, Recipe(epochs=30, augment=untouched, lr=0.05, batch=16, weight_decay=0))
        assert [epoch.epoch for epoch in epochs] == list(range(1, 31))
        assert epochs[-1].loss < 0.5 * epochs[0].loss
        assert epochs[-1].accuracy > 0.9
        assert not model.training
        assert not any(parameter.requires_grad for parameter in model.parameters())

    def test_first_epoch_of_one_batch_reports_the_loss_at_the_start(self, few):
        torch.manual_seed(1)
        logits = mlp((64, 16, 10))(normalise(few.images, CARD.mean, CARD.std))
        expected = torch.nn.functional.cross_entropy(logits, few.labels)
        _, (epoch,) = trained(few, Recipe(epochs=1, augment=untouched, batch=64))
        assert epoch.loss == pytest.approx(float(expected.detach()), rel=1e-4)
        assert epoch.accuracy == float((logits.argmax(1) == few.labels).double().mean())

    def test_caller_may_stop_between_epochs_and_finds_eval_mode(self, few):
        model = mlp((64, 16, 10))
        for epoch in train(model, few, Recipe(epochs=50, augment=untouched), CARD.mean, CARD.std):
            assert not model.training
            if epoch.epoch == 2:
                break
        assert epoch.epoch == 2

    def test_decay_spares_biases_and_norms(self, few, monkeypatch):
        groups = []
        make_sgd = torch.optim.SGD.__init__

        def spy(self, params, **options):
            groups.extend(params)
            make_sgd(self, params, **options)

        monkeypatch.setattr(torch.optim.SGD, "__init__", spy)
        trained(few, Recipe(epochs=1, augment=untouched, weight_decay=0.01))
        assert {(group["weight_decay"], p.ndim) for group in groups for p in group["params"]} == {(0.01, 2), (0.0, 1)}


class TestMake:
    def test_writes_weights_and_card_that_load_again(self, few, tmp_path):
        test, seen = itf.load_data("digits"), []
        card = make("digits-mlp", few, test, "the command", tmp_path / "new", seen.append, epochs=1, batch=16, seed=7)
        assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
            "digits-mlp.json",
            "digits-mlp.safetensors",
        ]
        assert [moment.epoch for moment in seen] == [1]
        model = itf.load_model("digits-mlp", weights=tmp_path / "new" / "digits-mlp.safetensors")
        measured = itf.evaluate(model, test, limit=None)
        assert measured.accuracy == card.accuracy == model.card.accuracy
        assert measured.interval == pytest.approx(card.details["interval"])
        assert card.details["command"] == "the command"
        assert card.details["seed"] == 7
        assert card.details["recipe"] == json.loads(json.dumps(card.details["recipe"]))
        assert (card.details["recipe"]["epochs"], card.details["recipe"]["augment"]) == (1, "wobble")
        assert card.details["versions"]["torch"] == torch.__version__
        assert card.details["test_images"] == 597

    def test_recipe_and_seed_decide_the_weights(self, few, tmp_path):
        files = []
        for number, seed in enumerate((3, 3, 4)):
            make("digits-mlp", few, few, "", tmp_path / str(number), epochs=1, seed=seed)
            files.append((tmp_path / str(number) / "digits-mlp.safetensors").read_bytes())
        assert files[0] == files[1] != files[2]

    @pytest.mark.parametrize("name", RECIPES)
    def test_every_recipe_is_for_a_model_of_the_zoo(self, name):
        assert name in ARCHITECTURES
        assert RECIPES[name].epochs > 0
        assert RECIPES[name].augment is (wobble if name.startswith("digits") else shift_and_flip)  # no mirrored digits

    def test_model_without_a_recipe_is_one_line(self, few, tmp_path):
        with pytest.raises(itf.IntrafusionError, match=r"no recipe for 'cifar10-resnet56'.*digits-mlp") as caught:
            make("cifar10-resnet56", few, few, "", tmp_path / "out")
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()

    OUT = {  # noqa: RUF012
        "a file": ("file", lambda path: path.touch()),
        "below a file": ("file/deeper", lambda path: path.parent.touch()),
        "a folder where the weights belong": ("", lambda path: (path / "digits-mlp.safetensors").mkdir()),
        "a folder where the card belongs": ("", lambda path: (path / "digits-mlp.json").mkdir()),
    }

    @pytest.mark.parametrize(("out", "occupy"), OUT.values(), ids=OUT)
    def test_unwritable_out_is_one_line(self, few, tmp_path, out, occupy):
        occupy(tmp_path / out)
        with pytest.raises(itf.IntrafusionError, match="cannot write digits-mlp") as caught:
            make("digits-mlp", few, few, "", tmp_path / out, epochs=1)
        assert "\n" not in str(caught.value)

    def test_out_that_is_a_file_is_refused_before_the_training(self, few, tmp_path):
        seen: list[TrainingProgress] = []
        (tmp_path / "file").touch()
        with pytest.raises(itf.IntrafusionError):
            make("digits-mlp", few, few, "", tmp_path / "file", seen.append, epochs=1)
        assert seen == []

    @pytest.mark.parametrize("changes", [{"epochs": 0}, {"epochs": -1}, {"seed": 2**64}], ids=str)
    def test_senseless_settings_are_one_line_and_write_nothing(self, few, tmp_path, changes):
        with pytest.raises(itf.IntrafusionError) as caught:
            make("digits-mlp", few, few, "", tmp_path, **({"epochs": 1} | changes))
        assert "\n" not in str(caught.value)
        assert list(tmp_path.iterdir()) == []
