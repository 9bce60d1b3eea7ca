// Dense CRF on CUDA: the mean-field inference of dense_crf.cpp on the same lattices. lattice.cuh
// builds these, mean_field.cuh runs the iterations and their gradients.
#include <algorithm>
#include <tuple>
#include <vector>

#include "mean_field.cuh"

namespace {

using namespace pyseg;

// Calls run(lattice, index of the first image), with lattices built, for as many images at once as
// 31 bits number the entries of.
template <class Real, class Run>
void for_images(const Arguments& a, int buffers, cudaStream_t stream, Run run) {
  const int64_t images = a.unary.size(0), height = a.unary.size(2), width = a.unary.size(3);
  const int64_t plane = height * width, classes = a.unary.size(1), planes = a.features.size(1);
  const Lattice<Real> one(a.settings, a.unary, 1, int(classes), height, width, buffers, stream);
  const int64_t entries = one.tiling.tiles() * one.tiling.per_tile();
  PYSEG_CHECK(entries < int64_t(1) << 31, "an image of ", height, " x ", width, " pixels with ",
              one.tiling.entries, " lattice entries each exceeds 2^31 entries: split the image");
  const int64_t most = std::max<int64_t>(
      1, std::min<int64_t>(4096, ((int64_t(1) << 31) - 1) / std::max<int64_t>(1, entries)));
  for (int64_t first = 0; first < images; first += most) {
    Lattice<Real> lattice(a.settings, a.unary, std::min(most, images - first), int(classes), height,
                          width, buffers, stream);
    lattice.build(a.unary.const_data_ptr<Real>() + first * classes * plane,
                  a.features.const_data_ptr<Real>() + first * planes * plane, int(planes),
                  a.weights.const_data_ptr<Real>(), data<Real>(a.compatibility));
    run(lattice, first);
  }
}

template <class Real>
void infer(const Arguments& a, Tensor& q, cudaStream_t stream) {
  const int64_t image = a.unary.size(1) * a.unary.size(2) * a.unary.size(3);
  for_images<Real>(a, 1, stream, [&](const Lattice<Real>& lattice, int64_t first) {
    MeanField<Real>(lattice).infer(a.unary.const_data_ptr<Real>() + first * image,
                                   data<Real>(a.compatibility),
                                   q.mutable_data_ptr<Real>() + first * image);
  });
}

template <class Real>
void backward(const Arguments& a, const Tensor& gradient, Tensor& unary, Tensor& weights,
              Tensor& compatibility, cudaStream_t stream) {
  const int64_t image = a.unary.size(1) * a.unary.size(2) * a.unary.size(3);
  for (Tensor* const tensor : {&weights, &compatibility})
    if (tensor->numel())
      STD_CUDA_CHECK(
          cudaMemsetAsync(tensor->mutable_data_ptr(), 0, tensor->numel() * sizeof(Real), stream));
  for_images<Real>(a, 2, stream, [&](const Lattice<Real>& lattice, int64_t first) {
    MeanField<Real>(lattice).backward(
        a.unary.const_data_ptr<Real>() + first * image, data<Real>(a.compatibility),
        gradient.const_data_ptr<Real>() + first * image,
        unary.mutable_data_ptr<Real>() + first * image, weights.mutable_data_ptr<Real>(),
        compatibility.mutable_data_ptr<Real>());
  });
}

Tensor dense_crf_cuda(const Tensor& unary, const Tensor& features, const Tensor& weights,
                      const std::optional<Tensor>& compatibility, std::vector<int64_t> sizes,
                      std::vector<int64_t> channels, std::vector<double> sigmas, int64_t iterations,
                      int64_t normalization, bool self_term, int64_t passes, double spread,
                      int64_t rings) {
  const DeviceScope device(unary, features, weights, compatibility);
  const Arguments a = check(unary, features, weights, compatibility, sizes, channels, sigmas,
                            iterations, normalization, self_term, passes, spread, rings);
  Tensor q = torch::stable::new_empty(a.unary, a.unary.sizes());
  if (unary.scalar_type() == ScalarType::Float)
    infer<float>(a, q, device.stream);
  else
    infer<double>(a, q, device.stream);
  return q;
}

std::tuple<Tensor, Tensor, Tensor> dense_crf_backward_cuda(
    const Tensor& gradient, const Tensor& unary, const Tensor& features, const Tensor& weights,
    const std::optional<Tensor>& compatibility, std::vector<int64_t> sizes,
    std::vector<int64_t> channels, std::vector<double> sigmas, int64_t iterations,
    int64_t normalization, bool self_term, int64_t passes, double spread, int64_t rings) {
  const DeviceScope device(unary, gradient, features, weights, compatibility);
  const Arguments a = check(unary, features, weights, compatibility, sizes, channels, sigmas,
                            iterations, normalization, self_term, passes, spread, rings);
  PYSEG_CHECK(shape(gradient) == shape(unary) && gradient.scalar_type() == unary.scalar_type(),
              "the gradient must be ", shape(unary), " of unary's dtype, got ", shape(gradient));
  const Tensor g = torch::stable::contiguous(gradient);
  const int64_t labels = compatibility ? unary.size(1) : 0;
  Tensor of_unary = torch::stable::new_empty(a.unary, a.unary.sizes());
  Tensor of_weights = torch::stable::new_empty(a.weights, a.weights.sizes());
  Tensor of_compatibility = torch::stable::new_empty(a.unary, {labels, labels});
  if (unary.scalar_type() == ScalarType::Float)
    backward<float>(a, g, of_unary, of_weights, of_compatibility, device.stream);
  else
    backward<double>(a, g, of_unary, of_weights, of_compatibility, device.stream);
  return {of_unary, of_weights, of_compatibility};
}

}  // namespace

PYSEG_DEVICE_LIBRARY(m) {
  m.impl("dense_crf", TORCH_BOX(&dense_crf_cuda));
  m.impl("dense_crf_backward", TORCH_BOX(&dense_crf_backward_cuda));
}
