// Batch norm, residual addition and activation on the CPU. ../common/batch_norm_act.h has the formulas.
//
// channels_first: a channel is N runs of S elements. They are cut into blocks of up to kBlock elements, which stay in
// L1 while their moments are computed; blocks are grouped into chunks. If there are enough channels for all threads,
// one thread processes a few neighbouring channels from statistics to output while they are in L2, so that x is read
// from memory once. channels_last and short runs: rows are cut into chunks (norm_columns.h). The statistics of all
// chunks come first. The output follows in reverse order of chunks, to begin with those that were read last and are
// still in cache.
//
// Chunks depend on the shape only, and partial sums are merged in chunk order in double. So the result does not depend
// on the number of threads.
#include "../common/batch_norm_act.h"

#include "dispatch.h"
#include "norm_columns.h"
#include "norm_runs.h"

namespace advdl_ops {
namespace ADVDL_CAPABILITY_NAMESPACE {
namespace {

using cpu::parallel_ranges;

// Runs of at least this length are not put into one block with others: to read several long rows together defeats the
// prefetchers.
constexpr int64_t kLongRun = 512;
// Bytes of x in a group of neighbouring channels, which take turns block by block. Their runs are adjacent in memory.
// The runs of one channel are far apart, and each would miss the TLB.
constexpr int64_t kGroupBytes = 1 << 20;

// Computes everything that forward stores or applies from the moments of channel c.
template <class Acc>
void finish_statistics(const BatchNormActForward& p, int64_t c, const Moments<double>& m,
                       Acc* scale, Acc* shift) {
  const double m2 = m.m2 < 0 ? 0 : m.m2;  // rounding may make it slightly negative; NaN stays
  const double var = m2 / m.count;
  const Acc rstd = static_cast<Acc>(1.0 / __builtin_sqrt(var + p.eps));
  static_cast<Acc*>(p.mean)[c] = static_cast<Acc>(m.mean);
  static_cast<Acc*>(p.rstd)[c] = p.out == nullptr ? static_cast<Acc>(m2) : rstd;
  if (p.running_mean_out != nullptr) {
    const DType dtype = p.shape.running_dtype;
    const double old_mean = read_scalar(p.running_mean, dtype, c);
    const double old_var = read_scalar(p.running_var, dtype, c);
    const double unbiased = m2 / (m.count - 1);
    write_scalar(p.running_mean_out, dtype, c, (1 - p.momentum) * old_mean + p.momentum * m.mean);
    write_scalar(p.running_var_out, dtype, c, (1 - p.momentum) * old_var + p.momentum * unbiased);
  }
  channel_affine(p.weight, p.bias, p.shape.weight_dtype, c, rstd, scale, shift);
}

// Not in training: mean and rstd are given, or come from the running statistics.
template <class Acc>
void use_known_statistics(const BatchNormActForward& p, int64_t c, Acc* scale, Acc* shift) {
  Acc* mean = static_cast<Acc*>(p.mean) + c;
  Acc* rstd = static_cast<Acc*>(p.rstd) + c;
  if (p.running_mean != nullptr) {
    const double var = read_scalar(p.running_var, p.shape.running_dtype, c);
    *rstd = static_cast<Acc>(1.0 / __builtin_sqrt(var + p.eps));
    *mean = static_cast<Acc>(read_scalar(p.running_mean, p.shape.running_dtype, c));
  }
  channel_affine(p.weight, p.bias, p.shape.weight_dtype, c, *rstd, scale, shift);
}

// Writes dbias and dweight unless they are given, and computes slope and offset of
// dx = scale * dz + slope * (x - mean) + offset.
template <class Acc>
void finish_gradients(const BatchNormActBackward& p, int64_t c, const GradientSums<double>& sums,
                      Acc* slope, Acc* offset) {
  const Acc rstd = static_cast<const Acc*>(p.rstd)[c];
  const double count = static_cast<double>(p.shape.n) * static_cast<double>(p.shape.s);
  double mean_dz = sums.dz / count, mean_dz_xhat = sums.dz_x * rstd / count;
  if (p.means_given) {
    mean_dz = static_cast<const Acc*>(p.dbias)[c];
    mean_dz_xhat = static_cast<const Acc*>(p.dweight)[c];
  } else {
    static_cast<Acc*>(p.dbias)[c] = static_cast<Acc>(sums.dz);
    static_cast<Acc*>(p.dweight)[c] = static_cast<Acc>(sums.dz_x * rstd);
  }
  *slope = *offset = Acc(0);
  if (!p.training) return;
  const double weight = p.weight == nullptr ? 1.0 : read_scalar(p.weight, p.shape.weight_dtype, c);
  const double scale = weight * rstd;
  *slope = static_cast<Acc>(-scale * rstd * mean_dz_xhat);
  *offset = static_cast<Acc>(-scale * mean_dz);
}

// --- channels_first ------------------------------------------------------------------------------

// How a channel's N runs of S elements are cut into blocks and chunks. Depends on the shape only.
struct ChannelBlocks {
  int64_t n, c, s, rows_per_block, blocks, chunks, group;
  ChannelBlocks(const BatchNormActShape& shape, int64_t element_bytes)
      : n(shape.n), c(shape.c), s(shape.s) {
    rows_per_block = s < kLongRun ? max_of(1, kBlock / max_of(1, s)) : 1;
    blocks = s <= kBlock ? ceil_div(n, rows_per_block) : n * ceil_div(s, kBlock);
    chunks = clamp(blocks / 4, 1, kMaxChunks);
    group = max_of(1, kGroupBytes / max_of(1, n * s * element_bytes));
  }
  // Calls f(channel, offset of the first element, run length, number of runs) for each block of a chunk, for all
  // channels [first, last) before the next block. The runs of a block are c * s elements apart.
  template <class F>
  ADVDL_INLINE void for_blocks(int64_t first, int64_t last, int64_t chunk, F&& f) const {
    const int64_t end = (chunk + 1) * blocks / chunks;
    for (int64_t b = chunk * blocks / chunks; b < end; ++b) {
      for (int64_t channel = first; channel < last; ++channel) {
        if (s <= kBlock) {
          const int64_t row = b * rows_per_block;
          f(channel, (row * c + channel) * s, s, min_of(rows_per_block, n - row));
        } else {
          const int64_t per_row = ceil_div(s, kBlock), begin = b % per_row * kBlock;
          f(channel, (b / per_row * c + channel) * s + begin, min_of(kBlock, s - begin), 1);
        }
      }
    }
  }
  // Whether channels alone keep all threads busy.
  bool channel_per_thread() const { return chunks == 1 || c >= 4 * cpu::thread_count(); }
};

// Partial: the moments of a chunk, or its gradient sums.
template <class Acc, class Partial>
struct ChannelsMemory {
  Constants<Acc> constants;
  Partial* partial;  // [C, chunks]
  ChannelsMemory(const ChannelBlocks& cut, Arena& arena)
      : constants(take_constants<Acc>(arena, cut.c)),
        partial(arena.take<Partial>(cut.c * cut.chunks)) {}
};

template <class T, ForwardAct kAct, bool kResidual>
void forward_channels_first(const BatchNormActForward& p, Arena arena) {
  using Acc = acc_t<T>;
  const ChannelBlocks cut(p.shape, sizeof(T));
  auto [k, partial] = ChannelsMemory<Acc, Moments<double>>(cut, arena);
  k.mean = static_cast<Acc*>(p.mean);
  const T* x = static_cast<const T*>(p.x);
  const T* residual = static_cast<const T*>(p.residual);
  T* out = static_cast<T*>(p.out);
  const bool stream_out = streams<T>(p.shape.n * p.shape.c * p.shape.s, kStreamBytes);
  const int64_t stride = cut.c * cut.s;

  const auto collect = [&](int64_t first, int64_t last, int64_t chunk) {
    for (int64_t c = first; c < last; ++c) partial[c * cut.chunks + chunk] = {};
    cut.for_blocks(first, last, chunk,
                   [&](int64_t c, int64_t offset, int64_t length, int64_t runs) {
                     add_block(x + offset, length, runs, stride, &partial[c * cut.chunks + chunk]);
                   });
  };
  const auto finish = [&](int64_t c) {
    if (!p.training) return use_known_statistics<Acc>(p, c, k.scale + c, k.shift + c);
    Moments<double> m = partial[c * cut.chunks];
    for (int64_t i = 1; i < cut.chunks; ++i) m.merge(partial[c * cut.chunks + i]);
    finish_statistics<Acc>(p, c, m, k.scale + c, k.shift + c);
  };
  const auto apply = [&](int64_t first, int64_t last, int64_t chunk) {
    if (out == nullptr) return;
    cut.for_blocks(
        first, last, chunk, [&](int64_t c, int64_t offset, int64_t length, int64_t runs) {
          for (int64_t r = 0; r < runs; ++r, offset += stride) {
            apply_run<T, kAct, PerRun, kResidual>(x + offset, residual + (kResidual ? offset : 0),
                                                  out + offset, length, k, c, p.act,
                                                  static_cast<Acc>(p.act_param), stream_out);
          }
        });
  };

  if (cut.channel_per_thread()) {
    parallel_ranges(cut.c, cut.n * cut.s, [&](int64_t begin, int64_t end) {
      // Evaluation reads x only once, so it goes in memory order.
      const int64_t group = p.training ? cut.group : cut.c;
      for (int64_t first = begin; first < end; first += group) {
        const int64_t last = min_of(first + group, end);
        if (p.training) {
          for (int64_t i = 0; i < cut.chunks; ++i) collect(first, last, i);
        }
        for (int64_t c = first; c < last; ++c) finish(c);
        for (int64_t i = cut.chunks - 1; i >= 0; --i) apply(first, last, i);
      }
      if (stream_out) stream_fence();
    });
    return;
  }
  const int64_t tasks = cut.c * cut.chunks;
  if (p.training) {
    parallel_ranges(tasks, cut.n * cut.s / cut.chunks, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        collect(i / cut.chunks, i / cut.chunks + 1, i % cut.chunks);
    });
  }
  for (int64_t c = 0; c < cut.c; ++c) finish(c);
  parallel_ranges(tasks, cut.n * cut.s / cut.chunks, [&](int64_t begin, int64_t end) {
    for (int64_t i = end - 1; i >= begin; --i)
      apply(i / cut.chunks, i / cut.chunks + 1, i % cut.chunks);
    if (stream_out) stream_fence();
  });
}

template <class T, BackwardAct kAct>
void backward_channels_first(const BatchNormActBackward& p, Arena arena) {
  using Acc = acc_t<T>;
  using Vec = typename Simd<Acc>::Vec;
  const ChannelBlocks cut(p.shape, sizeof(T));
  auto [k, partial] = ChannelsMemory<Acc, GradientSums<double>>(cut, arena);
  k.mean = const_cast<Acc*>(static_cast<const Acc*>(p.mean));
  auto [dout, x, saved, dresidual, dx, kept, stores_dz] = gradient_tensors<T, kAct>(p);
  const bool stream_residual =
      !is_transcendental(kAct) && streams<T>(p.shape.n * p.shape.c * p.shape.s, kStreamStoredBytes);
  const bool stream_out = streams_dx<T>(p.shape.n * p.shape.c * p.shape.s, kept, dx);
  // A streamed dz is not in cache. dout is, so dz is computed from it again.
  if (stream_residual || p.means_given) kept = nullptr;
  const Acc param = static_cast<Acc>(p.act_param);
  const int64_t stride = cut.c * cut.s;

  const auto collect = [&](int64_t first, int64_t last, int64_t chunk) {
    for (int64_t c = first; c < last; ++c) partial[c * cut.chunks + chunk] = {};
    if (p.means_given) return;
    cut.for_blocks(first, last, chunk,
                   [&](int64_t c, int64_t offset, int64_t length, int64_t runs) {
                     Vec dz_sum[4] = {}, dz_centred_sum[4] = {};
                     for (int64_t r = 0; r < runs; ++r, offset += stride) {
                       const bool streams_dz = stream_residual && is_aligned(stores_dz + offset);
                       for_gradients<T, kAct, PerRun, 4>(
                           dout + offset, x + offset, saved == nullptr ? nullptr : saved + offset,
                           length, k, c, p.act, param,
                           [&](int64_t i, const auto& lanes, auto index, auto dz, auto centred)
                               __attribute__((always_inline)) {
                                 if (stores_dz != nullptr)
                                   lanes.write_out(stores_dz + offset + i, dz, streams_dz);
                                 dz_sum[index.value] += lanes.counted(dz);
                                 dz_centred_sum[index.value] += lanes.counted(dz * centred);
                               });
                     }
                     GradientSums<double>& sums = partial[c * cut.chunks + chunk];
                     sums.dz += lane_sum((dz_sum[0] + dz_sum[1]) + (dz_sum[2] + dz_sum[3]));
                     sums.dz_x += lane_sum((dz_centred_sum[0] + dz_centred_sum[1]) +
                                           (dz_centred_sum[2] + dz_centred_sum[3]));
                   });
  };
  const auto begin_channel = [&](int64_t c) {
    channel_affine(p.weight, p.bias, p.shape.weight_dtype, c, static_cast<const Acc*>(p.rstd)[c],
                   k.scale + c, k.shift + c);
  };
  const auto finish = [&](int64_t c) {
    GradientSums<double> sums;
    for (int64_t i = 0; i < cut.chunks; ++i) sums.merge(partial[c * cut.chunks + i]);
    finish_gradients<Acc>(p, c, sums, k.slope + c, k.offset + c);
  };
  const auto gradient_of_kept = p.training ? gradient_run<T, BackwardAct::kept, PerRun, true>
                                           : gradient_run<T, BackwardAct::kept, PerRun, false>;
  const auto gradient_of_dout =
      p.training ? gradient_run<T, kAct, PerRun, true> : gradient_run<T, kAct, PerRun, false>;
  const auto apply = [&](int64_t first, int64_t last, int64_t chunk) {
    if (dx == nullptr) return;
    cut.for_blocks(first, last, chunk,
                   [&](int64_t c, int64_t offset, int64_t length, int64_t runs) {
                     for (int64_t r = 0; r < runs; ++r, offset += stride) {
                       if (kept != nullptr) {
                         gradient_of_kept(kept + offset, x + offset, nullptr, dx + offset, length,
                                          k, c, p.act, param, stream_out);
                       } else {
                         gradient_of_dout(dout + offset, x + offset,
                                          saved == nullptr ? nullptr : saved + offset, dx + offset,
                                          length, k, c, p.act, param, stream_out);
                       }
                     }
                   });
  };

  if (cut.channel_per_thread()) {
    parallel_ranges(cut.c, cut.n * cut.s, [&](int64_t begin, int64_t end) {
      for (int64_t first = begin; first < end; first += cut.group) {
        const int64_t last = min_of(first + cut.group, end);
        for (int64_t c = first; c < last; ++c) begin_channel(c);
        for (int64_t i = 0; i < cut.chunks; ++i) collect(first, last, i);
        for (int64_t c = first; c < last; ++c) finish(c);
        for (int64_t i = cut.chunks - 1; i >= 0; --i) apply(first, last, i);
      }
      if (stream_out || stream_residual) stream_fence();
    });
    return;
  }
  const int64_t tasks = cut.c * cut.chunks;
  for (int64_t c = 0; c < cut.c; ++c) begin_channel(c);
  parallel_ranges(tasks, cut.n * cut.s / cut.chunks, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      collect(i / cut.chunks, i / cut.chunks + 1, i % cut.chunks);
    if (stream_residual) stream_fence();
  });
  for (int64_t c = 0; c < cut.c; ++c) finish(c);
  parallel_ranges(tasks, cut.n * cut.s / cut.chunks, [&](int64_t begin, int64_t end) {
    for (int64_t i = end - 1; i >= begin; --i)
      apply(i / cut.chunks, i / cut.chunks + 1, i % cut.chunks);
    if (stream_out || stream_residual) stream_fence();
  });
}

// --- rows: channels_last, and channels_first with short runs ------------------------------------

// Each channel has one column, or S columns if runs of S elements are too short for vectors.
RowChunks row_chunks(const BatchNormActShape& shape) {
  const bool last = shape.layout == Layout::channels_last;
  return {last ? shape.n * shape.s : shape.n, shape.c, last ? 1 : shape.s};
}

// Whether a tensor is read row by row and not channel by channel.
bool by_rows(const BatchNormActShape& shape) {
  return shape.layout == Layout::channels_last || (shape.s > 0 && shape.s < kShortRun);
}

template <class Acc>
struct RowsMemory {
  Constants<Acc> constants;
  double *partial_first, *partial_second;  // [chunks, width]: means and m2, or the gradient sums
  RowsMemory(const RowChunks& cut, Arena& arena)
      : constants(take_constants<Acc>(arena, cut.width)),
        partial_first(arena.take<double>(cut.chunks * cut.width)),
        partial_second(arena.take<double>(cut.chunks * cut.width)) {}
};

template <class T, ForwardAct kAct, bool kResidual>
void forward_rows(const BatchNormActForward& p, Arena arena) {
  using Acc = acc_t<T>;
  const RowChunks cut = row_chunks(p.shape);
  const RowsMemory<Acc> memory(cut, arena);
  const auto& [k, partial_mean, partial_m2] = memory;
  const T* x = static_cast<const T*>(p.x);
  const T* residual = static_cast<const T*>(p.residual);
  T* out = static_cast<T*>(p.out);
  const bool stream_out = streams<T>(p.shape.n * p.shape.c * p.shape.s, kStreamBytes);

  if (p.training) {
    parallel_ranges(cut.chunks, cut.elements_per_chunk(), [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; ++chunk)
        collect_moments(x, cut, chunk, partial_mean, partial_m2);
    });
  }
  parallel_ranges(cut.channels, 8 * cut.chunks * cut.columns_per_channel(),
                  [&](int64_t begin, int64_t end) {
                    for (int64_t first = begin; first < end; first += kMergedChannels) {
                      const int64_t channels = min_of(kMergedChannels, end - first);
                      Moments<double> moments[kMergedChannels];
                      if (p.training)
                        merge_moments(cut, partial_mean, partial_m2, first, channels, moments);
                      for (int64_t c = 0; c < channels; ++c) {
                        const int64_t to = first + c;
                        if (p.training) {
                          finish_statistics<Acc>(p, to, moments[c], k.scale + to, k.shift + to);
                        } else {
                          use_known_statistics<Acc>(p, to, k.scale + to, k.shift + to);
                        }
                        k.mean[to] = static_cast<const Acc*>(p.mean)[to];
                      }
                    }
                  });
  if (out == nullptr) return;
  repeat(cut, k.mean);
  repeat(cut, k.scale);
  repeat(cut, k.shift);
  parallel_ranges(cut.chunks, cut.elements_per_chunk(), [&](int64_t begin, int64_t end) {
    for (int64_t chunk = end - 1; chunk >= begin; --chunk)
      apply_chunk<T, kAct, kResidual>(p, cut, chunk, x, residual, out, k, stream_out);
    if (stream_out) stream_fence();
  });
}

