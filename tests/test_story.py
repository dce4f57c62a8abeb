import pytest

import intrafusion as itf
from intrafusion.channels import coupling
from intrafusion.story import story


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
    assert "nothing of it remains" in gone.sentence("drop")
    assert "absorbs" in heir.sentence()
    assert "kept as it is" in heir.sentence("drop")


@pytest.mark.parametrize(
    ("model", "group", "says"),
    [
        ("digits-resnet", "conv1", "outputs are summed"),
        ("digits-vgg", "features.17", "4 inputs of classifier.0 after the flatten"),
        ("cifar10-resnet20", "conv1", "zero-padded shortcuts"),
        ("digits-mlp", "1", "written by 1; read by 3"),
    ],
)
def test_the_coupling_is_told_in_words(model, group, says):
    network = itf.load_model(model, weights="random")
    found = {g.name: g for g in itf.find_groups(network, network.card.example())}
    assert says in coupling(found[group])
