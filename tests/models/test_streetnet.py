import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import pyseg
from pyseg.classes import CAMVID_CLASSES, CAMVID_PALETTE
from pyseg.datasets.camvid import CamVid
from pyseg.errors import WeightsError
from pyseg.models.streetnet import BUNDLED, streetnet

DATA = Path(os.environ.get("PYSEG_TEST_DATA", Path(__file__).parents[2] / "../shared/data"))


def test_bundled_weights():
    assert BUNDLED.stat().st_size <= 6_000_000
    stored = load_file(BUNDLED)
    assert {v.dtype for v in stored.values()} == {torch.float16, torch.int64}
    model = streetnet()
    assert (model.classes, model.palette) == (CAMVID_CLASSES, CAMVID_PALETTE)
    for key, value in model.state_dict().items():
        assert torch.equal(value, stored[key].to(value.dtype))
    assert sum(p.numel() for p in model.parameters()) == 2_695_873


def test_registered_and_offline():
    built = pyseg.build("streetnet").stages[0].object
    again = streetnet(weights="bundled")
    for key, value in again.state_dict().items():
        assert torch.equal(value, built.state_dict()[key])


@pytest.mark.parametrize("size", [(360, 480), (65, 33), (2, 500), (1, 1)])
def test_any_size_at_stride_two(size):
    model = streetnet(weights=None, num_classes=4)
    (result,) = model.predict([torch.zeros(3, *size, dtype=torch.uint8)])
    assert result.logits.shape == (4, (size[0] + 1) // 2, (size[1] + 1) // 2)
    assert result.logits.isfinite().all()


def test_auxiliary_heads_in_training_only():
    model = streetnet(weights=None).train()
    images = torch.rand(2, 3, 64, 96)
    shapes = {key: tuple(value.shape[1:]) for key, value in model(images).items()}
    assert shapes == {"out": (11, 32, 48), "aux8": (11, 8, 12), "aux16": (11, 4, 6)}
    sum(value.square().mean() for value in model(images).values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert set(model.eval()(images)) == {"out"}


def test_batching_changes_nothing():
    model = streetnet()
    images = list(torch.randint(256, (3, 3, 60, 80), dtype=torch.uint8))
    for together, image in zip(model.predict(images), images, strict=True):
        (alone,) = model.predict([image])
        torch.testing.assert_close(together.logits, alone.logits, rtol=1e-4, atol=1e-4)


def test_other_classes_keep_the_trunk():
    bundled = streetnet().state_dict()
    with pytest.warns(UserWarning, match="the last layer for 3 classes is random"):
        other = streetnet(num_classes=3).state_dict()
    for key, value in other.items():
        if ".head" in key:
            assert value.shape[0] == 3
        else:
            assert torch.equal(value, bundled[key])
    assert len(streetnet(num_classes=3, weights=None).classes) == 3


def test_weights_none_is_random():
    torch.manual_seed(0)
    first = streetnet(weights=None).network.head[1].weight
    torch.manual_seed(0)
    assert torch.equal(first, streetnet(weights=None).network.head[1].weight)
    assert not torch.equal(first, streetnet(weights=None).network.head[1].weight)


def test_weights_from_a_file(tmp_path):
    source = streetnet(weights=None, num_classes=5)
    save_file(source.state_dict(), tmp_path / "five.safetensors")
    torch.save({"model": source.state_dict()}, tmp_path / "five.pt")
    for name in ("five.safetensors", "five.pt"):
        loaded = streetnet(num_classes=5, weights=tmp_path / name)
        for key, value in source.state_dict().items():
            assert torch.equal(value, loaded.state_dict()[key])
    with pytest.raises(WeightsError, match=r"for 5 classes, streetnet has 11; pass num_classes=5"):
        streetnet(weights=tmp_path / "five.safetensors")
    save_file({"conv.weight": torch.zeros(3)}, tmp_path / "foreign.safetensors")
    with pytest.raises(WeightsError, match=r"another architecture"):
        streetnet(weights=tmp_path / "foreign.safetensors")
    with pytest.raises(WeightsError):
        streetnet(weights=tmp_path / "absent.pt")
    with pytest.raises(ValueError, match=r"num_classes must be at least 1"):
        streetnet(num_classes=0, weights=None)


@pytest.mark.skipif(not (DATA / "camvid").is_dir(), reason=f"no CamVid below {DATA}")
def test_validation_score_is_the_cards():
    """Scored without pyseg's kernels: torch's bilinear upsampling, argmax and bincount."""
    card = (BUNDLED.parent / "streetnet_camvid.md").read_text(encoding="utf-8")
    stated = float(re.search(r"\| \*\*mIoU\*\* \|.*\| ([.\d]+) \|\n", card).group(1))
    model, data = streetnet(), CamVid(DATA / "camvid", "val")
    counts = torch.zeros(121, dtype=torch.int64)
    for index in range(len(data)):
        sample = data[index]
        logits = model.predict([sample.image])[0].logits[None]
        size = sample.labels.shape
        labels = torch.nn.functional.interpolate(logits, size, mode="bilinear").argmax(1)[0]
        valid = sample.labels != 255
        counts += torch.bincount(sample.labels[valid].long() * 11 + labels[valid], minlength=121)
    matrix = counts.view(11, 11).double()
    iou = matrix.diagonal() / (matrix.sum(0) + matrix.sum(1) - matrix.diagonal())
    assert iou.mean().item() == pytest.approx(stated, abs=1e-3)