template <class T, BackwardAct kAct>
void backward_rows(const BatchNormActBackward& p, Arena arena) {
  using Acc = acc_t<T>;
  const RowChunks cut = row_chunks(p.shape);
  const RowsMemory<Acc> memory(cut, arena);
  const auto& [k, partial_dz, partial_dz_x] = memory;
  auto [dout, x, saved, dresidual, dx, kept, stores_dz] = gradient_tensors<T, kAct>(p);
  const bool stream_out = streams<T>(p.shape.n * p.shape.c * p.shape.s, kStreamBytes);
  // dz is read again only after a pass over three tensors, so it streams from a smaller size on.
  const bool stream_residual = streams<T>(p.shape.n * p.shape.c * p.shape.s, kStreamStoredBytes);

  for (int64_t c = 0; c < cut.channels; ++c) {
    k.mean[c] = static_cast<const Acc*>(p.mean)[c];
    channel_affine(p.weight, p.bias, p.shape.weight_dtype, c, static_cast<const Acc*>(p.rstd)[c],
                   k.scale + c, k.shift + c);
  }
  repeat(cut, k.mean);
  repeat(cut, k.scale);
  repeat(cut, k.shift);
  if (p.means_given) {
    kept = nullptr;
  } else {
    parallel_ranges(cut.chunks, cut.elements_per_chunk(), [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; ++chunk)
        collect_gradients<T, kAct>(p, cut, chunk, dout, x, saved, stores_dz, k, stream_residual,
                                   partial_dz, partial_dz_x);
      if (stream_residual) stream_fence();
    });
  }
  parallel_ranges(
      cut.channels, 8 * cut.chunks * cut.columns_per_channel(), [&](int64_t begin, int64_t end) {
        for (int64_t first = begin; first < end; first += kMergedChannels) {
          const int64_t channels = min_of(kMergedChannels, end - first);
          GradientSums<double> sums[kMergedChannels];
          if (!p.means_given) merge_gradients(cut, partial_dz, partial_dz_x, first, channels, sums);
          for (int64_t c = 0; c < channels; ++c) {
            finish_gradients<Acc>(p, first + c, sums[c], k.slope + first + c, k.offset + first + c);
          }
        }
      });
  if (dx == nullptr) return;
  repeat(cut, k.slope);
  repeat(cut, k.offset);
  const auto gradients = p.training ? gradient_chunk<T, kAct, true, BatchNormActBackward>
                                    : gradient_chunk<T, kAct, false, BatchNormActBackward>;
  parallel_ranges(cut.chunks, cut.elements_per_chunk(), [&](int64_t begin, int64_t end) {
    for (int64_t chunk = end - 1; chunk >= begin; --chunk)
      gradients(p, cut, chunk, dout, x, saved, kept, dx, k, stream_out);
    if (stream_out) stream_fence();
  });
}

