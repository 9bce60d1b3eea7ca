"""Clustering: known clusters, the libraries' own results, and bad input."""

import numpy as np
import pytest
from pyseg_classical import clusters
from pyseg_classical.clusters import (
    DBSCAN,
    OPTICS,
    Agglomerative,
    Birch,
    GaussianMixture,
    KMeans,
    MeanShift,
    MeanShiftFeatures,
    Spectral,
    choose_k,
)
from pyseg_classical.features import features, filter_bank, responses, texton_map
from scipy import ndimage, stats
from sklearn import metrics

import pyseg
from pyseg.errors import SpecError

COUNTED = [KMeans, GaussianMixture, Agglomerative, Birch, Spectral]
OTHERS = [
    DBSCAN(eps=0.8, superpixels=0),
    OPTICS(superpixels=0, min_samples=8),
    MeanShiftFeatures(bandwidth=2.0, superpixels=0),
]


@pytest.fixture(scope="module")
def blobs():
    """180 points of 4 Gaussians that do not touch: features [180, 2] and their origins."""
    chance = np.random.default_rng(0)
    centres = np.array([[0, 0], [8, 1], [1, 9], [9, 8]])
    truth = np.repeat(np.arange(4), 45)
    return centres[truth] + chance.normal(0, 0.5, (180, 2)), truth


@pytest.mark.parametrize("made", COUNTED)
def test_blobs_by_their_number(made, blobs):
    values, truth = blobs
    found = made(k=4).labels(values)
    assert metrics.adjusted_rand_score(truth, found) == 1


@pytest.mark.parametrize("model", OTHERS, ids=lambda model: type(model).__name__)
def test_blobs_by_their_density(model, blobs):
    values, truth = blobs
    found = model.labels(values)
    clustered = found >= 0
    assert clustered.mean() > 0.5
    assert metrics.adjusted_rand_score(truth[clustered], found[clustered]) > 0.9


def test_dbscan_by_its_definition():
    values = np.random.default_rng(2).random((150, 2))
    eps, least = 0.08, 5
    near = np.square(values[:, None] - values[None]).sum(2) <= eps**2
    core = near.sum(1) >= least
    found = DBSCAN(eps=eps, min_samples=least).labels(values)
    assert ((found == -1) == ~(near & core[None]).any(1)).all()
    for i in np.flatnonzero(core):  # cores within reach are of one cluster, and of one only
        assert (found[near[i] & core] == found[i]).all()
    for i in np.flatnonzero(~core & (found >= 0)):
        assert found[i] in found[near[i] & core]


@pytest.mark.parametrize("method", ["elbow", "silhouette"])
def test_the_number_of_clusters_is_found(method, blobs):
    values, truth = blobs
    assert choose_k(values, method, most=8) == 4
    found = Agglomerative(k=method).labels(values)
    assert metrics.adjusted_rand_score(truth, found) == 1


def test_silhouette_by_its_formula(blobs):
    values, _ = blobs
    values, scores = values[::4], {}
    distance = np.sqrt(np.square(values[:, None] - values[None]).sum(2))
    for k in range(2, 7):
        labels = KMeans(k=k).labels(values)
        each = []
        for i, own in enumerate(labels):
            same = (labels == own) & (np.arange(len(labels)) != i)
            if not same.any():
                each.append(0)
                continue
            a = distance[i, same].mean()
            b = min(distance[i, labels == c].mean() for c in set(labels) - {own})
            each.append((b - a) / max(a, b))
        scores[k] = np.mean(each)
    assert choose_k(values, "silhouette", most=6) == max(scores, key=scores.get)


def test_one_kind_of_element_is_one_cluster():
    assert choose_k(np.ones((9, 3)), "elbow") == 1
    assert choose_k(np.ones((9, 3)), "silhouette") == 1


@pytest.mark.parametrize("made", COUNTED)
def test_more_clusters_than_distinct_elements(made):
    values = np.repeat([[0.0, 1.0], [5.0, 5.0], [9.0, 0.0]], 7, 0)
    found = made(k=8).labels(values)
    assert metrics.adjusted_rand_score(np.repeat([0, 1, 2], 7), found) == 1
    assert (made(k=8).labels(np.ones((5, 2))) == 0).all()


@pytest.mark.parametrize(
    "model", [*(made() for made in COUNTED), *OTHERS], ids=lambda model: type(model).__name__
)
def test_bad_features_are_refused(model):
    values = np.random.default_rng(0).random((20, 2))
    values[7, 1], values[9, 0] = np.nan, np.inf
    with pytest.raises(ValueError, match=r"2 of 20 elements hold NaN or infinity.*element 7"):
        model.labels(values)
    with pytest.raises(ValueError, match=r"features must be \[N, D\] with N, D > 0, got \[0, 2\]"):
        model.labels(np.zeros((0, 2)))


@pytest.mark.parametrize("made", [DBSCAN, OPTICS, Agglomerative, Spectral, MeanShiftFeatures])
def test_too_many_elements_are_refused_at_once(made):
    image = np.zeros((400, 400, 3), np.uint8)
    with pytest.raises(ValueError, match=r"takes at most .* got 160000.*set superpixels=1000"):
        made(superpixels=0).regions(image)


