#include "activations.h"

#include <algorithm>
#include <cstring>

namespace jaxquant {

std::vector<float> rounded(const float* x, int64_t m, int64_t k, Activations activations,
                           const Kernels& kernels) {
  std::vector<float> found(x, x + m * k);
  if (activations == kAsFloat || activations == kCodes) return found;
  const int64_t size = activations == kInt8Rows ? k : kBlock;
  for (int64_t r = 0; r < m; ++r)
    for (int64_t first = 0; first < k; first += size) {
      const int64_t at = r * k + first, count = std::min(size, k - first);
      const float scale = kernels.quantize(x + at, count, &found[at]);
      for (int64_t i = 0; i < count; ++i) found[at + i] *= scale;
    }
  return found;
}

std::vector<Segment> segments(int64_t k, int64_t group_size, int codes, Activations activations,
                              int64_t longest) {
  std::vector<Segment> found;
  for (int64_t begin = 0, at = 0; begin < k;) {
    int64_t group = begin / group_size, unit = begin / codes;
    int64_t end = std::min({k, (group + 1) * group_size, unit * codes + longest});
    if (activations == kInt8Blocks) end = std::min(end, (begin / kBlock + 1) * kBlock);
    int64_t units = (end + codes - 1) / codes - unit;
    found.push_back({unit, units, begin, end, group, at});
    begin = end;
    at += units;
  }
  return found;
}

std::vector<Rows> rows(int64_t m, const Multiply* kernels) {
  std::vector<Rows> found;
  for (int64_t first = 0; first < m;) {
    int kernel = 0;
    while (!kernels[kernel] || kRows[kernel] > m - first) ++kernel;
    found.push_back({first, kRows[kernel], kernel});
    first += kRows[kernel];
  }
  return found;
}

namespace {

// Whether no number is NaN or infinite.
bool all_finite(const float* x, int64_t count) {
  int32_t most = 0;
  for (int64_t i = 0; i < count; ++i) {
    int32_t bits;
    std::memcpy(&bits, x + i, sizeof bits);
    most = std::max(most, bits & 0x7fffffff);
  }
  return most < 0x7f800000;
}

// Numbers of row r of a segment as they stand among those of `count` rows: as(number) at
// [code, row]. The sum is that of the numbers.
template <class T, class As>
void lay_each(const float* x, const Segment& s, int codes, int count, As as, T* to, T* sum) {
  T total = 0;
  const int64_t start = s.unit * codes;
  for (int64_t i = s.begin; i < s.end; ++i) {
    const T v = static_cast<T>(x[i]);
    to[(i - start) * count] = as(v);
    total += v;
  }
  *sum = total;
}

// The words of Step planes from 4 * Step numbers, and the sum of these.
template <int Step>
int32_t four_in_a_word(const float* q, int count, int32_t* to) {
  int32_t total = 0;
  for (int p = 0; p < Step; ++p) {
    uint32_t word = 0;
    for (int j = 0; j < 4; ++j) {
      const auto v = static_cast<int32_t>(q[p + j * Step]);
      word |= static_cast<uint32_t>(v & 255) << (8 * j);
      total += v;
    }
    to[p * count] = static_cast<int32_t>(word);
  }
  return total;
}

// [unit, plane, row], four codes in a word as `Unit` says.
void lay_planes(const float* q, const Segment& s, Unit unit, int count, int32_t* to, int32_t* sum) {
  const auto lay = unit.step == 8 ? four_in_a_word<8>
                 : unit.step == 4 ? four_in_a_word<4>
                 : unit.step == 2 ? four_in_a_word<2>
                                  : four_in_a_word<1>;
  const int run = 4 * unit.step;
  int32_t total = 0;
  std::vector<float> part(unit.codes);
  for (int64_t u = 0; u < s.units; ++u) {
    const int64_t k = (s.unit + u) * unit.codes;
    const float* from = q + k;
    if (k < s.begin || k + unit.codes > s.end) {  // zeros for what is not of the segment
      for (int64_t i = 0; i < unit.codes; ++i)
        part[i] = k + i >= s.begin && k + i < s.end ? q[k + i] : 0;
      from = part.data();
    }
    for (int first = 0; first < unit.codes; first += run, to += unit.step * count)
      total += lay(from + first, count, to);
  }
  *sum = total;
}

}  // namespace

Prepared::Prepared(const float* x, int64_t m, int64_t k, const std::vector<Segment>& segments,
                   const std::vector<Rows>& rows, Unit unit, Activations activations,
                   bool integers, const Kernels& kernels,
                   const std::function<void(int64_t, std::function<void(int64_t)>)>& parallel)
    : units_(segments.back().at + segments.back().units),
      segments_(segments.size()),
      per_unit_(integers && unit.planes ? unit.planes : unit.codes),
      data_(m * units_ * per_unit_),
      sums_(m * segments_),
      scales_(m * segments_, 1.0f),
      finite_(m, true) {
  const bool rounds = activations == kInt8Rows || activations == kInt8Blocks;
  parallel(rows.size(), [&](int64_t i) {
    const Rows& some = rows[i];
    std::vector<float> q(k);
    const int64_t size = activations == kInt8Rows ? k : kBlock;
    std::vector<float> scale((k + size - 1) / size);
    for (int r = 0; r < some.count; ++r) {
      const float* row = x + (some.first + r) * k;
      char& sound = finite_[some.first + r];
      if (rounds) {
        for (int64_t b = 0; b * size < k; ++b) {
          scale[b] = kernels.quantize(row + b * size, std::min(size, k - b * size), &q[b * size]);
          sound &= scale[b] == scale[b];
        }
        row = q.data();
      } else if (!all_finite(row, k)) {
        sound = false;
        std::fill(q.begin(), q.end(), 0.0f);
        row = q.data();
      }
      for (int64_t s = 0; s < segments_; ++s) {
        const Segment& segment = segments[s];
        const int64_t place = some.first * segments_ + s * some.count + r;
        int32_t* to = data_.data() +
            (some.first * units_ + segment.at * some.count) * per_unit_ + r;
        if (rounds) scales_[place] = scale[segment.begin / size];
        if (integers && !unit.planes) {
          auto in_bytes = [](int32_t v) { return static_cast<int32_t>((v & 255) * 0x01010101u); };
          lay_each(row, segment, unit.codes, some.count, in_bytes, to, &sums_[place]);
        } else if (integers) {
          lay_planes(row, segment, unit, some.count, to, &sums_[place]);
        } else {
          auto same = [](float v) { return v; };
          lay_each(row, segment, unit.codes, some.count, same, reinterpret_cast<float*>(to),
                   reinterpret_cast<float*>(&sums_[place]));
        }
      }
    }
  });
}

}  // namespace jaxquant
