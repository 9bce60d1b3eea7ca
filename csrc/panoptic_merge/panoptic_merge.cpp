// Heuristic panoptic merge on the CPU (Kirillov et al., "Panoptic segmentation", 2019).
//
// Whether an instance stays depends on those accepted before it, so this is sequential in the
// instances; but only one bit per pixel matters. First all masks turn into bits, in parallel, a
// band of pixels at a time, and of each band only what is not empty is kept. Deciding then takes
// a few microseconds per instance. Last, in parallel again, the map is written once.
#include "panoptic_merge.h"

#include <algorithm>
#include <numeric>
#include <optional>
#include <vector>

#include "../common/common.h"
#include "panoptic_merge_simd.h"

namespace pyseg::merging {
namespace {

constexpr int64_t kBand = 1 << 15;  // pixels; a multiple of 64
constexpr int64_t kBandWords = kBand / 64;
constexpr int64_t kMaxLabel = 1 << 16;

// One image's problem.
struct Image {
  int64_t height, width, instances;
  const void* masks;   // [K, H, W] bytes; or [K, M, M] float probabilities with boxes
  const float* boxes;  // [K, 4] or null
  int64_t cells;       // M
  const float* scores;
  const int64_t* labels;
  const void* semantic;  // [H, W]
  int32_t* map;          // [H, W]
  int64_t* table;        // [K + stuff, 4]: id, label, area, instance (-1: stuff)
};

struct Thresholds {
  double score, overlap;
  int64_t stuff_area;
  float mask;
};

// The words of one instance in one band, without empty ones at both ends.
struct Piece {
  int first = 0;  // word in the band
  std::vector<uint64_t> words;
};

class Merge {
 public:
  Merge(const Image& image, const std::vector<int64_t>& stuff, const Thresholds& thresholds)
      : image_(image), stuff_(stuff), thresholds_(thresholds) {
    pixels_ = image.height * image.width;
    bands_ = (pixels_ + kBand - 1) / kBand;
    for (int64_t k = 0; k < image.instances; ++k)
      if (image.scores[k] >= thresholds.score) order_.push_back(k);
    std::stable_sort(order_.begin(), order_.end(),
                     [&](int64_t a, int64_t b) { return image.scores[a] > image.scores[b]; });
  }

  template <class Label>
  void run() {
    if (image_.boxes)
      pack_boxes();
    else
      pack_masks();
    decide();
    write<Label>();
  }

 private:
  int64_t band_pixels(int64_t band) const { return std::min(kBand, pixels_ - band * kBand); }
  Piece& piece(int64_t rank, int64_t band) { return pieces_[rank * bands_ + band]; }

  static void keep(const uint64_t* words, int64_t count, Piece& piece) {
    int64_t begin = 0, end = count;
    while (begin < end && words[begin] == 0) ++begin;
    while (end > begin && words[end - 1] == 0) --end;
    piece.first = int(begin);
    piece.words.assign(words + begin, words + end);
  }

  void pack_masks() {
    const auto* const masks = static_cast<const uint8_t*>(image_.masks);
    pieces_.resize(order_.size() * bands_);
    std::vector<int64_t> areas(pieces_.size());
    for_each(int64_t(pieces_.size()), band_pixels(0) / 8, [&](int64_t job, int64_t) {
      uint64_t words[kBandWords];
      const int64_t rank = job / bands_, band = job % bands_, count = band_pixels(band);
      areas[job] = pack_(masks + order_[rank] * pixels_ + band * kBand, count, words);
      if (areas[job]) keep(words, (count + 63) / 64, pieces_[job]);
    });
    areas_.assign(order_.size(), 0);
    for (size_t job = 0; job < areas.size(); ++job) areas_[job / bands_] += areas[job];
  }

  void pack_boxes() {
    pieces_.resize(order_.size() * bands_);
    areas_.assign(order_.size(), 0);
    std::vector<int64_t> costs(order_.size());  // pixels of the boxes
    for (size_t rank = 0; rank < order_.size(); ++rank) costs[rank] = box_pixels(rank);
    const int64_t all = std::accumulate(costs.begin(), costs.end(), int64_t(0));
    const int64_t items = int64_t(order_.size());
    for_each(items, 8 * all / std::max<int64_t>(1, items), [&](int64_t rank, int64_t) {
      uint64_t words[kBandWords];
      areas_[rank] = pack_box(rank, words);
    });
  }

  int64_t box_pixels(int64_t rank) const {
    const float* const box = image_.boxes + 4 * order_[rank];
    const CellRange columns = pixels_of_box(box[0], box[2], int(image_.cells), int(image_.width));
    const CellRange rows = pixels_of_box(box[1], box[3], int(image_.cells), int(image_.height));
    return int64_t(std::max(0, columns.last - columns.first)) * std::max(0, rows.last - rows.first);
  }

