"""Segmentation as clustering: pixels, or superpixels, whose features are near make a region."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from skimage import segmentation

if TYPE_CHECKING:
    from sklearn import mixture

from .features import FEATURES, features
from .kmeans import kmeans
from .regions import (
    Image,
    Map,
    RegionModel,
    adjacent,
    at_least,
    connected,
    joined,
    means,
    merge_small,
    one_of,
    renumbered,
    within,
)

Kind = Literal["intensity", "colour", "texture", "textons", "position"]
Choice = Literal["elbow", "silhouette"]
_SILHOUETTE = 2000  # elements whose silhouettes are computed: it takes all pairs


def check_features(values: NDArray[Any]) -> NDArray[np.float64]:
    """Features [N, D] as float64.

    Raises:
        ValueError: another shape, nothing, or values that are not finite.
    """
    checked = np.asarray(values, np.float64)
    if checked.ndim != 2 or 0 in checked.shape:
        raise ValueError(f"features must be [N, D] with N, D > 0, got {list(checked.shape)}")
    wrong = ~np.isfinite(checked).all(1)
    if wrong.any():
        raise ValueError(
            f"features must be finite: {int(wrong.sum())} of {len(checked)} elements hold NaN or "
            f"infinity, the first is element {int(wrong.argmax())}; remove them or fill them in"
        )
    return checked


def distinct(values: NDArray[np.float64], enough: int) -> int:
    """How many different rows there are, up to ``enough``."""
    for part in (values[: 50 * enough], values):
        found = len(np.unique(part, axis=0))
        if found >= enough:
            return enough
    return found


def choose_k(
    values: NDArray[Any],
    method: Choice,
    *,
    most: int = 10,
    seed: int = 0,
    labels: Callable[[NDArray[np.float64], int], NDArray[np.int64]] | None = None,
) -> int:
    """The number of clusters that fits.

    ``"elbow"``: the sum of squares within clusters W(k) falls steeply up to the right k; taken is
    the k whose point is farthest below the line from (1, W(1)) to (most, W(most)), with both axes
    scaled to 0..1. ``"silhouette"``: the k from 2 on with the largest mean of (b - a) / max(a, b),
    with an element's mean distance a from its own cluster and b from the nearest other (Rousseeuw,
    1987), of 2,000 elements drawn.

    Args:
        values: features [N, D].
        method: see above.
        most: largest k that is tried.
        seed: of the draw and of k-means.
        labels: clusters features [N, D] into k, [N]; None = k-means.

    Returns:
        1 where all elements are equal.

    Raises:
        ValueError: features that are not finite, or another method.
    """
    values = check_features(values)
    one_of("method", method, ("elbow", "silhouette"))
    most = min(most, distinct(values, most))
    if most <= 2:
        return most
    if labels is None:

        def labels(given: NDArray[np.float64], k: int) -> NDArray[np.int64]:
            return KMeans(k=k, seed=seed).labels(given)

    found = {k: labels(values, k) for k in range(1 if method == "elbow" else 2, most + 1)}
    if method == "silhouette":
        size = min(_SILHOUETTE, len(values))
        chosen = np.random.default_rng(seed).choice(len(values), size, replace=False)
        return max(found, key=lambda k: _silhouette(values[chosen], found[k][chosen]))
    sums = np.array([_within(values, found[k]) for k in found])
    sums = (sums - sums[-1]) / max(sums[0] - sums[-1], 1e-12)
    line = 1 - np.arange(most) / (most - 1)
    return 1 + int((line - sums).argmax())


def _silhouette(values: NDArray[np.float64], labels: NDArray[np.int64]) -> float:
    if not 1 < len(np.unique(labels)) < len(labels):
        return -1.0
    from sklearn import metrics

    return float(metrics.silhouette_score(values, labels))


def _within(values: NDArray[np.float64], labels: NDArray[np.int64]) -> float:
    """Sum of the squared distances from the clusters' means."""
    centres, _ = means(labels, values)
    return float(np.square(values - centres[labels]).sum())


