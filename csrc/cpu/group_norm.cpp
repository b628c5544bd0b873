// Group norm, residual addition and activation on the CPU. ../common/group_norm.h has the formulas.
//
// channels_first: a set (a group of a sample) is one contiguous run of D channels of S elements, D = C / groups. The
// first pass takes the moments of the run, block by block. The second pass normalizes it channel by channel; the run is
// mostly still in L2. If channels are too short for vectors, the run is normalized as a whole, with a weight for each
// element (norm_elementwise_affine.cpp). channels_last: a sample is S rows of C columns (norm_columns.h); the moments
// of the columns are merged into those of the groups.
//
// If there are enough sets (or samples) for all threads, one thread processes each from statistics to output. Otherwise
// the chunks of each set are distributed over the threads, pass by pass. Chunks depend on the shape only, and partial
// sums are merged in chunk order in double. So the result does not depend on the number of threads.
#include "../common/group_norm.h"

#include "dispatch.h"
#include "norm_columns.h"
#include "norm_elementwise_affine.h"
#include "norm_runs.h"
#include "norm_sets.h"

namespace advdl_ops {
namespace ADVDL_CAPABILITY_NAMESPACE {
namespace {

using cpu::parallel_ranges;

// Whether there are enough whole sets (or samples) to keep all threads busy, so that chunks need not be distributed.
bool shares_out_whole(int64_t count, int64_t chunks) {
  const int64_t threads = cpu::thread_count();
  return chunks == 1 || count >= 4 * threads || count % threads == 0;
}

// dweight and dbias [C] from the sums [N, C, pieces].
template <class Acc>
void sum_over_samples(const GroupNormBackward& p, const GradientSums<double>* sums, int64_t pieces,
                      const Acc* rstd) {
  if (p.dweight == nullptr) return;
  const GroupNormShape& shape = p.shape;
  const int64_t per_group = shape.c / shape.groups;
  parallel_ranges(shape.c, 8 * shape.n * pieces, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin; first < end; first += kMergedChannels) {
      const int64_t channels = min_of(kMergedChannels, end - first);
      double dbias[kMergedChannels] = {}, dweight[kMergedChannels] = {};
      for (int64_t n = 0; n < shape.n; ++n) {
        for (int64_t c = 0; c < channels; ++c) {
          const int64_t channel = first + c;
          const double r = rstd[n * shape.groups + channel / per_group];
          for (int64_t i = 0; i < pieces; ++i) {
            const GradientSums<double>& s = sums[(n * shape.c + channel) * pieces + i];
            dbias[c] += s.dz;
            dweight[c] += s.dz_x * r;
          }
        }
      }
      for (int64_t c = 0; c < channels; ++c) {
        static_cast<Acc*>(p.dbias)[first + c] = static_cast<Acc>(dbias[c]);
        static_cast<Acc*>(p.dweight)[first + c] = static_cast<Acc>(dweight[c]);
      }
    }
  });
}

// --- channels_first ------------------------------------------------------------------------------

// How the sets, contiguous runs of `length` elements, are cut into blocks and chunks. Depends on the shape only.
struct SetChunks {
  int64_t sets, per_set, s, length, blocks, chunks;  // sets of per_set channels of s elements
  explicit SetChunks(const GroupNormShape& shape)
      : sets(shape.sets()), per_set(shape.c / shape.groups), s(shape.s), length(shape.set_size()) {
    blocks = ceil_div(length, kBlock);
    chunks = clamp(blocks / 4, 1, kMaxChunks);
  }
  // The first element of a set that belongs to `chunk`.
  int64_t begin_of(int64_t chunk) const { return min_of(chunk * blocks / chunks * kBlock, length); }
};

template <class Acc>
struct RunsForwardMemory {
  Moments<double>* partial;  // [sets, chunks]
  Acc* rstd;                 // [sets]
  Affine<Acc> affine;
  RunsForwardMemory(const GroupNormShape& shape, Arena& arena)
      : partial(arena.take<Moments<double>>(shape.sets() * SetChunks(shape).chunks)),
        rstd(arena.take<Acc>(shape.sets())),
        affine(shape.c, arena) {}
};

template <class T, ForwardAct kAct, bool kResidual>
void forward_channels_first(const GroupNormForward& p, Arena arena) {
  using Acc = acc_t<T>;
  const SetChunks cut(p.shape);
  const RunsForwardMemory<Acc> memory(p.shape, arena);
  const auto& [partial, rstd, affine] = memory;
  affine.fill(p);
  const T* x = static_cast<const T*>(p.x);
  const T* residual = static_cast<const T*>(p.residual);
  T* out = static_cast<T*>(p.out);
  const bool stream_out = streams<T>(cut.sets * cut.length, kStreamBytes);

  const auto collect = [&](int64_t set, int64_t chunk) {
    Moments<double> m;
    const int64_t end = cut.begin_of(chunk + 1);
    for (int64_t i = cut.begin_of(chunk); i < end; i += kBlock)
      add_block(x + set * cut.length + i, min_of(kBlock, end - i), 1, 0, &m);
    partial[set * cut.chunks + chunk] = m;
  };
  const auto finish = [&](int64_t set) {
    Moments<double> m = partial[set * cut.chunks];
    for (int64_t i = 1; i < cut.chunks; ++i) m.merge(partial[set * cut.chunks + i]);
    rstd[set] = write_statistics<Acc>(p, set, m);
  };
  const auto apply = [&](int64_t set, int64_t chunk) {
    Acc scale, shift;
    const Constants<Acc> k{static_cast<Acc*>(p.mean) + set, &scale, &shift, nullptr, nullptr};
    const int64_t end = cut.begin_of(chunk + 1);
    for (int64_t i = cut.begin_of(chunk), length; i < end; i += length) {
      const int64_t channel = i / cut.s;
      length = min_of(end, (channel + 1) * cut.s) - i;
      const int64_t c = set % p.shape.groups * cut.per_set + channel;
      scale = rstd[set] * affine.weight[c];
      shift = affine.bias[c];
      const int64_t at = set * cut.length + i;
      apply_run<T, kAct, PerRun, kResidual>(x + at, residual + (kResidual ? at : 0), out + at,
                                            length, k, 0, p.act, static_cast<Acc>(p.act_param),
                                            stream_out);
    }
  };

  if (shares_out_whole(cut.sets, cut.chunks)) {
    parallel_ranges(cut.sets, cut.length, [&](int64_t begin, int64_t end) {
      for (int64_t set = begin; set < end; ++set) {
        for (int64_t i = 0; i < cut.chunks; ++i) collect(set, i);
        finish(set);
        for (int64_t i = cut.chunks - 1; i >= 0; --i) apply(set, i);
      }
      if (stream_out) stream_fence();
    });
    return;
  }
  const int64_t tasks = cut.sets * cut.chunks, work = cut.length / cut.chunks;
  parallel_ranges(tasks, work, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) collect(i / cut.chunks, i % cut.chunks);
  });
  for (int64_t set = 0; set < cut.sets; ++set) finish(set);
  parallel_ranges(tasks, work, [&](int64_t begin, int64_t end) {
    for (int64_t i = end - 1; i >= begin; --i) apply(i / cut.chunks, i % cut.chunks);
    if (stream_out) stream_fence();
  });
}