  int64_t pack_box(int64_t rank, uint64_t* words) {
    const int64_t cells = image_.cells, padded = cells + 4, width = image_.width;
    const float* const box = image_.boxes + 4 * order_[rank];
    const CellRange columns = pixels_of_box(box[0], box[2], int(cells), int(width));
    const CellRange rows = pixels_of_box(box[1], box[3], int(cells), int(image_.height));
    const int64_t across = columns.last - columns.first;
    if (across <= 0 || rows.last <= rows.first) return 0;
    // Zeros all around: cell c is at c + 2, so that -2 and its neighbour -1 are zeros too.
    std::vector<float> mask(padded * padded), row(padded);
    const float* const source =
        static_cast<const float*>(image_.masks) + order_[rank] * cells * cells;
    for (int64_t y = 0; y < cells; ++y)
      std::copy_n(source + y * cells, cells, mask.data() + (y + 2) * padded + 2);
    std::vector<int> cell(across);
    std::vector<float> tx(across);
    for (int64_t i = 0; i < across; ++i)
      cell[i] = cell_of_pixel(int(columns.first + i), box[0], box[2], int(cells), &tx[i]);
    std::vector<uint8_t> inside(across + 64);
    int64_t area = 0, band = -1;
    const auto finish = [&] {
      if (band < 0) return;
      const int64_t count = (band_pixels(band) + 63) / 64;
      keep(words, count, piece(rank, band));
    };
    std::vector<uint64_t> bits(across / 64 + 2);
    for (int64_t y = rows.first; y < rows.last; ++y) {
      float ty;
      const int low = cell_of_pixel(int(y), box[1], box[3], int(cells), &ty);
      if (low == -2) continue;
      threshold_row_(mask.data() + (low + 2) * padded, mask.data() + (low + 3) * padded, ty,
                     cell.data(), tx.data(), across, thresholds_.mask, cells, row.data(),
                     inside.data());
      const int64_t set = pack_(inside.data(), across, bits.data());
      if (set == 0) continue;
      area += set;
      const int64_t start = y * width + columns.first;
      for (int64_t i = 0; i < across; i += 64) {  // shifted into the words of the image
        const uint64_t word = bits[i / 64];
        if (word == 0) continue;
        const int64_t at = start + i;
        for (int half = 0; half < 2; ++half) {
          const int64_t target = at / 64 + half;
          const int shift = int(at % 64);
          const uint64_t part = half == 0 ? word << shift : shift ? word >> (64 - shift) : 0;
          if (part == 0) continue;
          if (target / kBandWords != band) {
            finish();
            band = target / kBandWords;
            std::fill_n(words, kBandWords, uint64_t(0));
          }
          words[target % kBandWords] |= part;
        }
      }
    }
    finish();
    return area;
  }

  // Who stays, in the order of scores; their pieces shrink to the pixels that they get.
  void decide() {
    taken_.assign(bands_ * kBandWords, 0);
    int64_t* row = image_.table;
    for (size_t rank = 0; rank < order_.size(); ++rank) {
      if (areas_[rank] == 0) continue;
      int64_t covered = 0;
      for (int64_t band = 0; band < bands_; ++band) {
        const Piece& part = piece(rank, band);
        const uint64_t* taken = taken_.data() + band * kBandWords + part.first;
        for (size_t i = 0; i < part.words.size(); ++i)
          covered += __builtin_popcountll(part.words[i] & taken[i]);
      }
      if (double(covered) / double(areas_[rank]) > thresholds_.overlap) continue;
      if (covered == areas_[rank]) continue;
      for (int64_t band = 0; band < bands_; ++band) {
        Piece& part = piece(rank, band);
        uint64_t* const taken = taken_.data() + band * kBandWords + part.first;
        for (size_t i = 0; i < part.words.size(); ++i) {
          part.words[i] &= ~taken[i];
          taken[i] |= part.words[i];
        }
      }
      accepted_.push_back(rank);
      const int64_t instance = order_[rank];
      *row++ = int64_t(accepted_.size());
      *row++ = image_.labels[instance];
      *row++ = areas_[rank] - covered;
      *row++ = instance;
    }
  }

