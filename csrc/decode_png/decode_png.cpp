// Plain PNGs: 8 bits of grey, of a palette's indices or of RGB, not interlaced, one picture. What
// is not plain, cut off or damaged gives an empty tensor, and is left to a decoder that takes all
// and says what is wrong. A file is decoded by one thread: there are always more files.
#include "decode_png.h"

#include <array>

#include "../common/buffer.h"
#include "decode_png_simd.h"

namespace pyseg::png {
namespace {

// Table k: the remainder of a byte that k zeros follow.
constexpr auto kRemainders = [] {
  std::array<std::array<uint32_t, 256>, 8> tables{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t rest = byte;
    for (int bit = 0; bit < 8; ++bit) rest = (rest >> 1) ^ (rest & 1 ? 0xedb88320u : 0);
    tables[0][byte] = rest;
  }
  for (int k = 1; k < 8; ++k)
    for (int byte = 0; byte < 256; ++byte) {
      const uint32_t before = tables[k - 1][byte];
      tables[k][byte] = (before >> 8) ^ tables[0][before & 255];
    }
  return tables;
}();

uint32_t crc32(const uint8_t* data, int64_t size) {
  uint32_t rest = ~uint32_t(0);
  int64_t i = 0;
  for (; i + 8 <= size; i += 8) {
    const uint8_t* const at = data + i;
    rest = kRemainders[7][at[0] ^ (rest & 255)] ^ kRemainders[6][at[1] ^ (rest >> 8 & 255)] ^
           kRemainders[5][at[2] ^ (rest >> 16 & 255)] ^ kRemainders[4][at[3] ^ (rest >> 24)] ^
           kRemainders[3][at[4]] ^ kRemainders[2][at[5]] ^ kRemainders[1][at[6]] ^
           kRemainders[0][at[7]];
  }
  for (; i < size; ++i) rest = (rest >> 8) ^ kRemainders[0][data[i] ^ (rest & 255)];
  return ~rest;
}

uint32_t big_endian(const uint8_t* at) {
  return uint32_t(at[0]) << 24 | uint32_t(at[1]) << 16 | uint32_t(at[2]) << 8 | at[3];
}

bool is(const uint8_t* kind, const char* name) { return std::memcmp(kind, name, 4) == 0; }

// Chunks that change nothing of the pixels, nor of how a picture is turned.
bool is_plain(const uint8_t* kind) {
  for (const char* name : {"gAMA", "cHRM", "sRGB", "sBIT", "pHYs", "bKGD", "tIME", "hIST", "iCCP"})
    if (is(kind, name)) return true;
  return false;
}

struct Stream {
  Buffer<uint8_t> data;
  int64_t size = 0;
};

// Reads the chunks. Returns whether the file is plain and whole.
bool read_chunks(const uint8_t* file, int64_t size, Form form, int64_t max_pixels, Picture& picture,
                 Stream& stream) {
  constexpr uint8_t kBegin[16] = {0x89, 'P', 'N', 'G', '\r', '\n', 0x1a, '\n',
                                  0,    0,   0,   13,  'I',  'H',  'D',  'R'};
  if (size < 57 || std::memcmp(file, kBegin, 16) != 0) return false;  // 57: the smallest file
  picture.width = big_endian(file + 16), picture.height = big_endian(file + 20);
  const uint8_t* const kind_of = file + 24;  // depth, colours, compression, filters, interlaced
  const bool coloured = kind_of[1] == 2;
  if (kind_of[0] != 8 || kind_of[2] || kind_of[3] || kind_of[4]) return false;
  if (form == kValues ? kind_of[1] != 0 && kind_of[1] != 3 : !coloured) return false;
  if (picture.width < 1 || picture.height < 1 || picture.width > max_pixels ||
      picture.height > max_pixels / picture.width)
    return false;
  picture.bytes = coloured ? 3 : 1;
  stream.data = Buffer<uint8_t>(size + kPadding);
  bool palette = kind_of[1] != 3, ended = false;
  for (int64_t at = 8; size - at >= 12;) {
    const int64_t length = big_endian(file + at);
    const uint8_t *const kind = file + at + 4, *const content = kind + 4;
    if (length > size - at - 12 || crc32(kind, length + 4) != big_endian(content + length))
      return false;
    if (is(kind, "IEND")) {
      std::memset(stream.data.get() + stream.size, 0, kPadding);
      return palette && stream.size > 0 && length == 0;
    }
    if (is(kind, "IDAT")) {
      if (ended || !palette) return false;
      std::memcpy(stream.data.get() + stream.size, content, length);
      stream.size += length;
    } else {
      ended = stream.size > 0;
      if (is(kind, "PLTE"))
        palette = palette || (length > 0 && length <= 768 && length % 3 == 0);
      else if (is(kind, "acTL") || (at > 8 && !(kind[0] & 32)))  // an animation, or not optional
        return false;
      else if (form == kColours && at > 8 && !is_plain(kind))
        return false;
    }
    at += 12 + length;
  }
  return false;
}

Tensor empty(const Tensor& like, Form form, int64_t height, int64_t width) {
  if (form == kColours) return torch::stable::new_empty(like, {height, width, 3}, ScalarType::Byte);
  const ScalarType dtype = form == kSegmentIds ? ScalarType::Int : ScalarType::Byte;
  return torch::stable::new_empty(like, {height, width}, dtype);
}

Tensor decode_png_cpu(const Tensor& data,  // [B] uint8, a whole file
                      int64_t form, int64_t max_pixels) {
  PYSEG_CHECK(data.dim() == 1 && data.scalar_type() == ScalarType::Byte,
              "data must be [B] uint8, got ", shape(data));
  PYSEG_CHECK(form >= 0 && form < kForms, "form must be 0 to ", kForms - 1, ", got ", form);
  PYSEG_CHECK(max_pixels >= 0, "max_pixels must not be negative, got ", max_pixels);
  const auto decode = PYSEG_AT_LEVEL(decode);
  const Tensor file = torch::stable::contiguous(data);
  Picture picture;
  Stream stream;
  // A stream is at least a 1032nd of what it becomes: no memory is asked for what cannot come.
  if (read_chunks(static_cast<const uint8_t*>(file.const_data_ptr()), file.numel(), Form(form),
                  max_pixels, picture, stream) &&
      stream.size > picture.filtered() / 1040) {
    Tensor result = empty(data, Form(form), picture.height, picture.width);
    const Buffer<uint8_t> memory(workspace(picture));
    if (decode(stream.data.get(), stream.size, picture, Form(form), memory.get(),
               result.mutable_data_ptr()))
      return result;
  }
  return empty(data, Form(form), 0, 0);
}

}  // namespace
}  // namespace pyseg::png

STABLE_TORCH_LIBRARY_FRAGMENT(pyseg, m) {
  m.def("decode_png(Tensor data, int form, int max_pixels) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(pyseg, CPU, m) {
  m.impl("decode_png", TORCH_BOX(&pyseg::png::decode_png_cpu));
}