// How the rows (each one channel of a sample) are cut into pieces for the gradients. Depends on the shape only.
struct RowPieces {
  int64_t rows, s, pieces, step;
  explicit RowPieces(const GroupNormShape& shape) : rows(shape.n * shape.c), s(shape.s) {
    // All pieces but the last consist of whole vectors.
    step = ceil_div(ceil_div(s, clamp(s / (4 * kBlock), 1, kMaxChunks)), 64) * 64;
    pieces = max_of(1, ceil_div(s, step));
  }
};

template <class Acc>
struct RunsBackwardMemory {
  GradientSums<double>* sums;    // [rows, pieces]
  Acc *slopes, *offsets, *rstd;  // [sets]
  Affine<Acc> affine;
  RunsBackwardMemory(const GroupNormShape& shape, Arena& arena)
      : sums(arena.take<GradientSums<double>>(shape.n * shape.c * RowPieces(shape).pieces)),
        slopes(arena.take<Acc>(shape.sets())),
        offsets(arena.take<Acc>(shape.sets())),
        rstd(arena.take<Acc>(shape.sets())),
        affine(shape.c, arena) {}
};

template <class T, BackwardAct kAct>
void backward_channels_first(const GroupNormBackward& p, Arena arena) {
  using Acc = acc_t<T>;
  using Vec = typename Simd<Acc>::Vec;
  const RowPieces cut(p.shape);
  const int64_t sets = p.shape.sets(), per_set = p.shape.c / p.shape.groups;
  const RunsBackwardMemory<Acc> memory(p.shape, arena);
  const auto& [sums, slopes, offsets, rstd, affine] = memory;
  fill_rstd(p, rstd);
  affine.fill(p);
  Acc* means = const_cast<Acc*>(static_cast<const Acc*>(p.mean));
  auto [dout, x, saved, dresidual, dx, kept, stores_dz] = gradient_tensors<T, kAct>(p);
  const int64_t elements = cut.rows * cut.s;
  const bool stream_residual =
      !is_transcendental(kAct) && dresidual != nullptr && streams<T>(elements, kStreamStoredBytes);
  const bool stream_out = streams_dx<T>(elements, kept, dx);
  // A streamed dz is not in cache. dout is, so dz is computed from it again.
  if (stream_residual) kept = nullptr;
  const Acc param = static_cast<Acc>(p.act_param);

  // Calls f(offset, length, constants) for a piece of a row.
  const auto with_piece = [&](int64_t row, int64_t piece, const auto& f) {
    const int64_t set = row / per_set;
    Acc scale = rstd[set] * affine.weight[row % p.shape.c], shift = affine.bias[row % p.shape.c];
    const int64_t begin = piece * cut.step;
    f(row * cut.s + begin, min_of(cut.step, cut.s - begin),
      Constants<Acc>{means + set, &scale, &shift, slopes + set, offsets + set});
  };
  const auto collect = [&](int64_t row, int64_t piece) {
    with_piece(row, piece, [&](int64_t at, int64_t length, const Constants<Acc>& k) {
      GradientSums<double> total;
      for (int64_t end = at + length; at < end; at += kBlock) {
        Vec dz_sum[4] = {}, dz_centred_sum[4] = {};
        const bool streams_dz = stream_residual && is_aligned(stores_dz + at);
        for_gradients<T, kAct, PerRun, 4>(
            dout + at, x + at, saved == nullptr ? nullptr : saved + at, min_of(kBlock, end - at), k,
            0, p.act, param,
            [&](int64_t i, const auto& lanes, auto index, auto dz, auto centred)
                __attribute__((always_inline)) {
                  if (stores_dz != nullptr) lanes.write_out(stores_dz + at + i, dz, streams_dz);
                  dz_sum[index.value] += lanes.counted(dz);
                  dz_centred_sum[index.value] += lanes.counted(dz * centred);
                });
        total.dz += lane_sum((dz_sum[0] + dz_sum[1]) + (dz_sum[2] + dz_sum[3]));
        total.dz_x += lane_sum((dz_centred_sum[0] + dz_centred_sum[1]) +
                               (dz_centred_sum[2] + dz_centred_sum[3]));
      }
      sums[row * cut.pieces + piece] = total;
    });
  };
  const auto finish = [&](int64_t set) {
    GradientSums<double> total;
    for (int64_t row = set * per_set; row < (set + 1) * per_set; ++row) {
      GradientSums<double> channel;
      for (int64_t i = 0; i < cut.pieces; ++i) channel.merge(sums[row * cut.pieces + i]);
      add_weighted(total, affine.weight[row % p.shape.c], channel);
    }
    finish_gradients(total, static_cast<double>(p.shape.set_size()), rstd[set], slopes + set,
                     offsets + set);
  };
  const auto apply = [&](int64_t row, int64_t piece) {
    with_piece(row, piece, [&](int64_t at, int64_t length, const Constants<Acc>& k) {
      if (kept != nullptr) {
        gradient_run<T, BackwardAct::kept, PerRun>(kept + at, x + at, nullptr, dx + at, length, k,
                                                   0, p.act, param, stream_out);
      } else {
        gradient_run<T, kAct, PerRun>(dout + at, x + at, saved == nullptr ? nullptr : saved + at,
                                      dx + at, length, k, 0, p.act, param, stream_out);
      }
    });
  };

  const int64_t tasks_per_set = per_set * cut.pieces;
  if (shares_out_whole(sets, tasks_per_set)) {
    parallel_ranges(sets, per_set * cut.s, [&](int64_t begin, int64_t end) {
      for (int64_t set = begin; set < end; ++set) {
        const int64_t first = set * tasks_per_set, last = first + tasks_per_set;
        for (int64_t i = first; i < last; ++i) collect(i / cut.pieces, i % cut.pieces);
        if (dx == nullptr) continue;
        finish(set);
        for (int64_t i = last - 1; i >= first; --i) apply(i / cut.pieces, i % cut.pieces);
      }
      if (stream_out || stream_residual) stream_fence();
    });
  } else {
    const int64_t tasks = cut.rows * cut.pieces, work = cut.s / cut.pieces;
    parallel_ranges(tasks, work, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) collect(i / cut.pieces, i % cut.pieces);
      if (stream_residual) stream_fence();
    });
    if (dx != nullptr) {
      for (int64_t set = 0; set < sets; ++set) finish(set);
      parallel_ranges(tasks, work, [&](int64_t begin, int64_t end) {
        for (int64_t i = end - 1; i >= begin; --i) apply(i / cut.pieces, i % cut.pieces);
        if (stream_out) stream_fence();
      });
    }
  }
  sum_over_samples(p, sums, cut.pieces, rstd);
}

