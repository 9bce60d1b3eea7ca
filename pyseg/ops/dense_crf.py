"""Fully connected CRF with Gaussian edge potentials, by mean-field inference."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _native

_native.load()

# Blurs along each axis of the lattice, their outer taps, rings of empty vertices kept around the
# occupied ones. The first is that of Adams et al. (2010) and of pydensecrf; the others were chosen
# by the error against brute force on crops of real images, see tests/ops/test_dense_crf.py.
QUALITY = {"compatible": (1, 0.25, 0), "default": (1, 0.235, 1), "high": (4, 0.19, 2)}
NORMALIZATION = {"none": 0, "symmetric": 1, "before": 2, "after": 3}
X, Y = -2, -1  # channels of a kernel that are no planes of the features
MAX_CLASSES = 256
MAX_FEATURES = 8
MAX_WEIGHT = 1e15
MAX_ITERATIONS = 10_000  # mean field settles within tens of steps


class Kernels(NamedTuple):
    """The Gaussian kernels of a CRF, as the operator takes them."""

    features: Tensor  # [N, F, H, W] every plane that a kernel uses, floating point
    weights: Tensor  # [K]
    sizes: list[int]  # [K] features of each kernel
    channels: list[int]  # of all kernels, one after the other: X, Y or a plane of features
    sigmas: list[float]  # as many: standard deviations in the feature's own unit


def dense_crf(
    unary: Tensor,
    image: Tensor,
    gaussian: Sequence[tuple] = ((3.0, 3.0),),
    bilateral: Sequence[tuple] = ((80.0, 13.0, 10.0),),
    iterations: int = 10,
    *,
    features: Sequence[tuple] = (),
    quality: str = "default",
    normalization: str = "symmetric",
    self_term: bool = True,
    compatibility: Tensor | None = None,
) -> Tensor:
    """Marginals of a fully connected CRF after some mean-field iterations.

    Starts from Q = softmax(-unary); each iteration is Q = softmax(-unary + sum_k w_k K_k Q), where
    K_k is a normalised Gaussian kernel between all pairs of pixels, each pixel with itself
    included unless ``self_term`` is False. The kernels are applied by permutohedral lattices, one
    per kernel.

    The result is the same, bit for bit, for any number of threads, and on CUDA from run to run.

    On CUDA the host waits once for the device, for the number of lattice vertices. A stream that is
    being captured into a CUDA graph does not wait: the graph has room for at least one vertex per
    pixel and kernel, in place of the number that there is; where it is replayed with an image that
    needs more, or whose features span too many cells, it prints so and fails as assertions on the
    device do. NaN or infinity in a tensor then makes the result NaN instead of raising.

    Args:
        unary: [N, C, H, W] energies, -log(probability), C up to 256. float32; float16 and bfloat16
            are computed in float32, float64 in float64.
        image: [N, B, H, W], uint8 or floating point, usually RGB with values 0 to 255; B up to 6.
        gaussian: kernels over position: (sigma_xy, weight), sigma_xy in pixels, one number or
            (sigma_x, sigma_y). Far below a pixel it reaches no neighbour along that axis.
        bilateral: kernels over position and image: (sigma_xy, sigma_rgb, weight), sigma_rgb in the
            image's unit, one number or one per channel.
        iterations: mean-field steps, at most 10,000; 0 returns softmax(-unary), whatever the
            image and features hold.
        features: kernels over anything else: (tensor, sigma, weight) with a floating point tensor
            [N, F, H, W], F from 1 to 8, and one sigma or F of them. For a kernel over position and
            depth the tensor holds x, y and depth.
        quality: of the lattices. "compatible" gives what pydensecrf gives; "default" about halves
            its error against the exact kernel on images at little cost; "high" is closer still,
            and its lattices take several times longer to build.
        normalization: "symmetric", D^-1/2 K D^-1/2 with the row sums D; "before", K D^-1; "after",
            D^-1 K; "none", K itself.
        self_term: whether a pixel is among its own neighbours, as in pydensecrf. False leaves it
            out, as eq. 1 of Krähenbühl & Koltun does, whose sum is over j != i, before the
            normalisation. The lattice's own diagonal is taken from barycentric weights as if no
            vertex were absent, on photographs 1 to 5 % more than it is. Where neighbours sum to
            less than a tenth of that, most would be error: such a pixel counts as alone, and
            neither gets nor sends a message. False takes memory for one more result; the backward
            pass then keeps Q of each iteration.
        compatibility: [C, C] penalty of label i (row) for a neighbour of label j. None is the
            Potts model: a penalty of 1 where the labels differ.

    A weight is a number or a tensor with one element. Gradients flow to unary, to weights and to
    compatibility, through all iterations as in Zheng et al. (2015); there are none for image and
    features, and no second derivatives. The backward pass runs the iterations once more instead of
    keeping Q of each.

    Returns:
        [N, C, H, W] probabilities, of the dtype of unary.

    Raises:
        ValueError: shapes, dtypes or devices do not fit; an image without pixels; a sigma that is
            not positive, or one of image or features so small that the lattice's coordinates
            overflow; NaN or infinity in unary, image or features, weights or penalties that are
            not finite or above 1e15; more than 2^31 lattice entries in an image; image or features
            require a gradient.

    Source:
        Krähenbühl & Koltun, "Efficient inference in fully connected CRFs with Gaussian edge
        potentials", NIPS 2011, and for the normalisation "Parameter learning and convergent
        inference for dense random fields", ICML 2013. Lattice: Adams, Baek & Davis, "Fast
        high-dimensional filtering using the permutohedral lattice", Eurographics 2010. Gradients:
        Zheng et al., "Conditional random fields as recurrent neural networks", ICCV 2015.

    Example:
        >>> unary = -torch.rand(1, 3, 48, 64).softmax(1).log()
        >>> image = torch.randint(0, 256, (1, 3, 48, 64), dtype=torch.uint8)
        >>> dense_crf(unary, image, iterations=5).argmax(1).shape
        torch.Size([1, 48, 64])
    """
    _native.check_tensors(unary=unary, image=image)
    if compatibility is not None:
        _native.check_tensors(compatibility=compatibility)
    if unary.ndim != 4 or not unary.is_floating_point():
        raise ValueError(
            f"unary must be [N, C, H, W] floating point, got {list(unary.shape)} {unary.dtype}"
        )
    classes, height, width = unary.shape[1:]
    if height == 0 or width == 0:
        raise ValueError(f"unary has no pixels: {list(unary.shape)}")
    if not 1 <= classes <= MAX_CLASSES:
        raise ValueError(f"unary must have 1 to {MAX_CLASSES} classes, got {list(unary.shape)}")
    iterations = _native.integer("iterations", iterations)
    if not 0 <= iterations <= MAX_ITERATIONS:
        raise ValueError(f"iterations must be 0 to {MAX_ITERATIONS}, got {iterations}")
    if not isinstance(quality, str) or quality not in QUALITY:
        raise ValueError(f"quality must be one of {', '.join(QUALITY)}, got {quality!r}")
    if not isinstance(normalization, str) or normalization not in NORMALIZATION:
        raise ValueError(
            f"normalization must be one of {', '.join(NORMALIZATION)}, got {normalization!r}"
        )
    self_term = _native.flag("self_term", self_term)
    dtype = torch.float64 if unary.dtype == torch.float64 else torch.float32
    kernels = _kernels(unary, image, gaussian, bilateral, features, dtype)
    if compatibility is not None:
        _check_device("compatibility", compatibility, unary)
        if compatibility.shape != (classes, classes):
            raise ValueError(
                f"compatibility must be [{classes}, {classes}], got {list(compatibility.shape)}"
            )
        compatibility = compatibility.to(dtype)
    _native.require("dense_crf", unary)
    q = torch.ops.pyseg.dense_crf(
        unary.to(dtype),
        kernels.features,
        kernels.weights,
        compatibility,
        kernels.sizes,
        kernels.channels,
        kernels.sigmas,
        iterations,
        NORMALIZATION[normalization],
        self_term,
        *QUALITY[quality],
    )
    return q.to(unary.dtype)


def _check_device(name: str, tensor: Tensor, unary: Tensor) -> None:
    if tensor.device != unary.device:
        raise ValueError(f"unary is on {unary.device}, {name} on {tensor.device}: move one of them")


def _check_planes(name: str, planes: Tensor, unary: Tensor) -> None:
    n, _, h, w = unary.shape
    if planes.ndim != 4 or (planes.shape[0], *planes.shape[2:]) != (n, h, w):
        raise ValueError(
            f"{name} must be [{n}, channels, {h}, {w}] like unary {list(unary.shape)}, got "
            f"{list(planes.shape)}"
        )
    _check_device(name, planes, unary)
    if planes.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} requires a gradient, which dense_crf has not: detach() it")


def _sigmas(name: str, given, count: int) -> list[float]:
    values = list(given) if isinstance(given, Sequence) else [given] * count
    if len(values) != count:
        raise ValueError(f"{name} must be one number or {count}, got {given}")
    values = [_native.number(name, value) for value in values]
    for value in values:
        if not 0 < value < float("inf"):
            raise ValueError(f"{name} must be positive, got {given}")
    return [float(value) for value in values]


def _each(name: str, given, form: str) -> list[tuple]:
    """The kernels of an argument, each as long as ``form``, which says what it consists of."""
    count = form.count(",") + 1
    try:
        kernels = [tuple(kernel) for kernel in given]
    except TypeError:
        raise ValueError(
            f"{name} must be a list of {form}, got a {type(given).__name__} of something else"
        ) from None
    for i, kernel in enumerate(kernels):
        if len(kernel) != count:
            raise ValueError(f"{name}[{i}] must be {form}, got {len(kernel)} values")
    return kernels


def _kernels(unary, image, gaussian, bilateral, features, dtype) -> Kernels:
    """Checks the kernels of `dense_crf` and brings them into the operator's form."""
    weights: list = []
    sizes: list[int] = []
    channels: list[int] = []
    sigmas: list[float] = []
    planes: list[Tensor] = []

    def add(name, weight, kernel_channels, kernel_sigmas):
        if len(kernel_channels) > MAX_FEATURES:
            raise ValueError(
                f"{name} has {len(kernel_channels)} features, at most {MAX_FEATURES} are possible"
            )
        if isinstance(weight, Tensor):
            if weight.numel() != 1:
                raise ValueError(f"{name}: weight must have one element, got {list(weight.shape)}")
            _check_device(f"{name}: weight", weight, unary)
        else:
            weight = _native.number(f"{name}: weight", weight)
            if not abs(weight) <= MAX_WEIGHT:
                raise ValueError(
                    f"{name}: weight must be finite and at most 1e15 in magnitude, got {weight}"
                )
        weights.append(weight)
        sizes.append(len(kernel_channels))
        channels.extend(kernel_channels)
        sigmas.extend(kernel_sigmas)

    _check_planes("image", image, unary)
    for i, kernel in enumerate(_each("gaussian", gaussian, "(sigma_xy, weight)")):
        name = f"gaussian[{i}]"
        sigma_x, sigma_y = _sigmas(f"{name}: sigma_xy", kernel[0], 2)
        # y before x here and below, as in pydensecrf's create_pairwise_*: the lattice is not quite
        # the same in all directions.
        add(name, kernel[1], [Y, X], [sigma_y, sigma_x])
    for i, kernel in enumerate(_each("bilateral", bilateral, "(sigma_xy, sigma_rgb, weight)")):
        name, bands = f"bilateral[{i}]", image.shape[1]
        if bands > MAX_FEATURES - 2:
            raise ValueError(
                f"{name} needs an image of at most {MAX_FEATURES - 2} channels, image has {bands}"
            )
        sigma_x, sigma_y = _sigmas(f"{name}: sigma_xy", kernel[0], 2)
        if not planes:
            planes.append(image)
        sigma_rgb = _sigmas(f"{name}: sigma_rgb", kernel[1], bands)
        add(name, kernel[2], [Y, X, *range(bands)], [sigma_y, sigma_x, *sigma_rgb])
    for i, kernel in enumerate(_each("features", features, "(tensor, sigma, weight)")):
        name, first = f"features[{i}]", sum(p.shape[1] for p in planes)
        _native.check_tensors(**{f"{name}: tensor": kernel[0]})
        _check_planes(name, kernel[0], unary)
        size = kernel[0].shape[1]
        if size == 0:
            raise ValueError(f"{name} has no features: {list(kernel[0].shape)}")
        planes.append(kernel[0])
        add(
            name,
            kernel[2],
            list(range(first, first + size)),
            _sigmas(f"{name}: sigma", kernel[1], size),
        )
    n, _, height, width = unary.shape
    entries = sum(sizes) + len(sizes)
    if height * width * max(entries, 1) >= 2**31:
        raise ValueError(
            f"unary of {height} x {width} pixels with {entries} lattice entries each exceeds 2^31 "
            "entries: split the image or use fewer kernels"
        )
    return Kernels(
        torch.cat([p.to(dtype) for p in planes], 1)
        if planes
        else unary.new_empty((n, 0, height, width), dtype=dtype),
        _stack(weights, unary.device, dtype),
        sizes,
        channels,
        sigmas,
    )