  template <class Label>
  void write() {
    // Counts of the stuff classes on the pixels that are left.
    const auto* const semantic = static_cast<const Label*>(image_.semantic);
    const int64_t limit = sizeof(Label) == 1 ? 256 : kMaxLabel;
    std::vector<int32_t> slot(limit, 0);  // label -> 1 + its place among the stuff classes
    for (size_t s = 0; s < stuff_.size(); ++s)
      if (stuff_[s] < limit) slot[stuff_[s]] = int32_t(s) + 1;
    const int64_t slots = int64_t(stuff_.size()) + 1;
    std::vector<int64_t> counts(bands_ * slots);
    const auto slot_of = [&](Label label) {
      return uint64_t(int64_t(label)) < uint64_t(limit) ? slot[label] : 0;
    };
    for_each(bands_, band_pixels(0), [&](int64_t band, int64_t) {
      int64_t* const own = counts.data() + band * slots;
      const Label* const labels = semantic + band * kBand;
      for (int64_t i = 0; i < band_pixels(band); i += 64) {
        const int64_t count = std::min<int64_t>(64, band_pixels(band) - i);
        uint64_t free = ~taken_[band * kBandWords + i / 64];
        if (count < 64) free &= (uint64_t(1) << count) - 1;
        if (count == 64 && all_equal(labels + i))
          own[slot_of(labels[i])] += __builtin_popcountll(free);
        else
          for (; free; free &= free - 1) ++own[slot_of(labels[i + __builtin_ctzll(free)])];
      }
    });
    std::vector<int32_t> ids(slots, 0);
    int64_t next = int64_t(accepted_.size());
    for (int64_t s = 1; s < slots; ++s) {
      int64_t area = 0;
      for (int64_t band = 0; band < bands_; ++band) area += counts[band * slots + s];
      if (area == 0 || area < thresholds_.stuff_area) continue;
      int64_t* const row = image_.table + next * 4;
      ids[s] = int32_t(++next);
      row[0] = next, row[1] = stuff_[s - 1], row[2] = area, row[3] = -1;
    }
    for_each(bands_, band_pixels(0), [&](int64_t band, int64_t) {
      const Label* const labels = semantic + band * kBand;
      int32_t* const map = image_.map + band * kBand;
      const int64_t pixels = band_pixels(band);
      for (int64_t i = 0; i < pixels; i += 64) {
        const int64_t count = std::min<int64_t>(64, pixels - i);
        if (count == 64 && all_equal(labels + i))
          std::fill_n(map + i, 64, ids[slot_of(labels[i])]);
        else
          for (int64_t k = i; k < i + count; ++k) map[k] = ids[slot_of(labels[k])];
      }
      for (size_t n = 0; n < accepted_.size(); ++n) {
        const Piece& part = piece(accepted_[n], band);
        for (size_t w = 0; w < part.words.size(); ++w) {
          int32_t* const at = map + (part.first + w) * 64;
          uint64_t word = part.words[w];
          if (word == ~uint64_t(0))
            std::fill_n(at, 64, int32_t(n) + 1);
          else
            for (; word; word &= word - 1) at[__builtin_ctzll(word)] = int32_t(n) + 1;
        }
      }
    });
  }

  template <class Label>
  static PYSEG_INLINE bool all_equal(const Label* labels) {
    Label differ = 0;
    for (int i = 1; i < 64; ++i) differ |= labels[i] ^ labels[0];
    return differ == 0;
  }