def test_a_wide_and_a_narrow_gaussian_are_found():
    chance = np.random.default_rng(0)
    values = np.concatenate([chance.normal(0, 0.3, (2000, 1)), chance.normal(2, 4, (2000, 1))])
    fitted = clusters.fitted_mixture(values, 2)
    assert np.sort(np.sqrt(fitted.covariances_.ravel())) == pytest.approx([0.3, 4], rel=0.1)
    density = clusters.log_densities(fitted, values[:5])
    for k in range(2):
        normal = stats.multivariate_normal(fitted.means_[k], fitted.covariances_[k])
        np.testing.assert_allclose(density[:, k], normal.logpdf(values[:5]))


# ------------------------------------------------------------------------------ features, images


def test_the_filter_bank_is_24_filters():
    bank = filter_bank()
    assert len(bank) == 24
    for kernel in bank[:20]:
        assert abs(kernel.sum()) < 1e-5
    for kernel in bank:
        assert np.abs(kernel).sum() == pytest.approx(1, abs=1e-4)
    image = np.random.default_rng(0).integers(0, 256, (30, 34, 3)).astype(np.uint8)
    found = responses(image)
    values = (image @ [299, 587, 114] + 500) // 1000 / 255
    for k, kernel in enumerate(bank):
        expected = ndimage.correlate(values, kernel.astype(float), mode="reflect")
        np.testing.assert_allclose(found[:, :, k], expected, atol=1e-5)


def stripes(colours):
    rows, columns = np.mgrid[:48, :96]
    left = (columns // 3) % 2
    right = (rows // 3) % 2
    return colours(100 + 60 * np.where(columns < 48, left, right))


@pytest.mark.parametrize("kind", ["texture", "textons"])
def test_texture_tells_stripes_apart(kind, colours):
    found = KMeans(k=2, features=(kind,), whole=True).regions(stripes(colours))
    truth = np.mgrid[:48, :96][1] >= 48
    agree = (found == truth).mean()
    assert max(agree, 1 - agree) > 0.95
    assert len(np.unique(texton_map(stripes(colours)))) > 3


def test_features_are_standardised_by_kind():
    image = np.random.default_rng(0).integers(0, 256, (20, 24, 3)).astype(np.uint8)
    found = features(image, ("intensity", "colour", "position"), (1, 2, 0.5))
    spread = np.square(found).mean((0, 1))
    assert found.shape == (20, 24, 6)
    np.testing.assert_allclose(found.mean((0, 1)), 0, atol=1e-9)
    for part, size in ((spread[:1], 1), (spread[1:4], 2), (spread[4:], 0.5)):
        assert part.sum() == pytest.approx(size**2)
    flat = features(np.zeros((4, 5, 3), np.uint8), ("colour", "texture", "textons"))
    assert (flat == 0).all()


@pytest.mark.parametrize("made", [*COUNTED, MeanShift, MeanShiftFeatures, DBSCAN])
def test_flags_are_parted_by_colour(made):
    image = np.zeros((40, 60, 3), np.uint8)
    image[:, :20], image[:, 20:40], image[:, 40:] = (200, 20, 30), (240, 240, 240), (20, 40, 160)
    image = (image + np.random.default_rng(0).integers(0, 6, image.shape)).astype(np.uint8)
    options = {"k": 3} if made in COUNTED else {}
    if made is not MeanShift:
        options |= {"features": ("colour",), "superpixels": 200}
    if made is MeanShiftFeatures:
        options["bandwidth"] = 0.5
    if made is Spectral:  # between parts that no neighbour links there is nothing else to cut
        options["neighbours"] = 90
    found = made(**options).regions(image)
    assert len(np.unique(found)) == 3
    for start in (0, 20, 40):
        assert len(np.unique(found[:, start + 2 : start + 18])) == 1


def test_mean_shift_regions_are_flat_zones_of_the_filter(colours):
    values = np.kron([[60, 60, 160], [60, 200, 160]], np.ones((20, 20)))
    found = MeanShift(min_size=0).regions(colours(values))
    assert len(np.unique(found)) == 3
    assert len(np.unique(np.stack([values, found]).reshape(2, -1), axis=1).T) == 3
    assert (MeanShift().regions(colours(np.full((1, 5), 3))) == 0).all()


def test_refusals_of_clusters():
    with pytest.raises(SpecError, match=r"option features must be|features must be"):
        pyseg.build("kmeans(features=('colour', 'depth'))")
    with pytest.raises(SpecError, match="features must be different kinds"):
        pyseg.build("kmeans(features=('colour', 'colour'))")
    with pytest.raises(SpecError, match=r"emphasis must be 1 numbers.*got 2"):
        pyseg.build("kmeans(emphasis=(1.0, 2.0))")
    with pytest.raises(SpecError, match="k must be 1 or more, got 0"):
        pyseg.build("kmeans(k=0)")
    with pytest.raises(SpecError, match="option k must be"):
        pyseg.build("kmeans(k='gap')")
