// A set is one run, mostly of a few hundred elements. Its statistics or gradient sums are computed first, then its
// output while it is still in L1. The gradients of weight and bias are sums over the rows, column by column. Rows are
// cut into chunks, each with its own sums: in the precision of the arithmetic for up to kMaxRows rows, then in double.
#include "norm_elementwise_affine.h"

#include "dispatch.h"
#include "norm_runs.h"
#include "norm_sets.h"

namespace advdl_ops {
namespace ADVDL_CAPABILITY_NAMESPACE {
namespace {

using cpu::parallel_ranges;

// The number of chunks of rows. Depends on the shape only.
int64_t chunks_of(const ContiguousSets& cut) {
  const int64_t most = min_of(kMaxChunks, max_of(1, cut.rows / 32));
  return clamp(cut.rows * cut.width() / (8 * kBlock), 1, most);
}

// Forward has no partial sums. If chunks also need no memory (inner == 1), there may be more of them, to balance the
// threads.
int64_t forward_chunks(const ContiguousSets& cut) {
  return cut.inner == 1 ? min_of(cut.rows, 8 * kMaxChunks) : chunks_of(cut);
}

// Neighbouring sets in the rows of one chunk. One thread processes them row by row, in memory order.
struct Span {
  int64_t chunk, first_set, last_set, first_row, last_row;
};

// Calls f(span) on all threads. With fewer chunks than threads, the sets of a chunk are divided too.
template <class F>
void for_spans(const ContiguousSets& cut, int64_t chunks, const F& f) {
  const int64_t work = cut.rows * cut.length / chunks;
  parallel_ranges(chunks * cut.sets, work, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin, last; task < end; task = last) {
      const int64_t chunk = task / cut.sets, first = chunk * cut.sets;
      last = min_of(end, first + cut.sets);
      f(Span{chunk, task - first, last - first, chunk * cut.rows / chunks,
             (chunk + 1) * cut.rows / chunks});
    }
  });
}

// The weight and bias of each element of a row. If a channel has several elements (inner > 1), each chunk has its own
// array, filled by the thread that reads it: a single array, filled by one thread, would move between cores in every
// call. Each set is then followed by padding, because whole vectors are read and the next set may belong to another
// thread.
template <class Acc>
struct ElementAffine {
  int64_t inner, sets, length, set_stride, chunk_stride;
  Acc *weights, *biases;  // [chunks or 1, sets, set_stride]
  ElementAffine(const ContiguousSets& cut, int64_t chunks, Arena& arena)
      : inner(cut.inner),
        sets(cut.sets),
        length(cut.length),
        set_stride(inner == 1 ? length : length + kPad),
        chunk_stride(inner == 1 ? 0 : sets * set_stride) {
    const int64_t count = inner == 1 ? sets * length + kPad : chunks * chunk_stride;
    weights = arena.take<Acc>(count);
    biases = arena.take<Acc>(count);
  }
  // Fills the array that all chunks share, if there is one.
  template <class Params>
  void fill_common(const Params& p) const {
    if (inner == 1) fill(p, 0, 0, sets);
  }
  // The index where the weights of a set begin.
  int64_t at(int64_t chunk, int64_t set) const { return chunk * chunk_stride + set * set_stride; }
  // Fills the weights and biases that the span reads.
  template <class Params>
  void prepare(const Params& p, const Span& span) const {
    if (inner > 1) fill(p, span.chunk, span.first_set, span.last_set);
  }

