"""Mixed images, the teacher and the draws, against what their papers' equations say."""

import colorsys
import math

import numpy as np
import pytest
import torch
from pyseg_uda import mixing
from pyseg_uda.mixing import RareClasses, blur, class_masks, jitter
from pyseg_uda.teacher import decay, move, teacher_of
from scipy import ndimage
from torch import nn

from pyseg.types import VOID


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_half_of_each_images_own_classes_rounded_up():
    torch.manual_seed(0)
    labels = torch.randint(0, 5, (3, 8, 9)).to(torch.uint8)
    labels[0][labels[0] == 4] = VOID
    labels[1] = 2
    labels[2] = VOID
    counts = set()
    for seed in range(20):
        masks = class_masks(labels, generator(seed))
        for image, mask in zip(labels, masks, strict=True):
            inside, outside = set(image[mask].tolist()), set(image[~mask].tolist())
            present = {*image.flatten().tolist()} - {VOID}
            assert not inside & outside and VOID not in inside
            assert len(inside) == math.ceil(len(present) / 2)
        counts.add(tuple(sorted(set(labels[0][masks[0]].tolist()))))
    assert len(counts) > 3  # drawn
    assert masks[1].all() and not masks[2].any()
    assert torch.equal(class_masks(labels, generator(19)), masks)


def test_jitter_is_brightness_contrast_saturation_and_hue():
    torch.manual_seed(0)
    images = 0.3 + 0.3 * torch.rand(24, 3, 3, 4)
    found = jitter(images, generator(), strength=0.2, chance=0.7)
    source, changed = generator(), 0
    for image, result in zip(images, found, strict=True):
        draw, *around = torch.rand(5, generator=source).tolist()
        if draw >= 0.7:
            assert torch.equal(image, result)
            continue
        changed += 1
        brightness, contrast, saturation, hue = (0.2 * (2 * value - 1) for value in around)
        pixels = np.clip((1 + brightness) * image.double().numpy(), 0, 1)
        grey = np.tensordot([0.2989, 0.587, 0.114], pixels, 1)
        pixels = np.clip(grey.mean() + (1 + contrast) * (pixels - grey.mean()), 0, 1)
        grey = np.tensordot([0.2989, 0.587, 0.114], pixels, 1)
        pixels = np.clip(grey + (1 + saturation) * (pixels - grey), 0, 1)
        for y, x in np.ndindex(3, 4):
            h, s, v = colorsys.rgb_to_hsv(*pixels[:, y, x])
            wanted = colorsys.hsv_to_rgb((h + hue) % 1, s, v)
            assert result[:, y, x].numpy() == pytest.approx(wanted, abs=2e-3)
    assert 10 < changed < 24


def test_blur_is_gaussian():
    torch.manual_seed(0)
    images = torch.rand(12, 3, 20, 24)
    found = blur(images, generator(), chance=0.6)
    source, changed = generator(), 0
    for image, result in zip(images, found, strict=True):
        draw, where = torch.rand(2, generator=source).tolist()
        sigma = mixing.SIGMA[0] + where * (mixing.SIGMA[1] - mixing.SIGMA[0])
        wanted = image.numpy()
        if draw < 0.6:
            changed += 1
            wanted = ndimage.gaussian_filter(
                wanted, (0, sigma, sigma), mode="mirror", radius=(0, 4, 4)
            )
        assert result.numpy() == pytest.approx(wanted, abs=1e-5)
    assert 3 < changed < 12


def test_rare_classes_are_drawn_by_their_softmax():
    counts = torch.tensor([[900, 80, 0, 20], [970, 30, 0, 0], [500, 499, 0, 1]])
    rare = RareClasses(counts, temperature=0.5, least=0.01)
    shares = counts.sum(0) / counts.sum()
    wanted = np.exp((1 - shares.double().numpy()) / 0.5) * [1, 1, 0, 1]  # class 2 is nowhere
    assert rare.probabilities.numpy() == pytest.approx(wanted / wanted.sum())
    assert [rows.tolist() for rows in rare.images] == [[0, 1, 2], [0, 1, 2], [], [0]]
    source = generator()
    draws = [rare.draw(source) for _ in range(2000)]
    found = np.bincount([c for c, _ in draws], minlength=4) / 2000
    assert found == pytest.approx(rare.probabilities.numpy(), abs=0.04)
    assert all(index in rare.images[c] for c, index in draws)
    with pytest.raises(ValueError, match=r"no image has more than a share of 1.0 of any class"):
        RareClasses(counts, least=1.0)


def test_the_teacher_is_the_mean_of_the_parameters_alone(convolutional):
    student = convolutional().train()
    teacher = teacher_of(student)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    kinds = {type(module): module.training for module in teacher.modules()}
    assert kinds[nn.BatchNorm2d] and not kinds[nn.Dropout2d] and not teacher.training
    wanted = {name: value.detach().double() for name, value in student.named_parameters()}
    for step in range(5):
        with torch.no_grad():
            for value in student.parameters():
                value.add_(torch.randn(value.shape))
        student.network.trunk[1].running_mean.add_(1)
        alpha = min(1 - 1 / (step + 1), 0.7)
        for name, value in student.named_parameters():
            wanted[name] = alpha * wanted[name] + (1 - alpha) * value.detach().double()
        move(teacher, student, step, 0.7)
    for name, value in teacher.named_parameters():
        assert torch.allclose(value.double(), wanted[name], atol=1e-5)
    assert not teacher.network.trunk[1].running_mean.any()
    assert decay(0) == 0 and decay(9) == 0.9 and decay(10**6) == 0.999


def test_the_teacher_normalises_by_the_batch_and_drops_nothing(convolutional):
    student = convolutional().train()
    student.network.trunk[1].running_mean.fill_(100)
    teacher = teacher_of(student)
    images = torch.rand(2, 3, 32, 32)
    one, two = teacher(images)["out"], teacher(images)["out"]
    assert torch.equal(one, two) and one.abs().max() < 20
