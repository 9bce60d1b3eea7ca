"""Dense CRF against brute force over all pairs of pixels and against pydensecrf's own results."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pyseg.ops import dense_crf
from pyseg.ops.dense_crf import NORMALIZATION, QUALITY, reference

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("PYSEG_TEST_DATA", ROOT.parent / "shared" / "data"))
CROP_HEIGHT, CROP_WIDTH, CLASSES = 48, 64, 11


def need(folder):
    if not folder.is_dir():
        pytest.skip(f"no test data at {folder}: set PYSEG_TEST_DATA")
    return folder


def smooth(generator, *shape):
    """Random planes that vary slowly, as images do."""
    n, c, h, w = shape
    coarse = torch.rand(n, c, max(2, h // 6), max(2, w // 6), generator=generator)
    return torch.nn.functional.interpolate(coarse, (h, w), mode="bilinear")


@pytest.fixture(autouse=True)
def one_thread():
    """These images are small: threads would mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def example(generator, n=2, c=4, h=20, w=33):
    unary = 2 * torch.randn(n, c, h, w, generator=generator)
    return unary, (255 * smooth(generator, n, 3, h, w)).to(torch.uint8)


# -- accuracy


def crops(count):
    """(image [3, H, W], label [H, W]) with four classes or more that cover 5 % or more each."""
    root = need(DATA / "camvid" / "val")
    found = []
    for file in sorted((root / "images").iterdir())[::4]:
        image = torch.from_numpy(np.array(Image.open(file).convert("RGB"))).permute(2, 0, 1)
        label = torch.from_numpy(np.array(Image.open(root / "labels" / f"{file.stem}.png"))).long()
        best = (0, None)
        for y in range(0, label.shape[0] - CROP_HEIGHT + 1, 24):
            for x in range(0, label.shape[1] - CROP_WIDTH + 1, 32):
                window = (slice(y, y + CROP_HEIGHT), slice(x, x + CROP_WIDTH))
                counts = torch.bincount(label[window].flatten(), minlength=CLASSES + 1)[:CLASSES]
                fourth = counts.sort().values[-4] / (CROP_HEIGHT * CROP_WIDTH)
                if fourth >= max(0.05, best[0]):
                    best = (fourth, window)
        if best[1] is not None:
            found.append((image[(slice(None), *best[1])], label[best[1]]))
        if len(found) == count:
            return found
    pytest.fail(f"only {len(found)} crops of {root} hold four classes")


def coarse_unary(label, generator):
    """What a network of stride 8 with doubts would predict; confident at most in uniform areas."""
    one_hot = torch.nn.functional.one_hot(label, CLASSES + 1)[..., :CLASSES].permute(2, 0, 1)
    logits = 6 * torch.nn.functional.avg_pool2d(one_hot[None].float(), 8)
    logits += torch.randn(logits.shape, generator=generator)
    return -torch.nn.functional.interpolate(logits, label.shape, mode="bilinear").log_softmax(1)


def test_accuracy_on_real_crops(generator, capsys):
    rows = {quality: [] for quality in QUALITY}
    for image, label in crops(24):
        unary = coarse_unary(label, generator)
        exact = reference(unary, image[None])
        for quality, errors in rows.items():
            q = dense_crf(unary, image[None], quality=quality)
            difference = (q - exact).abs()
            disagree = (q.argmax(1) != exact.argmax(1)).double().mean()
            errors.append([float(difference.mean()), float(disagree), float(difference.max())])
    mean = {quality: torch.tensor(errors).mean(0) for quality, errors in rows.items()}
    with capsys.disabled():
        print("\n24 crops, 10 iterations   mean |dQ|   argmax differs   of compatible")
        for quality, (error, disagree, _) in mean.items():
            ratio = error / mean["compatible"][0]
            print(f"{quality:23s} {error:11.6f} {disagree:14.3%} {ratio:14.2f}")
    # "compatible" is pydensecrf: test_compatible_is_pydensecrf.
    for quality, part in (("default", 1 / 2), ("high", 1 / 4)):
        assert mean[quality][0] <= part * mean["compatible"][0]
        assert mean[quality][1] <= part * mean["compatible"][1]


