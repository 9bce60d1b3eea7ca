"""The shim against pydensecrf's stored results, and against pydensecrf where it is installed."""

import copy
import gc
import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

import pyseg.compat.pydensecrf as package
import pyseg.compat.pydensecrf.densecrf as dcrf
from pyseg.compat.pydensecrf import eigen, utils
from pyseg.compat.pydensecrf.utils import (
    create_pairwise_bilateral,
    create_pairwise_gaussian,
    unary_from_labels,
    unary_from_softmax,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def random():
    return np.random.default_rng(0)


def peer(module):
    return pytest.importorskip(f"pydensecrf.{module}", reason="pydensecrf2 is not installed")


def scene(random, height=37, width=50, labels=5):
    """A photograph's likeness: flat patches with noise; and energies without structure."""
    patches = random.random((height // 6 + 1, width // 6 + 1, 3)).repeat(6, 0).repeat(6, 1)
    image = 255 * patches[:height, :width] + random.normal(0, 3, (height, width, 3))
    unary = 2 * random.standard_normal((labels, height * width))
    return np.ascontiguousarray(image.clip(0, 255).astype(np.uint8)), unary.astype(np.float32)


def assert_same(ours, expected):
    """Equal but for rounding, which may let a point touch one vertex of the lattice more."""
    ours, expected = np.array(ours), np.array(expected)
    assert abs(ours - expected).mean() < 1e-5
    assert (ours.argmax(0) == expected.argmax(0)).mean() >= 0.999


# -- a script as people write it, on the pictures that its author published


def read_example(folder, name):
    result = json.loads((folder / "reference.json").read_text())["results"][name]
    picture = np.array(Image.open(folder / result["image"]).convert("RGB"))
    annotation = np.array(Image.open(folder / result["annotation"]).convert("RGB")).astype(
        np.uint32
    )
    colour = annotation[..., 0] | annotation[..., 1] << 8 | annotation[..., 2] << 16
    colours, labels = np.unique(colour, return_inverse=True)
    unknown = 0 in colours
    colours = colours[1:] if unknown else colours
    palette = np.stack([colours & 255, colours >> 8 & 255, colours >> 16], 1).astype(np.uint8)
    return result, picture, labels.reshape(colour.shape), unknown, palette


@pytest.mark.parametrize("name", ["1", "1-b", "2", "3"])
def test_a_script_gives_the_published_picture(data_folder, name):
    folder = data_folder("crf")
    result, picture, labels, unknown, palette = read_example(folder, name)
    stored = np.load(folder / f"reference_{name}.npz")
    height, width = labels.shape
    crf = dcrf.DenseCRF(width * height, len(palette))
    crf.setUnaryEnergy(unary_from_labels(labels, len(palette), gt_prob=0.7, zero_unsure=unknown))
    features = create_pairwise_gaussian(sdims=(3, 3), shape=(height, width))
    crf.addPairwiseEnergy(
        features, compat=3, kernel=dcrf.DIAG_KERNEL, normalization=dcrf.NORMALIZE_SYMMETRIC
    )
    features = create_pairwise_bilateral(sdims=(80, 80), schan=(13, 13, 13), img=picture, chdim=2)
    crf.addPairwiseEnergy(features, compat=10)
    q = crf.inference(5)
    best = np.argmax(q, axis=0)
    painted = palette[best].reshape(picture.shape)
    published = np.array(Image.open(folder / f"out{name}.png").convert("RGB"))
    assert (painted == published).all(-1).mean() >= (0.9998 if name == "1-b" else 0.99999)
    assert (best == stored["map5"].ravel()).mean() >= 0.9999
    for steps, marginals in ((1, crf.inference(1)), (5, q)):
        expected = stored[f"q{steps}"].astype(np.float32).reshape(q.shape)
        assert abs(np.array(marginals) - expected).mean() < 1e-4  # stored in half precision

    marginals, tmp1, tmp2 = crf.startInference()
    for expected in result["kl_before_each_step"]:
        assert crf.klDivergence(marginals) == pytest.approx(expected, rel=1e-4)
        crf.stepInference(marginals, tmp1, tmp2)
    assert abs(marginals - q).mean() < 1e-5


# -- every option against the library


NORMALIZATIONS = [
    "NO_NORMALIZATION",
    "NORMALIZE_BEFORE",
    "NORMALIZE_AFTER",
    "NORMALIZE_SYMMETRIC",
]


def compatibilities(random, labels=5):
    vector = -3 * random.random(labels).astype(np.float32)
    matrix = 4 * random.random((labels, labels)).astype(np.float32)  # not symmetric
    return {
        "numbers": (3.0, 10.0),
        "vector": (vector, vector),
        "matrix": (matrix, matrix),
        "number and matrix": (3.0, matrix),
        "vector and number": (vector, 4.0),
    }


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("kind", list(compatibilities(np.random.default_rng(0))))
def test_two_dimensions_as_pydensecrf(random, normalization, kind):
    image, unary = scene(random)
    factor = np.float32(0.01) if normalization == "NO_NORMALIZATION" else np.float32(1)
    first, second = (c * factor for c in compatibilities(random)[kind])

    def run(module):
        crf = module.DenseCRF2D(50, 37, 5)
        crf.setUnaryEnergy(unary)
        how = getattr(module, normalization)
        crf.addPairwiseGaussian(sxy=(3, 2), compat=first, normalization=how)
        crf.addPairwiseBilateral((30, 20), (13, 12, 14), image, second, module.FULL_KERNEL, how)
        marginals, tmp1, tmp2 = crf.startInference()
        divergences = []
        for _ in range(3):
            divergences.append(crf.klDivergence(marginals))
            crf.stepInference(marginals, tmp1, tmp2)
        return np.array(crf.inference(5)), np.array(marginals), divergences

    ours, expected = run(dcrf), run(peer("densecrf"))
    assert_same(ours[0], expected[0])
    assert_same(ours[1], expected[1])
    np.testing.assert_allclose(ours[2], expected[2], rtol=1e-5)


def test_terms_with_different_normalizations(random):
    image, unary = scene(random)

    def run(module):
        crf = module.DenseCRF2D(50, 37, 5)
        crf.setUnaryEnergy(unary)
        crf.addPairwiseGaussian(3, 2.0, normalization=module.NORMALIZE_AFTER)
        crf.addPairwiseGaussian(5, 1.0, module.CONST_KERNEL, module.NORMALIZE_BEFORE)
        crf.addPairwiseBilateral(30, 20, image, 4.0)
        return np.array(crf.inference(4))

    assert_same(run(dcrf), run(peer("densecrf")))


def test_points_without_a_grid(random):
    """1009 is a prime: there is no rectangle of as many points."""
    features = random.random((4, 1009)).astype(np.float32) * 4
    unary = random.standard_normal((3, 1009)).astype(np.float32)

    def run(module):
        crf = module.DenseCRF(1009, 3)
        crf.setUnaryEnergy(unary)
        crf.addPairwiseEnergy(features, compat=4)
        return np.array(crf.inference(3))

    assert_same(run(dcrf), run(peer("densecrf")))


def test_unary_kinds_as_pydensecrf(random):
    _, unary = scene(random)
    weights = random.standard_normal((5, 4)).astype(np.float32)
    features = random.standard_normal((4, 37 * 50)).astype(np.float32)

    def run(module, set_unary):
        crf = module.DenseCRF2D(50, 37, 5)
        set_unary(module, crf)
        crf.addPairwiseGaussian(3, 2.0)
        return np.array(crf.inference(2))

    for set_unary in (
        lambda module, crf: crf.setUnary(module.ConstUnary(unary)),
        lambda module, crf: crf.setUnary(module.LogisticUnary(weights, features)),
        lambda module, crf: None,
    ):
        expected = run(peer("densecrf"), set_unary)
        assert_same(run(dcrf, set_unary), expected)
    products = dcrf.DenseCRF2D(50, 37, 5)
    products.setUnaryEnergy(weights, features)
    expected = torch.softmax(torch.from_numpy(-weights @ features), 0)
    np.testing.assert_allclose(products.inference(3), expected, atol=1e-5)  # no pairwise term


def test_utils_as_pydensecrf(random):
    theirs = peer("utils")
    labels = random.integers(0, 4, (7, 9))
    for arguments in ((3, 0.7, True), (4, 0.5, False)):
        expected = theirs.unary_from_labels(labels, *arguments)
        np.testing.assert_allclose(unary_from_labels(labels, *arguments), expected, rtol=1e-6)
    probabilities = random.dirichlet(np.ones(4) / 9, (7, 9)).transpose(2, 0, 1)
    for options in ({}, {"scale": 0.8}, {"clip": 0.02}, {"scale": 0.5, "clip": None}):
        expected = theirs.unary_from_softmax(probabilities, **options)
        result = unary_from_softmax(probabilities, **options)
        assert result.dtype == np.float32 and result.flags.c_contiguous
        np.testing.assert_allclose(result, expected, rtol=1e-5)
    for sdims, shape in (((3, 2), (7, 9)), ((1.5, 2, 3), (3, 4, 5))):
        expected = theirs.create_pairwise_gaussian(sdims, shape)
        np.testing.assert_array_equal(create_pairwise_gaussian(sdims, shape), expected)
    image = random.integers(0, 256, (7, 9, 3), dtype=np.uint8)
    for img, schan, chdim in (
        (image, (13, 14, 15), 2),
        (image, 20.0, 2),
        (image[..., 0], 5, -1),
        (image.transpose(2, 0, 1), (1, 2, 3), 0),
    ):
        expected = theirs.create_pairwise_bilateral((8, 9), schan, img, chdim)
        result = create_pairwise_bilateral((8, 9), schan, img, chdim)
        assert result.dtype == np.float32
        np.testing.assert_allclose(result, expected, rtol=1e-6)


def test_legacy_names():
    labels = np.array([0, 1, 2])
    with pytest.warns(DeprecationWarning, match="unary_from_labels"):
        old = utils.compute_unary(labels, 2)
    np.testing.assert_array_equal(old, unary_from_labels(labels, 2, 0.5))
    with pytest.warns(DeprecationWarning, match="unary_from_softmax"):
        old = utils.softmax_to_unary(np.array([[0.25], [0.75]]), 0.5)
    np.testing.assert_allclose(old, -np.log([[0.375], [0.625]]), rtol=1e-6)


# -- what needs no library


def test_the_package_holds_both_modules():
    assert package.DenseCRF2D is dcrf.DenseCRF2D
    assert package.unary_from_softmax is unary_from_softmax
    assert [int(getattr(package, name)) for name in NORMALIZATIONS] == [0, 1, 2, 3]
    assert (int(dcrf.CONST_KERNEL), int(dcrf.DIAG_KERNEL), int(dcrf.FULL_KERNEL)) == (0, 1, 2)


def test_any_layout_and_dtype(random):
    image, unary = scene(random)

    def run(unary, image):
        crf = dcrf.DenseCRF2D(50, 37, 5)
        crf.setUnaryEnergy(unary)
        crf.addPairwiseBilateral(20, 13, image, 5)
        return crf.inference(2)

    q = run(unary, image)
    assert q.dtype == np.float32 and q.shape == (5, 37 * 50) and q.flags.c_contiguous
    wide = np.asfortranarray(unary.astype(np.float64))
    np.testing.assert_array_equal(q, run(wide, np.asfortranarray(image)))


def test_arguments_are_copied(random):
    _, unary = scene(random)
    features = create_pairwise_gaussian((3, 3), (37, 50))
    crf = dcrf.DenseCRF2D(50, 37, 5)
    given = unary.copy()
    crf.setUnaryEnergy(given)
    crf.addPairwiseEnergy(features, 3)
    before = crf.inference(2)
    given[:], features[:] = 0, 0
    np.testing.assert_array_equal(before, crf.inference(2))


def test_steps_go_on_from_changed_marginals(random):
    """A caller may fix labels between steps; columns of zeros are how pydensecrf starts without
    energies."""
    _, unary = scene(random)
    crf = dcrf.DenseCRF2D(50, 37, 5)
    crf.setUnaryEnergy(unary)
    crf.addPairwiseGaussian(3, 3)
    q, tmp1, tmp2 = crf.startInference()
    q[:, :900] = np.eye(5, dtype=np.float32)[:, [2]]
    crf.stepInference(q, tmp1, tmp2)
    weights = torch.exp(-0.5 * torch.cdist(*[_points() / 3] * 2).square()).numpy()
    start = torch.softmax(torch.from_numpy(-unary), 0).numpy()
    start[:, :900] = np.eye(5)[:, [2]]
    norm = weights.sum(0) ** -0.5
    expected = torch.softmax(torch.from_numpy(3 * (start * norm) @ weights * norm - unary), 0)
    assert abs(q - expected.numpy()).mean() < 0.005  # the lattice is not the exact kernel


def _points():
    y, x = torch.meshgrid(torch.arange(37.0), torch.arange(50.0), indexing="ij")
    return torch.stack([y.flatten(), x.flatten()], 1)


def test_terms_and_marginals_may_change_between_steps(random):
    """What is remembered between a divergence and the step after it must not outlive either."""
    _, unary = scene(random)

    def run(module):
        crf = module.DenseCRF2D(50, 37, 5)
        crf.setUnaryEnergy(unary)
        crf.addPairwiseGaussian(3, 3.0)
        crf.addPairwiseGaussian(4, 0.0)  # without effect
        q, tmp1, tmp2 = crf.startInference()
        found = [crf.klDivergence(q), crf.klDivergence(q)]
        crf.addPairwiseGaussian(5, 2.0)
        found.append(crf.klDivergence(q))
        crf.stepInference(q, tmp1, tmp2)
        crf.setUnaryEnergy(2 * unary)
        return q, [*found, crf.klDivergence(q)]

    ours, expected = run(dcrf), run(peer("densecrf"))
    assert_same(ours[0], expected[0])
    np.testing.assert_allclose(ours[1], expected[1], rtol=1e-5)


def stepped(crf, steps=3):
    q, tmp1, tmp2 = crf.startInference()
    for _ in range(steps):
        crf.stepInference(q, tmp1, tmp2)
    return q


def test_steps_keep_their_lattices(random, monkeypatch):
    built = []
    original = dcrf.Lattices

    class Counted(original):
        def __init__(self, *arguments):
            built.append(arguments)
            super().__init__(*arguments)

    monkeypatch.setattr(dcrf, "Lattices", Counted)
    image, unary = scene(random)
    crf = dcrf.DenseCRF2D(50, 37, 5)
    crf.setUnaryEnergy(unary)
    crf.addPairwiseGaussian(3, 3)
    crf.addPairwiseBilateral(20, 13, image, 5)
    q = stepped(crf, 5)
    assert len(built) == 1
    np.testing.assert_allclose(q, crf.inference(5), atol=1e-5)
    crf.addPairwiseGaussian(5, 1)  # other lattices from here on
    np.testing.assert_allclose(stepped(crf, 2), crf.inference(2), atol=1e-5)
    assert len(built) == 2


def test_lattices_go_with_their_crf(random):
    _, unary = scene(random)
    crf = dcrf.DenseCRF2D(50, 37, 5)
    crf.setUnaryEnergy(unary)
    crf.addPairwiseGaussian(3, 3)
    q = stepped(crf)
    copies = [copy.copy(crf), copy.deepcopy(crf), pickle.loads(pickle.dumps(crf))]
    number = crf._lattices[0]._number
    energies = torch.from_numpy(q).reshape(1, 5, 37, 50)
    assert torch.ops.pyseg._dense_crf_messages(energies, number).shape == energies.shape
    del crf
    for other in copies:
        np.testing.assert_array_equal(stepped(other), q)
    del copies, other
    gc.collect()
    with pytest.raises(ValueError, match="there is no lattice"):
        torch.ops.pyseg._dense_crf_messages(energies, number)


def test_infinite_energies_forbid_labels(random):
    image, unary = scene(random)
    allowed = np.isfinite(np.where(random.random(unary.shape) < 0.3, np.inf, unary))
    allowed[0] = True
    unary = np.where(allowed, unary, np.inf).astype(np.float32)

    def run(module):
        crf = module.DenseCRF2D(50, 37, 5)
        crf.setUnaryEnergy(unary)
        crf.addPairwiseGaussian(3, 3.0)
        crf.addPairwiseBilateral(20, 13, image, 5.0)
        return np.array(crf.inference(3)), np.array(stepped(crf))

    whole, steps = run(dcrf)
    for q in (whole, steps):
        assert (q[~allowed] == 0).all()
        np.testing.assert_allclose(q.sum(0), 1, rtol=1e-5)
    np.testing.assert_allclose(whole, steps, atol=1e-5)
    expected = run(peer("densecrf"))
    assert_same(whole, expected[0])
    assert_same(steps, expected[1])


def test_one_forbidden_label():
    crf = dcrf.DenseCRF2D(3, 1, 2)
    crf.setUnaryEnergy(np.array([[0, np.inf, np.inf], [np.inf, 0, 0]], np.float32))
    crf.addPairwiseGaussian(3, 100)
    np.testing.assert_array_equal(crf.inference(5), [[1, 0, 0], [0, 1, 1]])
    assert np.isfinite(crf.klDivergence(crf.inference(5)))


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ([np.nan, 1], "unary energies hold NaN at point 1"),
        ([-np.inf, 1], "unary energies hold -inf at point 1"),
        ([np.inf, np.inf], "unary energies forbid all labels at point 1"),
    ],
)
def test_energies_without_marginals(column, message):
    energies = np.zeros((2, 3), np.float32)
    energies[:, 1] = column
    with pytest.raises(ValueError, match=message):
        dcrf.DenseCRF2D(3, 1, 2).setUnaryEnergy(energies)


def test_messages_show_no_numpy_scalars():
    crf = dcrf.DenseCRF(np.int64(12), np.int64(3))
    with pytest.raises(ValueError, match=r"must be \(3, 12\), got \(3, 7\)"):
        crf.setUnaryEnergy(np.zeros((3, 7)))
    crf = dcrf.DenseCRF2D(np.int64(4), np.int64(3), 3)
    with pytest.raises(ValueError, match=r"rgbim must be \(3, 4, 3\)"):
        crf.addPairwiseBilateral(3, 3, np.zeros((4, 3, 3)), 3)


def test_private_names_of_utils(random):
    image = random.integers(0, 256, (7, 9, 3), dtype=np.uint8)
    np.testing.assert_array_equal(
        utils._create_pairwise_gaussian_2d(3, 2, (7, 9)), create_pairwise_gaussian((3, 2), (7, 9))
    )
    result = utils._create_pairwise_bilateral_2d(3, 2, 13, 14, 15, image)
    expected = create_pairwise_bilateral((3, 2), (13, 14, 15), image, 2)
    np.testing.assert_array_equal(result, expected)
    theirs = peer("utils")._create_pairwise_bilateral_2d(3, 2, 13, 14, 15, image)
    np.testing.assert_allclose(result, theirs, rtol=1e-6)


# -- pydensecrf.eigen


def test_eigen_copies_arrays(random):
    vector = random.standard_normal(3).astype(np.float32)
    matrix = random.standard_normal((3, 5)).astype(np.float32)
    made = eigen.vectorXf(vector), eigen.matrixXf(matrix)
    assert isinstance(made[0], eigen.VectorXf) and isinstance(made[1], eigen.MatrixXf)
    for copied, given in zip(made, (vector, matrix), strict=True):
        np.testing.assert_array_equal(np.array(copied), given)
        assert np.asarray(copied).dtype == np.float32
        before = given.copy()
        given[:] = 0
        np.testing.assert_array_equal(np.asarray(copied), before)
        np.array(copied)[:] = 7  # a copy too
        np.testing.assert_array_equal(np.asarray(copied), before)
    assert np.asarray(made[1], dtype=np.float64).dtype == np.float64
    assert np.asarray(eigen.VectorXf()).shape == (0,)
    assert np.asarray(eigen.MatrixXf()).shape == (0, 0)


@pytest.mark.parametrize("values", [np.zeros((3, 3, 3), np.float32), np.zeros((3, 3)), np.zeros(3)])
def test_eigen_takes_float32_matrices_only(values):
    with pytest.raises(ValueError, match="must be float32 of 2 dimensions"):
        eigen.matrixXf(values)


def test_eigen_takes_contiguous_arrays_only():
    with pytest.raises(ValueError, match="C-contiguous"):
        eigen.matrixXf(np.zeros((3, 4), np.float32).T)
    with pytest.raises(ValueError, match="C-contiguous"):
        eigen.vectorXf(np.zeros(8, np.float32)[::2])


@pytest.mark.parametrize("make", [eigen.vectorXf, eigen.matrixXf])
def test_eigen_takes_no_none(make):
    with pytest.raises(TypeError):
        make(None)
    with pytest.raises(TypeError):
        make([[1.0, 2.0]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda crf: dcrf.DenseCRF(0, 3), "nvar must be at least 1"),
        (lambda crf: dcrf.DenseCRF(9, 256), "nlabels 1 to 255"),
        (lambda crf: crf.setUnaryEnergy(np.zeros((3, 7))), r"must be \(3, 12\), got \(3, 7\)"),
        (lambda crf: crf.setUnaryEnergy(np.zeros((3, 3, 4))), "u must have 2 dimensions"),
        (lambda crf: dcrf.LogisticUnary(np.zeros((3, 7)), np.zeros((6, 12))), "L's columns"),
        (lambda crf: crf.addPairwiseEnergy(np.zeros((2, 7)), 3), r"features must be \(F, 12\)"),
        (lambda crf: crf.addPairwiseGaussian(3, np.zeros(4)), r"compat must be a number, \(3,\)"),
        (lambda crf: crf.addPairwiseGaussian(3, np.zeros((3, 3, 3))), "compat must be a number"),
        (lambda crf: crf.addPairwiseGaussian(3, 3, normalization=4), "4 is not a valid"),
        (lambda crf: crf.addPairwiseGaussian(3, 3, kernel=3), "3 is not a valid"),
        (lambda crf: crf.addPairwiseGaussian(0, 3), "sxy must be positive"),
        (lambda crf: crf.addPairwiseBilateral(3, 3, np.zeros((4, 3, 3)), 3), "rgbim must be"),
        (lambda crf: crf.addPairwiseBilateral(3, (3, 0, 3), np.zeros((3, 4, 3)), 3), "srgb must"),
        (lambda crf: crf.klDivergence(np.zeros((3, 7))), r"Q must be \(3, 12\)"),
        (lambda crf: unary_from_labels(np.array([0, 5]), 3, 0.7), "labels must be 0 to 3"),
        (lambda crf: unary_from_labels(np.array([0.5]), 3, 0.7), "labels must be integers"),
        (lambda crf: unary_from_labels(np.array([0]), 3, 1.0), "gt_prob must be"),
        (lambda crf: unary_from_labels(np.array([0]), 1, 0.7), "n_labels must be at least 2"),
        (lambda crf: unary_from_softmax(np.ones((3, 2)), scale=0), "scale must be"),
        (lambda crf: create_pairwise_gaussian((3,), (3, 4)), "sdims must be 2 numbers"),
        (
            lambda crf: create_pairwise_bilateral((3, 3), (1, 2), np.zeros((3, 4, 3)), 2),
            "schan must be one number or 3",
        ),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call(dcrf.DenseCRF2D(4, 3, 3))