class Cluster(RegionModel):
    """What the methods of clustering have in common.

    Args:
        features: kinds, see `pyseg_classical.features.features`.
        emphasis: on each of the kinds, which are standardised; () = 1 each.
        superpixels: cluster the mean features of about so many superpixels (SLIC); 0 = all pixels.
        whole: a cluster is one region wherever it lies, not as many as it has connected parts.
        min_size: regions of fewer pixels join the neighbour nearest in colour.
        seed: of all chance.
    """

    most = 0  # elements that the method has time and memory for; 0 = any number

    def __init__(
        self,
        features: Sequence[str],
        emphasis: Sequence[float],
        superpixels: int,
        whole: bool,
        min_size: int,
        seed: int,
    ) -> None:
        kinds = (features,) if isinstance(features, str) else tuple(features)
        for kind in kinds:
            one_of("features", kind, FEATURES)
        if not kinds or len(set(kinds)) < len(kinds):
            raise ValueError(f"features must be different kinds, at least one, got {kinds!r}")
        if emphasis and len(emphasis) != len(kinds):
            raise ValueError(
                f"emphasis must be {len(kinds)} numbers, one for each of features={kinds!r}, got "
                f"{len(emphasis)}"
            )
        self.features = kinds
        self.emphasis = tuple(at_least("emphasis", weight, 0) for weight in emphasis)
        self.superpixels = int(at_least("superpixels", superpixels, 0))
        self.whole, self.min_size = whole, int(at_least("min_size", min_size, 0))
        self.seed = int(at_least("seed", seed, 0))

    def labels(self, values: NDArray[Any], pairs: NDArray[np.int64] | None = None) -> NDArray[Any]:
        """Clusters of any elements.

        Args:
            values: features [N, D].
            pairs: which elements are neighbours, [E, 2], for methods that ask; None = unknown.

        Returns:
            [N] numbers of clusters; negative = noise, in none.

        Raises:
            ValueError: features that are not finite, or more elements than the method can do.
        """
        values = check_features(values)
        if self.most and len(values) > self.most:
            raise ValueError(
                f"{type(self).__name__} takes at most {self.most} elements, got {len(values)}: "
                f"its time or memory grows with their square; set superpixels=1000, or any number "
                f"from 1 to {self.most}"
            )
        return self._cluster(values, pairs)

    def _cluster(self, values: NDArray[np.float64], pairs: Any) -> NDArray[Any]:
        raise NotImplementedError

    def regions(self, image: Image) -> Map:
        shape = image.shape[:2]
        pixels = shape[0] * shape[1]
        if not self.superpixels and self.most and pixels > self.most:
            self.labels(np.zeros((pixels, 1)))  # refuses, before features take their time
        values = features(image, self.features, self.emphasis, seed=self.seed)
        if self.superpixels and self.superpixels < pixels and min(shape) > 1:
            elements = renumbered(segmentation.slic(image, self.superpixels, start_label=0))
            values, _ = means(elements, values)
        else:
            elements = np.arange(pixels).reshape(shape)
            values = values.reshape(pixels, -1)
        found = np.asarray(self.labels(values, adjacent(elements)[0]))[elements]
        if self.whole:
            return found
        # Noise has regions, too: its connected parts.
        return merge_small(connected(found - found.min()), image, self.min_size)


