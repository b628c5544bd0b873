// Depthwise convolution in channels_last. Forward and the gradient of the input are one loop over rows of outputs
// (depthwise_conv2d_rows.h): forward steps through the input by the stride, the gradient through the output, once for each
// column modulo the stride, with the taps that meet it. With a dilation, filters that have runs take every dilation-th column at a
// time.
#include "depthwise_conv2d_rows.h"

#include "dispatch.h"

namespace advdl_ops {
namespace ADVDL_CAPABILITY_NAMESPACE {
namespace {

// In the type of the arithmetic: weight [taps, step], scale [C], shift [C].
template <class Acc>
struct Parameters {
  Acc *weight, *scale, *shift;
  // A load waits for an earlier store if the last 12 bits of their addresses are equal. Where columns of `out` are a multiple of
  // 2 KB apart, its stores have one or two such ends, which follow the channel. The weights of the same channels lie far
  // from them, so that a block of channels does not wait for the blocks before it.
  Parameters(void* workspace, const DepthwiseConv2dShape& s, const void* out) {
    const uintptr_t from = reinterpret_cast<uintptr_t>(workspace);
    const uintptr_t away = (reinterpret_cast<uintptr_t>(out) + kAway - from) % kPlaces / 64 * 64;
    weight = reinterpret_cast<Acc*>(static_cast<char*>(workspace) + away);
    scale = weight + s.taps() * step(s);
    shift = scale + step(s);
  }
  // Elements between the weights of two taps: an odd number of lines, so that they share no sets of the L1 cache.
  static int64_t step(const DepthwiseConv2dShape& s) {
    constexpr int64_t line = 64 / sizeof(Acc);
    return (ceil_div(s.c, line) | 1) * line;
  }
  static size_t bytes(const DepthwiseConv2dShape& s) {
    return (s.taps() + 2) * step(s) * sizeof(Acc) + kPlaces;
  }
  void fill(const DepthwiseConv2dShape& s, const void* weight_, const void* scale_,
            const void* shift_) {
    with_type(s.dtype, [&]<class T>() {
      const T* from = static_cast<const T*>(weight_);
      for (int64_t t = 0; t < s.taps(); ++t) {
        for (int64_t c = 0; c < s.c; ++c)
          weight[t * step(s) + c] = static_cast<Acc>(widened(from[c * s.taps() + t]));
      }
    });
    widen(s.scale_dtype, scale_, Acc(1), scale, s.c);
    widen(s.shift_dtype, shift_, Acc(0), shift, s.c);
  }

 private:
  static constexpr uintptr_t kPlaces = 2048, kAway = 768;
};

// Taps on the stack of whoever computes with them.
class Taps {
 public:
  explicit Taps(int64_t most) : many_(most > kOnStack ? new Tap[most] : nullptr) {}
  ~Taps() { delete[] many_; }
  Taps(const Taps&) = delete;
  Taps& operator=(const Taps&) = delete;
  Tap* data() { return many_ != nullptr ? many_ : few_; }

