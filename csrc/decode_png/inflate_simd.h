// Inflating (RFC 1951, 1950). Included after level.h, inside the namespace of its level; needs
// immintrin.h and cstring before that.
//
// Bits are taken from a word of 64, filled up once for a length with its distance or for three
// literals. A table is looked up by the next bits of the stream, and an entry has all that is to be
// known of a code; longer codes go on in a second table behind the first.

// Entries of a table. A literal is marked by the highest bit; the lowest byte is how many bits it
// takes in all, those of the extra number included; bits 8 to 11 are the length of the code.
constexpr uint32_t kLiteral = 1u << 31;
constexpr uint32_t kSpecial = 1u << 15;          // neither a literal nor a number
constexpr uint32_t kEnd = kSpecial | 1u << 14;   // of the block
constexpr uint32_t kMore = kSpecial | 1u << 13;  // a second table, from bit 16 on
constexpr uint32_t kWrong = kSpecial;

constexpr int kLengthBits = 11, kDistanceBits = 9, kLongest = 15, kSymbols = 320;

struct Codes {
  // A second table has two codes at least: there are half as many as codes, 16 entries or 64 each.
  uint32_t lengths[(1 << kLengthBits) + 144 * (1 << (kLongest - kLengthBits))];
  uint32_t distances[(1 << kDistanceBits) + 16 * (1 << (kLongest - kDistanceBits))];
  uint32_t orders[128];
  uint8_t sizes[kSymbols + 160];  // of codes, as read
  uint16_t sorted[kSymbols];
};
static_assert(sizeof(Codes) <= kTables);

constexpr uint16_t kLengthBase[31] = {3,  4,   5,   6,   7,   8,   9,   10, 11, 13, 15,
                                      17, 19,  23,  27,  31,  35,  43,  51, 59, 67, 83,
                                      99, 115, 131, 163, 195, 227, 258, 0,  0};
constexpr uint8_t kLengthExtra[29] = {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2,
                                      2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 0};

enum class Alphabet { lengths, distances, orders };

// The entry of a symbol, without the length of its code.
template <Alphabet A>
PYSEG_INLINE uint32_t entry_of(uint32_t symbol) {
  if (A == Alphabet::orders) return symbol << 16;
  if (A == Alphabet::distances) {
    if (symbol >= 30) return kWrong;
    const uint32_t extra = symbol < 4 ? 0 : symbol / 2 - 1;
    const uint32_t base = symbol < 4 ? symbol + 1 : ((2 + symbol % 2) << extra) + 1;
    return base << 16 | extra;
  }
  if (symbol < 256) return kLiteral | symbol << 16;
  if (symbol == 256) return kEnd;
  if (symbol >= 286) return kWrong;
  return uint32_t(kLengthBase[symbol - 257]) << 16 | kLengthExtra[symbol - 257];
}

// Fills a table from the lengths of the codes. Returns the bits of its second tables, -1 where the
// codes are not a whole set (of distances there may be one or none).
template <Alphabet A, int Bits>
int build(const uint8_t* sizes, int count, uint16_t* sorted, uint32_t* table) {
  int of_size[kLongest + 2] = {}, longest = 0;
  for (int k = 0; k < count; ++k) ++of_size[sizes[k]];
  of_size[0] = 0;
  int left = 1;
  for (int size = 1; size <= kLongest; ++size) {
    left = 2 * left - of_size[size];
    if (left < 0) return -1;
    if (of_size[size]) longest = size;
  }
  if (left > 0) {
    if (A != Alphabet::distances || longest > 1) return -1;
    for (int k = 0; k < 1 << Bits; ++k) table[k] = kWrong;
  }
  int place[kLongest + 2] = {};
  for (int size = 1; size <= kLongest; ++size) place[size + 1] = place[size] + of_size[size];
  for (int k = 0; k < count; ++k)
    if (sizes[k]) sorted[place[sizes[k]]++] = uint16_t(k);
  const int second = longest > Bits ? longest - Bits : 0;
  uint32_t code = 0;  // its bits in the order of the stream
  int next_free = 1 << Bits, which = 0;
  uint32_t opened = ~0u;  // whose second table was begun last
  for (int size = 1; size <= longest; ++size)
    for (int k = 0; k < of_size[size]; ++k) {
      const uint32_t entry = entry_of<A>(sorted[which++]) + uint32_t(size) * 0x101;
      if (size <= Bits) {
        for (uint32_t i = code; i < 1u << Bits; i += 1u << size) table[i] = entry;
      } else {
        const uint32_t first = code & ((1u << Bits) - 1);
        if (first != opened) {  // codes of one beginning follow each other
          opened = first;
          table[first] = kMore | uint32_t(next_free) << 16;
          next_free += 1 << second;
        }
        uint32_t* const own = table + (table[first] >> 16);
        for (uint32_t i = code >> Bits; i < 1u << second; i += 1u << (size - Bits)) own[i] = entry;
      }
      // The next code: the highest bits of a number are the first in the stream.
      uint32_t bit = 1u << (size - 1);
      while (code & bit) code ^= bit, bit >>= 1;
      code |= bit;
    }
  return second;
}