 private:
  template <class Params>
  void fill(const Params& p, int64_t chunk, int64_t first_set, int64_t last_set) const {
    const DType dtype = p.shape.weight_dtype;
    const int64_t channels = length / inner;
    for (int64_t set = first_set; set < last_set; ++set) {
      const int64_t to = at(chunk, set), c = set * channels;
      fill_channels(p.weight, dtype, c, channels, inner, Acc(1), weights + to);
      fill_channels(p.bias, dtype, c, channels, inner, Acc(0), biases + to);
    }
  }
};

template <class T, ForwardAct kAct, bool kResidual>
void forward(const GroupNormForward& p, const ContiguousSets& cut, Arena arena) {
  using Acc = acc_t<T>;
  const int64_t chunks = forward_chunks(cut);
  const ElementAffine<Acc> affine(cut, chunks, arena);
  affine.fill_common(p);
  const T* x = static_cast<const T*>(p.x);
  const T* residual = static_cast<const T*>(p.residual);
  T* out = static_cast<T*>(p.out);
  const bool stream_out = streams<T>(cut.rows * cut.width(), kStreamBytes);
  const auto do_set = [&](int64_t set, Acc* weight, Acc* bias) {
    const int64_t at = set * cut.length;
    Moments<double> m;
    for (int64_t i = 0; i < cut.length; i += kBlock)
      add_block(x + at + i, min_of(kBlock, cut.length - i), 1, 0, &m);
    Acc rstd = write_statistics<Acc>(p, set, m);
    const Constants<Acc> k{static_cast<Acc*>(p.mean) + set, weight, bias, nullptr, nullptr, &rstd};
    apply_run<T, kAct, AffinePerElement, kResidual>(x + at, residual + (kResidual ? at : 0),
                                                    out + at, cut.length, k, 0, p.act,
                                                    static_cast<Acc>(p.act_param), stream_out);
  };
  for_spans(cut, chunks, [&](const Span& span) {
    affine.prepare(p, span);
    for (int64_t row = span.first_row; row < span.last_row; ++row) {
      for (int64_t set = span.first_set; set < span.last_set; ++set) {
        const int64_t at = affine.at(span.chunk, set);
        do_set(row * cut.sets + set, affine.weights + at, affine.biases + at);
      }
    }
    if (stream_out) stream_fence();
  });
}

// The sums over the rows of each chunk, for each column.
template <class Acc>
struct ColumnSums {
  int64_t width, stride;
  Acc *dz, *dz_xhat;        // [chunks, width + kPad], of up to kMaxRows rows
  double *dbias, *dweight;  // [chunks, width]
  ColumnSums(const ContiguousSets& cut, int64_t chunks, Arena& arena)
      : width(cut.width()),
        stride(width + kPad),
        dz(arena.take<Acc>(chunks * stride)),
        dz_xhat(arena.take<Acc>(chunks * stride)),
        dbias(arena.take<double>(chunks * width)),
        dweight(arena.take<double>(chunks * width)) {}
  // Both: for the columns [column, column + length).
  void clear(int64_t chunk, int64_t column, int64_t length) const {
    std::memset(dbias + chunk * width + column, 0, length * sizeof(double));
    std::memset(dweight + chunk * width + column, 0, length * sizeof(double));
    std::memset(dz + chunk * stride + column, 0, length * sizeof(Acc));
    std::memset(dz_xhat + chunk * stride + column, 0, length * sizeof(Acc));
  }
  void flush(int64_t chunk, int64_t column, int64_t length) const {
    for (int64_t i = column; i < column + length; ++i) {
      dbias[chunk * width + i] += dz[chunk * stride + i];
      dweight[chunk * width + i] += dz_xhat[chunk * stride + i];
      dz[chunk * stride + i] = dz_xhat[chunk * stride + i] = Acc(0);
    }
  }
};

template <class Acc>
struct BackwardMemory {
  ElementAffine<Acc> affine;
  ColumnSums<Acc> columns;
  BackwardMemory(const ContiguousSets& cut, Arena& arena)
      : affine(cut, chunks_of(cut), arena), columns(cut, chunks_of(cut), arena) {}
};

template <class T, BackwardAct kAct>
void backward(const GroupNormBackward& p, const ContiguousSets& cut, Arena arena) {
  using Acc = acc_t<T>;
  using Vec = typename Simd<Acc>::Vec;
  const int64_t chunks = chunks_of(cut);
  const BackwardMemory<Acc> memory(cut, arena);
  const auto& [affine, columns] = memory;
  affine.fill_common(p);
  auto [dout, x, saved, dresidual, dx, kept, stores_dz] = gradient_tensors<T, kAct>(p);
  const bool stream_out = streams_dx<T>(cut.rows * cut.width(), kept, dx);
  const Acc param = static_cast<Acc>(p.act_param);

  const auto do_set = [&](int64_t set, Acc* weights, Acc* biases, Acc* dz_sum, Acc* dz_xhat_sum) {
    const int64_t at = set * cut.length;
    const T* saved_at = saved == nullptr ? nullptr : saved + at;
    Acc slope, offset, rstd = rstd_of(static_cast<const Acc*>(p.var)[set], p.eps);
    const Constants<Acc> k{const_cast<Acc*>(static_cast<const Acc*>(p.mean)) + set,
                           weights,
                           biases,
                           &slope,
                           &offset,
                           &rstd};
    const ChannelValue<Acc, true> weight(weights);
    const Vec rstd_vec = broadcast(rstd);
    GradientSums<double> total;
    for (int64_t begin = 0; begin < cut.length; begin += kBlock) {
      Vec sum[4] = {}, centred_sum[4] = {};
      const Constants<Acc> block{k.mean,  k.scale + begin, k.shift + begin,
                                 nullptr, nullptr,         k.rstd};
      const int64_t from = at + begin;
      for_gradients<T, kAct, AffinePerElement, 4>(
          dout + from, x + from, saved == nullptr ? nullptr : saved + from,
          min_of(kBlock, cut.length - begin), block, 0, p.act, param,
          [&](int64_t i, const auto& lanes, auto index, auto dz, auto centred)
              __attribute__((always_inline)) {
                if (stores_dz != nullptr) lanes.write(stores_dz + from + i, dz);
                const Vec counted = lanes.counted(dz), product = lanes.counted(dz * centred);
                Acc* down = dz_sum + begin + i;
                Acc* down_xhat = dz_xhat_sum + begin + i;
                // Not past the end of the set: the next sums may belong to another thread.
                lanes.write(down, lanes.read(down) + counted);
                lanes.write(down_xhat, lanes.read(down_xhat) + product * rstd_vec);
                // Past the end of the set are other weights, or padding with any content.
                const Vec weights = lanes.counted(weight.at(begin + i));
                sum[index.value] += counted * weights;
                centred_sum[index.value] += product * weights;
              });
      total.dz += lane_sum((sum[0] + sum[1]) + (sum[2] + sum[3]));
      total.dz_x += lane_sum((centred_sum[0] + centred_sum[1]) + (centred_sum[2] + centred_sum[3]));
    }
    if (dx == nullptr) return;
    finish_gradients(total, static_cast<double>(cut.length), rstd, &slope, &offset);
    if (kept != nullptr) {
      gradient_run<T, BackwardAct::kept, AffinePerElement>(
          kept + at, x + at, nullptr, dx + at, cut.length, k, 0, p.act, param, stream_out);
    } else {
      gradient_run<T, kAct, AffinePerElement>(dout + at, x + at, saved_at, dx + at, cut.length, k,
                                              0, p.act, param, stream_out);
    }
  };

  for_spans(cut, chunks, [&](const Span& span) {
    const int64_t column = span.first_set * cut.length;
    const int64_t width = span.last_set * cut.length - column;
    affine.prepare(p, span);
    columns.clear(span.chunk, column, width);
    for (int64_t row = span.first_row; row < span.last_row; ++row) {
      for (int64_t set = span.first_set; set < span.last_set; ++set) {
        const int64_t at = affine.at(span.chunk, set);
        const int64_t sums_at = span.chunk * columns.stride + set * cut.length;
        do_set(row * cut.sets + set, affine.weights + at, affine.biases + at, columns.dz + sums_at,
               columns.dz_xhat + sums_at);
      }
      if ((row - span.first_row) % kMaxRows == kMaxRows - 1)
        columns.flush(span.chunk, column, width);
    }
    columns.flush(span.chunk, column, width);
    if (stream_out) stream_fence();
  });
  if (p.dweight != nullptr) sum_parts<Acc>(p, columns.dbias, columns.dweight, chunks, cut.inner);
}

}  // namespace

void elementwise_affine_forward(const GroupNormForward& p, const ContiguousSets& cut, Arena arena) {
  dispatch_forward(p, [&]<class T, ForwardAct kAct, bool kResidual>() {
    forward<T, kAct, kResidual>(p, cut, arena);
  });
}

void elementwise_affine_backward(const GroupNormBackward& p, const ContiguousSets& cut,
                                 Arena arena) {
  dispatch_backward(p, [&]<class T, BackwardAct kAct>() { backward<T, kAct>(p, cut, arena); });
}

template <class Acc>
void take_elementwise_affine(const ContiguousSets& cut, bool backward, Arena& arena) {
  if (backward)
    BackwardMemory<Acc>(cut, arena);
  else
    ElementAffine<Acc>(cut, forward_chunks(cut), arena);
}
template void take_elementwise_affine<float>(const ContiguousSets&, bool, Arena&);
template void take_elementwise_affine<double>(const ContiguousSets&, bool, Arena&);

}  // namespace ADVDL_CAPABILITY_NAMESPACE
}  // namespace advdl_ops
