// Additive codebooks: a group of rows is the sum of one vector of each codebook.

#include <algorithm>
#include <cstring>
#include <new>

#include "arguments.h"

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
ffi::Error additive(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::RemainingArgs args,
                    ffi::RemainingRets results, int32_t bits, int32_t group, int32_t activations,
                    int32_t most) try {
  if (group > kMostGroup) return invalid("groups of more than 64 rows");
  const Kernels& kernels = choose(most);
  std::vector<Sums> matrices(results.size());
  std::vector<Task> tasks(results.size());
  for (size_t i = 0; i < results.size(); ++i) {
    auto codes = args.get<ffi::AnyBuffer>(3 * i), scale = args.get<ffi::AnyBuffer>(3 * i + 2);
    auto books = args.get<ffi::AnyBuffer>(3 * i + 1);
    auto y = results.get<ffi::AnyBuffer>(i);
    if (!codes || !books || !scale || !y) return invalid("a matrix lacks an array");
    auto found = scales(*scale), vectors = scales(*books);
    if (!found || !vectors) return invalid("floats must be float16, bfloat16 or float32");
    Sums& sums = matrices[i];
    sums.form = kFloat32;
    sums.scales = *found;
    sums.codes = static_cast<const uint32_t*>(codes->untyped_data());
    sums.n = codes->dimensions().back();
    sums.books = books->dimensions()[0];
    sums.bits = bits;
    sums.group = group;
    sums.vectors.resize(books->element_count());
    kernels.widen(vectors->data, vectors->type, books->element_count(), sums.vectors.data());
    tasks[i] = {{&sums}, static_cast<float*>((*y)->untyped_data()), sums.n};
  }
  const auto size = x.dimensions();
  const int64_t longest = std::max<int64_t>(1, 32 / group) * group;
  multiply(pool.num_threads(), kernels, x.typed_data(),
           {size[0], size[1], size[1], longest, 256, static_cast<Activations>(activations)}, tasks);
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
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<int32_t>("bits")
                                  .Attr<int32_t>("group")
                                  .Attr<int32_t>("activations")
                                  .Attr<int32_t>("most"));