class _CountedCluster(Cluster):
    """Methods that are told how many clusters to make, or find it by `choose_k`."""

    def _count(self, k: int | str, k_max: int) -> None:
        if isinstance(k, str):
            one_of("k", k, ("elbow", "silhouette"))
        else:
            at_least("k", k, 1)
        self.k, self.k_max = k, int(at_least("k_max", k_max, 2))

    def _cluster(self, values: NDArray[np.float64], pairs: Any) -> NDArray[Any]:
        if isinstance(self.k, str):
            k = choose_k(
                values,
                self.k,  # type: ignore[arg-type]
                most=self.k_max,
                seed=self.seed,
                labels=lambda given, count: self._some(given, count, pairs),
            )
        else:
            k = self.k
        return self._some(values, k, pairs)

    def _some(self, values: NDArray[np.float64], k: int, pairs: Any) -> NDArray[Any]:
        """In ``k`` clusters, or as many as there are different elements."""
        k = min(k, distinct(values, k))
        return np.zeros(len(values), np.int64) if k == 1 else self._divided(values, k, pairs)

    def _divided(self, values: NDArray[np.float64], k: int, pairs: Any) -> NDArray[Any]:
        raise NotImplementedError


class KMeans(_CountedCluster):
    """k-means (Lloyd, 1982), from k-means++ starts (Arthur and Vassilvitskii, 2007); compiled.

    It minimises the sum of squared distances from the nearest of k means.

    Args:
        k: clusters, as many as there are different elements where these are fewer; or how their
            number is found: ``"elbow"`` or ``"silhouette"``.
        k_max: the largest that is tried.
        starts: the best of so many is taken, as one may end in a local minimum.
        features: any of "intensity", "colour", "texture", "textons", "position".
        emphasis: on each of the kinds, which are standardised; () = 1 each.
        superpixels: cluster about so many superpixels' means; 0 = all pixels.
        whole: a cluster is one region wherever it lies, not as many as it has connected parts.
        min_size: regions of fewer pixels join the neighbour nearest in colour.
        seed: of the starts.
    """

    def __init__(
        self,
        *,
        k: int | Choice = 5,
        k_max: int = 10,
        starts: int = 5,
        features: Sequence[Kind] = ("colour",),
        emphasis: Sequence[float] = (),
        superpixels: int = 0,
        whole: bool = False,
        min_size: int = 50,
        seed: int = 0,
    ) -> None:
        super().__init__(features, emphasis, superpixels, whole, min_size, seed)
        self._count(k, k_max)
        self.starts = int(at_least("starts", starts, 1))

    def _divided(self, values: NDArray[np.float64], k: int, pairs: Any) -> NDArray[Any]:
        found = [kmeans(values, k, seed=self.seed + start) for start in range(self.starts)]
        return min(found, key=lambda one: one.inertia).labels.astype(np.int64)


class GaussianMixture(_CountedCluster):
    """A mixture of k Gaussians by expectation maximisation (Dempster, Laird and Rubin, 1977).

    Fitted on at most 20,000 elements that are drawn; each element gets its most probable Gaussian.

    Args:
        k: Gaussians; or how their number is found: ``"elbow"`` or ``"silhouette"``.
        covariance: of each: ``"full"``, ``"tied"`` (one for all), ``"diag"`` or ``"spherical"``.
        k_max: the largest that is tried.
        features: any of "intensity", "colour", "texture", "textons", "position".
        emphasis: on each of the kinds, which are standardised; () = 1 each.
        superpixels: cluster about so many superpixels' means; 0 = all pixels.
        whole: a cluster is one region wherever it lies, not as many as it has connected parts.
        min_size: regions of fewer pixels join the neighbour nearest in colour.
        seed: of the draw and the start.
    """

    def __init__(
        self,
        *,
        k: int | Choice = 5,
        covariance: Literal["full", "tied", "diag", "spherical"] = "full",
        k_max: int = 10,
        features: Sequence[Kind] = ("colour",),
        emphasis: Sequence[float] = (),
        superpixels: int = 0,
        whole: bool = False,
        min_size: int = 50,
        seed: int = 0,
    ) -> None:
        super().__init__(features, emphasis, superpixels, whole, min_size, seed)
        self._count(k, k_max)
        self.covariance = one_of("covariance", covariance, ("full", "tied", "diag", "spherical"))

    def _divided(self, values: NDArray[np.float64], k: int, pairs: Any) -> NDArray[Any]:
        return fitted_mixture(values, k, self.covariance, self.seed).predict(values)


