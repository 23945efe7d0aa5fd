// Products with packed integers or codes of a table.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>

#include "calls.h"
#include "packed.h"

namespace jaxquant {
namespace {

// Values as floats, and as 14-bit integers for products of integers.
Table make_table(ffi::Span<const float> values) {
  Table t = {};
  float low = *std::min_element(values.begin(), values.end());
  float high = *std::max_element(values.begin(), values.end());
  t.unit = high > low ? (high - low) / 16383 : 1;
  t.offset = static_cast<int32_t>(std::lround(-2 * low / t.unit));
  for (size_t i = 0; i < 16; ++i) {
    t.values[i] = values[i % values.size()];
    int v = static_cast<int>(std::lround(t.values[i] / t.unit + t.offset * 0.5f));
    v = std::clamp(v, 0, 16383);
    t.high[i] = v >> 7, t.low[i] = v & 127;
  }
  return t;
}

// Of every matrix: codes, scale, zero points (empty where there are none). Results in their order.
ffi::Error packed(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::S32> groups,
                  ffi::RemainingArgs args, ffi::RemainingRets results, int32_t bits,
                  int32_t group_size, int32_t activations, int32_t most,
                  ffi::Span<const float> table) try {
  const bool tabled = table.size() > 0;
  if (bits < 2 || (bits > 4 && (bits != 8 || tabled))) return invalid("bits must be 2, 3, 4 or 8");
  const Form form = static_cast<Form>(bits == 8 ? kInt8 : bits - 2 + (tabled ? kTable2 : kInt2));
  Table values;
  if (tabled) values = make_table(table);
  const auto asked = calls(x, groups, args, results, 3);
  if (!asked) return invalid("a matrix lacks an array");
  for (const auto& [m, alike] : *asked) {
    std::vector<Packed> matrices(alike.size());
    std::vector<Task> tasks(alike.size());
    for (size_t i = 0; i < alike.size(); ++i) {
      const Call& call = alike[i];
      const Array &codes = call.arrays[0], &scale = call.arrays[1], &zero = call.arrays[2];
      Packed& matrix = matrices[i];
      matrix.form = form;
      matrix.table = tabled ? &values : nullptr;
      matrix.n = call.n;
      matrix.codes = codes.as<uint32_t>();
      if (zero.count) matrix.zero_words = zero.as<uint32_t>();
      auto found = scales(scale);
      if (!found) return invalid("scales must be float16, bfloat16 or float32");
      matrix.scales = *found;
      tasks[i] = {{&matrix}, call.y, call.n, 1, call.x};
    }
    const int64_t k = x.dimensions()[1];
    multiply(pool.num_threads(), choose(most),
             {m, k, group_size, 128, 8192, static_cast<Activations>(activations)}, tasks);
  }
  return ffi::Error::Success();
} catch (const std::bad_alloc&) {
  return ffi::Error(ffi::ErrorCode::kResourceExhausted, "no memory for a packed product");
}

}  // namespace
}  // namespace jaxquant

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxquant_packed, jaxquant::packed,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<int32_t>("bits")
                                  .Attr<int32_t>("group_size")
                                  .Attr<int32_t>("activations")
                                  .Attr<int32_t>("most")
                                  .Attr<xla::ffi::Span<const float>>("table"));
