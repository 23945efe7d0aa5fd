// Additive codebooks: a group of rows is the sum of one vector of each codebook.

#include <algorithm>
#include <cstring>
#include <new>

#include "calls.h"

namespace jaxquant {
namespace {

constexpr int kMostGroup = 64;

class Sums : public Operand {
 public:
  const uint32_t* codes;            // one stream of bits down each column
  std::vector<float> vectors;       // [books, 2^bits, group]
  int64_t n, books, bits, group;

  Words words(const Segment& s, int64_t first, int64_t count, int64_t columns,
              uint32_t* room) const override {
    auto* out = reinterpret_cast<float*>(room);
    for (int64_t g = s.begin / group; g * group < s.end; ++g) {
      const int64_t from = std::max(s.begin, g * group), to = std::min(s.end, (g + 1) * group);
      float* rows = out + (from - s.begin) * columns;
      for (int64_t c = 0; c < count; ++c) {
        float sum[kMostGroup];
        total(g, first + c, sum);
        for (int64_t i = from; i < to; ++i) rows[(i - from) * columns + c] = sum[i - g * group];
      }
      for (int64_t i = from; i < to; ++i)
        std::fill_n(rows + (i - from) * columns + count, columns - count, 0.0f);
    }
    return {room, columns};
  }

 private:
  void total(int64_t g, int64_t column, float* sum) const {
    for (int64_t m = 0; m < books; ++m) {
      const int64_t bit = (g * books + m) * bits, low = bit % 32;
      const uint32_t* w = codes + bit / 32 * n + column;
      uint32_t code = *w >> low;
      if (low + bits > 32) code |= w[n] << (32 - low);
      code &= (1u << bits) - 1;
      const float* v = vectors.data() + ((m << bits) + code) * group;
      for (int64_t i = 0; i < group; ++i) sum[i] = m ? sum[i] + v[i] : v[i];
    }
  }
};

// Of every matrix: codes, codebooks [books, 2^bits, group], scale [1, n].
ffi::Error additive(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::S32> groups,
                    ffi::RemainingArgs args, ffi::RemainingRets results, int32_t bits,
                    int32_t group, int32_t activations, int32_t most) try {
  if (group > kMostGroup) return invalid("groups of more than 64 rows");
  const Kernels& kernels = choose(most);
  const auto asked = calls(x, groups, args, results, 3);
  if (!asked) return invalid("a matrix lacks an array");
  for (const auto& [m, alike] : *asked) {
    std::vector<Sums> matrices(alike.size());
    std::vector<Task> tasks(alike.size());
    for (size_t i = 0; i < alike.size(); ++i) {
      const Call& call = alike[i];
      const Array &codes = call.arrays[0], &books = call.arrays[1], &scale = call.arrays[2];
      auto found = scales(scale), vectors = scales(books);
      if (!found || !vectors) return invalid("floats must be float16, bfloat16 or float32");
      Sums& sums = matrices[i];
      sums.form = kFloat32;
      sums.scales = *found;
      sums.codes = codes.as<uint32_t>();
      sums.n = call.n;
      sums.books = books.dimensions[0];
      sums.bits = bits;
      sums.group = group;
      sums.vectors.resize(books.count);
      kernels.widen(vectors->data, vectors->type, books.count, sums.vectors.data());
      tasks[i] = {{&sums}, call.y, call.n, 1, call.x};
    }
    const int64_t k = x.dimensions()[1], longest = std::max<int64_t>(1, 32 / group) * group;
    multiply(pool.num_threads(), kernels,
             {m, k, k, longest, 256, static_cast<Activations>(activations)}, tasks);
  }
  return ffi::Error::Success();
} catch (const std::bad_alloc&) {
  return ffi::Error(ffi::ErrorCode::kResourceExhausted, "no memory for a product of codebooks");
}

}  // namespace
}  // namespace jaxquant

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxquant_additive, jaxquant::additive,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<int32_t>("bits")
                                  .Attr<int32_t>("group")
                                  .Attr<int32_t>("activations")
                                  .Attr<int32_t>("most"));
