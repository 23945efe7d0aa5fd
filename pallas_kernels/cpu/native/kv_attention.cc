// Attention of a few queries over a packed cache (pallas_kernels/codecs/kv_layout.py): of its codes the visible
// are decoded, a group of tokens at a time.

#include <algorithm>
#include <cmath>
#include <limits>
#include <new>

#include "arguments.h"
#include "slots.h"
#include "threads.h"

namespace jaxquant {
namespace {

// Sizes that the shapes of the arrays say, and what a call is to see.
struct Cache {
  int64_t slots, group, sinks, ring, width, channels;
  int64_t coded;         // tokens to be read from the codes, whole groups
  int64_t first, start;  // those to be read from the ring: first ... start - 1
  int64_t groups() const { return slots / group; }
};

// Cosines and sines [*, width / 2]: of the places in a group, and back to where each group begins.
// Of whole steps from angle to angle in double, which stays exact enough and calls no sine.
struct Turns {
  std::vector<float> cos, sin, back_cos, back_sin;

  static void steps(const std::vector<double>& radians, int64_t count, float sign,
                    std::vector<float>& cos, std::vector<float>& sin) {
    const size_t half = radians.size();
    cos.resize(count * half);
    sin.resize(count * half);
    for (size_t i = 0; i < half; ++i) {
      const double c = std::cos(radians[i]), s = std::sin(radians[i]);
      double x = 1, y = 0;
      for (int64_t j = 0; j < count; ++j) {
        cos[j * half + i] = static_cast<float>(x);
        sin[j * half + i] = sign * static_cast<float>(y);
        const double next = x * c - y * s;
        y = y * c + x * s;
        x = next;
      }
    }
  }

  Turns(const float* frequencies, int64_t half, const Cache& cache) {
    if (half == 0) return;
    std::vector<double> radians(frequencies, frequencies + half);
    steps(radians, cache.group, 1, cos, sin);
    for (double& r : radians) r *= static_cast<double>(cache.group);
    steps(radians, cache.coded / cache.group, -1, back_cos, back_sin);
  }

  bool any() const { return !cos.empty(); }
};

// The keys, or the values, of one head.
struct Side {
  Slots own, sink, ring;
  const uint32_t* codes;
  const uint16_t *scale, *offset;
  Form form;

  // Codes of a group as floats.
  void unpack(const Cache& c, int64_t group, const Kernels& kernels, float* to) const {
    const Unit& unit = kUnits[form];
    Product p{};
    p.units = static_cast<int>(c.group / unit.codes);
    p.columns = static_cast<int>(c.width);
    p.stride = c.width;
    p.words = codes + group * p.units * unit.words * c.width;
    kernels.unpack[form](p, to);
  }
};

struct Head {
  const Kernels& kernels;
  const Cache& cache;
  const Turns& turns;
  Side keys, values;

  // Slots of `slots` as rows of floats, a run at a time: step(rows, count).
  template <class Step>
  void exact(const Slots& slots, int64_t first, int64_t end, float* room, Step step) const {
    for (int64_t count; first < end; first += count) {
      count = std::min(kRun, end - first);
      step(slots.read(first, count, kernels, room), count);
    }
  }

  // What is seen as it is, of keys or of values, always in this order.
  template <class Step>
  void exact(const Side& side, int64_t own, float* room, Step step) const {
    exact(side.own, 0, own, room, step);
    exact(side.sink, 0, std::min(cache.sinks, cache.start), room, step);
    for (int64_t at = cache.first; at < cache.start;) {  // in two parts where the ring closes
      const int64_t place = at % cache.ring;
      const int64_t count = std::min(cache.start - at, cache.ring - place);
      exact(side.ring, place, place + count, room, step);
      at += count;
    }
  }