  // of the level in force, chosen here as no thread may throw
  const decltype(PYSEG_AT_LEVEL(pack)) pack_ = PYSEG_AT_LEVEL(pack);
  const decltype(PYSEG_AT_LEVEL(threshold_row)) threshold_row_ = PYSEG_AT_LEVEL(threshold_row);
  const Image image_;
  const std::vector<int64_t>& stuff_;
  const Thresholds thresholds_;
  int64_t pixels_, bands_;
  std::vector<int64_t> order_;     // instances by score
  std::vector<int64_t> areas_;     // of those
  std::vector<Piece> pieces_;      // [order, bands]
  std::vector<int64_t> accepted_;  // their ranks
  std::vector<uint64_t> taken_;    // bits of the pixels that instances have
};

std::tuple<Tensor, Tensor> panoptic_merge_cpu(
    const Tensor& masks,                 // [N, K, H, W] bool; with boxes [N, K, M, M] probabilities
    const std::optional<Tensor>& boxes,  // [N, K, 4] xyxy
    const Tensor& scores,                // [N, K] float32
    const Tensor& labels,                // [N, K] int64
    const Tensor& semantic,              // [N, H, W] integer
    std::vector<int64_t> stuff_classes, double score_threshold, double overlap_threshold,
    int64_t stuff_area, double mask_threshold) {
  PYSEG_CHECK(masks.dim() == 4 && semantic.dim() == 3,
              "masks must be [N, K, h, w] and semantic "
              "[N, H, W], got ",
              shape(masks), " and ", shape(semantic));
  const int64_t images = masks.size(0), instances = masks.size(1);
  const int64_t height = semantic.size(1), width = semantic.size(2);
  PYSEG_CHECK(semantic.size(0) == images && scores.dim() == 2 && scores.size(0) == images &&
                  scores.size(1) == instances && labels.dim() == 2 && labels.size(0) == images &&
                  labels.size(1) == instances,
              "masks ", shape(masks), ", scores ", shape(scores), ", labels ", shape(labels),
              " and semantic ", shape(semantic), " do not fit together");
  PYSEG_CHECK(scores.scalar_type() == ScalarType::Float && labels.scalar_type() == ScalarType::Long,
              "scores must be float32 and labels int64");
  if (boxes) {
    PYSEG_CHECK(masks.scalar_type() == ScalarType::Float &&
                    boxes->scalar_type() == ScalarType::Float && boxes->dim() == 3 &&
                    boxes->size(0) == images && boxes->size(1) == instances &&
                    boxes->size(2) == 4 && masks.size(2) == masks.size(3) && masks.size(2) > 0,
                "with boxes [N, K, 4] masks must be square, [N, K, M, M] float32; got ",
                shape(*boxes), " and ", shape(masks));
  } else {
    PYSEG_CHECK(masks.scalar_type() == ScalarType::Bool && masks.size(2) == height &&
                    masks.size(3) == width,
                "masks must be bool of the size of semantic ", shape(semantic), ", got ",
                shape(masks));
  }
  PYSEG_CHECK(height * width < (int64_t(1) << 31),
              "an image must have fewer than 2^31 pixels, got ", shape(semantic));
  PYSEG_CHECK(stuff_classes.size() <= size_t(kMaxStuff), "at most ", kMaxStuff,
              " stuff_classes are possible, got ", stuff_classes.size());
  for (const int64_t label : stuff_classes)
    PYSEG_CHECK(label >= 0 && label < kMaxLabel, "stuff_classes must be 0 to ", kMaxLabel - 1,
                ", got ", label);
  const Tensor m = torch::stable::contiguous(masks), s = torch::stable::contiguous(scores),
               l = torch::stable::contiguous(labels), c = torch::stable::contiguous(semantic);
  std::optional<Tensor> b;
  if (boxes) b = torch::stable::contiguous(*boxes);
  const int64_t rows = instances + int64_t(stuff_classes.size());
  Tensor map = torch::stable::new_empty(c, {images, height, width}, ScalarType::Int);
  Tensor table = torch::stable::new_empty(c, {images, rows, 4}, ScalarType::Long);
  int64_t* const table_data = table.mutable_data_ptr<int64_t>();
  std::fill_n(table_data, table.numel(), int64_t(0));
  const Thresholds thresholds{score_threshold, overlap_threshold, stuff_area,
                              float(mask_threshold)};
  for (int64_t n = 0; n < images; ++n) {
    Image image{};
    image.height = height, image.width = width, image.instances = instances;
    const int64_t mask_bytes = instances * m.size(2) * m.size(3) * (boxes ? sizeof(float) : 1);
    image.masks = static_cast<const uint8_t*>(m.const_data_ptr()) + n * mask_bytes;
    if (b) image.boxes = b->const_data_ptr<float>() + n * instances * 4, image.cells = m.size(2);
    image.scores = s.const_data_ptr<float>() + n * instances;
    image.labels = l.const_data_ptr<int64_t>() + n * instances;
    image.map = map.mutable_data_ptr<int32_t>() + n * height * width;
    image.table = table_data + n * rows * 4;
    const auto run = [&]<class Label>(Label) {
      image.semantic = static_cast<const Label*>(c.const_data_ptr()) + n * height * width;
      Merge(image, stuff_classes, thresholds).run<Label>();
    };
    switch (c.scalar_type()) {
      case ScalarType::Byte: run(uint8_t()); break;
      case ScalarType::Short: run(int16_t()); break;
      case ScalarType::Int: run(int32_t()); break;
      case ScalarType::Long: run(int64_t()); break;
      default: PYSEG_CHECK(false, "semantic must be uint8, int16, int32 or int64");
    }
  }
  return {map, table};
}

}  // namespace
}  // namespace pyseg::merging

STABLE_TORCH_LIBRARY_FRAGMENT(pyseg, m) {
  m.def(
      "panoptic_merge(Tensor masks, Tensor? boxes, Tensor scores, Tensor labels, Tensor semantic, "
      "int[] stuff_classes, float score_threshold, float overlap_threshold, int stuff_area, float "
      "mask_threshold) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(pyseg, CPU, m) {
  m.impl("panoptic_merge", TORCH_BOX(&pyseg::merging::panoptic_merge_cpu));
}