PYSEG_INLINE uint64_t load_64(const uint8_t* from) {
  uint64_t word;
  std::memcpy(&word, from, 8);
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
  word = __builtin_bswap64(word);
#endif
  return word;
}

constexpr int kWide = PYSEG_REGISTER < 32 ? PYSEG_REGISTER : 32;  // bytes that are copied at a time

PYSEG_INLINE void copy_wide(uint8_t* to, const uint8_t* from) { std::memcpy(to, from, kWide); }

// Repeats what lies `distance` before; writes up to kSlack beyond. Nothing before to - distance is
// looked at.
PYSEG_INLINE void repeat(uint8_t* to, int64_t distance, int64_t length) {
  uint8_t* const end = to + length;
  const uint8_t* from = to - distance;
  if (distance < kWide) {
    if (distance == 1) {
      std::memset(to, *from, kWide);
      from = to, to += kWide;
      if (length <= kWide) return;
    } else {
      // What is written is right as far as the distance, and written over beyond.
      uint8_t pattern[kWide];
      std::memcpy(pattern, from, kWide);
      int64_t done = 0;
      for (; done < kWide; done += distance) std::memcpy(to + done, pattern, kWide);
      from = to, to += done;
    }
  }
  do {
    copy_wide(to, from);
    to += kWide, from += kWide;
  } while (to < end);
}

enum class Step { more, end, wrong };

// A stream that is inflated piece by piece.
struct Inflater {
  const uint8_t *in, *in_end;
  Codes* codes;
  uint64_t bits = 0;
  int count = 0;  // of bits; above them lie more that are in the stream, too
  int length_second = 0, distance_second = 0;
  int64_t stored = 0;  // bytes of a stored block that are still to come
  enum { between, within_stored, within_codes } where = between;
  bool last = false;

  PYSEG_INLINE void fill() {
    bits |= load_64(in) << count;
    in += (63 - count) >> 3;
    count |= 56;
  }
  PYSEG_INLINE void drop(int n) { bits >>= n, count -= n; }
  PYSEG_INLINE uint32_t take(int n) {
    const uint32_t value = uint32_t(bits & ((uint64_t(1) << n) - 1));
    drop(n);
    return value;
  }
  bool beyond() const { return in > in_end + 16; }  // with the padding no load leaves it

  void to_byte() {
    drop(count & 7);
    in -= count >> 3;
    bits = 0, count = 0;
  }