// --- channels_last -------------------------------------------------------------------------------

// A sample as rows, with D adjacent columns for each group.
RowChunks group_columns(const GroupNormShape& shape) {
  return {shape.s, shape.groups, shape.c / shape.groups};
}

// Calls first(sample, chunk) for all chunks of a sample, then finish(sample), then second(sample, chunk) in reverse
// order.
template <class First, class Finish, class Second>
void for_samples(const GroupNormShape& shape, const RowChunks& cut, const First& first,
                 const Finish& finish, const Second& second, bool fence) {
  if (shares_out_whole(shape.n, cut.chunks)) {
    parallel_ranges(shape.n, shape.c * shape.s, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        for (int64_t i = 0; i < cut.chunks; ++i) first(n, i);
        finish(n);
        for (int64_t i = cut.chunks - 1; i >= 0; --i) second(n, i);
      }
      if (fence) stream_fence();
    });
    return;
  }
  const int64_t tasks = shape.n * cut.chunks;
  parallel_ranges(tasks, cut.elements_per_chunk(), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) first(i / cut.chunks, i % cut.chunks);
    if (fence) stream_fence();
  });
  parallel_ranges(shape.n, 8 * shape.c * cut.chunks, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) finish(n);
  });
  parallel_ranges(tasks, cut.elements_per_chunk(), [&](int64_t begin, int64_t end) {
    for (int64_t i = end - 1; i >= begin; --i) second(i / cut.chunks, i % cut.chunks);
    if (fence) stream_fence();
  });
}

