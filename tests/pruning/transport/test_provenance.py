import math

import pytest
import torch

import intrafusion as itf
from intrafusion.pruning.groups.group import coupling
from intrafusion.pruning.transport.planning import TransportPlan
from intrafusion.pruning.transport.provenance import moves, story


@pytest.fixture(scope="module")
def told():
    model = itf.load_model("digits-resnet")
    group = next(g for g in itf.find_groups(model, model.card.example()) if g.name == "layer2.0.conv1")
    scores = itf.score(model, group)
    plan = itf.plan(model, group, scores, sparsity=0.3)
    return plan, scores, [story(plan, scores, channel) for channel in range(group.size)]


def test_every_channel_is_kept_or_merged_away_as_the_plan_says(told):
    plan, _, stories = told
    assert [s.channel for s in stories if s.kept] == plan.kept.tolist()


def test_ranks_are_a_ranking_of_the_scores(told):
    _, scores, stories = told
    assert sorted(s.rank for s in stories) == list(range(1, len(stories) + 1))
    assert stories[int(scores.argmax())].rank == 1


def test_what_one_channel_gives_another_absorbs(told):
    _, _, stories = told
    given = {(s.channel, target): weight for s in stories if not s.kept for target, weight in s.goes_to}
    absorbed = {(source, s.channel): weight for s in stories for source, weight in s.absorbs}
    assert given == absorbed
    assert all(sum(weight for _, weight in s.goes_to) == pytest.approx(1) for s in stories)


def test_the_sentence_tells_fusion_from_dropping(told):
    _, _, stories = told
    gone = next(s for s in stories if not s.kept)
    heir = next(s for s in stories if s.absorbs)
    assert f"merged into channel{'s' if len(gone.goes_to) > 1 else ''} {gone.goes_to[0][0]}" in gone.sentence()
    assert "It is removed." in gone.sentence("drop")
    assert "absorbs" in heir.sentence()
    assert "kept unchanged" in heir.sentence("drop")


def test_weights_are_the_channels_row_or_column_of_the_matrix(told):
    plan, _, stories = told
    for s in stories:
        rows = (plan.kept == s.channel).nonzero()[:, 0]
        expected = plan.matrix[rows[0]] if s.kept else plan.matrix[:, s.channel]
        assert sorted(weight for _, weight in s.weights) == pytest.approx(sorted(expected[expected > 0].tolist()))
    assert all(s.weights[0] == (s.channel, 1.0) for s in stories if s.kept)


def test_moves_are_the_plans_entries(told):
    plan, _, _ = told
    rows = moves(plan)
    assert len(rows) == int((plan.coupling > 0).sum())
    assert sum(row["mass"] for row in rows) == pytest.approx(1)
    assert sum(row["mass"] * row["cost"] for row in rows) == pytest.approx(plan.total_cost)


SMALL = TransportPlan(  # of channels 0, 1, 2 only channel 0 stays: with weight 0.6, and half of channel 1; 2 goes nowhere
    torch.tensor([[0.2], [1 / 6], [0.0]]).double(), torch.tensor([[0.6, 0.5, 0.0]]).double(), torch.tensor([0]),
    torch.tensor([[0.0], [1.0], [2.0]]).double(), torch.full((3,), 1 / 3).double(), torch.ones(1).double(), False,
)  # fmt: skip


@pytest.mark.parametrize(("channel", "says"), [
    (0, "It is kept with a weight of 0.60, and absorbs channel 1 (weight 0.50)."),
    (1, "It is merged into channel 0 (weight 0.50)."),
    (2, "It is removed, and this plan discards its mass."),
])  # fmt: skip
def test_plans_that_split_or_leave_mass_are_told_as_they_are(channel, says):
    assert story(SMALL, torch.tensor([3.0, 2.0, 1.0]), channel).sentence().endswith(says)


def test_the_numbers_of_a_plan_by_hand():
    assert SMALL.total_cost == pytest.approx(1 / 6)
    assert SMALL.share_moved == pytest.approx((1 / 6) / (0.2 + 1 / 6))
    assert SMALL.entropy == pytest.approx(-(0.2 * math.log(0.2) + math.log(1 / 6) / 6))
    assert SMALL.stays.tolist() == pytest.approx([0.2])
    torch.testing.assert_close(SMALL.spread()[0], SMALL.matrix[0])
    assert not SMALL.spread()[1:].any()


@pytest.mark.parametrize(
    ("model", "group", "says"),
    [
        ("digits-resnet", "conv1", "outputs are summed"),
        ("digits-vgg", "features.17", "4 inputs of classifier.0 after flattening"),
        ("cifar10-resnet20", "conv1", "zero-padded shortcuts"),
        ("digits-mlp", "1", "produced by 1; read by 3"),
    ],
)
def test_the_coupling_is_told_in_words(model, group, says):
    network = itf.load_model(model, weights="random")
    found = {g.name: g for g in itf.find_groups(network, network.card.example())}
    assert says in coupling(found[group])