def _stack(weights: list, device, dtype) -> Tensor:
    # full() runs on the device: a tensor made of numbers would be copied there, and waited for.
    scalars = [
        weight.to(dtype).reshape(())
        if isinstance(weight, Tensor)
        else torch.full((), float(weight), device=device, dtype=dtype)
        for weight in weights
    ]
    return torch.stack(scalars) if scalars else torch.empty(0, device=device, dtype=dtype)


class Lattices:
    """The lattices of one image, kept for callers who take single steps with any Q.

    float32 on the CPU, quality "compatible", self terms included. `pyseg.compat.pydensecrf` builds
    on this.

    Args:
        features: (tensor [1, F, H, W] divided by its standard deviations, weight) of each kernel,
            at least one.
        normalization: as for `dense_crf`.
    """

    def __init__(self, features: Sequence[tuple[Tensor, float]], normalization: str) -> None:
        self._arguments = (features, normalization)
        kernels = _kernels(
            features[0][0],
            features[0][0],
            (),
            (),
            [(planes, 1.0, weight) for planes, weight in features],
            torch.float32,
        )
        passes, spread, _ = QUALITY["compatible"]
        self._number: int = torch.ops.pyseg._dense_crf_lattice(
            kernels.features,
            kernels.weights,
            kernels.sizes,
            kernels.channels,
            kernels.sigmas,
            NORMALIZATION[normalization],
            passes,
            spread,
        )
        weakref.finalize(self, torch.ops.pyseg._dense_crf_release, self._number).atexit = False

    def __reduce__(self):
        return type(self), self._arguments  # a copy builds its own

    def messages(self, q: Tensor) -> Tensor:
        """sum_k w_k K_k q, of any numbers ``q`` [1, C, H, W] float32."""
        return torch.ops.pyseg._dense_crf_messages(q, self._number)


