// Products with floats stored without loss in planes (pallas_kernels/codecs/float_planes.py), and
// the floats themselves.
//
// A few rows of x meet bfloat16 planes as they are decoded, where the instruction set has a kernel
// for that. Otherwise blocks of weights are decoded to floats in a core's cache.

#include "float_planes.h"

#include <cmath>
#include <cstring>
#include <new>

#include "calls.h"

namespace jaxquant {
namespace {

constexpr int64_t kNarrow = 256;                // columns of a block that is decoded
constexpr int64_t kSums = int64_t{1} << 16;     // sums of a block, in a core's cache
constexpr int64_t kFewRows = 128;               // that meet weights as these are decoded
constexpr int64_t kWorth = int64_t{1} << 20;    // multiplications that are worth waking a thread

// The value of a float8.
float small_float(const FloatType& type, bool finite, uint32_t bits) {
  const int mantissa = type.mantissa, most = (1 << type.exponent) - 1, bias = most / 2;
  const int fraction = bits & ((1 << mantissa) - 1), exponent = bits >> mantissa & most;
  float v = exponent ? std::ldexp(float(fraction + (1 << mantissa)), exponent - bias - mantissa)
                     : std::ldexp(float(fraction), 1 - bias - mantissa);
  if (finite && (bits & 127) == 127) v = NAN;
  if (!finite && exponent == most) v = fraction ? NAN : INFINITY;
  return bits & 128 ? -v : v;
}

// A matrix whose weights come out as floats.
class Decoded : public Operand {
 public:
  Decoded(const FloatPlanes& planes, int type, const Kernels& kernels)
      : planes_(planes),
        type_(type),
        kernels_(kernels),
        starts_(entries(planes, 0, planes.n)) {
    form = kFloat32;
    scales = {&kOne, kSingle, true};
    if (type == kE4M3 || type == kE5M2)
      for (uint32_t i = 0; i < 256; ++i)
        table_.push_back(small_float(planes.type, type == kE4M3, i));
  }

  Words words(const Segment& s, int64_t first, int64_t count, int64_t columns,
              uint32_t* room) const override {
    const int up = type_ == kBfloat16 ? 16 : 0;
    const FloatTile tile{&planes_, s.begin, first, s.end - s.begin, count, up, room, columns};
    kernels_.float_tile(tile);
    put_listed(tile, starts_.data() + first);
    for (int64_t i = 0; i < tile.rows; ++i) {
      uint32_t* row = room + i * columns;
      if (type_ == kFloat16) widen_halves(row, count);
      if (!table_.empty())
        for (int64_t c = 0; c < count; ++c) std::memcpy(row + c, &table_[row[c] & 255], 4);
      std::fill(row + count, row + columns, 0u);
    }
    return {room, columns};
  }

 private:
  static constexpr float kOne = 1;

  void widen_halves(uint32_t* row, int64_t count) const {
    uint16_t halves[kNarrow];
    std::copy_n(row, count, halves);
    kernels_.widen(halves, kHalf, count, reinterpret_cast<float*>(row));
  }

  const FloatPlanes& planes_;
  int type_;
  const Kernels& kernels_;
  std::vector<int32_t> starts_;
  std::vector<float> table_;
};

// Few rows of x as `FloatProduct` wants them; and which of them are finite.
struct FewRows {
  std::vector<float> x;
  std::vector<char> finite;