 private:
  static constexpr int64_t kOnStack = 256;
  Tap few_[kOnStack];
  Tap* many_;
};

// The columns that all of the row's taps reach.
template <class T>
Range reached_by_all(const Row<T>& row) {
  Range all{0, row.out_columns};
  for (int64_t t = 0; t < row.tap_count; ++t) all = common(row.taps[t].columns, all);
  return all;
}

// Where the rows of one image lie from which taps read: row r is the one at place first + r, or r modulo `slots`.
struct Places {
  int64_t first = 0, slots = 0;
  int64_t c = 0;  // channels that lie together
  int64_t of(int64_t row) const { return slots == 0 ? first + row : row % slots; }
};

// Taps of row `i` of the output of forward, of its columns r, r + phases, ...
int64_t forward_taps(const DepthwiseConv2dShape& s, const Places& places, int64_t i, int64_t r,
                     int64_t phases, Tap* taps) {
  int64_t count = 0;
  for (int64_t a = 0; a < s.h.kernel; ++a) {
    const int64_t row = i * s.h.stride + a * s.h.dilation - s.h.padding;
    if (row < 0 || row >= s.h.in) continue;
    for (int64_t b = 0; b < s.w.kernel; ++b) {
      const int64_t column = r * s.w.stride + b * s.w.dilation - s.w.padding;
      // Divisions only in the first row of taps.
      const Range columns = count < s.w.kernel ? reached(column, phases * s.w.stride, s.w.in,
                                                         ceil_div(s.w.out - r, phases))
                                               : taps[b].columns;
      taps[count++] = {(places.of(row) * s.w.in + column) * places.c, a * s.w.kernel + b, columns};
    }
  }
  return count;
}

// Taps of row `i` of dx, of its columns r, r + phases, ..., where the stride divides `phases`.
int64_t gradient_taps(const DepthwiseConv2dShape& s, const Places& places, int64_t i, int64_t r,
                      int64_t phases, Tap* taps) {
  const int64_t columns = ceil_div(s.w.in - r, phases);
  int64_t count = 0;
  for (int64_t a = 0; a < s.h.kernel; ++a) {
    const int64_t place = i + s.h.padding - a * s.h.dilation;
    if (place < 0 || place % s.h.stride != 0 || place / s.h.stride >= s.h.out) continue;
    for (int64_t b = s.w.kernel - 1; b >= 0; --b) {
      const int64_t along = r + s.w.padding - b * s.w.dilation;
      const int64_t column = floor_div(along, s.w.stride);
      if (column * s.w.stride != along) continue;
      taps[count++] = {(places.of(place / s.h.stride) * s.w.out + column) * places.c,
                       a * s.w.kernel + b, reached(column, phases / s.w.stride, s.w.out, columns)};
    }
  }
  return count;
}

// Whether correlate_rows has a loop for the taps of a row of the filter. It leaves out at most kernel - 1 inputs on each side of
// the image, so the padding must not exceed the reach.
bool has_run(const Conv2dAxis& w) {
  const bool is_known = w.kernel == 3 || w.kernel == 5 || (w.kernel == 7 && w.stride == 1);
  return is_known && w.stride <= 2 && w.padding <= w.reach();
}

// A prefetch pays in forward and the gradient of the weight if the images are larger than a cache and the filter is small. Else
// it only costs instructions.
bool prefetches(const DepthwiseConv2dShape& s) {
  constexpr int64_t kCachedBytes = 4 << 20, kFewTaps = 9;
  const int64_t pixels = s.h.in * s.w.in + s.h.out * s.w.out;
  return s.n * s.c * pixels * element_bytes(s.dtype) > kCachedBytes && s.taps() <= kFewTaps;
}

// Whether an output of `count` runs of channels streams: each of its vectors must then be aligned.
ADVDL_INLINE bool streams(const void* out, int64_t count, int64_t run_bytes) {
  return count * run_bytes >= kConvStreamBytes && run_bytes % ADVDL_VECTOR_BYTES == 0 &&
         reinterpret_cast<uintptr_t>(out) % ADVDL_VECTOR_BYTES == 0;
}

// Forward, or the gradient of the input, as rows of sums over taps. A task is a row of outputs, of a chunk of the channels.
//
// A vector of half a line of the cache reads each line twice. Where neighbouring columns share sets of the L1 cache, the line is
// evicted in between. Then the rows that the taps read are copied, a chunk of channels at a time, to a buffer that fits this
// cache, where they lie side by side.
template <class T>
class Correlation {
 public:
  // in: x, or dz for the gradient.
  Correlation(const DepthwiseConv2dShape& s, bool is_gradient, const T* in,
              const Parameters<acc_t<T>>& parameters, const Epilogue<T>& epilogue)
      : s_(s),
        is_gradient_(is_gradient),
        prefetches_(is_gradient || prefetches(s)),
        in_rows_(is_gradient ? s.h.out : s.h.in),
        out_rows_(is_gradient ? s.h.in : s.h.out),
        in_columns_(is_gradient ? s.w.out : s.w.in),
        out_columns_(is_gradient ? s.w.in : s.w.out),
        chunk_(s.c),
        in_(in),
        weight_(parameters.weight),
        epilogue_(epilogue) {
    // The binding drops the stride over a single output; columns of dx that no tap reaches may then be more than a block
    // leaves out at the border.
    const bool reaches_all = s.w.in + 2 * s.w.padding - s.w.reach() == s.w.out;
    const bool is_dense =
        is_gradient ? s.w.stride == 1 && reaches_all : s.w.stride == 1 || s.w.dilation == 1;
    has_runs_ = kHasRuns<T> && is_dense && has_run(s.w);
    phases_ = has_runs_ ? s.w.dilation : is_gradient ? s.w.stride : 1;
    step_ = is_gradient ? phases_ / s.w.stride : phases_ * s.w.stride;
    pairs_ = has_runs_ && kHasPairs && s.w.kernel == 3 && s.h.dilation == 1 && in_columns_ > 0 &&
             (!is_gradient || s.h.stride == 1);
    // Channels are computed in the direction in which the next loads of x do not have the last bits of the address of the
    // stores just made (see Parameters).
    const int64_t bytes = s.c * sizeof(T), period = bytes & -bytes;
    const auto ahead = reinterpret_cast<uintptr_t>(epilogue.out) - reinterpret_cast<uintptr_t>(in);
    descends_ = 2 * (ahead % period) < static_cast<uintptr_t>(period);
    constexpr int64_t kWays = 8;
    if (has_runs_ && !kHasPairs && bytes % kSharedSetsBytes == 0 &&
        s.h.kernel * in_columns_ > 2 * kWays && s.h.stride <= s.h.kernel)
      choose_chunks(bytes);
  }

