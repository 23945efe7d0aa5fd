// Products with packed integers or codes of a table.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>

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
ffi::Error packed(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::RemainingArgs args,
                  ffi::RemainingRets results, int32_t bits, int32_t group_size,
                  int32_t activations, int32_t most, ffi::Span<const float> table) try {
  const bool tabled = table.size() > 0;
  if (bits < 2 || (bits > 4 && (bits != 8 || tabled))) return invalid("bits must be 2, 3, 4 or 8");
  const Form form = static_cast<Form>(bits == 8 ? kInt8 : bits - 2 + (tabled ? kTable2 : kInt2));
  Table values;
  if (tabled) values = make_table(table);
  std::vector<Packed> matrices(results.size());
  std::vector<Task> tasks(results.size());
  for (size_t i = 0; i < results.size(); ++i) {
    auto codes = args.get<ffi::AnyBuffer>(3 * i), scale = args.get<ffi::AnyBuffer>(3 * i + 1);
    auto zero = args.get<ffi::AnyBuffer>(3 * i + 2);
    auto y = results.get<ffi::AnyBuffer>(i);
    if (!codes || !scale || !zero || !y) return invalid("a matrix lacks an array");
    Packed& matrix = matrices[i];
    matrix.form = form;
    matrix.table = tabled ? &values : nullptr;
    matrix.n = codes->dimensions().back();
    matrix.codes = static_cast<const uint32_t*>(codes->untyped_data());
    if (zero->element_count())
      matrix.zero_words = static_cast<const uint32_t*>(zero->untyped_data());
    auto found = scales(*scale);
    if (!found) return invalid("scales must be float16, bfloat16 or float32");
    matrix.scales = *found;
    tasks[i] = {{&matrix}, static_cast<float*>((*y)->untyped_data()), matrix.n};
  }
  const auto size = x.dimensions();
  multiply(pool.num_threads(), choose(most), x.typed_data(),
           {size[0], size[1], group_size, 128, 8192, static_cast<Activations>(activations)}, tasks);
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
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<int32_t>("bits")
                                  .Attr<int32_t>("group_size")
                                  .Attr<int32_t>("activations")
                                  .Attr<int32_t>("most")
                                  .Attr<xla::ffi::Span<const float>>("table"));
