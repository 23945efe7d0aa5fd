// Attention of a few queries over cached keys and values, of which only the visible are read.

#include <algorithm>
#include <cmath>
#include <limits>
#include <new>

#include "arguments.h"
#include "slots.h"
#include "threads.h"

namespace jaxquant {
namespace {

// One position of one head of keys: `count` queries, all seeing the first `visible` slots.
void attend(const Kernels& kernels, const float* q, int count, int64_t visible, const Slots& keys,
            const Slots& values, float* y) {
  const int64_t width = keys.width;
  if (visible == 0) {
    std::fill_n(y, count * width, std::numeric_limits<float>::quiet_NaN());
    return;
  }
  const int64_t stride = (visible + kRun - 1) / kRun * kRun;
  thread_local std::vector<float> queries, weights, room;
  queries.resize(count * width);
  weights.resize(count * stride);
  room.resize(kRun * width);
  const float scale = 1 / std::sqrt(static_cast<float>(width));
  for (int64_t i = 0; i < count * width; ++i) queries[i] = q[i] * scale;
  const Attend a{queries.data(), count, width, weights.data(), stride, y};
  auto runs = [&](auto step, const Slots& slots) {
    for (int64_t first = 0; first < visible; first += kRun) {
      const int64_t some = std::min(kRun, visible - first);
      step(a, slots.read(first, some, kernels, room.data()), first, some);
    }
  };
  runs(kernels.scores, keys);
  std::vector<float> sums(count);
  for (int r = 0; r < count; ++r) {
    float* row = weights.data() + r * stride;
    std::fill(row + visible, row + stride, -std::numeric_limits<float>::max());
    sums[r] = kernels.exponentials(row, stride);
  }
  std::fill_n(y, count * width, 0.0f);
  runs(kernels.mix, values);
  for (int r = 0; r < count; ++r)
    for (int64_t i = 0; i < width; ++i) y[r * width + i] /= sums[r];
}

// q [b, t, heads, width]; keys and values [b, kv_heads, slots, width]; positions [t].
ffi::Error attention(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> q, ffi::AnyBuffer keys,
                     ffi::AnyBuffer values, ffi::Buffer<ffi::S32> positions,
                     ffi::ResultBuffer<ffi::F32> y, int32_t most) try {
  const auto size = q.dimensions(), cache = keys.dimensions();
  const int64_t t = size[1], heads = size[2], width = size[3], kv_heads = cache[1], slots = cache[2];
  const int64_t count = heads / kv_heads;
  auto key_type = scales(keys), value_type = scales(values);
  if (!key_type || !value_type) return invalid("keys and values must be floats of up to 32 bits");
  const Kernels& kernels = choose(most);
  auto visible = [&](int64_t i) {
    return std::clamp<int64_t>(int64_t{positions.typed_data()[i]} + 1, 0, slots);
  };
  int64_t seen = 0;
  for (int64_t i = 0; i < t; ++i) {
    seen += visible(i);
  }
  const int64_t work = 2 * size[0] * heads * width * seen;
  auto one = [&](int, int64_t i) {
    auto of = [&](const ffi::AnyBuffer& a, ScaleType type) {
      const int64_t bytes = type == kSingle ? 4 : 2;
      return Slots{static_cast<const char*>(a.untyped_data()) + i * slots * width * bytes, type,
                   width};
    };
    const int64_t b = i / kv_heads, head = i % kv_heads;
    for (int64_t j = 0; j < t; ++j) {
      const int64_t at = ((b * t + j) * heads + head * count) * width;
      attend(kernels, q.typed_data() + at, static_cast<int>(count), visible(j),
             of(keys, key_type->type), of(values, value_type->type), y->typed_data() + at);
    }
  };
  Team::the().share(worth(work, pool.num_threads()) - 1, false, size[0] * kv_heads, one);
  return ffi::Error::Success();
} catch (const std::bad_alloc&) {
  return ffi::Error(ffi::ErrorCode::kResourceExhausted, "out of memory in attention");
}

}  // namespace
}  // namespace jaxquant

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxquant_attention, jaxquant::attention,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Attr<int32_t>("most"));
