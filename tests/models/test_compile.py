"""torch.compile of the networks, without a break in the graph and without a compiler of C++."""

import pytest
import torch
import torch._dynamo

import pyseg
from pyseg.models.fcn import FCNVGG, FCNAlexNet
from pyseg.models.unet import UNet

NETWORKS = {
    "fcn8s": lambda: FCNVGG(3, 8, widths=(4, 4, 6, 6, 8), hidden=8),
    "fcn16s_modern": lambda: FCNVGG(3, 16, widths=(4, 4, 6, 6, 8), hidden=8, style="modern"),
    "fcn_alexnet": lambda: FCNAlexNet(3, hidden=8),
    "unet": lambda: UNet(2, width=4),
    "unet_valid": lambda: UNet(2, width=4, padded=False, tile=36),
    "fcn_resnet18": lambda: pyseg.models.create("fcn_resnet18", weights=None).network,
    "linknet": lambda: pyseg.models.create("linknet", weights=None).network,
    "unet_resnet34": lambda: pyseg.models.create("unet_resnet34", weights=None).network,
    "unet_vgg16": lambda: pyseg.models.create("unet_vgg16", weights=None).network,
    "segnet": lambda: pyseg.models.create("segnet", weights=None).network,
}
SLOW = {"linknet", "unet_resnet34", "unet_vgg16", "segnet"}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in SLOW else ()) for n in NETWORKS]
)
@torch.no_grad()
def test_compiled_it_gives_the_same(name):
    torch._dynamo.reset()
    torch.manual_seed(0)
    network = NETWORKS[name]().eval()
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter)
    x = torch.randn(2, 3, 45, 60)
    wanted = network(x)
    found = torch.compile(network, backend="aot_eager", fullgraph=True)(x)
    one, other = (made["out"] if isinstance(made, dict) else made for made in (wanted, found))
    torch.testing.assert_close(other, one)


@torch.no_grad()
def test_bayesian_segnet_compiles_with_breaks():
    """Its random generators are no part of a graph."""
    torch._dynamo.reset()
    network = pyseg.models.create("bayesian_segnet", weights=None, samples=2).network
    x = torch.randn(1, 3, 33, 40)
    wanted = network(x)
    found = torch.compile(network, backend="eager")(x)
    torch.testing.assert_close(found["out"], wanted["out"])
    torch.testing.assert_close(found["uncertainty"], wanted["uncertainty"])
