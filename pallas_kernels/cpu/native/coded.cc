// Range-coded streams of matrices, read: the steps, scales and integers of pallas_kernels/codecs/entropy_stream.py.
//
// What is read is what `entropy_stream.read` reads, of noise too: words past the end are zeros, and nothing
// but the given arrays is touched, whatever the stream says. Called by pallas_kernels/streams.py.

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>
#include <vector>

namespace jaxquant {
namespace {

constexpr int kPrecision = 14, kSlots = 1 << kPrecision;
constexpr uint32_t kLow = 1 << 16;
constexpr int kHeader = 9;
constexpr int kNear = 4, kPlaces = kSlots >> kNear;  // slots that share a place to search from

}  // namespace

// Of one shape of the source: slots below every symbol [classes, 2, symbols]. Of every symbol: its
// least code and plain bits. unit: the class of scale one. g, f: of the trellis.
struct Tables {
  const int32_t *below, *least, *bits;
  int32_t classes, symbols, unit, g, f;
};

// A matrix [k, n] and where its parts go. `base` are the base and the shape.
struct Stream {
  const uint16_t* words;
  int64_t size, k, n, lanes, chains;
  int32_t *base, *steps, *levels, *widths, *columns;
  int16_t* values;
};

namespace {

// One distribution: slots below each symbol and all of them; for every place the first symbol that
// ends behind it.
struct Distribution {
  uint16_t below[128];
  uint8_t first[kPlaces];
};

std::vector<Distribution> distributions(const Tables& t) {
  std::vector<Distribution> found(2 * t.classes);
  for (size_t i = 0; i < found.size(); ++i) {
    Distribution& d = found[i];
    std::copy_n(t.below + i * t.symbols, t.symbols, d.below);
    d.below[t.symbols] = kSlots;
    for (int place = 0, symbol = 0; place < kPlaces; ++place) {
      while (d.below[symbol + 1] <= place << kNear) ++symbol;
      d.first[place] = symbol;
    }
  }
  return found;
}

class Reader {
 public:
  Reader(const Stream& s, const Tables& t)
      : words_(s.words + kHeader), size_(s.size - kHeader), lanes_(s.lanes), tables_(t),
        distributions_(distributions(t)), states_(s.lanes), symbols_(s.lanes) {
    for (int64_t i = 0; i < lanes_; ++i) states_[i] = word(i) | word(lanes_ + i) << 16;
    next_ = 2 * lanes_;
  }

  // The codes of all lanes, of the sources at(lane) = 2 class + quantizer.
  template <class At>
  void pull(At at, int32_t* codes) {
    bool more = false;
    int64_t next = next_;
    for (int64_t i = 0; i < lanes_; ++i) {
      const Distribution& d = distributions_[at(i)];
      const uint32_t x = states_[i], slot = x % kSlots;
      int symbol = d.first[slot >> kNear];
      while (d.below[symbol + 1] <= slot) ++symbol;
      const uint32_t below = d.below[symbol];
      states_[i] = filled((d.below[symbol + 1] - below) * (x >> kPrecision) + slot - below, next);
      symbols_[i] = symbol;
      codes[i] = tables_.least[symbol];
      more |= tables_.bits[symbol] > 0 || states_[i] < kLow;  // the latter of a damaged stream
    }
    next_ = next;
    if (more) pull_bits(codes);
  }

  bool intact() const {
    const bool all = std::all_of(states_.begin(), states_.end(), [](auto x) { return x == kLow; });
    return all && next_ <= size_;
  }

 private:
  uint32_t word(int64_t i) const { return i < size_ ? words_[i] : 0; }

  uint32_t filled(uint32_t x, int64_t& next) const {
    const bool low = x < kLow;
    const uint32_t longer = x << 16 | word(next);
    next += low;
    return low ? longer : x;
  }