def fitted_mixture(
    values: NDArray[np.float64], k: int, covariance: str = "full", seed: int = 0
) -> mixture.GaussianMixture:
    """A mixture of ``k`` Gaussians, fitted on at most 20,000 of the elements [N, D]."""
    chance = np.random.default_rng(seed)
    chosen = chance.choice(len(values), min(len(values), 20_000), replace=False)
    sample = values[np.sort(chosen)]
    from sklearn import mixture

    made = mixture.GaussianMixture(
        min(k, distinct(sample, k)),
        covariance_type=covariance,
        tol=1e-5,
        reg_covar=1e-4,
        max_iter=500,
        random_state=seed,
    )
    return made.fit(sample)


def log_densities(
    fitted: mixture.GaussianMixture, values: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Logarithm of the density of elements [N, D] under each full Gaussian, [N, K], unweighted."""
    found = []
    for mean, root in zip(fitted.means_, fitted.precisions_cholesky_, strict=True):
        distance = np.square((values - mean) @ root).sum(1)
        scale = np.log(np.diag(root)).sum() - values.shape[1] * np.log(2 * np.pi) / 2
        found.append(scale - distance / 2)
    return np.stack(found, 1)


class DBSCAN(Cluster):
    """Clusters where elements are dense (Ester, Kriegel, Sander and Xu, 1996).

    An element with at least ``min_samples`` within ``eps`` is a core; cores within ``eps`` of each
    other are of one cluster, and what is within ``eps`` of a core belongs to its cluster. The rest
    is noise, whose connected parts are regions of their own.

    Args:
        eps: distance of standardised features.
        min_samples: itself included.
        features: any of "intensity", "colour", "texture", "textons", "position".
        emphasis: on each of the kinds, which are standardised; () = 1 each.
        superpixels: cluster about so many superpixels' means; 0 = all pixels.
        whole: a cluster is one region wherever it lies; noise is void.
        min_size: regions of fewer pixels join the neighbour nearest in colour.

    Raises:
        ValueError: in predicting, more than 20,000 elements.
    """

    most = 20_000

    def __init__(
        self,
        *,
        eps: float = 0.15,
        min_samples: int = 4,
        features: Sequence[Kind] = ("colour", "position"),
        emphasis: Sequence[float] = (),
        superpixels: int = 1000,
        whole: bool = False,
        min_size: int = 50,
    ) -> None:
        super().__init__(features, emphasis, superpixels, whole, min_size, 0)
        self.eps = at_least("eps", eps, 1e-9)
        self.min_samples = int(at_least("min_samples", min_samples, 1))

    def _cluster(self, values: NDArray[np.float64], pairs: Any) -> NDArray[Any]:
        from sklearn import cluster

        return cluster.DBSCAN(eps=self.eps, min_samples=self.min_samples).fit_predict(values)


class OPTICS(Cluster):
    """Clusters of different densities (Ankerst, Breunig, Kriegel and Sander, 1999).

    Elements are put in an order in which each follows what it is reached from best; clusters are
    the valleys of the reachability in that order that are steep by ``xi``. The rest is noise, whose
    connected parts are regions of their own.

    Args:
        min_samples: that make an element a core, itself included; fewer where there are fewer.
        xi: least relative steepness of a valley's sides, in 0..1.
        features: any of "intensity", "colour", "texture", "textons", "position".
        emphasis: on each of the kinds, which are standardised; () = 1 each.
        superpixels: cluster about so many superpixels' means; 0 = all pixels.
        whole: a cluster is one region wherever it lies; noise is void.
        min_size: regions of fewer pixels join the neighbour nearest in colour.

    Raises:
        ValueError: in predicting, more than 10,000 elements.
    """

    most = 10_000

    def __init__(
        self,
        *,
        min_samples: int = 5,
        xi: float = 0.05,
        features: Sequence[Kind] = ("colour", "position"),
        emphasis: Sequence[float] = (),
        superpixels: int = 1000,
        whole: bool = False,
        min_size: int = 50,
    ) -> None:
        super().__init__(features, emphasis, superpixels, whole, min_size, 0)
        self.min_samples = int(at_least("min_samples", min_samples, 2))
        self.xi = within("xi", xi, 1e-6, 1 - 1e-6)

    def _cluster(self, values: NDArray[np.float64], pairs: Any) -> NDArray[Any]:
        if distinct(values, 2) < 2:
            return np.zeros(len(values), np.int64)
        samples = min(self.min_samples, len(values))
        # Equal elements have density without limit, and sklearn divides by their distance.
        with np.errstate(divide="ignore", invalid="ignore"):
            from sklearn import cluster

            return cluster.OPTICS(min_samples=samples, xi=self.xi).fit_predict(values)


class Agglomerative(_CountedCluster):
    """Bottom-up clustering: the two nearest clusters become one until k are left.

    Args:
        k: clusters; or how their number is found: ``"elbow"`` or ``"silhouette"``.
        linkage: ``"ward"`` (1963: least growth of the squares within), ``"average"``,
            ``"complete"`` or ``"single"`` distance of elements.
        adjoining: only clusters that touch in the image are merged.
        k_max: the largest that is tried.
        features: any of "intensity", "colour", "texture", "textons", "position".
        emphasis: on each of the kinds, which are standardised; () = 1 each.
        superpixels: cluster about so many superpixels' means; 0 = all pixels.
        whole: a cluster is one region wherever it lies, not as many as it has connected parts.
        min_size: regions of fewer pixels join the neighbour nearest in colour.

    Raises:
        ValueError: in predicting, more than 20,000 elements.
    """

    most = 20_000

    def __init__(
        self,
        *,
        k: int | Choice = 20,
        linkage: Literal["ward", "average", "complete", "single"] = "ward",
        adjoining: bool = True,
        k_max: int = 10,
        features: Sequence[Kind] = ("colour",),
        emphasis: Sequence[float] = (),
        superpixels: int = 1000,
        whole: bool = False,
        min_size: int = 50,
    ) -> None:
        super().__init__(features, emphasis, superpixels, whole, min_size, 0)
        self._count(k, k_max)
        self.linkage = one_of("linkage", linkage, ("ward", "average", "complete", "single"))
        self.adjoining = adjoining

    def _divided(self, values: NDArray[np.float64], k: int, pairs: Any) -> NDArray[Any]:
        links = None
        if self.adjoining and pairs is not None and len(pairs):
            both = np.concatenate([pairs, pairs[:, ::-1]])
            size = (len(values),) * 2
            links = sparse.csr_matrix((np.ones(len(both)), (both[:, 0], both[:, 1])), size)
        from sklearn import cluster

        made = cluster.AgglomerativeClustering(k, linkage=self.linkage, connectivity=links)
        return made.fit_predict(values)


class Birch(_CountedCluster):
    """Clusters of a tree that one pass over the elements builds (Zhang, Ramakrishnan, Livny, 1996).

    The leaves' sub-clusters, within ``threshold``, are merged bottom-up to k.

    Args:
        k: clusters; or how their number is found: ``"elbow"`` or ``"silhouette"``.
        threshold: radius of a sub-cluster, in standardised features.
        branching: sub-clusters of a node.
        k_max: the largest that is tried.
        features: any of "intensity", "colour", "texture", "textons", "position".
        emphasis: on each of the kinds, which are standardised; () = 1 each.
        superpixels: cluster about so many superpixels' means; 0 = all pixels.
        whole: a cluster is one region wherever it lies, not as many as it has connected parts.
        min_size: regions of fewer pixels join the neighbour nearest in colour.
    """

    def __init__(
        self,
        *,
        k: int | Choice = 5,
        threshold: float = 0.1,
        branching: int = 50,
        k_max: int = 10,
        features: Sequence[Kind] = ("colour",),
        emphasis: Sequence[float] = (),
        superpixels: int = 0,
        whole: bool = False,
        min_size: int = 50,
    ) -> None:
        super().__init__(features, emphasis, superpixels, whole, min_size, 0)
        self._count(k, k_max)
        self.threshold = at_least("threshold", threshold, 1e-6)
        self.branching = int(at_least("branching", branching, 2))

    def _divided(self, values: NDArray[np.float64], k: int, pairs: Any) -> NDArray[Any]:
        threshold = self.threshold
        from sklearn import cluster

        while True:  # a tree that is too coarse has fewer leaves than clusters
            tree = cluster.Birch(
                threshold=threshold, branching_factor=self.branching, n_clusters=None
            ).fit(values)
            if len(tree.subcluster_centers_) >= k:
                break
            threshold /= 2
        if len(tree.subcluster_centers_) > k:
            tree.set_params(n_clusters=k)
            tree.partial_fit()
        return tree.predict(values)


class Spectral(_CountedCluster):
    """Clusters by eigenvectors of the graph of neighbours (Ng, Jordan and Weiss, 2001).

    Elements are linked to the nearest ``neighbours`` in features with weight exp(-|x - y|^2 /
    (2 scale^2)), the scale being the median of these distances; k-means of the first k eigenvectors
    of the normalised Laplacian.

    Args:
        k: clusters; or how their number is found: ``"elbow"`` or ``"silhouette"``.
        neighbours: of each element.
        k_max: the largest that is tried.
        features: any of "intensity", "colour", "texture", "textons", "position".
        emphasis: on each of the kinds, which are standardised; () = 1 each.
        superpixels: cluster about so many superpixels' means; 0 = all pixels.
        whole: a cluster is one region wherever it lies, not as many as it has connected parts.
        min_size: regions of fewer pixels join the neighbour nearest in colour.
        seed: of the eigenvectors' start and of k-means.

    Raises:
        ValueError: in predicting, more than 10,000 elements.
    """

    most = 10_000

    def __init__(
        self,
        *,
        k: int | Choice = 8,
        neighbours: int = 12,
        k_max: int = 10,
        features: Sequence[Kind] = ("colour", "position"),
        emphasis: Sequence[float] = (),
        superpixels: int = 1000,
        whole: bool = False,
        min_size: int = 50,
        seed: int = 0,
    ) -> None:
        super().__init__(features, emphasis, superpixels, whole, min_size, seed)
        self._count(k, k_max)
        self.neighbours = int(at_least("neighbours", neighbours, 1))

    def _divided(self, values: NDArray[np.float64], k: int, pairs: Any) -> NDArray[Any]:
        if len(values) <= k:
            return np.arange(len(values))
        from sklearn import neighbors

        near = neighbors.kneighbors_graph(
            values, min(self.neighbours, len(values) - 1), mode="distance"
        )
        scale = max(float(np.median(near.data)), 1e-9)
        near.data = np.maximum(np.exp(-np.square(near.data / scale) / 2), 1e-12)
        weights = near.maximum(near.T)
        # A trace of weight everywhere along a chain: parts that no link joins have no eigenvectors
        # of their own order, and ARPACK is slow to find that out.
        chain = np.arange(len(values) - 1)
        trace = sparse.coo_matrix(
            (np.full(len(chain), 1e-6), (chain, chain + 1)), weights.shape
        ).tocsr()
        from sklearn import cluster

        made = cluster.SpectralClustering(
            k, affinity="precomputed", assign_labels="kmeans", random_state=self.seed
        )
        return made.fit_predict((weights + trace + trace.T).tocsr())


class MeanShiftFeatures(Cluster):
    """Mean shift in feature space: clusters are the modes of the density (Cheng, 1995).

    A start in every occupied cell of a grid as wide as the bandwidth moves to the mean of what is
    within the bandwidth until it rests; elements belong to the nearest mode. `MeanShift` is the
    form for pixels of Comaniciu and Meer.

    Args:
        bandwidth: radius in standardised features; 0 = the mean distance, over 500 elements drawn,
            from the farther of the nearest tenth of them.
        features: any of "intensity", "colour", "texture", "textons", "position".
        emphasis: on each of the kinds, which are standardised; () = 1 each.
        superpixels: cluster about so many superpixels' means; 0 = all pixels.
        whole: a cluster is one region wherever it lies, not as many as it has connected parts.
        min_size: regions of fewer pixels join the neighbour nearest in colour.
        seed: of the draw.

    Raises:
        ValueError: in predicting, more than 5,000 elements.
    """

    most = 5_000

    def __init__(
        self,
        *,
        bandwidth: float = 0.0,
        features: Sequence[Kind] = ("colour", "position"),
        emphasis: Sequence[float] = (),
        superpixels: int = 1000,
        whole: bool = False,
        min_size: int = 50,
        seed: int = 0,
    ) -> None:
        super().__init__(features, emphasis, superpixels, whole, min_size, seed)
        self.bandwidth = at_least("bandwidth", bandwidth, 0)

    def _cluster(self, values: NDArray[np.float64], pairs: Any) -> NDArray[Any]:
        from sklearn import cluster

        bandwidth = self.bandwidth or cluster.estimate_bandwidth(
            values, quantile=0.1, n_samples=min(500, len(values)), random_state=self.seed
        )
        if distinct(values, 2) < 2 or not bandwidth > 0:
            return np.unique(values, axis=0, return_inverse=True)[1].ravel()
        from sklearn import cluster

        return cluster.MeanShift(bandwidth=bandwidth, bin_seeding=True).fit_predict(values)


class MeanShift(RegionModel):
    """Mean shift in position and colour (Comaniciu and Meer, 2002).

    Every pixel moves, in the space of positions and CIELUV colours, to the mean of what is within
    both bandwidths until it rests; neighbours whose resting colours differ by less than the
    bandwidth of the colour are of one region.

    Args:
        spatial: bandwidth of the position, in pixels.
        colour: bandwidth of CIELUV, whose L, u and v are each stretched to 0..255.
        min_size: regions of fewer pixels join the neighbour nearest in colour.
        levels: of a pyramid in which coarse results spare the fine ones steps; 0 = exact.
    """

    def __init__(
        self, *, spatial: int = 8, colour: float = 8.0, min_size: int = 50, levels: int = 0
    ) -> None:
        self.spatial = int(at_least("spatial", spatial, 1))
        self.colour = at_least("colour", colour, 0.1)
        self.min_size = int(at_least("min_size", min_size, 0))
        self.levels = int(within("levels", levels, 0, 8))

    def regions(self, image: Image) -> Map:
        return merge_small(*self.modes(image), self.min_size)

    def modes(self, image: Image) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
        """Regions [H, W] before small ones join, and the image [H, W, 3] in CIELUV."""
        luv = cv2.cvtColor(image, cv2.COLOR_RGB2LUV)
        levels = min(self.levels, int(np.log2(min(image.shape[:2]))))
        rest = cv2.pyrMeanShiftFiltering(luv, self.spatial, self.colour, maxLevel=levels)
        numbers = np.arange(rest[:, :, 0].size).reshape(rest.shape[:2])
        pairs, colours = [], rest.astype(np.int64)
        for axis in (0, 1):
            ahead = np.square(np.diff(colours, axis=axis)).sum(2) < self.colour**2
            moved = np.moveaxis(numbers, axis, 0)
            near = np.moveaxis(ahead, axis, 0)
            pairs.append(np.stack([moved[:-1][near], moved[1:][near]], 1))
        return joined(numbers, np.concatenate(pairs)), luv
