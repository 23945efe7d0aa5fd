// Planes of bytes in Huffman code: the layout of pallas_kernels/codecs/huffman_lanes.py, coded and decoded.
//
// A look-up of 12 bits finds up to six symbols at a time. Eight lanes advance in turn, for each waits
// for its own look-ups only. Nothing but the given arrays is touched, whatever the words say; words past
// the end are zeros. Called by pallas_kernels/byte_streams.py, and as an operation of JAX.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>

#include "threads.h"
#include "xla/ffi/api/ffi.h"

namespace jaxquant {
namespace {

namespace ffi = xla::ffi;

constexpr int64_t kLane = 1024;            // symbols
constexpr int kLimit = 12;                 // bits of a code word
constexpr int kSlack = 16;                 // bytes that may be read past the last bit of a lane
constexpr int64_t kReach = kLane * kLimit / 8 + kSlack;
constexpr int kLooks = 4;                  // look-ups of 12 bits in the 57 that one load gives

// What the low bits of a stream begin with: symbols in the low six bytes, their number, their bits.
using Run = uint64_t;
constexpr int kRun = 6;

int symbols_of(Run run) { return run >> 48 & 0xFF; }
int bits_of(Run run) { return run >> 56; }

struct Code {
  int width;
  const uint16_t* table;  // [2^width], symbol + 256 length
  Run runs[1 << kLimit];

  uint64_t mask() const { return (uint64_t{1} << width) - 1; }
};

// False of a table that no code has.
bool prepare(Code& code, const uint16_t* table, int width) {
  if (width < 1 || width > kLimit) return false;
  code.width = width;
  code.table = table;
  for (uint32_t index = 0; index < 1u << width; ++index) {
    if (table[index] >> 8 > width) return false;
    Run run = 0;
    int used = 0, count = 0;
    for (; count < kRun; ++count) {
      const uint16_t entry = table[index >> used];
      if (used + (entry >> 8) > width) break;
      run |= static_cast<Run>(entry & 0xFF) << 8 * count;
      used += entry >> 8;
    }
    code.runs[index] = run | static_cast<Run>(count) << 48 | static_cast<Run>(used) << 56;
  }
  return true;
}

// A lane being decoded. Where it ends eight bytes at a time may no longer be written.
struct Lane {
  const uint8_t* from;
  int64_t bit;
  uint8_t *to, *end;

