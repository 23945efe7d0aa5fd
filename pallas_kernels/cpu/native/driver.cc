// Products of x with packed matrices: blocks of columns on threads, segment by segment of k.
//
// Of a block the sums stay in a few kilobytes; a segment's words are read, and where need be made,
// once for all rows of x.

#include <algorithm>
#include <cstring>
#include <limits>
#include <map>
#include <optional>

#include "operand.h"

namespace jaxquant {

namespace {

constexpr int64_t kAlign = 16;              // columns of a block are a multiple of this
constexpr int64_t kWake = int64_t{1} << 20;  // multiplications that are worth waking a thread
constexpr int64_t kBroad = 1024;  // columns whose words memory gives as fast as those of more
constexpr int64_t kSums = int64_t{1} << 16;   // sums of a block, in a core's cache

int64_t up(int64_t v, int64_t to) { return (v + to - 1) / to * to; }

// Memory of a thread that lives as long as the thread.
template <class T>
T* scratch(std::vector<T>& v, int64_t count) {
  if (static_cast<int64_t>(v.size()) < count) v.resize(count);
  T* data = v.data();
  return data;
}

struct Columns {
  const Task* task;
  int64_t first, count;
};

// Blocks of columns for `threads`: about equally many for each, up to four if they are broad, for
// one may be late. What is left of 16 stands alone.
std::vector<Columns> cut(const Shape& shape, const std::vector<Task>& tasks, int lanes,
                         int64_t threads) {
  int64_t all = 0;
  for (const Task& task : tasks) all += task.n;
  const int64_t each = threads == 1 ? 1 : std::clamp<int64_t>(all / (threads * kBroad), 1, 4);
  const int64_t fair = (all + each * threads - 1) / (each * threads);
  std::vector<Columns> blocks;
  for (const Task& task : tasks) {
    int64_t align = task.interleaved > 1 ? task.interleaved * lanes : kAlign;
    int64_t most = std::max<int64_t>(128, std::min(shape.wide, kSums / shape.m));
    int64_t size = up(std::min(most, std::max<int64_t>(fair, 128)), align);
    int64_t whole = task.interleaved > 1 ? task.n : task.n / kAlign * kAlign;
    for (int64_t first = 0; first < whole; first += size)
      blocks.push_back({&task, first, std::min(size, whole - first)});
    if (whole < task.n) blocks.push_back({&task, whole, task.n - whole});
  }
  return blocks;
}

struct Job {
  const Kernels& kernels;
  const Shape& shape;
  const std::vector<Segment>& segments;
  const std::vector<Rows>& rows;
  const Prepared& x;
  bool integers;
  bool unpacked;  // words are made floats before, in strips

  // By the place in kRows. What an operand's form does to x is the same for all operands.
  const Multiply* multiply(Form form) const {
    return integers ? kernels.integers[form] : kernels.floats[form];
  }
};

// Many rows of x: the weights of some segments as floats, scaled, in strips of a few columns. A
// strip stays in the first cache for all rows, and sums go to memory once for all its segments.
class Strips {
 public:
  Strips(const Job& job, int64_t columns, float* sums)
      : job_(job),
        columns_(columns),
        width_(2 * job.kernels.lanes),
        sums_(sums),
        floats_(scratch(floats_room(), up(columns, width_) * kDepth)),
        ones_(width_, 1.0f) {}

  // Segment number i: p.units floats of each column, or to be added to those of the last call.
  void add(size_t i, const Product& p, bool onto) {
    if (!onto && (depth_ + p.units > kDepth || scales_differ(i))) multiply();
    if (depth_ == 0) first_ = i;
    const int at = onto ? depth_ - p.units : depth_;
    for (int64_t column = 0; column < columns_; column += width_)
      job_.kernels.scaled(p, column, width_, floats_ + column * kDepth + at * width_, onto);
    depth_ = at + p.units;
  }

  // x with what has been added, to the sums: some rows of x, which the second cache keeps, meet all
  // strips.
  void multiply() {
    const auto rows = job_.rows.begin();
    const size_t count = depth_ ? job_.rows.size() : 0;
    for (size_t first = 0; first < count; first += kTall)
      for (int64_t column = 0; column < columns_; column += width_)
        for (size_t i = first; i < std::min(first + kTall, count); ++i) multiply(rows[i], column);
    depth_ = 0;
  }

