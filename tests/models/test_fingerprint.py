import copy
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

import intrafusion as itf
from intrafusion.models.fingerprint import of_images, of_model
from intrafusion.studies.session import open_session


@pytest.fixture
def model() -> nn.Module:
    return itf.load_model("digits-mlp")


@pytest.fixture(scope="module")
def data() -> itf.ImageData:
    return itf.load_data("digits").subset(20)


def changed(what: str, model: nn.Module) -> nn.Module:
    """The network, other in one respect."""
    if what == "one weight":
        model[1].weight.data[3, 5] += 1e-6
    elif what == "the sign of a zero":
        model[1].bias.data[0] = 0.0
        before = of_model(model)
        model[1].bias.data[0] = -0.0
        assert of_model(model) != before
    elif what == "weights in other places":
        model[1].weight.data = model[1].weight.data.flip(0)
    elif what == "the mean of its input":
        model.card = replace(model.card, mean=(0.1,))
    elif what == "the spread of its input":
        model.card = replace(model.card, std=(0.1,))
    elif what == "a layer without numbers":
        model[2] = nn.GELU()
    elif what == "numbers of another kind":
        model.double()
    return model


KINDS = ["one weight", "the sign of a zero", "weights in other places", "the mean of its input",
         "the spread of its input", "a layer without numbers", "numbers of another kind"]  # fmt: skip


@pytest.mark.parametrize("what", KINDS)
def test_a_network_that_may_answer_otherwise_has_another(model, what):
    before = of_model(model)
    assert of_model(changed(what, copy.deepcopy(model))) != before
    assert of_model(model) == before


def test_norms_count_with_what_they_have_seen():
    model = itf.load_model("digits-resnet")
    before = of_model(model)
    model.bn1.running_var[0] *= 2
    assert of_model(model) != before


def test_numbers_that_belong_to_no_layer_count_with_name_and_shape():
    def made(name: str, shape: tuple[int, ...]) -> str:
        model = nn.Sequential()
        model.card = itf.load_model("digits-mlp").card
        model.register_parameter(name, nn.Parameter(torch.arange(6.0).reshape(shape)))
        return of_model(model)

    assert len({made("a", (2, 3)), made("a", (3, 2)), made("b", (2, 3))}) == 3


def test_wherever_the_weights_lie_they_are_the_same(model, tmp_path):
    torch.save(model.state_dict(), tmp_path / "moved.pt")
    assert of_model(itf.load_model("digits-mlp", weights=tmp_path / "moved.pt")) == of_model(model)
    model.card = replace(model.card, name="another", source="elsewhere", accuracy=0.5)
    assert of_model(model) == of_model(itf.load_model("digits-mlp"))
    assert of_model(model.to(memory_format=torch.channels_last)) == of_model(model)


def test_another_process_says_the_same(model, data):
    script = (
        "import intrafusion as itf; from intrafusion.models.fingerprint import *;"
        "print(of_model(itf.load_model('digits-mlp')), of_images(itf.load_data('digits').subset(20)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split() == [of_model(model), of_images(data)]


class TestImages:
    def test_pixels_labels_and_their_order_count(self, data):
        pixel = data.images.clone()
        pixel[3, 0, 2, 2] ^= 1
        label = data.labels.clone()
        label[7] = 1 - label[7]
        others = [
            replace(data, images=pixel),
            replace(data, labels=label),
            replace(data, images=data.images.flip(0), labels=data.labels.flip(0)),
            replace(data, images=data.images[:-1], labels=data.labels[:-1]),
            replace(data, images=data.images.transpose(2, 3)),
            replace(data, images=data.images.reshape(20, 1, 4, 16)),
        ]
        assert len({of_images(other) for other in [data, *others]}) == len(others) + 1

    def test_names_and_memory_do_not(self, data):
        other = replace(data, name="x", split="y", images=data.images.contiguous(memory_format=torch.channels_last))
        assert of_images(other) == of_images(data)

    def test_which_choice_is_first_counts(self, data):
        other = itf.load_data("digits").subset(20, seed=1)
        assert len({of_images(data), of_images(data, other), of_images(other, data), of_images(other)}) == 4


def test_a_benchs_images_are_those_that_the_spec_looks_at():
    session = open_session(itf.PruneSpec(model="digits-mlp"))
    base = itf.PruneSpec(model="digits-mlp", limit=50)
    plain = session.fingerprints(base)
    same = [base.but(sparsity=0.7), base.but(calibration=7), base.but(merge="drop")]
    assert {session.fingerprints(spec) for spec in same} == {plain}
    sees = base.but(criterion="taylor")
    others = [base.but(limit=51), base.but(seed=1), sees, sees.but(calibration=7), sees.but(cost="activations")]
    found = [session.fingerprints(spec)[1] for spec in others]
    assert found[4] == found[2]
    assert len({plain[1], *found}) == 5
    assert {session.fingerprints(spec)[0] for spec in others} == {of_model(session.model)}