  int64_t tasks() const { return s_.n * chunks_ * out_rows_; }
  int64_t outputs_per_task() const { return out_columns_ * chunk_; }

  void run(int64_t begin, int64_t end) const {
    Taps taps(s_.taps()), second_taps(s_.taps());
    Buffer<T> buffer(slots_ * in_columns_ * chunk_);
    for (int64_t task = begin, next; task < end; task = next) {
      const int64_t first = task % out_rows_;
      next = min_of(task - first + out_rows_, end);
      run_rows(task / out_rows_ / chunks_, task / out_rows_ % chunks_ * chunk_, first,
               first + next - task, taps.data(), second_taps.data(), buffer.data());
    }
    if (streams_output()) stream_fence();
  }

 private:
  // Decides that rows are copied, of as many channels at a time as the buffer holds.
  void choose_chunks(int64_t bytes) {
    constexpr int64_t kBufferBytes = 24 << 10, kLine = 64;
    const int64_t read = (is_gradient_ ? s_.h.reach() / s_.h.stride : s_.h.reach()) + 1;
    const int64_t slots = min_of(read, in_rows_);
    if (slots * in_columns_ == 0) return;
    const int64_t most = kBufferBytes / (slots * in_columns_) / kLine * kLine;
    if (most == 0) return;
    slots_ = slots;
    chunk_ = round_up(ceil_div(bytes, ceil_div(bytes, most)), kLine) / sizeof(T);
    chunks_ = ceil_div(s_.c, chunk_);
  }
  bool is_copied() const { return slots_ != 0; }
  // Copied rows are written in halves of a line, which would leave the cores one by one.
  bool streams_output() const { return epilogue_.streams && !is_copied(); }

  // Rows of the input that row i of the output reads; they may lie outside of the image.
  Range input_rows(int64_t i) const {
    if (!is_gradient_) {
      const int64_t begin = i * s_.h.stride - s_.h.padding;
      return {begin, begin + s_.h.reach() + 1};
    }
    const int64_t last = i + s_.h.padding;
    return {ceil_div(last - s_.h.reach(), s_.h.stride), floor_div(last, s_.h.stride) + 1};
  }