// The constants of each sample's columns [N, width], and two partial results for each chunk.
template <class Acc>
struct Columns {
  RowChunks cut, channels;  // columns by group, and by channel
  int64_t stride;
  Constants<Acc> all;
  double *partial_first, *partial_second;  // [N, chunks, width]
  Columns(const GroupNormShape& shape, bool backward, Arena& arena)
      : cut(group_columns(shape)), channels(shape.s, shape.c, 1), stride(cut.width + kPad) {
    all.mean = arena.take<Acc>(shape.n * stride);
    all.scale = arena.take<Acc>(shape.n * stride);
    all.shift = arena.take<Acc>(shape.n * stride);
    all.slope = arena.take<Acc>(backward ? shape.n * stride : 0);
    all.offset = arena.take<Acc>(backward ? shape.n * stride : 0);
    partial_first = arena.take<double>(shape.n * cut.chunks * cut.width);
    partial_second = arena.take<double>(shape.n * cut.chunks * cut.width);
  }
  Constants<Acc> of(int64_t n) const {
    const int64_t at = n * stride;
    return {all.mean + at, all.scale + at, all.shift + at, all.slope + at, all.offset + at};
  }
  double* first(int64_t n) const { return partial_first + n * cut.chunks * cut.width; }
  double* second(int64_t n) const { return partial_second + n * cut.chunks * cut.width; }

  // Sets mean, scale and shift of a sample's columns, from the statistics of its groups.
  void set_affine(int64_t n, const Acc* mean, const Acc* rstd, const Affine<Acc>& affine) const {
    const Constants<Acc> k = of(n);
    for (int64_t c = 0; c < channels.channels; ++c) {
      const int64_t set = n * cut.channels + c / cut.inner;
      k.mean[c] = mean[set];
      k.scale[c] = rstd[set] * affine.weight[c];
      k.shift[c] = affine.bias[c];
    }
    repeat(channels, k.mean);
    repeat(channels, k.scale);
    repeat(channels, k.shift);
  }
};

