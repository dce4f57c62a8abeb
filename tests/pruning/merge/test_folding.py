"""Folding: duplicates are folded exactly, and what is left agrees with the paper's formulas written out."""

import copy

import pytest
import torch
from torch import nn

import intrafusion as itf
from intrafusion.pruning.groups.bn_folding import fold
from intrafusion.pruning.groups.norms import norm_of
from intrafusion.pruning.merge.folding import FOLD_NORMS, _gain, clusters
from intrafusion.pruning.pruner import prune_groups

FOLDS = ("fold", "fold-naive")
KINDS = {
    "norm": lambda: [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()],
    "bare": lambda: [nn.Conv2d(3, 8, 3), nn.ReLU()],
    "depthwise": lambda: [
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8), nn.ReLU()
    ],
}  # fmt: skip
EXAMPLE = torch.zeros(1, 3, 8, 8)


def doubled(kind: str, random_weights) -> nn.Sequential:
    """Eight channels that are four, twice, but for what reads them."""
    torch.manual_seed(0)
    model = random_weights(
        nn.Sequential(*KINDS[kind](), nn.Conv2d(8, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5))
    )
    for module in model:
        if isinstance(module, nn.BatchNorm2d) or (isinstance(module, nn.Conv2d) and module.out_channels == 8):
            for tensor in [*module.parameters(), *module.buffers()]:
                if tensor.ndim:
                    tensor.data[4:] = tensor.data[:4]
        elif isinstance(module, nn.Conv2d):
            module.weight.data[:, 4:] = module.weight.data[:, :4]
    return model


@pytest.mark.parametrize("merge", FOLDS)
@pytest.mark.parametrize("kind", KINDS)
def test_duplicates_fold_exactly(random_weights, same_logits, kind, merge):
    model, images = doubled(kind, random_weights), torch.randn(6, 3, 8, 8)
    small = itf.prune(model, EXAMPLE, 0.5, merge=merge, groups=["0"])
    assert small[0].out_channels == 4
    same_logits(small(images), model(images))


@pytest.mark.parametrize("fold_norms", FOLD_NORMS)
@pytest.mark.parametrize("merge", FOLDS)
def test_every_kind_of_coupling(network, merge, fold_norms):
    small = prune_groups(network.model, network.groups, 0.5, merge=merge, fold_norms=fold_norms)
    assert torch.isfinite(small(network.images)).all()
    whole = prune_groups(network.model, network.groups, 0.0, merge=merge, fold_norms=fold_norms)
    torch.testing.assert_close(whole(network.images), network.logits, rtol=1e-3, atol=1e-3)


def written_out(model: nn.Sequential, members: torch.Tensor, repair: bool) -> nn.Sequential:
    """Folding conv, norm, ReLU, conv by the paper's formulas, the norm being left as it is."""
    mean, norm, new = (members / members.sum(1, keepdim=True)).float(), model[1], copy.deepcopy(model)
    std = (norm.running_var + norm.eps).sqrt()
    weight, gamma, beta = model[0].weight.flatten(1), mean @ norm.weight, mean @ norm.bias
    bias = model[0].bias
    if repair:
        unit, shift = weight / std[:, None], (bias - norm.running_mean) / std
        sizes = members.sum(1)
        cosines = torch.nn.functional.cosine_similarity(unit[:, None].double(), unit[None].double(), dim=2)
        gain = torch.ones(len(members), dtype=torch.float64)
        for row, cluster in enumerate(members):
            inside = cluster.bool()
            n = float(sizes[row])
            if n > 1:
                E = float((cosines[inside][:, inside].sum() - n) / (n * n - n))
                gain[row] = n / (n + (n * n - n) * E) ** 0.5
        weight, bias, gamma = mean @ unit, mean @ shift, gamma * gain.float()
        centre, variance = torch.zeros(len(members)), torch.ones(len(members)) - norm.eps
    else:
        weight, bias = mean @ weight, mean @ bias
        centre, variance = mean @ norm.running_mean, mean @ std.square() - norm.eps
    new[0] = nn.Conv2d(3, len(members), 3)
    new[0].weight.data, new[0].bias.data = weight.reshape(-1, 3, 3, 3), bias
    new[1] = nn.BatchNorm2d(len(members), eps=norm.eps).eval()
    new[1].weight.data, new[1].bias.data, new[1].running_mean, new[1].running_var = gamma, beta, centre, variance
    new[3] = nn.Conv2d(len(members), 6, 3)
    new[3].weight.data = torch.einsum("kn,onhw->okhw", members.float(), model[3].weight)
    new[3].bias.data = model[3].bias.data
    return new.requires_grad_(False)