  bool begin_block() {
    fill();
    if (beyond()) return false;
    last = take(1);
    const uint32_t kind = take(2);
    if (kind == 0) {
      to_byte();
      if (in_end - in < 4) return false;
      stored = in[0] | in[1] << 8;
      if (stored != (0xffff ^ (in[2] | in[3] << 8))) return false;
      in += 4;
      where = within_stored;
      return true;
    }
    if (kind == 3) return false;
    where = within_codes;
    uint8_t* const sizes = codes->sizes;
    if (kind == 1) {
      for (int k = 0; k < 288; ++k) sizes[k] = k < 144 ? 8 : k < 256 ? 9 : k < 280 ? 7 : 8;
      for (int k = 0; k < 32; ++k) sizes[288 + k] = 5;
      return build_both(288, 32);
    }
    const int lengths = int(take(5)) + 257, distances = int(take(5)) + 1, orders = int(take(4)) + 4;
    if (lengths > 286 || distances > 30) return false;
    constexpr uint8_t kOrder[19] = {16, 17, 18, 0, 8,  7, 9,  6, 10, 5,
                                    11, 4,  12, 3, 13, 2, 14, 1, 15};
    uint8_t order_sizes[19] = {};
    for (int k = 0; k < orders; ++k) {
      fill();
      order_sizes[kOrder[k]] = uint8_t(take(3));
    }
    if (build<Alphabet::orders, 7>(order_sizes, 19, codes->sorted, codes->orders) < 0) return false;
    for (int k = 0; k < lengths + distances;) {  // may write 138 beyond
      fill();
      if (beyond()) return false;
      const uint32_t entry = codes->orders[bits & 127], symbol = entry >> 16;
      drop(int(entry & 255));
      if (symbol < 16) {
        sizes[k++] = uint8_t(symbol);
        continue;
      }
      if (symbol == 16 && k == 0) return false;
      const int times = symbol == 16   ? 3 + int(take(2))
                        : symbol == 17 ? 3 + int(take(3))
                                       : 11 + int(take(7));
      std::memset(sizes + k, symbol == 16 ? sizes[k - 1] : 0, times);
      k += times;
      if (k > lengths + distances) return false;
    }
    if (!sizes[256]) return false;
    return build_both(lengths, distances);
  }

  bool build_both(int lengths, int distances) {
    length_second =
        build<Alphabet::lengths, kLengthBits>(codes->sizes, lengths, codes->sorted, codes->lengths);
    distance_second = build<Alphabet::distances, kDistanceBits>(codes->sizes + lengths, distances,
                                                                codes->sorted, codes->distances);
    return length_second >= 0 && distance_second >= 0;
  }

  // Inflates until `out` is beyond `most` or the stream ends; copies reach back to `begin` at most.
  // Writes up to kSlack beyond `most`.
  Step run(const uint8_t* begin, uint8_t*& out, uint8_t* most) {
    while (true) {
      if (where == between) {
        if (last) return Step::end;
        if (!begin_block()) return Step::wrong;
      } else if (where == within_stored) {
        int64_t n = stored;
        if (out >= most) return Step::more;
        if (n > in_end - in) return Step::wrong;
        if (n > most - out) n = most - out;
        std::memcpy(out, in, n);
        in += n, out += n, stored -= n;
        if (stored) return Step::more;
        where = between;
      } else {
        const Step step = run_codes(begin, out, most);
        if (step != Step::end) return step;
        where = between;
      }
    }
  }