@torch.library.register_fake("pyseg::dense_crf")
def _(unary, features, weights, compatibility, *parameters):
    return torch.empty_like(unary, memory_format=torch.contiguous_format)


@torch.library.register_fake("pyseg::_dense_crf_backward")
def _(gradient, unary, features, weights, compatibility, *parameters):
    return (
        torch.empty_like(unary, memory_format=torch.contiguous_format),
        torch.empty_like(weights, memory_format=torch.contiguous_format),
        weights.new_empty((0, 0) if compatibility is None else compatibility.shape),
    )


def _remember(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4])
    ctx.parameters = inputs[4:]


def _backward(ctx, gradient):
    compatibility = ctx.saved_tensors[3]
    if ctx.needs_input_grad[1]:
        raise NotImplementedError("dense_crf has no gradient for image and features: detach() them")
    unary, weights, mixing = torch.ops.pyseg._dense_crf_backward(
        gradient, *ctx.saved_tensors, *ctx.parameters
    )
    rest = (None,) * len(ctx.parameters)
    return unary, None, weights, None if compatibility is None else mixing, *rest


def _backward_twice(ctx, *gradients):
    raise NotImplementedError("dense_crf has no second derivatives")


torch.library.register_autograd("pyseg::dense_crf", _backward, setup_context=_remember)
torch.library.register_autograd("pyseg::_dense_crf_backward", _backward_twice)