@pytest.mark.parametrize("merge", FOLDS)
def test_is_the_papers_formulas(random_weights, same_logits, merge):
    torch.manual_seed(1)
    model = random_weights(
        nn.Sequential(*KINDS["norm"](), nn.Conv2d(8, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5))
    )
    groups = itf.find_groups(model, EXAMPLE)
    dense = fold(model, EXAMPLE)
    plan = itf.plan(dense, groups[0], itf.score(dense, groups[0]), 0.6)
    members = clusters(dense, groups[0], plan)
    assert torch.equal(members.sum(0), torch.ones(8, dtype=torch.float64))
    assert (members.sum(1) > 0).all()
    small = itf.prune(model, EXAMPLE, 0.6, merge=merge, groups=["0"])
    images = torch.randn(6, 3, 8, 8)
    same_logits(small(images), written_out(model, members, merge == "fold")(images))


def test_norms_enter_the_clusters_as_columns_or_not_at_all(random_weights):
    """Filters in two pairs of likes, their scales in two others: (0, 1), (2, 3) by weights alone, (0, 2), (1, 3) by scales."""
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    model = random_weights(nn.Sequential(*layers))
    for part in (model[0].weight.data, model[3].weight.data.transpose(0, 1)):
        part[1], part[2], part[3] = part[0] + 1e-3, -part[0], -part[0] + 1e-3
    model[1].running_var.fill_(1.0)
    model[1].weight.data = torch.tensor([9.0, 90, 9, 90])
    groups, dense = itf.find_groups(model, EXAMPLE), fold(model, EXAMPLE)
    plan = itf.plan(dense, groups[0], itf.score(dense, groups[0]), 0.5)
    found = {way: clusters(dense, groups[0], plan, way) for way in FOLD_NORMS}
    together = {way: {tuple(row.nonzero()[:, 0].tolist()) for row in rows} for way, rows in found.items()}
    assert together == {"none": {(0, 1), (2, 3)}, "columns": {(0, 2), (1, 3)}}
    assert torch.equal(clusters(dense, groups[0], plan), found["none"])
    for way in FOLD_NORMS:
        small = itf.prune(model, EXAMPLE, 0.5, merge="fold-naive", groups=["0"], fold_norms=way)
        merged = copy.deepcopy(dense)
        itf.registry("merge")["fold-naive"](merged, groups[0], plan, fold_norms=way)
        torch.testing.assert_close(small[0].weight, merged[0].weight[plan.kept])
    with pytest.raises(itf.IntrafusionError, match="unknown fold_norms 'diag'"):
        itf.prune(model, EXAMPLE, 0.5, merge="fold", groups=["0"], fold_norms="diag")


def test_what_was_folded_in_is_remembered(random_weights):
    model = random_weights(nn.Sequential(*KINDS["norm"](), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)))
    norm = norm_of(fold(model, EXAMPLE)[0])
    torch.testing.assert_close(norm.gamma.float(), model[1].weight.data)
    torch.testing.assert_close(norm.std.float(), (model[1].running_var + model[1].eps).sqrt())
    assert norm_of(model[0]) is None


def test_the_gain_of_independent_and_of_equal_rows():
    members = torch.tensor([[1.0, 1, 0, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]], dtype=torch.float64)
    rows = torch.tensor([[1.0, 0], [0, 1], [2, 1], [4, 2], [5, 5]], dtype=torch.float64)
    torch.testing.assert_close(_gain(rows, members), torch.tensor([2**0.5, 1, 1], dtype=torch.float64))


@pytest.mark.parametrize(("sparsity", "prototype"), [(0.3, 0.463), (0.5, 0.19)])
def test_resnet20_naive(reference, sparsity, prototype):
    model = itf.load_model("cifar10-resnet20", weights=reference("weights/cifar10_resnet20.th"))
    test = itf.load_data("cifar10", path=reference("data/cifar10_test.npz"))
    inner = [g.name for g in itf.find_groups(model, model.card.example()) if g.reason is None and g.name != "conv1"]
    small = itf.prune(model, model.card.example(), sparsity, merge="fold-naive", groups=inner)
    assert abs(itf.evaluate(small, test, limit=3000).accuracy - prototype) < 0.12