  void pull_bits(int32_t* codes) {
    for (int64_t i = 0; i < lanes_; ++i) {
      const int bits = tables_.bits[symbols_[i]];
      const uint32_t x = states_[i], slot = x % kSlots, value = slot >> (kPrecision - bits);
      const uint32_t frequency = kSlots >> bits;
      states_[i] = filled(frequency * (x >> kPrecision) + slot - value * frequency, next_);
      codes[i] += static_cast<int32_t>(value);
    }
  }

  const uint16_t* words_;
  int64_t size_, lanes_, next_;
  const Tables& tables_;
  std::vector<Distribution> distributions_;
  std::vector<uint32_t> states_;
  std::vector<int> symbols_;
};

// Codes of one class, plus their mean; what fills up the last lanes costs nothing.
void read_side(Reader& reader, int64_t lanes, int source, int32_t mean, int64_t count,
               int32_t* to) {
  std::vector<int32_t> codes(lanes);
  for (int64_t first = 0; first < count; first += lanes) {
    const int64_t here = std::min(lanes, count - first);
    reader.pull([&](int64_t i) { return i < here ? 2 * source : 0; }, codes.data());
    for (int64_t i = 0; i < here; ++i) to[first + i] = codes[i] + mean;
  }
}

// Rows first ... first + lanes, one to a lane.
void read_rows(Reader& reader, const Stream& s, const Tables& t, int64_t first,
               std::vector<int32_t>& states, std::vector<int32_t>& codes) {
  const int64_t rows = std::min(s.lanes, s.k - first);
  const int32_t* levels = s.levels + first;
  std::fill(states.begin(), states.end(), 0);
  for (int64_t j = 0; j < s.n; ++j) {
    int32_t* state = states.data() + j % s.chains * s.lanes;
    const int32_t column = s.columns[j] + t.unit;
    auto source = [&](int64_t i) {
      return i < rows ? 2 * std::clamp(levels[i] + column, 1, t.classes - 1) + (state[i] & 1) : 0;
    };
    reader.pull(source, codes.data());
    for (int64_t i = 0; i < rows; ++i) {
      const int32_t q = state[i] & 1, code = codes[i];
      s.values[(first + i) * s.n + j] = static_cast<int16_t>(2 * code - q);
      state[i] = (state[i] >> 1) ^ ((code & 1) * t.g) ^ (q * t.f);
    }
  }
}

bool read(const Stream& s, const Tables& t) {
  int32_t head[kHeader];
  for (int i = 0; i < kHeader; ++i) head[i] = static_cast<int16_t>(s.words[i]);
  s.base[0] = static_cast<int32_t>((head[0] & 0xFFFF) | static_cast<uint32_t>(head[1]) << 16);
  auto source = [&](int i) { return std::clamp(head[i], 1, t.classes - 1); };
  Reader reader(s, t);
  read_side(reader, s.lanes, source(3), head[4], s.k, s.steps);
  read_side(reader, s.lanes, source(5), head[6], s.k, s.levels);
  read_side(reader, s.lanes, source(7), 0, s.n, s.widths);
  read_side(reader, s.lanes, source(8), 0, s.n, s.columns);
  for (int64_t i = 0; i < s.k; ++i) s.levels[i] -= s.steps[i];
  for (int64_t j = 0; j < s.n; ++j) s.columns[j] -= s.widths[j];
  std::vector<int32_t> states(s.chains * s.lanes), codes(s.lanes);
  for (int64_t first = 0; first < s.k; first += s.lanes)
    read_rows(reader, s, t, first, states, codes);
  return reader.intact();
}

}  // namespace
}  // namespace jaxquant

// 1 if the stream is whole, 0 if not, -1 without memory, -2 for arguments that are none.
extern "C" int jaxquant_read_coded(const jaxquant::Stream* s, const jaxquant::Tables* t) try {
  if (s->size < jaxquant::kHeader || s->lanes < 1 || s->chains < 1 || s->k < 0 || s->n < 0 ||
      t->symbols < 1 || t->symbols > 127 || t->classes < 2)
    return -2;
  return jaxquant::read(*s, *t);
} catch (const std::bad_alloc&) {
  return -1;
}
