// The panoptic head of UPSNet on the CPU, with bilinear upsampling and argmax fused: neither
// full-size logits nor a channel per instance exist.
//
// Output rows between the same two rows of logits form a group. Both rows are stretched to the
// output's columns, the lower one to serve as the upper one of the next group; then, tile by tile,
// every output row looks for its best stuff and thing class in registers, and the few instances
// whose boxes meet the tile add theirs.
#include "panoptic_head.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "../common/common.h"
#include "panoptic_head_simd.h"

namespace pyseg::head {
namespace {

constexpr int kRows = 8;

struct Columns {  // where output columns lie between those of the source
  std::vector<int> low, high;
  std::vector<float> t;

  Columns(int64_t inputs, int64_t outputs) : low(outputs), high(outputs), t(outputs) {
    for (int64_t i = 0; i < outputs; ++i) {
      source_index<float>(i, float(inputs) / float(outputs), inputs, &low[i], &t[i]);
      high[i] = std::min<int>(low[i] + 1, int(inputs) - 1);
    }
  }
};

struct Instance {
  int index, label;
  PixelBox box;
  const float* mask;
  std::vector<int> low, high;  // cells of the box's columns that lie on the image, from `first` on
  std::vector<float> t;
  int first;
};

Tensor panoptic_head_cpu(const Tensor& logits,  // [N, C, h, w] float32, stuff classes first
                         const Tensor& masks,   // [N, K, M, M] float32 logits
                         const Tensor& boxes,   // [N, K, 4] float32 xyxy
                         const Tensor& labels,  // [N, K] int64, stuff <= label < C; -1: no instance
                         int64_t stuff, int64_t height, int64_t width) {
  PYSEG_CHECK(logits.dim() == 4 && masks.dim() == 4 && boxes.dim() == 3 && labels.dim() == 2,
              "logits, masks, boxes and labels must have 4, 4, 3 and 2 dimensions");
  const int64_t images = logits.size(0), classes = logits.size(1), low_height = logits.size(2),
                low_width = logits.size(3), instances = masks.size(1), cells = masks.size(2);
  PYSEG_CHECK(masks.size(0) == images && boxes.size(0) == images && labels.size(0) == images &&
                  boxes.size(1) == instances && labels.size(1) == instances && boxes.size(2) == 4 &&
                  masks.size(3) == cells && cells > 0,
              "logits ", shape(logits), ", masks ", shape(masks), ", boxes ", shape(boxes),
              " and labels ", shape(labels), " do not fit together");
  PYSEG_CHECK(
      logits.scalar_type() == ScalarType::Float && masks.scalar_type() == ScalarType::Float &&
          boxes.scalar_type() == ScalarType::Float && labels.scalar_type() == ScalarType::Long,
      "logits, masks and boxes must be float32 and labels int64");
  PYSEG_CHECK(stuff >= 0 && stuff <= classes && classes > 0 && low_height > 0 && low_width > 0,
              "logits ", shape(logits), " must have pixels and at least num_stuff = ", stuff,
              " classes");
  PYSEG_CHECK(height >= 0 && width >= 0 && height < (1 << 24) && width < (1 << 24),
              "size out of range: ", height, " x ", width);
  Tensor out = torch::stable::new_empty(logits, {images, height, width}, ScalarType::Int);
  if (out.numel() == 0) return out;
  const Tensor x = torch::stable::contiguous(logits), m = torch::stable::contiguous(masks),
               b = torch::stable::contiguous(boxes), l = torch::stable::contiguous(labels);
  const int64_t stride =
      (width + kMostLanes - 1) / kMostLanes * kMostLanes;  // whole vectors can be read
  const Columns columns(low_width, width);
  std::vector<int> row_low(height);
  std::vector<float> row_t(height);
  std::vector<int64_t> groups;
  for (int64_t y = 0; y < height; ++y) {
    source_index<float>(y, float(low_height) / float(height), low_height, &row_low[y], &row_t[y]);
    if (groups.empty() || row_low[y] != row_low[groups.back()] || y - groups.back() == kRows)
      groups.push_back(y);
  }
  const int64_t count = int64_t(groups.size());
  groups.push_back(height);

  std::vector<std::vector<Instance>> present(images);
  for (int64_t n = 0; n < images; ++n)
    for (int64_t k = 0; k < instances; ++k) {
      const int64_t label = l.const_data_ptr<int64_t>()[n * instances + k];
      if (label == -1) continue;
      PYSEG_CHECK(label >= stuff && label < classes, "labels[", k, "] of image ", n, " is ", label,
                  ": a thing has a class from num_stuff = ", stuff, " to ", classes - 1);
      Instance instance{};
      instance.index = int(k), instance.label = int(label);
      instance.box = pixel_box(b.const_data_ptr<float>() + (n * instances + k) * 4);
      instance.mask = m.const_data_ptr<float>() + (n * instances + k) * cells * cells;
      const PixelBox& box = instance.box;
      instance.first = std::max(0, box.left);
      const int last = std::min(int(width), box.left + box.width);
      for (int column = instance.first; column < last; ++column) {
        int low;
        float t;
        source_index<float>(column - box.left, float(cells) / float(box.width), cells, &low, &t);
        instance.low.push_back(low), instance.t.push_back(t);
        instance.high.push_back(std::min(low + 1, int(cells) - 1));
      }
      present[n].push_back(std::move(instance));
    }

  const Loops& kernels = *PYSEG_AT_LEVEL(loops);
  const float* const in = x.const_data_ptr<float>();
  int32_t* const target = out.mutable_data_ptr<int32_t>();
  struct Worker {
    // [C, stride] rows of logits stretched to the output's columns.
    std::vector<float> top, bottom, mask_row;
    int64_t bottom_row = -1;  // counted over all images
    Best best;
  };
  std::vector<std::unique_ptr<Worker>> workers(torch::stable::get_num_threads());
  constexpr int64_t kRun = 4;  // groups that follow each other share a row
  const int64_t runs = (count + kRun - 1) / kRun;
  for_each(images * runs, 2 * kRun * kRows * width * (classes + instances),
           [&](int64_t item, int64_t number) {
             if (!workers[number]) {
               workers[number] = std::make_unique<Worker>();
               workers[number]->top.resize(classes * stride),
                   workers[number]->bottom.resize(classes * stride);
               workers[number]->mask_row.resize(cells);
             }
             auto& [top, bottom, mask_row, bottom_row, best] = *workers[number];
             const auto load = [&](int64_t n, int64_t y, std::vector<float>& to) {
               for (int64_t c = 0; c < classes; ++c)
                 kernels.stretch(in + ((n * classes + c) * low_height + y) * low_width,
                                 columns.low.data(), columns.high.data(), columns.t.data(),
                                 int(width), to.data() + c * stride);
             };
             const int64_t begin = item / runs * count + item % runs * kRun;
             const int64_t end = std::min(begin + kRun, (item / runs + 1) * count);
             for (int64_t job = begin; job < end; ++job) {
               const int64_t n = job / count, y = groups[job % count];
               const int64_t upper = row_low[y], lower = std::min(upper + 1, low_height - 1);
               if (bottom_row == n * low_height + upper)
                 top.swap(bottom);
               else
                 load(n, upper, top);
               load(n, lower, bottom);
               bottom_row = n * low_height + lower;
               for (int64_t start = 0; start < width; start += kTile) {
                 const int across = int(std::min<int64_t>(kTile, width - start));
                 for (int64_t row = y; row < groups[job % count + 1]; ++row) {
                   const float ty = row_t[row];
                   kernels.best_classes(top.data() + start, bottom.data() + start, stride,
                                        int(classes), int(stuff), ty, across, &best);
                   std::fill_n(best.value_at, kTile, -1);
                   std::fill_n(best.outside, kTile, -1);
                   std::fill_n(best.inside, kTile, 0.0f);
                   std::fill_n(best.value, kTile, 0.0f);
                   bool all_outside = false;  // every column has an instance elsewhere
                   for (const Instance& instance : present[n]) {
                     const PixelBox& box = instance.box;
                     int from = std::max(0, box.left - int(start));
                     int to = std::min(across, box.left + box.width - int(start));
                     if (!box.has_row(int(row)) || from >= to) from = to = 0;
                     if (!all_outside && to - from < across) {
                       for (int i = 0; i < across; ++i)
                         if ((i < from || i >= to) && best.outside[i] < 0)
                           best.outside[i] = instance.index;
                       all_outside = from == to;
                     }
                     if (from == to) continue;
                     int low;
                     float t;
                     source_index<float>(row - box.top, float(cells) / float(box.height), cells,
                                         &low, &t);
                     const float* const cell_row = instance.mask + low * cells;
                     const float* const next =
                         instance.mask + std::min<int64_t>(low + 1, cells - 1) * cells;
                     for (int64_t i = 0; i < cells; ++i)
                       mask_row[i] = cell_row[i] + t * (next[i] - cell_row[i]);
                     const int skip = int(start) + from - instance.first;
                     kernels.add_instance(top.data() + instance.label * stride + start,
                                          bottom.data() + instance.label * stride + start, ty,
                                          mask_row.data(), instance.low.data() + skip,
                                          instance.high.data() + skip, instance.t.data() + skip,
                                          from, to, instance.index, &best);
                   }
                   kernels.choose(&best, across, int(stuff), int(instances),
                                  target + (n * height + row) * width + start);
                 }
               }
             }
           });
  return out;
}

}  // namespace
}  // namespace pyseg::head

STABLE_TORCH_LIBRARY_FRAGMENT(pyseg, m) {
  m.def(
      "panoptic_head(Tensor logits, Tensor masks, Tensor boxes, Tensor labels, int num_stuff, "
      "SymInt height, SymInt width) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(pyseg, CPU, m) {
  m.impl("panoptic_head", TORCH_BOX(&pyseg::head::panoptic_head_cpu));
}