 private:
  void multiply(const Rows& r, int64_t column) {
    Product p{reinterpret_cast<const uint32_t*>(floats_ + column * kDepth), width_, depth_};
    p.columns = static_cast<int>(std::min(width_, columns_ - column));
    p.scale = ones_.data();
    p.x = job_.x.x(r, job_.segments[first_]);
    p.sums = job_.x.sums(r, first_);
    p.xscale = job_.x.scales(r, first_);
    p.y = sums_ + r.first * columns_ + column;
    p.y_stride = columns_;
    job_.kernels.floats[kFloat32][r.kernel](p);
  }

  static constexpr int kDepth = 256;  // more than a segment has
  static constexpr size_t kTall = 32;  // of `Rows`

  static std::vector<float>& floats_room() {
    thread_local std::vector<float> room;
    return room;
  }

  bool scales_differ(size_t i) const {  // of x
    return job_.segments[i].begin / kBlock != job_.segments[first_].begin / kBlock;
  }

  const Job& job_;
  int64_t columns_, width_;
  float *sums_, *floats_;
  std::vector<float> ones_;
  size_t first_ = 0;
  int depth_ = 0;
};

// Segments of one operand, some columns wide.
class Reader {
 public:
  Reader(const Job& job, const Operand& operand, const Columns& block, int64_t columns)
      : job_(job),
        operand_(operand),
        block_(block),
        columns_(columns),
        scale_(columns),
        zero_(columns) {}

  // All but x and y; good until the next segment of any reader of this thread.
  Product read(const Segment& segment) {
    thread_local std::vector<uint32_t> words_room;
    thread_local std::vector<float> panel_room;
    if (segment.group != group_) open(segment.group);
    const Unit unit = kUnits[operand_.form];
    const int64_t most = up(job_.shape.longest, unit.codes) / unit.codes * unit.words;
    uint32_t* room = scratch(words_room, (most + unit.words) * columns_);
    Words words = operand_.words(segment, block_.first, block_.count, columns_, room);
    Product p{words.data, words.stride, static_cast<int>(segment.units),
              static_cast<int>(columns_)};
    p.scale = scale_.data();
    p.zero = has_zero_ ? zero_.data() : nullptr;
    p.table = operand_.table;
    p.trellis = operand_.trellis;
    p.rows = operand_.rows;
    p.rate = operand_.rate(group_);
    p.y_stride = columns_;
    if (job_.unpacked) {
      float* panel = scratch(panel_room, segment.units * unit.codes * columns_);
      job_.kernels.unpack[operand_.form](p, panel);
      p.words = reinterpret_cast<const uint32_t*>(panel);
      p.stride = columns_;
      p.units *= unit.codes;
    }
    return p;
  }

 private:
  void open(int64_t group) {
    group_ = group;
    const Scales& s = operand_.scales;
    const int64_t size = s.type == kSingle ? 4 : 2;
    const char* from = static_cast<const char*>(s.data) +
        (s.shared ? group : group * block_.task->n + block_.first) * size;
    job_.kernels.widen(from, s.type, s.shared ? 1 : block_.count, scale_.data());
    if (s.shared) std::fill(scale_.begin() + 1, scale_.end(), scale_[0]);
    if (s.factor != 1)
      for (float& scale : scale_) scale *= s.factor;
    has_zero_ = operand_.zeros(group, block_.first, block_.count, job_.kernels, zero_.data());
  }

