"""train_instances: small UPSNets on synthetic scenes."""

from dataclasses import replace

import pytest
import torch

import pyseg
from pyseg.datasets.synthetic import StreetScenes
from pyseg.errors import PysegError
from pyseg.training import loop, random_view, train_instances

SCENES = StreetScenes(length=3, size=(64, 64))
SMALL = {"num_stuff": 5, "backbone": "resnet18", "channels": 16, "min_size": 64, "max_size": 64}


def make():
    torch.manual_seed(0)
    return pyseg.models.get("upsnet_resnet50")(num_classes=8, weights=None, **SMALL)


SMALL_MODEL = make()  # for what does not train


def fit(model, output, epochs, **options):
    return train_instances(
        model, SCENES, output_dir=output, epochs=epochs, batch_size=2, progress=False, **options
    )


def test_a_run_that_was_killed_goes_on_as_if_it_was_not(tmp_path, monkeypatch):
    whole, parts = make(), make()
    log = fit(whole, tmp_path / "whole", 2, validation=StreetScenes(length=1, size=(64, 64)))
    assert [entry["epoch"] for entry in log] == [1, 2]
    assert {"loss", "loss_panoptic", "loss_mask", "seconds"} <= set(log[0])
    assert 0 <= log[1]["pq"] <= 1 and "pq" not in log[0]

    save = loop._save

    def save_and_die(*arguments):
        save(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "_save", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        fit(parts, tmp_path / "parts", 2)
    monkeypatch.setattr(loop, "_save", save)
    with pytest.raises(PysegError, match="earlier run; pass resume=True"):
        fit(parts, tmp_path / "parts", 2)
    with pytest.raises(PysegError, match="other settings: learning_rate"):
        fit(make(), tmp_path / "parts", 2, learning_rate=0.1, resume=True)
    again = make()
    fit(again, tmp_path / "parts", 2, resume=True)
    for key, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key
    built = pyseg.build(
        f"upsnet_resnet50({', '.join(f'{key}={value!r}' for key, value in SMALL.items())})",
        num_classes=8,
        weights=tmp_path / "parts" / "model.safetensors",
    )
    assert torch.equal(
        built(SCENES[0].image).segments.map, again.predict([SCENES[0].image])[0].segments.map
    )


def test_mirroring_keeps_image_labels_and_instances_together():
    sample = SCENES[0]
    crowd = torch.arange(len(sample.instances.labels)) == 1
    sample = replace(sample, instances=replace(sample.instances, crowd=crowd))
    mirrored = random_view(sample, 0.0, 1.0, torch.Generator().manual_seed(0))
    assert torch.equal(mirrored.image, sample.image.flip(2))
    assert torch.equal(mirrored.labels, sample.labels.flip(1))
    assert torch.equal(mirrored.instances.crowd, crowd)
    for mask, box in zip(mirrored.instances.masks, mirrored.instances.boxes, strict=True):
        columns = mask.any(0).nonzero()
        assert [int(columns.min()), int(columns.max()) + 1] == box[[0, 2]].int().tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs must be positive, got 0"),
        ({"flip": 2.0}, "flip is a share"),
        ({"ema": 1.0}, "ema must be in 0..1"),
        ({"precision": "fp8"}, "precision must be 'bf16' or 'fp32', got 'fp8'"),
    ],
)
def test_bad_settings(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        fit(SMALL_MODEL, tmp_path, **{"epochs": 1, **options})
    assert not list(tmp_path.iterdir())
