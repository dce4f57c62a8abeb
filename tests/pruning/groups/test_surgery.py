import pytest
import torch

from intrafusion.pruning.groups.surgery import pad
from intrafusion.pruning.pruner import cut


@pytest.mark.parametrize("merge", ["drop", "fusion"])
def test_padded_back_it_computes_the_same(network, merge):
    made = cut(network.model, network.groups, 0.5, merge=merge)
    if not made.merged:
        pytest.skip("groups too small to lose a channel")
    dense = made.dense()
    padded = pad(made.small, dense, {one.group: one.kept for one in made.merged})
    assert {n: p.shape for n, p in padded.named_parameters()} == {n: p.shape for n, p in dense.named_parameters()}
    if network.name == "plain-norm":
        return  # its norms shift channels that are zero
    torch.testing.assert_close(padded(network.images), made.small(network.images), rtol=1e-4, atol=1e-4)