  // Of a block with codes.
  Step run_codes(const uint8_t* const begin, uint8_t*& to, uint8_t* const most) {
    const uint32_t *const lengths = codes->lengths, *const distances = codes->distances;
    constexpr uint64_t kLengthMask = (1 << kLengthBits) - 1,
                       kDistanceMask = (1 << kDistanceBits) - 1;
    const uint64_t length_mask = (uint64_t(1) << length_second) - 1;
    const uint64_t distance_mask = (uint64_t(1) << distance_second) - 1;
    Inflater own = *this;  // in registers
    uint8_t* out = to;
    Step step = Step::more;
    own.fill();
    uint32_t entry = lengths[own.bits & kLengthMask];
    while (out < most) {
      if (own.beyond()) {
        step = Step::wrong;
        break;
      }
      // `entry` is of the bits to come, of which there are 56 at least.
      if (entry & kLiteral) {
        own.drop(entry & 255);
        *out++ = uint8_t(entry >> 16);
        entry = lengths[own.bits & kLengthMask];
        if (entry & kLiteral) {
          own.drop(entry & 255);
          *out++ = uint8_t(entry >> 16);
          entry = lengths[own.bits & kLengthMask];
          if (entry & kLiteral) {
            own.drop(entry & 255);
            *out++ = uint8_t(entry >> 16);
            own.fill();
            entry = lengths[own.bits & kLengthMask];
            continue;
          }
        }
        own.fill();
      }
      if (entry & kSpecial) {
        if ((entry & kMore) == kMore)
          entry = lengths[(entry >> 16) + ((own.bits >> kLengthBits) & length_mask)];
        if (entry & kLiteral) {
          own.drop(entry & 255);
          *out++ = uint8_t(entry >> 16);
          own.fill();
          entry = lengths[own.bits & kLengthMask];
          continue;
        }
        if (entry & kSpecial) {
          step = (entry & kEnd) == kEnd ? Step::end : Step::wrong;
          own.drop(entry & 255);
          break;
        }
      }
      uint64_t before = own.bits;
      own.drop(entry & 255);
      const int64_t length = (entry >> 16 & 0x7fff) +
                             ((before & ((uint64_t(1) << (entry & 255)) - 1)) >> (entry >> 8 & 15));
      uint32_t far = distances[own.bits & kDistanceMask];
      if (far & kSpecial) {
        if ((far & kMore) == kMore)
          far = distances[(far >> 16) + ((own.bits >> kDistanceBits) & distance_mask)];
        if (far & kSpecial) {
          step = Step::wrong;
          break;
        }
      }
      before = own.bits;
      own.drop(far & 255);
      const int64_t distance =
          (far >> 16 & 0x7fff) + ((before & ((uint64_t(1) << (far & 255)) - 1)) >> (far >> 8 & 15));
      if (distance > out - begin) {
        step = Step::wrong;
        break;
      }
      own.fill();  // what comes next is looked up while bytes are copied
      entry = lengths[own.bits & kLengthMask];
      repeat(out, distance, length);
      out += length;
    }
    // Where it stopped between two symbols, `entry` is of bits that are not dropped.
    in = own.in, bits = own.bits, count = own.count;
    to = out;
    return step;
  }

  // Where the stream ended, to the byte; of a stream that was not read beyond its end.
  const uint8_t* stop() {
    to_byte();
    return in;
  }
};

// Adler's checksum goes on over n bytes.
PYSEG_INLINE void add_to_checksum(const uint8_t* data, int64_t n, uint32_t& sum, uint32_t& sums) {
  constexpr int64_t kOnce = 5504;  // bytes, after which no sum of 32 bits is full
  while (n > 0) {
    const int64_t now = n < kOnce ? n : kOnce;
    int64_t i = 0;
#if defined(PYSEG_AVX2) || defined(PYSEG_AVX512)
    // Of 32 bytes: their sum, and their sum by places 32 .. 1; the first 32-fold the sums before.
    const __m256i zero = _mm256_setzero_si256(), ones = _mm256_set1_epi16(1);
    const __m256i places =
        _mm256_setr_epi8(32, 31, 30, 29, 28, 27, 26, 25, 24, 23, 22, 21, 20, 19, 18, 17, 16, 15, 14,
                         13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1);
    __m256i total = zero, before = zero, weighted = zero;
    for (; i + 32 <= now; i += 32) {
      const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(data + i));
      before = _mm256_add_epi32(before, total);
      total = _mm256_add_epi32(total, _mm256_sad_epu8(v, zero));
      weighted =
          _mm256_add_epi32(weighted, _mm256_madd_epi16(_mm256_maddubs_epi16(v, places), ones));
    }
    alignas(32) uint32_t lanes[3][8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes[0]), total);
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes[1]), before);
    _mm256_store_si256(reinterpret_cast<__m256i*>(lanes[2]), weighted);
    uint64_t a = 0, b = 0, c = 0;
    for (int k = 0; k < 8; ++k) a += lanes[0][k], b += lanes[1][k], c += lanes[2][k];
    sums = uint32_t((sums + uint64_t(sum) * uint64_t(i) + 32 * b + c) % 65521);
    sum = uint32_t((sum + a) % 65521);
#endif
    uint64_t one = sum, two = sums;
    for (; i < now; ++i) one += data[i], two += one;
    sum = uint32_t(one % 65521), sums = uint32_t(two % 65521);
    data += now, n -= now;
  }
}