// --- both ----------------------------------------------------------------------------------------

void forward(const BatchNormActForward& p, void* workspace) {
  // With an empty batch, training has nothing to do, but evaluation still writes mean and rstd.
  if (p.shape.c == 0 || (p.training && p.shape.n * p.shape.s == 0)) return;
  const Arena arena(workspace);
  dispatch_forward(p, [&]<class T, ForwardAct kAct, bool kResidual>() {
    by_rows(p.shape) ? forward_rows<T, kAct, kResidual>(p, arena)
                     : forward_channels_first<T, kAct, kResidual>(p, arena);
  });
}

void backward(const BatchNormActBackward& p, void* workspace) {
  if (p.shape.c == 0) return;
  const Arena arena(workspace);
  dispatch_backward(p, [&]<class T, BackwardAct kAct>() {
    by_rows(p.shape) ? backward_rows<T, kAct>(p, arena)
                     : backward_channels_first<T, kAct>(p, arena);
  });
}

// Partial: Moments<double> in forward, GradientSums<double> in backward.
template <class Partial>
size_t workspace_bytes(const BatchNormActShape& shape) {
  if (shape.c == 0) return 0;
  return bytes_taken([&](Arena& arena) {
    with_type(shape.dtype, [&]<class T>() {
      using Acc = acc_t<T>;
      if (by_rows(shape))
        RowsMemory<Acc>(row_chunks(shape), arena);
      else
        ChannelsMemory<Acc, Partial>(ChannelBlocks(shape, sizeof(T)), arena);
    });
  });
}

}  // namespace

void add_batch_norm_act(cpu::KernelTable& table) {
  table.batch_norm_act = {
      [](const BatchNormActForward& p) { return workspace_bytes<Moments<double>>(p.shape); },
      [](const BatchNormActBackward& p) { return workspace_bytes<GradientSums<double>>(p.shape); },
      forward, backward};
}

}  // namespace ADVDL_CAPABILITY_NAMESPACE
}  // namespace advdl_ops
