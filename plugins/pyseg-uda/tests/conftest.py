"""A few drawn scenes in two lights, and a small mix transformer."""

import pytest
import torch
from torch import nn

from pyseg.models import SemanticModel
from pyseg.models.segformer import SegFormer
from pyseg.types import Sample

CLASSES = ("road", "sky", "car", "pole")


class Scenes:
    """A sky above a road with a car and a pole, by day or, darker and bluer, at dusk."""

    classes, palette = CLASSES, ((128, 64, 128), (70, 130, 180), (200, 30, 30), (60, 60, 60))

    def __init__(self, count=4, size=(48, 64), dusk=False, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.samples = []
        for index in range(count):
            labels = torch.zeros(size, dtype=torch.uint8)
            labels[: size[0] // 2] = 1
            x, y = (int(torch.randint(n, (), generator=generator)) for n in (40, 8))
            labels[22 + y : 36 + y, x : x + 18] = 2
            labels[8:30, 60:62] = 3
            image = torch.tensor(self.palette)[labels.long()].permute(2, 0, 1).float()
            image = image + 20 * torch.randn(3, *size, generator=generator)
            if dusk:
                image = image * torch.tensor([0.3, 0.35, 0.5]).view(3, 1, 1)
            labels[:, :2] = 255
            image = image.clamp(0, 255).to(torch.uint8)
            self.samples.append(Sample(f"scene{index}", image, labels))

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]


class Small(nn.Module):
    """Normalisation over batches, dropout, an auxiliary head and a named trunk."""

    def __init__(self, classes=4):
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, 2, 1)
        )
        self.head = nn.Sequential(nn.ReLU(), nn.Dropout2d(0.1), nn.Conv2d(16, classes, 1))
        self.auxiliary = nn.Conv2d(16, classes, 1)

    def forward(self, x):
        x = self.trunk(x)
        outputs = {"out": self.head(x)}
        return {**outputs, "aux": self.auxiliary(x)} if self.training else outputs


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def scenes():
    return Scenes


@pytest.fixture
def convolutional():
    """``convolutional(seed)``: a model of `Small`."""

    def make(seed=0):
        torch.manual_seed(seed)
        model = SemanticModel(Small(), CLASSES)
        model.trunk, model.heads = "trunk", ("head.2",)
        return model

    return make


@pytest.fixture
def transformer():
    """``transformer(seed)``: a model of a mix transformer with one or two blocks a stage."""

    def make(seed=0, depths=(1, 2, 1, 1), head="segformer"):
        torch.manual_seed(seed)
        widths = (8, 16, 20, 32)
        network = SegFormer(len(CLASSES), widths=widths, depths=depths, width=16, head=head)
        with torch.no_grad():  # else attention is next to even everywhere
            for name, value in network.named_parameters():
                if ".attn." in name and "norm" not in name:
                    value.normal_(0, 0.5)
        model = SemanticModel(network, CLASSES)
        model.trunk, model.heads = "trunk", ("head.score",)
        return model

    return make