  uint64_t window() const {
    uint64_t found;
    std::memcpy(&found, from + (bit >> 3), 8);
    return found >> (bit & 7);
  }
};

void finish(const Code& code, Lane& lane) {
  while (lane.end - lane.to >= 8) {
    const Run run = code.runs[lane.window() & code.mask()];
    std::memcpy(lane.to, &run, 8);
    lane.to += symbols_of(run);
    lane.bit += bits_of(run);
  }
  while (lane.to < lane.end) {
    const uint16_t entry = code.table[lane.window() & code.mask()];
    *lane.to++ = static_cast<uint8_t>(entry);
    lane.bit += entry >> 8;
  }
}

template <int N>
void decode_together(const Code& code, Lane* given) {
  Lane lanes[N];
  std::copy_n(given, N, lanes);
  const uint64_t mask = code.mask();
  for (;;) {
    int64_t room = kLane;
    for (int i = 0; i < N; ++i) room = std::min<int64_t>(room, lanes[i].end - lanes[i].to);
    int64_t turns = (room - 2) / (kLooks * kRun);
    if (turns <= 0) break;
    for (; turns > 0; --turns)
      for (int i = 0; i < N; ++i) {
        uint64_t window = lanes[i].window();
        uint8_t* to = lanes[i].to;
        int bits = 0;
        for (int look = 0; look < kLooks; ++look) {
          const Run run = code.runs[window & mask];
          std::memcpy(to, &run, 8);
          to += symbols_of(run);
          window >>= bits_of(run);
          bits += bits_of(run);
        }
        lanes[i].to = to;
        lanes[i].bit += bits;
      }
  }
  std::copy_n(lanes, N, given);
}

struct Plane {
  const uint8_t* words;  // 32-bit words, little-endian, at any address
  int64_t bytes;
  const int64_t* starts;  // in words
  const uint16_t* sizes;  // in words
  int64_t count;
  uint8_t* to;
};

// Lane number i, from a copy if its last bits lie too near to the end.
Lane open(const Plane& p, int64_t i, uint8_t* room) {
  const int64_t start = std::min(std::max<int64_t>(p.starts[i], 0), p.bytes / 4) * 4;
  const uint8_t* from = p.words + start;
  if (p.bytes - start < kReach) {
    std::copy_n(from, p.bytes - start, room);
    std::memset(room + (p.bytes - start), 0, kReach - (p.bytes - start));
    from = room;
  }
  return {from, 0, p.to + i * kLane, p.to + std::min((i + 1) * kLane, p.count)};
}

// Whether the lane ends in its last word, and zeros follow.
bool intact(const Lane& lane, int64_t size) {
  const int64_t rest = size * 32 - lane.bit;
  if (rest < 0 || rest > 31) return false;
  return rest == 0 || (lane.window() & ((uint64_t{1} << rest) - 1)) == 0;
}

bool decode(const Code& code, const Plane& p, int64_t first, int64_t last) {
  constexpr int N = 8;
  uint8_t room[N][kReach];
  bool whole = true;
  for (int64_t i = first; i < last; i += N) {
    const int64_t here = std::min<int64_t>(N, last - i);
    Lane lanes[N];
    for (int64_t j = 0; j < here; ++j) lanes[j] = open(p, i + j, room[j]);
    if (here == N) decode_together<N>(code, lanes);
    for (int64_t j = 0; j < here; ++j) {
      finish(code, lanes[j]);
      whole &= intact(lanes[j], p.sizes[i + j]);
    }
  }
  return whole;
}

// A lane, to a room of zeros: how many bits it takes. words: code word + 2^16 length, by symbol.
int64_t encode(const uint32_t* words, const uint8_t* symbols, int64_t count, uint8_t* to) {
  constexpr int kTogether = 4;  // 48 bits, and 7 that are held
  const uint8_t* const start = to;
  uint64_t bits = 0;
  int held = 0;
  int64_t i = 0;
  auto put = [&](int64_t some) {
    for (int64_t j = i; j < i + some; ++j) {
      bits |= static_cast<uint64_t>(words[symbols[j]] & 0xFFFF) << held;
      held += words[symbols[j]] >> 16;
    }
    std::memcpy(to, &bits, 8);
    to += held >> 3;
    bits >>= held & ~7;
    held &= 7;
    i += some;
  };
  while (count - i >= kTogether) put(kTogether);
  put(count - i);
  return (to - start) * 8 + held;
}

// words [size]; sizes [lanes]; table [2^width]; plane [count]. Of lanes that are not intact too,
// all symbols are what the table says.
ffi::Error huffman(ffi::ThreadPool pool, ffi::Buffer<ffi::U32> words, ffi::Buffer<ffi::U16> sizes,
                   ffi::Buffer<ffi::U16> table, ffi::ResultBuffer<ffi::U8> plane) try {
  const int64_t count = plane->element_count(), lanes = sizes.element_count();
  if (lanes != (count + kLane - 1) / kLane)
    return ffi::Error::InvalidArgument("the number of lanes does not fit that of symbols");
  auto code = std::make_unique<Code>();
  int width = 0;
  while (size_t{1} << width < table.element_count()) ++width;
  if (size_t{1} << width != table.element_count() || !prepare(*code, table.typed_data(), width))
    return ffi::Error::InvalidArgument("this is no table of a code of up to 12 bits");
  std::unique_ptr<int64_t[]> starts(new int64_t[lanes + 1]());
  for (int64_t i = 0; i < lanes; ++i) starts[i + 1] = starts[i] + sizes.typed_data()[i];
  const Plane p{reinterpret_cast<const uint8_t*>(words.typed_data()),
                static_cast<int64_t>(words.size_bytes()), starts.get(), sizes.typed_data(), count,
                plane->typed_data()};
  constexpr int64_t kShare = 64;  // lanes
  const int64_t shares = (lanes + kShare - 1) / kShare;
  const int threads = static_cast<int>(std::max<int64_t>(1, std::min(pool.num_threads(), shares)));
  Team::the().share(threads - 1, shares >= 4, shares, [&](int, int64_t i) {
    decode(*code, p, i * kShare, std::min(lanes, (i + 1) * kShare));
  });
  return ffi::Error::Success();
} catch (const std::bad_alloc&) {
  return ffi::Error(ffi::ErrorCode::kResourceExhausted, "no memory to decode a plane");
}

}  // namespace
}  // namespace jaxquant

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxquant_huffman, jaxquant::huffman,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::U32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::U16>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::U16>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::U8>>());

extern "C" {

// How often each byte occurs.
void jaxquant_byte_counts(const uint8_t* plane, int64_t count, int64_t* counts) {
  constexpr int kTables = 4;  // so that equal neighbours need not wait for each other
  int64_t found[kTables][256] = {};
  int64_t i = 0;
  for (; i + kTables <= count; i += kTables)
    for (int j = 0; j < kTables; ++j) ++found[j][plane[i + j]];
  for (; i < count; ++i) ++found[0][plane[i]];
  for (int s = 0; s < 256; ++s) counts[s] = found[0][s] + found[1][s] + found[2][s] + found[3][s];
}

// All lanes, one after the other, and their sizes: how many bytes they take, up to 1536 for each.
int64_t jaxquant_huffman_encode(const uint8_t* plane, int64_t count, const uint8_t* lengths,
                                const uint16_t* codes, uint16_t* sizes, uint8_t* to) {
  using namespace jaxquant;
  uint32_t words[256];
  for (int s = 0; s < 256; ++s) words[s] = codes[s] | static_cast<uint32_t>(lengths[s]) << 16;
  const uint8_t* const start = to;
  for (int64_t first = 0; first < count; first += kLane) {
    uint8_t room[kReach] = {};
    const int64_t bits = encode(words, plane + first, std::min(kLane, count - first), room);
    *sizes = static_cast<uint16_t>((bits + 31) / 32);
    std::memcpy(to, room, 4 * *sizes);
    to += 4 * *sizes++;
  }
  return to - start;
}

// Lanes first to last - 1 of a plane of `count` symbols: 1 if all are intact, 0 if not, -1 if there is no
// such table, -2 without memory.
int jaxquant_huffman_decode(const uint8_t* words, int64_t bytes, const int64_t* starts,
                            const uint16_t* sizes, const uint16_t* table, int width, int64_t first,
                            int64_t last, int64_t count, uint8_t* to) try {
  auto code = std::make_unique<jaxquant::Code>();
  if (!jaxquant::prepare(*code, table, width)) return -1;
  return jaxquant::decode(*code, {words, bytes, starts, sizes, count, to}, first, last);
} catch (const std::bad_alloc&) {
  return -2;
}

}  // extern "C"
