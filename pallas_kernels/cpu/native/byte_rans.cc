// Planes of bytes as interleaved rANS: a chunk of pallas_kernels/codecs/byte_rans.py, coded and decoded.
//
// Nothing but the given arrays is touched, whatever the words say; words past the end are zeros.
// Called by pallas_kernels/byte_streams.py.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>

namespace jaxquant {
namespace {

constexpr int kPrecision = 14, kSlots = 1 << kPrecision;
constexpr uint32_t kLow = 1 << 16;
constexpr int64_t kMostLanes = 32;

struct Range {
  uint16_t frequency, below;
};

struct Table {
  Range ranges[256];
  uint8_t symbols[kSlots];
};

// False unless all slots have an owner.
bool prepare(Table& t, const uint16_t* frequencies) {
  uint32_t below = 0;
  for (int s = 0; s < 256; ++s) {
    if (frequencies[s] > kSlots - below) return false;
    t.ranges[s] = {frequencies[s], static_cast<uint16_t>(below)};
    std::memset(t.symbols + below, s, frequencies[s]);
    below += frequencies[s];
  }
  return below == kSlots;
}

struct Words {
  const uint8_t* from;  // 16-bit words, little-endian, at any address
  int64_t size, next;

  uint32_t at(int64_t i) const {
    uint16_t word = 0;
    if (i < size) std::memcpy(&word, from + 2 * i, 2);
    return word;
  }
};

// One symbol of `lanes` lanes each. Within: a word for each lane is there.
template <bool kWithin>
inline void step(const Table& t, Words& words, uint32_t* states, int64_t lanes, uint8_t* to) {
  for (int64_t i = 0; i < lanes; ++i) {
    const uint32_t x = states[i], slot = x % kSlots;
    const uint8_t symbol = t.symbols[slot];
    const Range r = t.ranges[symbol];
    const uint32_t after = r.frequency * (x >> kPrecision) + slot - r.below;
    uint32_t word;
    if (kWithin) {
      uint16_t narrow;
      std::memcpy(&narrow, words.from + 2 * words.next, 2);
      word = narrow;
    } else {
      word = words.at(words.next);
    }
    const bool low = after < kLow;
    states[i] = low ? after << 16 | word : after;
    words.next += low;
    to[i] = symbol;
  }
}

template <int64_t N>
void decode_within(const Table& t, Words& words, uint32_t* given, uint8_t*& to, int64_t& left) {
  uint32_t states[N];
  std::copy_n(given, N, states);
  for (; left >= N && words.size - words.next >= N; left -= N, to += N)
    step<true>(t, words, states, N, to);
  std::copy_n(states, N, given);
}

bool decode(const Table& t, Words words, int64_t lanes, int64_t count, uint8_t* to) {
  uint32_t states[kMostLanes];
  for (int64_t i = 0; i < lanes; ++i) states[i] = words.at(i) | words.at(lanes + i) << 16;
  words.next = 2 * lanes;
  int64_t left = count;
  if (lanes == kMostLanes) decode_within<kMostLanes>(t, words, states, to, left);
  for (int64_t here; left > 0; left -= here, to += here) {
    here = std::min(lanes, left);
    step<false>(t, words, states, here, to);
  }
  return words.next == words.size &&
      std::all_of(states, states + lanes, [](uint32_t x) { return x == kLow; });
}

}  // namespace
}  // namespace jaxquant

extern "C" {

// A chunk of `count` symbols, whose frequencies are not zero, to the end of a room of 2 lanes + count words:
// how many words they take.
int64_t jaxquant_rans_encode(const uint8_t* plane, int64_t count, int64_t lanes,
                             const uint16_t* frequencies, uint16_t* room) {
  using namespace jaxquant;
  uint32_t below[257] = {}, states[kMostLanes];
  for (int s = 0; s < 256; ++s) below[s + 1] = below[s] + frequencies[s];
  std::fill_n(states, kMostLanes, kLow);
  uint16_t* to = room + 2 * lanes + count;
  for (int64_t i = count; i-- > 0;) {
    uint32_t& x = states[i & (lanes - 1)];
    const uint32_t f = frequencies[plane[i]];
    if (f == 0) return -1;
    if (x >> (32 - kPrecision) >= f) {
      *--to = static_cast<uint16_t>(x);
      x >>= 16;
    }
    x = (x / f << kPrecision) + x % f + below[plane[i]];
  }
  to -= 2 * lanes;
  for (int64_t i = 0; i < lanes; ++i) {
    to[i] = static_cast<uint16_t>(states[i]);
    to[lanes + i] = static_cast<uint16_t>(states[i] >> 16);
  }
  return room + 2 * lanes + count - to;
}

// A chunk of `count` symbols in `size` words: 1 if it is intact, 0 if not, -1 for arguments that are
// none, -2 without memory.
int jaxquant_rans_decode(const uint8_t* words, int64_t size, int64_t lanes, int64_t count,
                         const uint16_t* frequencies, uint8_t* to) try {
  using namespace jaxquant;
  auto table = std::make_unique<Table>();
  if (lanes < 1 || lanes > kMostLanes || !prepare(*table, frequencies)) return -1;
  return decode(*table, {words, size, 0}, lanes, count, to);
} catch (const std::bad_alloc&) {
  return -2;
}

}  // extern "C"
