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

// One symbol of lane number i. Branches on what is random would be mispredicted.
template <class Word>
inline uint8_t step(const Table& t, uint32_t& state, int64_t& next, Word word) {
  const uint32_t slot = state % kSlots;
  const uint8_t symbol = t.symbols[slot];
  const Range r = t.ranges[symbol];
  const uint32_t after = r.frequency * (state >> kPrecision) + slot - r.below;
  const uint32_t low = after < kLow;
  state = after << 16 * low | (word(next) & (0 - low));
  next += low;
  return symbol;
}

// All lanes, while each could take a word.
int64_t decode_within(const Table& t, Words& words, uint32_t* given, int64_t count, uint8_t* to) {
  uint32_t states[kMostLanes];
  std::copy_n(given, kMostLanes, states);
  const uint8_t* const from = words.from;
  int64_t next = words.next, done = 0;
  auto word = [&](int64_t i) {
    uint16_t found;
    std::memcpy(&found, from + 2 * i, 2);
    return uint32_t{found};
  };
  for (; count - done >= kMostLanes && words.size - next >= kMostLanes; done += kMostLanes) {
    uint8_t symbols[kMostLanes];
    for (int i = 0; i < kMostLanes; ++i) symbols[i] = step(t, states[i], next, word);
    std::memcpy(to + done, symbols, kMostLanes);
  }
  std::copy_n(states, kMostLanes, given);
  words.next = next;
  return done;
}

bool decode(const Table& t, Words words, int64_t lanes, int64_t count, uint8_t* to) {
  uint32_t states[kMostLanes];
  for (int64_t i = 0; i < lanes; ++i) states[i] = words.at(i) | words.at(lanes + i) << 16;
  words.next = 2 * lanes;
  int64_t done = lanes == kMostLanes ? decode_within(t, words, states, count, to) : 0;
  auto word = [&](int64_t i) { return words.at(i); };
  for (; done < count; ++done) to[done] = step(t, states[done & (lanes - 1)], words.next, word);
  return words.next == words.size &&
      std::all_of(states, states + lanes, [](uint32_t x) { return x == kLow; });
}

// A state x divided by a frequency f: x inverse >> kInverse. This is exact, for the error of
// the inverse is below f 2^-kInverse, and x < 2^18 f; for the same reason 64 bits hold the product.
constexpr int kInverse = 46;

struct Divisor {
  uint64_t inverse;
  uint32_t most;  // first state that must give a word, shifted right by 18
  uint16_t rest, below;  // slots of the other symbols; of those below
};

void prepare(Divisor* divisors, const uint16_t* frequencies) {
  uint32_t below = 0;
  for (int s = 0; s < 256; ++s) {
    const uint32_t f = frequencies[s];
    const uint64_t inverse = f ? ((uint64_t{1} << kInverse) + f - 1) / f : 0;
    divisors[s] = {inverse, f, static_cast<uint16_t>(kSlots - f), static_cast<uint16_t>(below)};
    below += f;
  }
}

// The symbol, to a state; whether a word went to `to`, which is written in any case.
inline int push(const Divisor& d, uint32_t& state, uint16_t* to) {
  const uint32_t x = state, full = x >> (32 - kPrecision) >= d.most;
  *to = static_cast<uint16_t>(x);
  const uint32_t shorter = x >> 16 * full;
  const uint32_t quotient = static_cast<uint32_t>(shorter * d.inverse >> kInverse);
  state = quotient * d.rest + shorter + d.below;
  return full;
}

}  // namespace
}  // namespace jaxquant

extern "C" {

// A chunk of `count` symbols, whose frequencies are not zero, to the end of a room of 2 lanes + count + 1
// words: how many words they take.
int64_t jaxquant_rans_encode(const uint8_t* plane, int64_t count, int64_t lanes,
                             const uint16_t* frequencies, uint16_t* room) {
  using namespace jaxquant;
  Divisor divisors[256];
  prepare(divisors, frequencies);
  uint32_t states[kMostLanes];
  std::fill_n(states, kMostLanes, kLow);
  uint16_t* const end = room + 2 * lanes + count + 1;
  uint16_t* to = end;
  for (int64_t i = count; i-- > 0;) to -= push(divisors[plane[i]], states[i & (lanes - 1)], to - 1);
  to -= 2 * lanes;
  for (int64_t i = 0; i < lanes; ++i) {
    to[i] = static_cast<uint16_t>(states[i]);
    to[lanes + i] = static_cast<uint16_t>(states[i] >> 16);
  }
  return end - to;
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