template <class Acc>
struct ColumnsForwardMemory {
  Columns<Acc> columns;
  Acc* rstd;  // [sets]
  Affine<Acc> affine;
  ColumnsForwardMemory(const GroupNormShape& shape, Arena& arena)
      : columns(shape, false, arena), rstd(arena.take<Acc>(shape.sets())), affine(shape.c, arena) {}
};

template <class T, ForwardAct kAct, bool kResidual>
void forward_channels_last(const GroupNormForward& p, Arena arena) {
  using Acc = acc_t<T>;
  const GroupNormShape& shape = p.shape;
  const ColumnsForwardMemory<Acc> memory(shape, arena);
  const auto& [columns, rstd, affine] = memory;
  const RowChunks& cut = columns.cut;
  affine.fill(p);
  const int64_t sample = shape.c * shape.s;
  const T* x = static_cast<const T*>(p.x);
  const T* residual = static_cast<const T*>(p.residual);
  T* out = static_cast<T*>(p.out);
  const bool stream_out = streams<T>(shape.n * sample, kStreamBytes);
  for_samples(
      shape, cut,
      [&](int64_t n, int64_t chunk) {
        collect_moments(x + n * sample, cut, chunk, columns.first(n), columns.second(n));
      },
      [&](int64_t n) {
        for (int64_t first = 0; first < shape.groups; first += kMergedChannels) {
          const int64_t groups = min_of(kMergedChannels, shape.groups - first);
          Moments<double> moments[kMergedChannels];
          merge_moments(cut, columns.first(n), columns.second(n), first, groups, moments);
          for (int64_t g = 0; g < groups; ++g)
            rstd[n * shape.groups + first + g] =
                write_statistics<Acc>(p, n * shape.groups + first + g, moments[g]);
        }
        columns.set_affine(n, static_cast<const Acc*>(p.mean), rstd, affine);
      },
      [&](int64_t n, int64_t chunk) {
        apply_chunk<T, kAct, kResidual>(p, cut, chunk, x + n * sample,
                                        residual + (kResidual ? n * sample : 0), out + n * sample,
                                        columns.of(n), stream_out);
      },
      stream_out);
}

template <class Acc>
struct ColumnsBackwardMemory {
  Columns<Acc> columns;
  GradientSums<double>* sums;  // [N, C]
  Acc* rstd;                   // [sets]
  Affine<Acc> affine;
  ColumnsBackwardMemory(const GroupNormShape& shape, Arena& arena)
      : columns(shape, true, arena),
        sums(arena.take<GradientSums<double>>(shape.n * shape.c)),
        rstd(arena.take<Acc>(shape.sets())),
        affine(shape.c, arena) {}
};

template <class T, BackwardAct kAct>
void backward_channels_last(const GroupNormBackward& p, Arena arena) {
  using Acc = acc_t<T>;
  const GroupNormShape& shape = p.shape;
  const ColumnsBackwardMemory<Acc> memory(shape, arena);
  const auto& [columns, sums, rstd, affine] = memory;
  const RowChunks& cut = columns.cut;
  fill_rstd(p, rstd);
  affine.fill(p);
  const int64_t sample = shape.c * shape.s;
  const auto at = [&](const void* tensor, int64_t n) {
    return tensor == nullptr ? nullptr : static_cast<const T*>(tensor) + n * sample;
  };
  const auto out_at = [&](T* tensor, int64_t n) {
    return tensor == nullptr ? nullptr : tensor + n * sample;
  };
  T* dresidual = static_cast<T*>(p.dresidual);
  T* dx = static_cast<T*>(p.dx);
  T* kept = kept_dz<T, kAct>(p);
  T* stores_dz = kept != nullptr ? kept : dresidual;
  const bool stream_out = streams_dx<T>(shape.n * sample, kept, dx);

  parallel_ranges(shape.n, 8 * shape.c, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n)
      columns.set_affine(n, static_cast<const Acc*>(p.mean), rstd, affine);
  });
  for_samples(
      shape, cut,
      [&](int64_t n, int64_t chunk) {
        collect_gradients<T, kAct>(p, cut, chunk, at(p.dout, n), at(p.x, n), at(p.saved, n),
                                   out_at(stores_dz, n), columns.of(n), false, columns.first(n),
                                   columns.second(n));
      },
      [&](int64_t n) {
        GradientSums<double>* of_sample = sums + n * shape.c;
        for (int64_t first = 0; first < shape.c; first += kMergedChannels) {
          const int64_t channels = min_of(kMergedChannels, shape.c - first);
          for (int64_t c = 0; c < channels; ++c) of_sample[first + c] = {};
          merge_gradients(columns.channels, columns.first(n), columns.second(n), first, channels,
                          of_sample + first);
        }
        const Constants<Acc> k = columns.of(n);
        for (int64_t g = 0; g < shape.groups; ++g) {
          GradientSums<double> total;
          for (int64_t c = g * cut.inner; c < (g + 1) * cut.inner; ++c)
            add_weighted(total, affine.weight[c], of_sample[c]);
          finish_gradients(total, static_cast<double>(shape.set_size()), rstd[n * shape.groups + g],
                           k.slope + g, k.offset + g);
        }
        repeat(cut, k.slope);
        repeat(cut, k.offset);
      },
      [&](int64_t n, int64_t chunk) {
        if (dx == nullptr) return;
        gradient_chunk<T, kAct>(p, cut, chunk, at(p.dout, n), at(p.x, n), at(p.saved, n),
                                out_at(kept, n), out_at(dx, n), columns.of(n), stream_out);
      },
      stream_out);
  sum_over_samples(p, sums, 1, rstd);
}