  // One position: `count` queries, which see the first `own` of the new tokens, and the past.
  void attend(const float* q, int count, int64_t own, float* y) const {
    const int64_t width = cache.width, before = own + std::min(cache.sinks, cache.start) +
                                                std::max<int64_t>(0, cache.start - cache.first);
    const int64_t seen = before + cache.coded, stride = (seen + kRun - 1) / kRun * kRun;
    thread_local std::vector<float> queries, turned, weights, room, scales;
    queries.resize(count * width);
    weights.resize(count * stride);
    room.resize(std::max(kRun, cache.group) * width);
    const float scale = 1 / std::sqrt(static_cast<float>(width));
    for (int64_t i = 0; i < count * width; ++i) queries[i] = q[i] * scale;
    Attend a{queries.data(), count, width, weights.data(), stride, y};
    int64_t at = 0;
    exact(keys, own, room.data(), [&](const float* rows, int64_t some) {
      kernels.scores(a, rows, at, some);
      at += some;
    });
    scales.resize(2 * std::max(width, width / cache.channels * cache.group));
    score_codes(a, before, turned, room.data(), scales.data());
    std::vector<float> sums(count);
    for (int r = 0; r < count; ++r) {
      float* row = weights.data() + r * stride;
      const float never = -std::numeric_limits<float>::max();
      std::fill_n(row + before, std::min(cache.sinks, cache.coded), never);
      std::fill(row + seen, row + stride, never);
      sums[r] = kernels.exponentials(row, stride);
    }
    std::fill_n(y, count * width, 0.0f);
    at = 0;
    exact(values, own, room.data(), [&](const float* rows, int64_t some) {
      kernels.mix(a, rows, at, some);
      at += some;
    });
    mix_codes(a, before, room.data(), scales.data());
    for (int r = 0; r < count; ++r)
      for (int64_t i = 0; i < width; ++i) y[r * width + i] /= sums[r];
  }

  void score_codes(Attend a, int64_t at, std::vector<float>& turned, float* room,
                   float* scales) const {
    const float* queries = a.queries;
    const int64_t width = cache.width, half = width / 2;
    for (int64_t g = 0; g * cache.group < cache.coded; ++g, at += cache.group) {
      keys.unpack(cache, g, kernels, room);
      kernels.widen(keys.scale + g * width, kHalf, width, scales);
      kernels.widen(keys.offset + g * width, kHalf, width, scales + width);
      kernels.by_channel(room, cache.group, width, scales, scales + width);
      if (turns.any()) {
        kernels.turn(room, cache.group, width, turns.cos.data(), turns.sin.data(), half);
        turned.assign(queries, queries + a.count * width);
        kernels.turn(turned.data(), a.count, width, turns.back_cos.data() + g * half,
                     turns.back_sin.data() + g * half, 0);
        a.queries = turned.data();
      }
      kernels.scores(a, room, at, cache.group);
    }
  }

  void mix_codes(const Attend& a, int64_t at, float* room, float* scales) const {
    const int64_t runs = cache.width / cache.channels, group = cache.group;
    float* offsets = scales + runs * group;
    for (int64_t g = 0; g * group < cache.coded; ++g, at += group) {
      values.unpack(cache, g, kernels, room);
      for (int64_t run = 0; run < runs; ++run) {
        const int64_t from = run * cache.slots + g * group;
        kernels.widen(values.scale + from, kHalf, group, scales + run * group);
        kernels.widen(values.offset + from, kHalf, group, offsets + run * group);
      }
      kernels.by_row(room, group, cache.width, cache.channels, scales, offsets, group);
      kernels.mix(a, room, at, group);
    }
  }
};

// After q: own keys and values; layer, start; frequencies; the arrays of `Past`.
struct Arrays {
  enum { kOwnK, kOwnV, kLayer, kStart, kFrequencies, kSinkK, kSinkV, kRingK, kRingV,
         kKeyCodes, kKeyScale, kKeyOffset, kValueCodes, kValueScale, kValueOffset, kCount };
  std::vector<ffi::AnyBuffer> all;