@pytest.mark.parametrize("name", ["1", "1-b", "2", "3"])
def test_compatible_is_pydensecrf(name):
    root = need(DATA / "crf")
    result = json.loads((root / "reference.json").read_text())["results"][name]
    stored = np.load(root / f"reference_{name}.npz")
    image = torch.from_numpy(np.array(Image.open(root / result["image"]).convert("RGB")))
    classes, labels = result["n_labels"], torch.from_numpy(stored["labels"]).long()
    unsure = 1 if result["zero_is_unknown"] else 0  # then 0 is no label and the others count from 1
    p = torch.full((classes, *labels.shape), 0.3 / (classes - 1))
    p.scatter_(0, (labels - unsure).clamp_min(0)[None], 0.7)
    p[:, labels < unsure] = 1 / classes
    for iterations in (1, 5):
        q = dense_crf(
            -p.log()[None],
            image.permute(2, 0, 1)[None],
            iterations=iterations,
            quality="compatible",
        )[0]
        expected = torch.from_numpy(stored[f"q{iterations}"].astype(np.float32))
        assert (q - expected).abs().mean() < 1e-4  # they are stored in half precision
        assert (q.argmax(0) == expected.argmax(0)).float().mean() >= 0.999
    assert (q.argmax(0) == torch.from_numpy(stored["map5"])).float().mean() >= 0.9999


def test_compatible_is_the_installed_pydensecrf(generator):
    peer = pytest.importorskip("pydensecrf.densecrf", reason="pydensecrf2 is not installed")
    unary, image = example(generator, 1, 5, 60, 50)
    crf = peer.DenseCRF2D(50, 60, 5)
    crf.setUnaryEnergy(unary[0].reshape(5, -1).numpy())
    y, x = np.mgrid[:60, :50].astype(np.float32)
    bands = image[0].numpy().astype(np.float32)
    crf.addPairwiseEnergy(np.stack([y / 3, x / 4]).reshape(2, -1), compat=3)
    crf.addPairwiseEnergy(np.stack([y / 40, x / 40, *bands / 13]).reshape(5, -1), compat=10)
    q = dense_crf(
        unary, image, (((4.0, 3.0), 3.0),), ((40.0, 13.0, 10.0),), 5, quality="compatible"
    )
    np.testing.assert_allclose(np.array(crf.inference(5)), q[0].reshape(5, -1), atol=1e-4)


@pytest.mark.parametrize("normalization", NORMALIZATION)
@pytest.mark.parametrize("quality", QUALITY)
def test_normalizations(generator, normalization, quality):
    unary, image = example(generator)
    weight = 0.05 if normalization == "none" else 1.0
    kernels = {"gaussian": ((3.0, weight),), "bilateral": ((20.0, 30.0, weight),)}
    q = dense_crf(unary, image, quality=quality, normalization=normalization, **kernels)
    expected = reference(unary, image, normalization=normalization, **kernels)
    # Errors of scale cancel where the kernel is normalised; the classic lattice has such errors.
    bound = {"compatible": 0.004, "default": 0.002, "high": 0.001}[quality]
    assert (q - expected).abs().mean() < (10 * bound if normalization == "none" else bound)


@pytest.mark.parametrize("size", range(1, 9))
def test_features_of_any_dimension(generator, size):
    unary, image = example(generator, 2, 3)
    planes = smooth(generator, 2, size, 20, 33)
    sigmas = [0.3 + 0.05 * i for i in range(size)]
    kernels = {"gaussian": (), "bilateral": (), "features": ((planes, sigmas, 2.0),)}
    q = dense_crf(unary, image, quality="high", iterations=3, **kernels)
    expected = reference(unary, image, iterations=3, **kernels)
    plain = torch.softmax(-unary, 1)
    assert (q - expected).abs().mean() < 0.1 * (plain - expected).abs().mean()


def test_bilateral_is_a_feature_kernel(generator):
    unary, image = example(generator)
    y, x = torch.meshgrid(torch.arange(20.0), torch.arange(33.0), indexing="ij")
    planes = torch.cat([torch.stack([y, x]).expand(2, -1, -1, -1), image], 1)
    features = ((planes, (20.0, 10.0, 13.0, 14.0, 15.0), 5.0),)
    direct = dense_crf(unary, image, (), (((10.0, 20.0), (13.0, 14.0, 15.0), 5.0),))
    torch.testing.assert_close(dense_crf(unary, image, (), (), features=features), direct)


def test_several_kernels(generator):
    unary, image = example(generator)
    kernels = {
        "gaussian": ((3.0, torch.tensor(2.0)), ((2.0, 5.0), 1.0)),
        "bilateral": ((30.0, 20.0, 2.0), (10.0, (20.0, 30.0, 40.0), torch.tensor([1.0]))),
    }
    q = dense_crf(unary, image, quality="high", **kernels)
    assert (q - reference(unary, image, **kernels)).abs().mean() < 2e-3


def test_compatibility(generator):
    unary, image = example(generator)
    potts = 1 - torch.eye(4)
    torch.testing.assert_close(
        dense_crf(unary, image, compatibility=potts), dense_crf(unary, image), atol=1e-4, rtol=0
    )
    matrix = torch.rand(4, 4, generator=generator)  # not symmetric
    options = {"gaussian": ((3.0, 2.0),), "bilateral": (), "compatibility": matrix}
    q = dense_crf(unary, image, quality="high", **options)
    assert (q - reference(unary, image, **options)).abs().mean() < 1e-3