  const Job& job_;
  const Operand& operand_;
  const Columns& block_;
  int64_t columns_, group_ = -1;
  std::vector<float> scale_;
  std::vector<int32_t> zero_;
  bool has_zero_ = false;
};

void add_products(const Job& job, const Columns& block, int64_t columns, float* sums) {
  const auto& operands = block.task->operands;
  std::vector<Reader> readers;
  for (const Operand* operand : operands) readers.emplace_back(job, *operand, block, columns);
  std::optional<Strips> strips;
  if (job.shape.m >= kManyRows && (job.unpacked || operands[0]->form == kFloat32))
    strips.emplace(job, columns, sums);
  auto multiply = [&](size_t i, Product p, Form form) {
    for (const Rows& r : job.rows) {
      p.x = job.x.x(r, job.segments[i]);
      p.sums = job.x.sums(r, i);
      p.xscale = job.x.scales(r, i);
      p.y = sums + r.first * columns;
      job.multiply(form)[r.kernel](p);
    }
  };
  for (size_t i = 0; i < job.segments.size(); ++i)
    for (size_t o = 0; o < operands.size(); ++o) {
      const Product p = readers[o].read(job.segments[i]);
      if (strips) {
        strips->add(i, p, o > 0);
      } else {
        multiply(i, p, operands[o]->form);
      }
    }
  if (strips) strips->multiply();
}

// Column c of an interleaved block is at tile c / width, place c % width: [place, lane] there.
void copy(const Job& job, const Columns& block, int64_t columns, const float* sums) {
  const Task& task = *block.task;
  const int64_t width = task.interleaved, lanes = job.kernels.lanes;
  for (int64_t r = 0; r < job.shape.m; ++r) {
    float* y = task.y + r * task.n + block.first;
    const float* from = sums + r * columns;
    if (!job.x.finite(r)) {
      std::fill_n(y, block.count, std::numeric_limits<float>::quiet_NaN());
      continue;
    }
    if (width == 1) {
      std::memcpy(y, from, block.count * sizeof(float));
      continue;
    }
    for (int64_t c = 0; c < block.count; ++c) {
      int64_t tile = c / width, run = tile / lanes;
      y[c] = from[(run * width + c % width) * lanes + tile % lanes];
    }
  }
}

// What escapes add; of a word that says nonsense, nothing.
void add_escapes(const Shape& shape, const Columns& block) {
  const Task& task = *block.task;
  const Escapes& e = *task.escapes;
  for (int64_t r = 0; r < shape.m; ++r) {
    const float* x = task.x + r * shape.k;
    float* y = task.y + r * task.n;
    for (int64_t c = block.first; c < block.first + block.count; ++c) {
      const int64_t end = std::min<int64_t>(e.ranges[task.n + c], e.count);
      float sum = 0;
      for (int64_t i = std::max(e.ranges[c], 0); i < end; ++i) {
        const int64_t row = e.words[i] & 0xFFFF;
        if (row < shape.k) sum += x[row] * static_cast<float>(e.words[i] >> 16);
      }
      y[c] += e.scale[c] * sum;
    }
  }
}

}  // namespace

void multiply(int64_t most_threads, const Kernels& kernels, const Shape& shape,
              const std::vector<Task>& tasks) {
  int64_t n = 0;
  for (const Task& task : tasks) n += task.n;
  if (shape.m == 0 || n == 0) return;
  const Form form = tasks[0].operands[0]->form;
  const Unit unit = kUnits[form];
  // Values of tables, and sums of operands, are for many rows made once, as floats.
  const bool once = shape.m >= kManyRows && kernels.unpack[form] &&
      (tasks[0].operands[0]->table || tasks[0].operands.size() > 1);
  const bool integers = shape.activations != kAsFloat && kernels.integers[form][3] && !once;
  const bool unpacked = !integers && shape.m >= kManyRows && kernels.unpack[form];
  const Multiply* by_rows =
      integers ? kernels.integers[form] : kernels.floats[unpacked ? kFloat32 : form];
  const int64_t work = shape.m * shape.k * n;
  const int threads = worth(work, most_threads);
  auto share = [&](int64_t count, std::function<void(int64_t)> one) {
    Team::the().share(threads - 1, work >= kWake, count, [&](int, int64_t i) { one(i); });
  };
  const auto pieces = segments(shape.k, shape.group_size, unit.codes, shape.activations,
                               shape.longest);
  const auto few = rows(shape.m, by_rows);
  std::map<const float*, Prepared> prepared;
  for (const Task& task : tasks)
    prepared.try_emplace(task.x, task.x, shape.m, shape.k, pieces, few, unit, shape.activations,
                         integers, kernels, share);
  const auto blocks = cut(shape, tasks, kernels.lanes, threads);
  share(blocks.size(), [&](int64_t i) {
    thread_local std::vector<float> sums_room;
    const Columns& block = blocks[i];
    const Task& task = *block.task;
    const int64_t align = task.interleaved > 1 ? task.interleaved * kernels.lanes : kAlign;
    const int64_t columns = up(block.count, align);
    float* sums = scratch(sums_room, shape.m * columns);
    std::fill_n(sums, shape.m * columns, 0.0f);
    const Prepared& own = prepared.at(task.x);
    const Job job{kernels, shape, pieces, few, own, integers, unpacked};
    add_products(job, block, columns, sums);
    copy(job, block, columns, sums);
    if (task.escapes) add_escapes(shape, block);
  });
}

}  // namespace jaxquant
