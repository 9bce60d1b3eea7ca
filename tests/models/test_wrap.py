"""`wrap` and `compose`: pipelines from objects."""

import pytest
import torch
from torch import nn

import pyseg
from pyseg import testing
from pyseg.errors import PluginError, SpecError, UnknownName
from pyseg.models import SemanticModel, wrap
from pyseg.refiners import CRF


class Colour(nn.Module):
    """Class 1 where the red channel, as it comes in, is above 0."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        red = x[:, :1] * self.gain
        return {"out": torch.cat([-red, red], 1)}


IMAGE = torch.zeros(3, 20, 30, dtype=torch.uint8)
IMAGE[0, :, 15:] = 255


def test_wrapped_it_is_a_stage():
    network = Colour().train()
    model = wrap(network, classes=("dark", "red"), mean=(0.5,) * 3, std=(0.25,) * 3)
    assert not network.training and model.classes == ("dark", "red")
    result = pyseg.build(model)(IMAGE)
    torch.testing.assert_close(result.logits[1, 0], torch.tensor([-4.0] * 15 + [4.0] * 15))
    assert wrap(network, classes=2).classes == ("class 0", "class 1")
    assert isinstance(model, SemanticModel)


def coloured(*, num_classes: int | None = None):
    """A wrapped network of the user's."""
    torch.manual_seed(0)
    count = num_classes or 2
    if count < 1 or num_classes == 0:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    return wrap(nn.Conv2d(3, count, 3, padding=1), classes=count)


def test_it_conforms():
    testing.check_model(coloured)


@pytest.mark.parametrize(
    "network, options, error, words",
    [
        (lambda x: x, {"classes": 2}, TypeError, "network must be a torch.nn.Module.*got function"),
        (Colour, {"classes": 2}, TypeError, "got Colour"),
        (Colour(), {"classes": "road"}, ValueError, "classes must be a sequence"),
        (Colour(), {"classes": ()}, ValueError, "at least one class"),
        (Colour(), {"classes": 0}, ValueError, "at least 1, got 0"),
        (Colour(), {"classes": ("a", "a")}, ValueError, "a twice"),
        (Colour(), {"classes": 2, "mean": (0.5,)}, ValueError, "mean must be 3 numbers"),
        (Colour(), {"classes": 2, "std": (1, 0, 1)}, ValueError, "std must be above 0"),
        (Colour(), {"classes": 2, "palette": [(0, 0, 0)]}, ValueError, "palette must have"),
    ],
)
def test_what_cannot_be_wrapped(network, options, error, words):
    with pytest.raises(error, match=words):
        wrap(network, **options)


def test_logits_of_another_number_are_named():
    with pytest.raises(PluginError, match=r"logits must be \[3, h, w\]"):
        pyseg.compose(wrap(Colour(), classes=3))(IMAGE)


def test_composing():
    model = wrap(Colour(), classes=("dark", "red"))

    def invert(image, prediction):
        return prediction.with_logits(-prediction.logits)

    wanted = pyseg.build(model, "crf(iterations=2)", invert)(IMAGE)
    made = pyseg.compose(model, "crf(iterations=2)", invert)
    assert len(made.stages) == 3 and made.model is model
    assert torch.equal(made(IMAGE).logits, wanted.logits)
    longer = pyseg.compose(pyseg.compose(model, CRF(iterations=2)), invert)
    assert torch.equal(longer(IMAGE).logits, wanted.logits)
    whole = pyseg.compose(pyseg.build("streetnet", weights=None), "crf+crf(iterations=1)")
    assert len(whole.stages) == 3
    assert len(pyseg.compose(model).stages) == 1


def test_what_cannot_be_composed():
    model = wrap(Colour(), classes=2)
    with pytest.raises(SpecError, match=r"got the text 'streetnet'; pyseg.build takes names"):
        pyseg.compose("streetnet", "crf")
    with pytest.raises(SpecError, match=r"pyseg.models.wrap\(network, classes"):
        pyseg.compose(Colour(), "crf")
    with pytest.raises(UnknownName, match=r"no refiner is called 'crv'. Did you mean 'crf'"):
        pyseg.compose(model, "crv")
    with pytest.raises(PluginError, match=r"must be|lacks|begins with"):
        pyseg.compose(model, object())