# -- sizes, layouts, dtypes


@pytest.mark.parametrize("classes", [1, 2, 3, 5, 8, 9, 16, 17, 21, 24, 25, 32, 33, 40, 150, 256])
def test_any_number_of_classes(generator, classes):
    unary, image = example(generator, 1, classes, 11, 19)
    q = dense_crf(unary, image)
    torch.testing.assert_close(q.sum(1), torch.ones(1, 11, 19))
    # float64 takes other loops: rows of whole vectors, whatever the number of classes
    difference = (q - dense_crf(unary.double(), image)).abs()
    assert difference.mean() < 1e-5
    assert difference.max() < 1e-3  # a rounding may choose another, equally near vertex


@pytest.mark.parametrize(
    ("height", "width"), [(1, 1), (1, 200), (200, 1), (2, 2), (57, 129), (65, 16), (3, 300)]
)
def test_any_size(generator, height, width):
    unary, image = example(generator, 1, 3, height, width)
    q = dense_crf(unary, image, quality="high")
    torch.testing.assert_close(q.sum(1), torch.ones(1, height, width))
    if height * width <= 1000:  # one iteration: more only amplify how random these energies are
        q = dense_crf(unary, image, iterations=1, quality="high")
        assert (q - reference(unary, image, iterations=1)).abs().mean() < 8e-3


def test_one_pixel_keeps_its_label():
    unary = torch.tensor([0.3, 1.7, 2.0]).reshape(1, 3, 1, 1)
    image = torch.zeros(1, 3, 1, 1, dtype=torch.uint8)
    expected = reference(unary, image)  # its only neighbour is itself
    torch.testing.assert_close(dense_crf(unary, image), expected.float(), atol=1e-6, rtol=1e-5)


def test_one_class_is_certain(generator):
    unary, image = example(generator, 1, 1)
    assert (dense_crf(unary, image) == 1).all()


def test_nothing_to_do(generator):
    unary, image = example(generator)
    expected = torch.softmax(-unary, 1)
    torch.testing.assert_close(dense_crf(unary, image, iterations=0), expected)
    torch.testing.assert_close(dense_crf(unary, image, (), ()), expected)
    assert dense_crf(unary[:0], image[:0]).shape == (0, 4, 20, 33)


def test_batch_is_its_images(generator):
    unary, image = example(generator, 3)
    q = dense_crf(unary, image)
    for i in range(3):
        assert torch.equal(q[i : i + 1], dense_crf(unary[i : i + 1], image[i : i + 1]))


def test_strides_do_not_matter(generator):
    unary, image = example(generator)
    q = dense_crf(unary, image)
    last = torch.channels_last
    assert torch.equal(q, dense_crf(unary.to(memory_format=last), image.to(memory_format=last)))
    wide = torch.randn(2, 8, 20, 66, generator=generator)
    wide[:, ::2, :, ::2] = unary
    assert torch.equal(q, dense_crf(wide[:, ::2, :, ::2], image.flip(3).flip(3)))


def test_same_bits_for_any_number_of_threads(generator):
    unary, image = example(generator, 1, 19, 150, 300)
    results = []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        results.append(dense_crf(unary, image, iterations=2))
    for result in results[1:]:
        assert torch.equal(results[0], result)


OTHER_LEVEL = """
import sys, torch, pyseg
from pyseg.ops import dense_crf
torch.set_num_threads(1)
inputs = torch.load(sys.argv[1])
results = [dense_crf(unary, image, iterations=2) for unary, image in inputs]
torch.save((torch.ops.pyseg.simd_level(), results), sys.argv[2])
"""


@pytest.mark.parametrize("level", ["v3", "generic"])
def test_every_simd_level(generator, level, tmp_path):
    inputs = []
    for classes in (3, 7, 12, 19, 22, 30, 40):
        unary, image = example(generator, 1, classes, 21, 35)
        inputs += [(unary, image), (unary.double(), image)]
    torch.save(inputs, tmp_path / "inputs.pt")
    subprocess.run(
        [sys.executable, "-c", OTHER_LEVEL, tmp_path / "inputs.pt", tmp_path / "results.pt"],
        cwd=ROOT,
        env={**os.environ, "PYSEG_SIMD": level},
        check=True,
    )
    taken, results = torch.load(tmp_path / "results.pt")
    if level not in taken:
        assert taken == "generic"
        pytest.skip(f"this processor runs no {level}")
    for (unary, image), q in zip(inputs, results, strict=True):
        difference = (q - dense_crf(unary, image, iterations=2)).abs()
        assert difference.mean() < 1e-5
        assert difference.max() < 1e-3  # a rounding may choose another, equally near vertex


