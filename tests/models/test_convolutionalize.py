"""`convolutionalize`: a classifier of images over all places of larger ones."""

import pytest
import torch
from torch import nn
from torchvision import models

from pyseg.models import SemanticModel, convolutionalize


def randomised(make, **options):
    """A classifier whose outputs depend on its inputs, in evaluation mode too."""
    torch.manual_seed(0)
    return make(weights=None, num_classes=7, **options).eval()


@pytest.mark.parametrize(
    "make, side",
    [
        (models.alexnet, 224),
        (models.vgg16, 224),
        (models.resnet18, 224),
        (models.densenet121, 64),
        (models.mobilenet_v2, 96),
        (models.mobilenet_v3_small, 96),
        (models.convnext_tiny, 64),
        (models.mnasnet0_5, 96),
        (models.shufflenet_v2_x0_5, 96),
        (models.efficientnet_b0, 64),
    ],
)
@torch.no_grad()
def test_outputs_are_equal(make, side):
    classifier = randomised(make)
    before = {key: value.clone() for key, value in classifier.state_dict().items()}
    dense = convolutionalize(classifier, size=side)
    x = torch.randn(1, 3, side, side)
    wanted, got = classifier(x), dense(x)
    assert got.shape == (1, 7, 1, 1)
    torch.testing.assert_close(got[..., 0, 0], wanted, atol=1e-5, rtol=1e-4)
    larger = dense(torch.randn(1, 3, side + 32, side + 64))
    assert larger.shape == (1, 7, 2, 3) and larger.std() > 0
    assert before.keys() == classifier.state_dict().keys()
    assert all(torch.equal(v, before[k]) for k, v in classifier.state_dict().items())


@torch.no_grad()
def test_a_map_is_the_classifier_moved_over_the_image():
    """Without padding in the way: a small network whose windows are exact."""
    torch.manual_seed(0)

    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2))
            self.avgpool = nn.AdaptiveAvgPool2d(1)
            self.fc = nn.Linear(4, 5)

        def forward(self, x):
            return self.fc(self.avgpool(self.features(x)).flatten(1))

    classifier = Classifier().eval()
    dense = convolutionalize(classifier, size=10)
    image = torch.randn(1, 3, 14, 18)
    scores = dense(image)
    assert scores.shape == (1, 5, 3, 5)
    for i in range(3):
        for j in range(5):
            window = image[..., 2 * i : 2 * i + 10, 2 * j : 2 * j + 10]
            torch.testing.assert_close(scores[..., i, j], classifier(window))


def test_it_makes_a_model():
    dense = convolutionalize(randomised(models.resnet18), size=64)
    model = SemanticModel(dense, [f"class {i}" for i in range(7)])
    result = model.predict([torch.zeros(3, 96, 128, dtype=torch.uint8)])[0]
    assert result.logits.shape == (7, 2, 3) and result.labels.shape == (96, 128)


@pytest.mark.parametrize(
    "make, reason",
    [
        (lambda: models.squeezenet1_0(num_classes=3), "no fully connected layer"),
        (lambda: models.vgg11(num_classes=3, init_weights=False), r"pools \[2, 2\].* to \[7, 7\]"),
        (lambda: nn.Linear(64, 3), "no fully connected layer"),
        (lambda: nn.Conv2d(4, 3, 1), "cannot be traced"),
    ],
)
def test_what_cannot_become_one_says_why(make, reason):
    with pytest.raises(ValueError, match=f"(?s)classifier: .*{reason}.*vgg16"):
        convolutionalize(make(), size=64)