  FewRows(const float* from, int64_t m, int64_t k)
      : x((k + kBlockRows - 1) / kBlockRows * m * kBlockRows), finite(m, true) {
    for (int64_t r = 0; r < m; ++r) {
      const float* row = from + r * k;
      finite[r] = std::all_of(row, row + k, [](float v) { return std::isfinite(v); });
      if (!finite[r]) continue;
      for (int64_t i = 0; i < k; ++i) {
        const int64_t in = i % kBlockRows, place = (in & ~3) | (in & 1) << 1 | (in >> 1 & 1);
        x[(i / kBlockRows * m + r) * kBlockRows + place] = row[i];
      }
    }
  }
};

// Some columns of a product.
struct Part {
  const FloatPlanes* planes;
  const FewRows* x;
  float* y;
  int64_t first, count;
};

void multiply_few(const Part& part, int64_t m, const Kernels& kernels) {
  const FloatPlanes& w = *part.planes;
  const int64_t count = part.count;
  for (int64_t r = 0; r < m; ++r) std::fill_n(part.y + r * w.n + part.first, count, 0.0f);
  std::vector<int32_t> at = entries(w, part.first, count), end(at.begin() + 1, at.end());
  std::vector<int32_t> next((count + 15) / 16 * 16, INT32_MAX);
  for (int64_t c = 0; c < count; ++c)
    if (at[c] < end[c])
      next[c] = static_cast<int32_t>(std::min<int64_t>(
          w.where[at[c]] - (part.first + c) * w.k, INT32_MAX));
  kernels.float_product({&w, part.first, count, m, part.x->x.data(), part.y,
                         at.data(), end.data(), next.data()});
  for (int64_t r = 0; r < m; ++r)
    if (!part.x->finite[r]) std::fill_n(part.y + r * w.n + part.first, count, NAN);
}

struct Matrix {
  FloatPlanes planes;
  const float* x;
  float* y;
};

void multiply_few(int64_t most_threads, const std::vector<Matrix>& matrices, int64_t m,
                  const Kernels& kernels) {
  std::map<const float*, FewRows> rows;
  std::vector<Part> parts;
  int64_t work = 0;
  for (const Matrix& one : matrices) work += m * one.planes.k * one.planes.n;
  const int threads = worth(work, most_threads);
  const int64_t wide = std::clamp<int64_t>(kSums / m / 64 * 64, 256, 1024);
  for (const Matrix& one : matrices) {
    const FewRows& x = rows.try_emplace(one.x, one.x, m, one.planes.k).first->second;
    const int64_t n = one.planes.n, share = share_of(n, threads, wide);
    for (int64_t first = 0; first < n; first += share)
      parts.push_back({&one.planes, &x, one.y, first, std::min(share, n - first)});
  }
  Team::the().share(threads - 1, work >= kWorth, parts.size(),
                    [&](int, int64_t i) { multiply_few(parts[i], m, kernels); });
}

void multiply_many(int64_t most_threads, const std::vector<Matrix>& matrices, int64_t m,
                   int type, const Kernels& kernels) {
  std::vector<Decoded> decoded;
  std::vector<Task> tasks;
  decoded.reserve(matrices.size());
  for (const Matrix& one : matrices) {
    decoded.emplace_back(one.planes, type, kernels);
    tasks.push_back({{&decoded.back()}, one.y, one.planes.n, 1, one.x});
  }
  const int64_t k = matrices[0].planes.k;
  multiply(most_threads, kernels, {m, k, k, kBlockRows, kNarrow, kAsFloat}, tasks);
}

ffi::Error float_planes_product(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x,
                                ffi::Buffer<ffi::S32> groups, ffi::RemainingArgs args,
                                ffi::RemainingRets results, int32_t type, int32_t bits,
                                int32_t activations, int32_t most) try {
  const Kernels& kernels = choose(most);
  const int64_t rows = x.dimensions()[0], k = x.dimensions()[1];
  const auto asked = calls(x, groups, args, results, kFloatArrays);
  if (!asked) return invalid("a matrix lacks an array");
  const auto form = static_cast<Activations>(activations);
  const auto all = rounded(x.typed_data(), rows, k, form, kernels);
  for (const auto& [m, alike] : *asked) {
    std::vector<Matrix> matrices;
    for (const Call& call : alike) {
      const auto planes = float_planes(call.arrays, k, call.n, type, bits);
      if (!planes) return invalid("float planes must be those of the rows, columns and dtype");
      if (k == 0) std::fill_n(call.y, m * call.n, 0.0f);
      if (k > 0 && m > 0 && call.n > 0)
        matrices.push_back({*planes, all.data() + (call.x - x.typed_data()), call.y});
    }
    if (matrices.empty()) continue;
    if (kernels.float_product && type == kBfloat16 && m <= kFewRows) {
      multiply_few(pool.num_threads(), matrices, m, kernels);
    } else {
      multiply_many(pool.num_threads(), matrices, m, type, kernels);
    }
  }
  return ffi::Error::Success();
} catch (const std::bad_alloc&) {
  return ffi::Error(ffi::ErrorCode::kResourceExhausted, "no memory for a product of float planes");
}

// --- floats -----------------------------------------------------------------------------------

template <class T>
void narrow(const uint32_t* from, int64_t count, void* to) {
  std::copy_n(from, count, static_cast<T*>(to));
}

// Columns first ... first + count of all rows, in their own bytes.
void decode_columns(const FloatPlanes& w, int64_t first, int64_t count, const Kernels& kernels,
                    char* out) {
  const auto starts = entries(w, first, count);
  const int bytes = w.type.bytes;
  std::vector<uint32_t> room(kBlockRows * count);
  for (int64_t row = 0; row < w.k; row += kBlockRows) {
    const int64_t rows = std::min<int64_t>(kBlockRows, w.k - row);
    const FloatTile tile{&w, row, first, rows, count, 0, room.data(), count};
    kernels.float_tile(tile);
    put_listed(tile, starts.data());
    for (int64_t i = 0; i < rows; ++i) {
      const uint32_t* from = room.data() + i * count;
      void* to = out + ((row + i) * w.n + first) * bytes;
      bytes == 1   ? narrow<uint8_t>(from, count, to)
      : bytes == 2 ? narrow<uint16_t>(from, count, to)
                   : narrow<uint32_t>(from, count, to);
    }
  }
}

ffi::Error float_planes_decode(ffi::ThreadPool pool, ffi::RemainingArgs args,
                               ffi::Result<ffi::AnyBuffer> out, int32_t type, int32_t bits,
                               int32_t most) try {
  std::vector<Array> arrays;
  for (size_t i = 0; i < kFloatArrays; ++i) {
    const auto a = args.get<ffi::AnyBuffer>(i);
    if (!a) return invalid("a matrix lacks an array");
    arrays.push_back(whole(*a));
  }
  const int64_t k = out->dimensions()[0], n = out->dimensions()[1];
  const auto w = float_planes(arrays, k, n, type, bits);
  if (!w || out->size_bytes() != static_cast<size_t>(k * n * w->type.bytes))
    return invalid("float planes must be those of the rows, columns and dtype");
  if (k == 0 || n == 0) return ffi::Error::Success();
  const Kernels& kernels = choose(most);
  const int threads = worth(k * n, pool.num_threads());
  const int64_t share = share_of(n, threads, kNarrow);
  Team::the().share(threads - 1, k * n >= kWorth, (n + share - 1) / share, [&](int, int64_t i) {
    decode_columns(*w, i * share, std::min(share, n - i * share), kernels,
                   static_cast<char*>(out->untyped_data()));
  });
  return ffi::Error::Success();
} catch (const std::bad_alloc&) {
  return ffi::Error(ffi::ErrorCode::kResourceExhausted, "no memory to decode float planes");
}

}  // namespace
}  // namespace jaxquant

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxquant_float_planes, jaxquant::float_planes_product,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<int32_t>("type")
                                  .Attr<int32_t>("bits")
                                  .Attr<int32_t>("activations")
                                  .Attr<int32_t>("most"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxquant_float_planes_decode, jaxquant::float_planes_decode,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .RemainingArgs()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<int32_t>("type")
                                  .Attr<int32_t>("bits")
                                  .Attr<int32_t>("most"));