def test_unknown_simd_level(generator, monkeypatch):
    monkeypatch.setenv("PYSEG_SIMD", "v5")
    with pytest.raises(ValueError, match="PYSEG_SIMD must be v4, v3 or generic, got v5"):
        dense_crf(*example(generator))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(generator, dtype):
    unary, image = example(generator)
    q = dense_crf(unary.to(dtype), image)
    assert q.dtype == dtype
    assert torch.equal(q, dense_crf(unary.to(dtype).float(), image).to(dtype))


def test_very_certain_unary(generator):
    unary, image = example(generator)
    q = dense_crf(1e4 * unary, image)
    torch.testing.assert_close(q, torch.softmax(-1e4 * unary, 1), atol=1e-5, rtol=0)
    assert q.isfinite().all()


# -- bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda u, i: (u[0], i), "unary must be"),
        (lambda u, i: (u.long(), i), "unary must be"),
        (lambda u, i: (u[..., :0], i[..., :0]), "unary has no pixels"),
        (lambda u, i: (u[:, :0], i), "1 to 256 classes"),
        (lambda u, i: (u[:, :1].expand(-1, 257, -1, -1), i), "1 to 256 classes"),
        (lambda u, i: (u, i[..., 1:]), "image must be"),
        (lambda u, i: (u, i[:1]), "image must be"),
        (lambda u, i: (u, i.to("meta")), "unary is on cpu, image on meta"),
        (lambda u, i: (u.masked_fill(u > 2, torch.nan), i), "unary holds NaN or infinity"),
        (lambda u, i: (u.masked_fill(u > 2, torch.inf), i), "unary holds NaN or infinity"),
        (lambda u, i: (u, i / 0.0), "image or features hold NaN or infinity"),
        (
            lambda u, i: (
                u[:1, :1, :1, :1].expand(1, 1, 2**15, 2**14),
                i[:1, :, :1, :1].expand(1, 3, 2**15, 2**14),
            ),
            r"exceeds 2\^31",
        ),
    ],
)
def test_bad_tensors(generator, change, message):
    with pytest.raises(ValueError, match=message):
        dense_crf(*change(*example(generator)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gaussian": ((0.0, 3.0),)}, r"gaussian\[0\]: sigma_xy must be positive"),
        ({"gaussian": (((3.0, -1.0), 3.0),)}, r"gaussian\[0\]: sigma_xy must be positive"),
        ({"gaussian": ((3.0,),)}, r"gaussian\[0\] must be \(sigma_xy, weight\)"),
        ({"bilateral": ((80.0, torch.nan, 1.0),)}, r"bilateral\[0\]: sigma_rgb must be positive"),
        ({"bilateral": ((80.0, (1.0, 2.0), 1.0),)}, r"sigma_rgb must be one number or 3"),
        ({"bilateral": ((1e-6, 13.0, 1.0),)}, "sigma is too small"),
        ({"gaussian": ((3.0, torch.ones(2)),)}, "weight must have one element"),
        ({"features": ((torch.ones(2, 9, 20, 33), 1.0, 1.0),)}, "at most 8"),
        ({"features": ((torch.ones(2, 2, 20, 32), 1.0, 1.0),)}, r"features\[0\] must be"),
        ({"iterations": -1}, "iterations"),
        ({"quality": "best"}, "quality must be one of"),
        ({"normalization": "both"}, "normalization must be one of"),
        ({"compatibility": torch.eye(3)}, r"compatibility must be \[4, 4\]"),
    ],
)
def test_bad_options(generator, options, message):
    with pytest.raises(ValueError, match=message):
        dense_crf(*example(generator), **options)


# -- the operator


def test_opcheck(generator):
    unary, image = example(generator)
    features = image.float()
    weights = torch.tensor([3.0, 10.0])
    kernels = ([2, 5], [-1, -2, -1, -2, 0, 1, 2], [3.0, 3.0, 80.0, 80.0, 13.0, 13.0, 13.0])
    for compatibility in (None, 1 - torch.eye(4)):
        torch.library.opcheck(
            torch.ops.pyseg.dense_crf.default,
            (unary, features, weights, compatibility, *kernels, 2, 1, 2, 0.2, 1),
        )


def test_compile(generator):
    unary, image = example(generator)
    compiled = torch.compile(dense_crf, fullgraph=True)
    assert torch.equal(compiled(unary, image, iterations=2), dense_crf(unary, image, iterations=2))


def test_backward_raises_instead_of_giving_no_gradient():
    unary = torch.rand(1, 3, 5, 6, requires_grad=True)
    q = dense_crf(unary, torch.zeros(1, 3, 5, 6, dtype=torch.uint8), iterations=1)
    with pytest.raises(NotImplementedError, match="no gradient in this version"):
        q.sum().backward()