  int64_t size(int i, int axis) const { return all[i].dimensions()[axis]; }
  int64_t number(int i) const { return *static_cast<const int32_t*>(all[i].untyped_data()); }

  // Where head `i` of all layers' begins.
  template <class T>
  const T* at(int array, int64_t i) const {
    const auto shape = all[array].dimensions();
    return static_cast<const T*>(all[array].untyped_data()) + i * shape[3] * shape[4];
  }

  Slots slots(int array, int64_t i, int64_t rows, int64_t width) const {
    const ScaleType type = scales(all[array])->type;
    const int64_t bytes = type == kSingle ? 4 : 2;
    return {static_cast<const char*>(all[array].untyped_data()) + i * rows * width * bytes, type,
            width};
  }

  Cache cache() const {
    Cache c;
    c.slots = size(kValueScale, 4);
    c.group = c.slots / size(kKeyScale, 3);
    c.sinks = size(kSinkK, 3);
    c.ring = size(kRingK, 3);
    c.width = size(kRingK, 4);
    c.channels = c.width / size(kValueScale, 3);
    c.start = number(kStart);
    const int64_t old = std::max<int64_t>(0, c.start - (c.ring - c.group));
    c.coded = std::min(old / c.group * c.group, c.slots);
    c.first = std::max(c.coded, c.sinks);
    return c;
  }

  // Of head `own` of a call, `past` of all layers'.
  Side side(bool values, int64_t own, int64_t past, const Cache& c) const {
    const int codes = values ? kValueCodes : kKeyCodes, v = values;
    const int64_t bits = 32 * size(codes, 3) / c.slots;
    return {slots(kOwnK + v, own, size(kOwnK, 2), c.width),
            slots(kSinkK + v, past, c.sinks, c.width), slots(kRingK + v, past, c.ring, c.width),
            at<uint32_t>(codes, past), at<uint16_t>(codes + 1, past), at<uint16_t>(codes + 2, past),
            static_cast<Form>(bits == 8 ? kInt8 : kInt2 + bits - 2)};
  }
};

ffi::Error kv_attention(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> q, ffi::RemainingArgs args,
                        ffi::ResultBuffer<ffi::F32> y, int32_t most) try {
  Arrays arrays;
  for (int i = 0; i < Arrays::kCount; ++i) {
    auto array = args.get<ffi::AnyBuffer>(i);
    if (!array) return invalid("a packed cache lacks an array");
    arrays.all.push_back(*array);
  }
  const auto size = q.dimensions();
  const int64_t t = size[1], heads = size[2], width = size[3], kv = arrays.size(Arrays::kOwnK, 1);
  const int64_t count = heads / kv, layer = arrays.number(Arrays::kLayer);
  const Kernels& kernels = choose(most);
  const Cache cache = arrays.cache();
  const Turns turns(static_cast<const float*>(arrays.all[Arrays::kFrequencies].untyped_data()),
                    arrays.size(Arrays::kFrequencies, 0), cache);
  auto one = [&](int, int64_t i) {
    const int64_t past = layer * size[0] * kv + i, b = i / kv, head = i % kv;
    const Head h{kernels, cache, turns, arrays.side(false, i, past, cache),
                 arrays.side(true, i, past, cache)};
    for (int64_t j = 0; j < t; ++j) {
      const int64_t at = ((b * t + j) * heads + head * count) * width;
      h.attend(q.typed_data() + at, static_cast<int>(count), j + 1, y->typed_data() + at);
    }
  };
  const int64_t seen = cache.start + t, work = 2 * size[0] * t * heads * width * seen;
  Team::the().share(worth(work, pool.num_threads()) - 1, false, size[0] * kv, one);
  return ffi::Error::Success();
} catch (const std::bad_alloc&) {
  return ffi::Error(ffi::ErrorCode::kResourceExhausted, "out of memory in kv_attention");
}

}  // namespace
}  // namespace jaxquant

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxquant_kv_attention, jaxquant::kv_attention,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .RemainingArgs()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Attr<int32_t>("most"));