  // Rows `first` to `last` of the output of image n, of the channels from c on.
  void run_rows(int64_t n, int64_t c, int64_t first, int64_t last, Tap* taps, Tap* second_taps,
                T* buffer) const {
    Row<T> like;
    like.c = min_of(chunk_, s_.c - c);
    like.weight_step = Parameters<acc_t<T>>::step(s_);
    like.descends = descends_;
    const Places places{n * in_rows_, slots_, like.c};
    like.in = is_copied() ? buffer : in_;
    like.weight = weight_ + c;
    like.in_step = step_ * like.c;
    like.tap_step = phases_ * like.c;
    like.out_step = phases_ * s_.c;
    if (has_runs_) {
      like.run = s_.w.kernel;
      like.run_step = s_.w.stride;
    }
    Epilogue<T> epilogue = epilogue_;
    epilogue.scale += c;
    epilogue.shift += c;
    epilogue.streams = streams_output();
    int64_t copied = max_of(input_rows(first).begin, 0);
    for (int64_t i = first, count; i < last; i += count) {
      count = pairs_ && i + 1 < last ? 2 : 1;
      const int64_t read = input_rows(i + count - 1).end;
      if (is_copied()) {
        for (; copied < min_of(read, in_rows_); ++copied)
          copy_row(in_ + (n * in_rows_ + copied) * in_columns_ * s_.c + c, like.c,
                   buffer + copied % slots_ * in_columns_ * like.c);
      }
      for (int64_t r = 0; r < phases_ && r < out_columns_; ++r) {
        const int64_t column = is_gradient_
                                   ? floor_div(r + s_.w.padding - s_.w.reach(), s_.w.stride)
                                   : r * s_.w.stride - s_.w.padding;
        like.out_columns = ceil_div(out_columns_ - r, phases_);
        like.first_column = floor_div(column, phases_);
        like.in_columns = ceil_div(in_columns_ - (column - like.first_column * phases_), phases_);
        if (prefetches_ && !is_copied()) {
          like.next = (places.of(min_of(read, in_rows_)) * in_columns_ + column) * s_.c;
          like.next_step = in_columns_ * s_.c;
          like.next_rows = count * (is_gradient_ ? 1 : min_of(s_.h.stride, 2));
        }
        Row<T> rows[2] = {like, like};
        // In the order of the taps, which is the one of the rows of the filter.
        const int64_t first_row = is_gradient_ ? i + count - 1 : i;
        set(rows[0], places, n, c, first_row, r, taps);
        if (count == 1) {
          correlate_rows<1>(rows, epilogue);
          continue;
        }
        if constexpr (kHasPairs) {
          set(rows[1], places, n, c, is_gradient_ ? i : i + 1, r, second_taps);
          int64_t& own = rows[0].own_taps;
          const int64_t all = rows[0].tap_count;
          if (rows[1].tap_count == 0) own = all;
          while (own < all && taps[own].from != second_taps[0].from) own += like.run;
          correlate_rows<2>(rows, epilogue);
        }
      }
    }
  }

  // Sets what a row of outputs, row i of image n, has of its own, for its columns r, r + phases, ...
  void set(Row<T>& row, const Places& places, int64_t n, int64_t c, int64_t i, int64_t r,
           Tap* taps) const {
    row.taps = taps;
    row.tap_count = is_gradient_ ? gradient_taps(s_, places, i, r, phases_, taps)
                                 : forward_taps(s_, places, i, r, phases_, taps);
    row.out = ((n * out_rows_ + i) * out_columns_ + r) * s_.c + c;
    if (!has_runs_) row.inside = reached_by_all(row);
  }

  // Copies c channels of a row, and prefetches them of the row after it.
  void copy_row(const T* from, int64_t c, T* to) const {
    constexpr int64_t line = 64 / sizeof(T);
    for (int64_t j = 0; j < in_columns_; ++j) {
      for (int64_t i = 0; i < c; i += line) {
        if (prefetches_) prefetch(from + in_columns_ * s_.c + i);
        __builtin_memcpy(to + i, from + i, 64);
      }
      from += s_.c;
      to += c;
    }
  }

