// Batch norm, residual addition and activation on the CPU; what is computed stands in ../common/batch_norm_act.h.
//
// channels_first: a channel is N runs of S elements. They are cut into blocks of up to kBlock elements, which stay in
// L1 for two passes (mean, squares about it), and blocks are grouped into chunks. With channels enough for all threads, one
// thread does a few neighbouring channels from statistics to output while they lie in L2: x is read from memory once.
// channels_last, and short runs: rows cut into chunks; statistics of all chunks, then the apply over the same chunks in
// reverse, so that what was read last, and is still in cache, is used first.
//
// Chunks depend on the shape only, and partial sums are merged in chunk order in double: the result does
// not depend on the number of threads.
#include "../common/batch_norm_act.h"

#include "dispatch.h"
#include "norm.h"
#include "parallel.h"

namespace advdl_ops {
namespace ADVDL_CAPABILITY_NAMESPACE {
namespace {

using cpu::parallel_ranges;

// From the moments of channel c: everything that forward stores or applies.
template <class Acc>
void finish_statistics(const BatchNormActForward& p, int64_t c, const Moments& m, Acc* scale,
                       Acc* shift) {
  const double m2 = m.m2 < 0 ? 0 : m.m2;  // rounding may leave a trace below zero; NaN stays
  const double var = m2 / m.count;
  const Acc rstd = static_cast<Acc>(1.0 / __builtin_sqrt(var + p.eps));
  static_cast<Acc*>(p.mean)[c] = static_cast<Acc>(m.mean);
  static_cast<Acc*>(p.rstd)[c] = rstd;
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

// The running statistics as mean and rstd, for evaluation.
template <class Acc>
void use_running_statistics(const BatchNormActForward& p, int64_t c, Acc* scale, Acc* shift) {
  const double var = read_scalar(p.running_var, p.shape.running_dtype, c);
  const Acc rstd = static_cast<Acc>(1.0 / __builtin_sqrt(var + p.eps));
  static_cast<Acc*>(p.mean)[c] =
      static_cast<Acc>(read_scalar(p.running_mean, p.shape.running_dtype, c));
  static_cast<Acc*>(p.rstd)[c] = rstd;
  channel_affine(p.weight, p.bias, p.shape.weight_dtype, c, rstd, scale, shift);
}

// dx = scale * dz + slope * (x - mean) + offset.
template <class Acc>
void finish_gradients(const BatchNormActBackward& p, int64_t c, double sum_dz,
                      double sum_dz_centred, Acc* slope, Acc* offset) {
  const Acc rstd = static_cast<const Acc*>(p.rstd)[c];
  static_cast<Acc*>(p.dbias)[c] = static_cast<Acc>(sum_dz);
  static_cast<Acc*>(p.dweight)[c] = static_cast<Acc>(sum_dz_centred * rstd);
  *slope = *offset = Acc(0);
  if (!p.training) return;
  const double count = static_cast<double>(p.shape.n) * static_cast<double>(p.shape.s);
  const double weight = p.weight == nullptr ? 1.0 : read_scalar(p.weight, p.shape.weight_dtype, c);
  const double scale = weight * rstd;
  *slope = static_cast<Acc>(-scale * rstd * rstd * sum_dz_centred / count);
  *offset = static_cast<Acc>(-scale * sum_dz / count);
}

// --- channels_first ------------------------------------------------------------------------------

// How a channel's N runs of S elements are cut; by the shape alone.
struct ChannelBlocks {
  int64_t n, c, s, rows_per_block, blocks, chunks, group;
  ChannelBlocks(const BatchNormActShape& shape, int64_t element_bytes)
      : n(shape.n), c(shape.c), s(shape.s) {
    rows_per_block = s < kLongRun ? max_of(1, kBlock / max_of(1, s)) : 1;
    blocks = s <= kBlock ? ceil_div(n, rows_per_block) : n * ceil_div(s, kBlock);
    chunks = clamp(blocks / 4, 1, kMaxChunks);
    group = max_of(1, kGroupBytes / max_of(1, n * s * element_bytes));
  }
  // f(channel, offset of the first element, run length, runs; runs lie c * s apart) for each block of a chunk of the
  // channels [first, last): neighbours in memory take turns.
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

template <class T, ForwardAct kAct, bool kResidual>
void forward_channels_first(const BatchNormActForward& p, Arena arena) {
  using Acc = acc_t<T>;
  const ChannelBlocks cut(p.shape, sizeof(T));
  Constants<Acc> k = arena.take_constants<Acc>(cut.c);
  Moments* partial = arena.take<Moments>(cut.c * cut.chunks);
  k.mean = static_cast<Acc*>(p.mean);
  const T* x = static_cast<const T*>(p.x);
  const T* residual = static_cast<const T*>(p.residual);
  T* out = static_cast<T*>(p.out);
  const bool stream_out = streams<T>(p.shape.n * p.shape.c * p.shape.s, kStreamBytes);
  const int64_t stride = cut.c * cut.s;

  const auto collect = [&](int64_t first, int64_t last, int64_t chunk) {
    for (int64_t c = first; c < last; ++c) partial[c * cut.chunks + chunk] = Moments{};
    cut.for_blocks(first, last, chunk,
                   [&](int64_t c, int64_t offset, int64_t length, int64_t runs) {
                     add_block(x + offset, length, runs, stride, &partial[c * cut.chunks + chunk]);
                   });
  };
  const auto finish = [&](int64_t c) {
    if (!p.training) return use_running_statistics<Acc>(p, c, k.scale + c, k.shift + c);
    Moments m;
    for (int64_t i = 0; i < cut.chunks; ++i) {
      const Moments& part = partial[c * cut.chunks + i];
      m.merge(part.count, part.mean, part.m2);
    }
    finish_statistics<Acc>(p, c, m, k.scale + c, k.shift + c);
  };
  const auto apply = [&](int64_t first, int64_t last, int64_t chunk) {
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
      // Evaluation reads once: in the order of memory.
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
  Constants<Acc> k = arena.take_constants<Acc>(cut.c);
  GradientSums* partial = arena.take<GradientSums>(cut.c * cut.chunks);
  k.mean = const_cast<Acc*>(static_cast<const Acc*>(p.mean));
  const T* dout = static_cast<const T*>(p.dout);
  const T* x = static_cast<const T*>(p.x);
  const T* saved = static_cast<const T*>(p.saved);
  T* dresidual = static_cast<T*>(p.dresidual);
  T* dx = static_cast<T*>(p.dx);
  const bool stream_residual =
      !is_transcendental(kAct) && streams<T>(p.shape.n * p.shape.c * p.shape.s, kStreamStoredBytes);
  T* kept = kept_dz<T, kAct>(p);
  T* stores_dz = kept != nullptr ? kept : dresidual;
  const bool stream_out = streams_dx<T>(p.shape.n * p.shape.c * p.shape.s, kept, dx);
  // What was streamed is far: dz is then computed again from dout, which is near.
  if (stream_residual) kept = nullptr;
  const Acc param = static_cast<Acc>(p.act_param);
  const int64_t stride = cut.c * cut.s;

  const auto collect = [&](int64_t first, int64_t last, int64_t chunk) {
    for (int64_t c = first; c < last; ++c) partial[c * cut.chunks + chunk] = GradientSums{};
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
                     GradientSums& sums = partial[c * cut.chunks + chunk];
                     sums.dz += lane_sum((dz_sum[0] + dz_sum[1]) + (dz_sum[2] + dz_sum[3]));
                     sums.dz_centred += lane_sum((dz_centred_sum[0] + dz_centred_sum[1]) +
                                                 (dz_centred_sum[2] + dz_centred_sum[3]));
                   });
  };
  const auto begin_channel = [&](int64_t c) {
    channel_affine(p.weight, p.bias, p.shape.weight_dtype, c, static_cast<const Acc*>(p.rstd)[c],
                   k.scale + c, k.shift + c);
  };
  const auto finish = [&](int64_t c) {
    GradientSums sums;
    for (int64_t i = 0; i < cut.chunks; ++i) {
      sums.dz += partial[c * cut.chunks + i].dz;
      sums.dz_centred += partial[c * cut.chunks + i].dz_centred;
    }
    finish_gradients<Acc>(p, c, sums.dz, sums.dz_centred, k.slope + c, k.offset + c);
  };
  const auto apply = [&](int64_t first, int64_t last, int64_t chunk) {
    if (dx == nullptr) return;
    cut.for_blocks(
        first, last, chunk, [&](int64_t c, int64_t offset, int64_t length, int64_t runs) {
          for (int64_t r = 0; r < runs; ++r, offset += stride) {
            if (kept != nullptr) {
              // Already holds dz.
              gradient_run<T, BackwardAct::kept, PerRun>(kept + offset, x + offset, nullptr,
                                                         dx + offset, length, k, c, p.act, param,
                                                         p.training, stream_out);
            } else {
              gradient_run<T, kAct, PerRun>(
                  dout + offset, x + offset, saved == nullptr ? nullptr : saved + offset,
                  dx + offset, length, k, c, p.act, param, p.training, stream_out);
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

// Channels of one column each, or of S where a run of S is too short for vectors.
RowChunks row_chunks(const BatchNormActShape& shape) {
  const bool last = shape.layout == Layout::channels_last;
  return {last ? shape.n * shape.s : shape.n, shape.c, last ? 1 : shape.s};
}

// Whether a tensor is read so, and not channel by channel.
bool by_rows(const BatchNormActShape& shape) {
  return shape.layout == Layout::channels_last || (shape.s > 0 && shape.s < kShortRun);
}

template <class T, ForwardAct kAct, bool kResidual>
void forward_rows(const BatchNormActForward& p, Arena arena) {
  using Acc = acc_t<T>;
  const RowChunks cut = row_chunks(p.shape);
  Constants<Acc> k = arena.take_constants<Acc>(cut.width);
  double* partial_mean = arena.take<double>(cut.chunks * cut.width);
  double* partial_m2 = arena.take<double>(cut.chunks * cut.width);
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
                      Moments moments[kMergedChannels];
                      if (p.training)
                        merge_moments(cut, partial_mean, partial_m2, first, channels, moments);
                      for (int64_t c = 0; c < channels; ++c) {
                        const int64_t to = first + c;
                        if (p.training) {
                          finish_statistics<Acc>(p, to, moments[c], k.scale + to, k.shift + to);
                        } else {
                          use_running_statistics<Acc>(p, to, k.scale + to, k.shift + to);
                        }
                        k.mean[to] = static_cast<const Acc*>(p.mean)[to];
                      }
                    }
                  });
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
  Constants<Acc> k = arena.take_constants<Acc>(cut.width);
  double* partial_dz = arena.take<double>(cut.chunks * cut.width);
  double* partial_dz_centred = arena.take<double>(cut.chunks * cut.width);
  const T* dout = static_cast<const T*>(p.dout);
  const T* x = static_cast<const T*>(p.x);
  const T* saved = static_cast<const T*>(p.saved);
  T* dresidual = static_cast<T*>(p.dresidual);
  T* kept = kept_dz<T, kAct>(p);
  T* stores_dz = kept != nullptr ? kept : dresidual;
  T* dx = static_cast<T*>(p.dx);
  const bool stream_out = streams<T>(p.shape.n * p.shape.c * p.shape.s, kStreamBytes);
  // Read again only after a pass over three tensors.
  const bool stream_residual = streams<T>(p.shape.n * p.shape.c * p.shape.s, kStreamStoredBytes);

  for (int64_t c = 0; c < cut.channels; ++c) {
    k.mean[c] = static_cast<const Acc*>(p.mean)[c];
    channel_affine(p.weight, p.bias, p.shape.weight_dtype, c, static_cast<const Acc*>(p.rstd)[c],
                   k.scale + c, k.shift + c);
  }
  repeat(cut, k.mean);
  repeat(cut, k.scale);
  repeat(cut, k.shift);
  parallel_ranges(cut.chunks, cut.elements_per_chunk(), [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk)
      collect_gradients<T, kAct>(p, cut, chunk, dout, x, saved, stores_dz, k, stream_residual,
                                 partial_dz, partial_dz_centred);
    if (stream_residual) stream_fence();
  });
  parallel_ranges(cut.channels, 8 * cut.chunks * cut.columns_per_channel(),
                  [&](int64_t begin, int64_t end) {
                    for (int64_t first = begin; first < end; first += kMergedChannels) {
                      const int64_t channels = min_of(kMergedChannels, end - first);
                      GradientSums sums[kMergedChannels];
                      merge_gradients(cut, partial_dz, partial_dz_centred, first, channels, sums);
                      for (int64_t c = 0; c < channels; ++c) {
                        finish_gradients<Acc>(p, first + c, sums[c].dz, sums[c].dz_centred,
                                              k.slope + first + c, k.offset + first + c);
                      }
                    }
                  });
  if (dx == nullptr) return;
  repeat(cut, k.slope);
  repeat(cut, k.offset);
  parallel_ranges(cut.chunks, cut.elements_per_chunk(), [&](int64_t begin, int64_t end) {
    for (int64_t chunk = end - 1; chunk >= begin; --chunk)
      gradient_chunk<T, kAct>(p, cut, chunk, dout, x, saved, kept, dx, k, p.training, stream_out);
    if (stream_out) stream_fence();
  });
}

// --- both ----------------------------------------------------------------------------------------

void forward(const BatchNormActForward& p, void* workspace) {
  // Nothing to normalize; evaluation still has mean and rstd to report.
  if (p.shape.c == 0 || (p.training && p.shape.n * p.shape.s == 0)) return;
  const Arena arena{static_cast<char*>(workspace)};
  dispatch_forward(p, [&]<class T, ForwardAct kAct, bool kResidual>() {
    by_rows(p.shape) ? forward_rows<T, kAct, kResidual>(p, arena)
                     : forward_channels_first<T, kAct, kResidual>(p, arena);
  });
}

void backward(const BatchNormActBackward& p, void* workspace) {
  if (p.shape.c == 0) return;
  const Arena arena{static_cast<char*>(workspace)};
  dispatch_backward(p, [&]<class T, BackwardAct kAct>() {
    by_rows(p.shape) ? backward_rows<T, kAct>(p, arena)
                     : backward_channels_first<T, kAct>(p, arena);
  });
}

template <class Acc, class Partial>
size_t workspace_of(const BatchNormActShape& shape) {
  if (shape.c == 0) return 0;
  Arena arena{nullptr};
  if (!by_rows(shape)) {
    const ChannelBlocks cut(shape, 1);  // the size of groups needs no memory
    arena.take_constants<Acc>(cut.c);
    arena.take<Partial>(cut.c * cut.chunks);
  } else {
    const RowChunks cut = row_chunks(shape);
    arena.take_constants<Acc>(cut.width);
    arena.take<double>(cut.chunks * cut.width);
    arena.take<double>(cut.chunks * cut.width);
  }
  return arena.used;
}

template <class Partial>
size_t workspace_bytes(const BatchNormActShape& shape) {
  return shape.dtype == DType::f64 ? workspace_of<double, Partial>(shape)
                                   : workspace_of<float, Partial>(shape);
}

}  // namespace

void add_batch_norm_act(cpu::KernelTable& table) {
  table.batch_norm_act_forward_workspace = [](const BatchNormActForward& p) {
    return workspace_bytes<Moments>(p.shape);
  };
  table.batch_norm_act_backward_workspace = [](const BatchNormActBackward& p) {
    return workspace_bytes<GradientSums>(p.shape);
  };
  table.batch_norm_act_forward = forward;
  table.batch_norm_act_backward = backward;
}

}  // namespace ADVDL_CAPABILITY_NAMESPACE
}  // namespace advdl_ops