// --- both ----------------------------------------------------------------------------------------

bool is_channels_last(const GroupNormShape& shape) {
  return shape.layout == Layout::channels_last && shape.s > 1;
}

// Whether the channels of a contiguous sample are too short for loops of their own. A channel with a partial vector at
// its end (7x7) costs that vector and two reductions, which takes longer than reading a weight for each element.
bool has_short_channels(const GroupNormShape& shape) {
  if (is_channels_last(shape)) return false;
  return shape.s < kShortRun || (shape.s < 4 * kShortRun && shape.s % 8 != 0);
}

ContiguousSets contiguous_sets(const GroupNormShape& shape) {
  return {shape.n, shape.groups, shape.set_size(), shape.s};
}

void forward(const GroupNormForward& p, void* workspace) {
  if (p.shape.is_empty()) return;
  const Arena arena(workspace);
  if (has_short_channels(p.shape))
    return elementwise_affine_forward(p, contiguous_sets(p.shape), arena);
  dispatch_forward(p, [&]<class T, ForwardAct kAct, bool kResidual>() {
    is_channels_last(p.shape) ? forward_channels_last<T, kAct, kResidual>(p, arena)
                              : forward_channels_first<T, kAct, kResidual>(p, arena);
  });
}

void backward(const GroupNormBackward& p, void* workspace) {
  if (p.shape.is_empty()) return zero_parameter_gradients(p);
  const Arena arena(workspace);
  if (has_short_channels(p.shape))
    return elementwise_affine_backward(p, contiguous_sets(p.shape), arena);
  dispatch_backward(p, [&]<class T, BackwardAct kAct>() {
    is_channels_last(p.shape) ? backward_channels_last<T, kAct>(p, arena)
                              : backward_channels_first<T, kAct>(p, arena);
  });
}

template <class Acc>
void take_workspace(const GroupNormShape& shape, bool backward, Arena& arena) {
  if (has_short_channels(shape))
    return take_elementwise_affine<Acc>(contiguous_sets(shape), backward, arena);
  if (is_channels_last(shape)) {
    if (backward)
      ColumnsBackwardMemory<Acc>(shape, arena);
    else
      ColumnsForwardMemory<Acc>(shape, arena);
  } else if (backward) {
    RunsBackwardMemory<Acc>(shape, arena);
  } else {
    RunsForwardMemory<Acc>(shape, arena);
  }
}

size_t workspace_bytes(const GroupNormShape& shape, bool backward) {
  if (shape.is_empty()) return 0;
  return bytes_taken([&](Arena& arena) {
    shape.dtype == DType::f64 ? take_workspace<double>(shape, backward, arena)
                              : take_workspace<float>(shape, backward, arena);
  });
}

}  // namespace

void add_group_norm(cpu::KernelTable& table) {
  table.group_norm = {[](const GroupNormForward& p) { return workspace_bytes(p.shape, false); },
                      [](const GroupNormBackward& p) { return workspace_bytes(p.shape, true); },
                      forward, backward};
}

}  // namespace ADVDL_CAPABILITY_NAMESPACE
}  // namespace advdl_ops