  const DepthwiseConv2dShape& s_;
  const bool is_gradient_, prefetches_;
  const int64_t in_rows_, out_rows_, in_columns_, out_columns_;
  bool has_runs_, pairs_, descends_;
  int64_t phases_, step_;  // parts of a row; input columns between neighbouring outputs of one
  int64_t chunk_, chunks_ = 1, slots_ = 0;  // channels of a task; rows in the buffer, or 0
  const T* in_;
  const acc_t<T>* weight_;
  const Epilogue<T>& epilogue_;
};

template <class T>
void correlate(const Correlation<T>& correlation) {
  cpu::parallel_ranges(correlation.tasks(), correlation.outputs_per_task(),
                       [&](int64_t begin, int64_t end) { correlation.run(begin, end); });
}

template <class T>
void forward(const DepthwiseConv2dForward& p, void* workspace) {
  using Acc = acc_t<T>;
  const DepthwiseConv2dShape& s = p.shape;
  Parameters<Acc> parameters(workspace, s, p.out);
  parameters.fill(s, p.weight, p.scale, p.shift);
  const Epilogue<T> epilogue{parameters.scale,
                             parameters.shift,
                             static_cast<const T*>(p.residual),
                             static_cast<T*>(p.out),
                             p.act,
                             static_cast<Acc>(p.act_param),
                             p.scale != nullptr || p.shift != nullptr,
                             streams(p.out, s.n * s.h.out * s.w.out, s.c * sizeof(T))};
  correlate(Correlation<T>(s, false, static_cast<const T*>(p.x), parameters, epilogue));
}

template <class T>
Epilogue<T> plain_epilogue(const DepthwiseConv2dBackward& p,
                           const Parameters<acc_t<T>>& parameters) {
  const DepthwiseConv2dShape& s = p.shape;
  return {parameters.scale,
          parameters.shift,
          nullptr,
          static_cast<T*>(p.dx),
          Activation::identity,
          0,
          false,
          streams(p.dx, s.n * s.h.in * s.w.in, s.c * sizeof(T))};
}

// How the sums over N, H_out and W_out are split: each part has sums of its own, which are then added in order. By the shape
// alone, so that the result does not depend on the threads.
struct Split {
  int64_t parts, rows, blocks, channels;  // rows of dz in a part; blocks of `channels` channels
  explicit Split(const DepthwiseConv2dShape& s) {
    const int64_t all = s.n * s.h.out;
    // A part's sums are small beside what it reads.
    int64_t wanted = all * s.w.out / (8 * (s.taps() + 1));
    wanted = wanted < 1 ? 1 : wanted > 64 ? 64 : wanted;
    rows = ceil_div(all > 0 ? all : 1, wanted);
    parts = ceil_div(all, rows);
    const int64_t least = 4 * ADVDL_VECTOR_BYTES / 4;
    int64_t count = s.c / least;
    const int64_t useful = 32 / (parts > 0 ? parts : 1);
    count = count < 1 ? 1 : count;
    count = useful < 1 ? 1 : count < useful ? count : useful;
    channels = round_up(ceil_div(s.c, count), least);
    blocks = ceil_div(s.c, channels);
  }
};

// sums[k] [C] += dz[j] * x[j * step + from[k]] of one row, one vector of channels. kAhead: with what the next row reads
// prefetched; an `if` for that in the loop, never taken, made it a third slower.
template <int kTaps, bool kAhead, class T, class Lanes>
ADVDL_INLINE void add_products(const T* dz, const Row<T>& row, const Tap* taps, acc_t<T>* sums,
                               int64_t c, const Lanes& lanes) {
  using Vec = typename Simd<acc_t<T>>::Vec;
  Vec acc[kTaps];
  const T* from[kTaps];
  const int64_t step = row.in_step;
  const Range inside = row.inside;
#pragma GCC unroll 16
  for (int k = 0; k < kTaps; ++k) {
    acc[k] = lanes.read(sums + taps[k].weight * row.c + c);
    from[k] = row.in + taps[k].from + c;
  }
  for (int64_t j = inside.begin; j < inside.end; ++j) {
    const Vec gradient = lanes.read(dz + j * row.c + c);
    const int64_t at = j * step;
    if constexpr (kAhead) {
      prefetch(dz + (row.out_columns + j) * row.c + c);
      prefetch(from[kTaps - 1] + at + row.next_step);
    }
#pragma GCC unroll 16
    for (int k = 0; k < kTaps; ++k) acc[k] += gradient * lanes.read(from[k] + at);
  }
#pragma GCC unroll 16
  for (int k = 0; k < kTaps; ++k) {
    const Range own = taps[k].columns;
    const auto add = [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j) {
        acc[k] += lanes.read(dz + j * row.c + c) * lanes.read(from[k] + j * step);
      }
    };
    add(own.begin, min_of(own.end, inside.begin));
    add(max_of(own.begin, inside.end), own.end);
  }
#pragma GCC unroll 16
  for (int k = 0; k < kTaps; ++k) lanes.write(sums + taps[k].weight * row.c + c, acc[k]);
}

// Of channels c_begin to c_end; `bias` [C] or null.
template <class T>
void add_row(const T* dz, const Row<T>& row, acc_t<T>* sums, acc_t<T>* bias, int64_t c_begin,
             int64_t c_end) {
  // No overlapping vectors: sums are added to.
  for_vectors<acc_t<T>, 1, false>(c_end - c_begin, [&](int64_t i, const auto& lanes, auto) {
    const int64_t c = c_begin + i;
    const Tap *tap = row.taps, *end = tap + row.tap_count;
    for (; row.next_rows != 0 && tap + 9 <= end; tap += 9) {
      add_products<9, true>(dz, row, tap, sums, c, lanes);
    }
    for (; tap + 9 <= end; tap += 9) add_products<9, false>(dz, row, tap, sums, c, lanes);
    for (; tap + 3 <= end; tap += 3) add_products<3, false>(dz, row, tap, sums, c, lanes);
    for (; tap < end; ++tap) add_products<1, false>(dz, row, tap, sums, c, lanes);
    if (bias != nullptr) {
      auto acc = lanes.read(bias + c);
      for (int64_t j = 0; j < row.out_columns; ++j) acc += lanes.read(dz + j * row.c + c);
      lanes.write(bias + c, acc);
    }
  });
}

// With the gradient of the input, where that is wanted too: dz is then still in the cache.
template <class T>
void weight_gradient(const DepthwiseConv2dBackward& p, const Parameters<acc_t<T>>& parameters,
                     void* partial_sums) {
  using Acc = acc_t<T>;
  const DepthwiseConv2dShape& s = p.shape;
  const Split split(s);
  const int64_t per_part = (s.taps() + 1) * s.c, rows = s.n * s.h.out;
  Acc* partial = static_cast<Acc*>(partial_sums);
  const bool wants_weight = p.dweight != nullptr;
  const Epilogue<T> epilogue = plain_epilogue<T>(p, parameters);
  const Correlation<T> input_gradient(s, true, static_cast<const T*>(p.dz), parameters, epilogue);
  Row<T> like;
  like.in = static_cast<const T*>(p.x);
  like.c = s.c;
  like.in_step = s.w.stride * s.c;
  like.out_columns = s.w.out;
  like.next_rows = prefetches(s) ? 1 : 0;
  like.next_step = s.h.stride * s.w.in * s.c;  // from the last row of taps
  cpu::parallel_ranges(
      split.parts * split.blocks, split.rows * s.w.out * split.channels,
      [&](int64_t begin, int64_t end) {
        Taps taps(s.taps());
        Row<T> row = like;
        row.taps = taps.data();
        for (int64_t task = begin; task < end; ++task) {
          const int64_t part = task / split.blocks, block = task % split.blocks;
          const int64_t c_begin = block * split.channels;
          const int64_t c_end = min_of(c_begin + split.channels, s.c);
          Acc* sums = partial + part * per_part;
          Acc* bias = p.dbias != nullptr ? sums + s.taps() * s.c : nullptr;
          for (int64_t t = 0; t <= s.taps(); ++t) {
            for (int64_t c = c_begin; c < c_end; ++c) sums[t * s.c + c] = 0;
          }
          const int64_t last = min_of((part + 1) * split.rows, rows);
          for (int64_t i = part * split.rows; i < last; ++i) {
            const Places places{i / s.h.out * s.h.in, 0, s.c};
            row.tap_count =
                wants_weight ? forward_taps(s, places, i % s.h.out, 0, 1, taps.data()) : 0;
            row.inside = reached_by_all(row);
            add_row(static_cast<const T*>(p.dz) + i * s.w.out * s.c, row, sums, bias, c_begin,
                    c_end);
          }
          if (p.dx != nullptr) {
            const int64_t all = input_gradient.tasks(), parts = split.parts * split.blocks;
            input_gradient.run(all * task / parts, all * (task + 1) / parts);
          }
        }
      });
  cpu::parallel_ranges(s.c, split.parts * (s.taps() + 1), [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      for (int64_t t = 0; t <= s.taps(); ++t) {
        const bool is_bias = t == s.taps();
        if (is_bias ? p.dbias == nullptr : !wants_weight) continue;
        double sum = 0;
        for (int64_t part = 0; part < split.parts; ++part) {
          sum += partial[part * per_part + t * s.c + c];
        }
        (is_bias ? static_cast<Acc*>(p.dbias)[c] : static_cast<Acc*>(p.dweight)[c * s.taps() + t]) =
            static_cast<Acc>(sum);
      }
    }
  });
}

template <class Acc>
size_t partial_bytes(const DepthwiseConv2dShape& s) {
  return s.c == 0 ? 0 : Split(s).parts * (s.taps() + 1) * s.c * sizeof(Acc);
}

size_t forward_workspace(const DepthwiseConv2dForward& p) {
  return p.shape.dtype == DType::f64 ? Parameters<double>::bytes(p.shape)
                                     : Parameters<float>::bytes(p.shape);
}
size_t backward_workspace(const DepthwiseConv2dBackward& p) {
  const DepthwiseConv2dShape& s = p.shape;
  return s.dtype == DType::f64 ? Parameters<double>::bytes(s) + partial_bytes<double>(s)
                               : Parameters<float>::bytes(s) + partial_bytes<float>(s);
}
void run_forward(const DepthwiseConv2dForward& p, void* workspace) {
  if (p.shape.c == 0) return;
  with_type(p.shape.dtype, [&]<class T>() { forward<T>(p, workspace); });
}
void run_backward(const DepthwiseConv2dBackward& p, void* workspace) {
  if (p.shape.c == 0) return;
  with_type(p.shape.dtype, [&]<class T>() {
    using Acc = acc_t<T>;
    const DepthwiseConv2dShape& s = p.shape;
    Parameters<Acc> parameters(workspace, s, p.dx);
    if (p.dx != nullptr) parameters.fill(s, p.weight, nullptr, nullptr);
    if (p.dweight != nullptr || p.dbias != nullptr) {
      weight_gradient<T>(p, parameters, static_cast<char*>(workspace) + parameters.bytes(s));
    } else if (p.dx != nullptr) {
      const Epilogue<T> epilogue = plain_epilogue<T>(p, parameters);
      correlate(Correlation<T>(s, true, static_cast<const T*>(p.dz), parameters, epilogue));
    }
  });
}

}  // namespace

void add_depthwise_conv2d_last(cpu::KernelTable& table) {
  table.depthwise_conv2d_last = {forward_workspace, backward_workspace, run_forward, run_backward};
}

}  // namespace ADVDL_CAPABILITY_NAMESPACE
}  // namespace advdl_ops