def reference(
    unary: Tensor,
    image: Tensor,
    gaussian: Sequence[tuple] = ((3.0, 3.0),),
    bilateral: Sequence[tuple] = ((80.0, 13.0, 10.0),),
    iterations: int = 10,
    *,
    features: Sequence[tuple] = (),
    normalization: str = "symmetric",
    self_term: bool = True,
    compatibility: Tensor | None = None,
) -> Tensor:
    """The same with exact kernels in float64: O(pixels^2) memory, for small images."""
    n, classes, height, width = unary.shape
    u = unary.double().reshape(n, classes, -1)
    kernels = _kernels(unary, image, gaussian, bilateral, features, torch.float64)
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    grid = {X: columns.to(u).reshape(1, -1), Y: rows.to(u).reshape(1, -1)}
    channels, sigmas = list(kernels.channels), list(kernels.sigmas)
    total = u.new_zeros(())
    for k, size in enumerate(kernels.sizes):
        scaled = []
        for channel, sigma in zip(channels[:size], sigmas[:size], strict=True):
            plane = kernels.features[:, channel].flatten(1) if channel >= 0 else grid[channel]
            scaled.append((plane / sigma).expand(n, -1))
        del channels[:size], sigmas[:size]
        points = torch.stack(scaled, -1)
        # The other modes of cdist lose digits where points are close.
        mode = "donot_use_mm_for_euclid_dist"
        kernel = torch.cdist(points, points, compute_mode=mode).square_().mul_(-0.5).exp_()
        if not self_term:
            kernel.diagonal(dim1=1, dim2=2).zero_()
        sums = kernel.sum(2) + 1e-20  # a row without neighbours stays 0
        if normalization == "symmetric":
            kernel *= sums.rsqrt()[:, :, None]
            kernel *= sums.rsqrt()[:, None]
        elif normalization == "before":
            kernel /= sums[:, None]
        elif normalization == "after":
            kernel /= sums[:, :, None]
        total = total + kernels.weights[k] * kernel
    q = torch.softmax(-u, 1)
    for _ in range(iterations if kernels.sizes else 0):
        message = q @ total.mT
        if compatibility is not None:
            message = -(compatibility.double() @ message)
        q = torch.softmax(message - u, 1)
    return q.reshape(unary.shape)
