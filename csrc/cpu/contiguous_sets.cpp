// A set is one run, mostly of a few hundred elements: its statistics or gradient sums, and then its output, while it lies in
// L1. The gradients of weight and bias are sums down the columns of the rows: rows are cut into chunks, each with sums of its
// own, in the precision of the arithmetic for kMaxRows rows and in double beyond.
#include "contiguous_sets.h"

#include "parallel.h"

namespace advdl_ops {
namespace ADVDL_CAPABILITY_NAMESPACE {
namespace {

using cpu::parallel_ranges;

template <class T, ForwardAct kAct, bool kResidual>
void forward(const GroupNormForward& p, const ContiguousSets& cut, Arena arena) {
  using Acc = acc_t<T>;
  const Affine<Acc> affine(p, cut.inner, arena);
  const T* x = static_cast<const T*>(p.x);
  const T* residual = static_cast<const T*>(p.residual);
  T* out = static_cast<T*>(p.out);
  const int64_t sets = cut.rows * cut.sets;
  const bool stream_out = streams<T>(sets * cut.length, kStreamBytes);
  parallel_ranges(sets, cut.length, [&](int64_t begin, int64_t end) {
    for (int64_t set = begin; set < end; ++set) {
      const int64_t at = set * cut.length, column = set % cut.sets * cut.length;
      Moments m;
      for (int64_t i = 0; i < cut.length; i += kBlock)
        add_block(x + at + i, min_of(kBlock, cut.length - i), 1, 0, &m);
      Acc rstd = write_statistics<Acc>(p, set, m);
      const Constants<Acc> k{static_cast<Acc*>(p.mean) + set,
                             affine.weight + column,
                             affine.bias + column,
                             nullptr,
                             nullptr,
                             &rstd};
      apply_run<T, kAct, AffinePerElement, kResidual>(x + at, residual + (kResidual ? at : 0),
                                                      out + at, cut.length, k, 0, p.act,
                                                      static_cast<Acc>(p.act_param), stream_out);
    }
    if (stream_out) stream_fence();
  });
}

// Rows are cut into chunks by the shape alone.
int64_t chunks_of(const ContiguousSets& cut) {
  const int64_t most = min_of(kMaxChunks, max_of(1, cut.rows / 32));
  return clamp(cut.rows * cut.width() / (8 * kBlock), 1, most);
}

// Sums down the columns of one chunk, [width + kPad] each.
template <class Acc>
struct ColumnSums {
  int64_t chunks, width, stride;
  Acc *dz, *dz_xhat;        // of up to kMaxRows rows
  double *dbias, *dweight;  // [chunks, width]
  ColumnSums(const ContiguousSets& cut, Arena& arena)
      : chunks(chunks_of(cut)),
        width(cut.width()),
        stride(width + kPad),
        dz(arena.take<Acc>(chunks * stride)),
        dz_xhat(arena.take<Acc>(chunks * stride)),
        dbias(arena.take<double>(chunks * width)),
        dweight(arena.take<double>(chunks * width)) {}
  // Of the columns [column, column + length).
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

template <class T, BackwardAct kAct>
void backward(const GroupNormBackward& p, const ContiguousSets& cut, Arena arena) {
  using Acc = acc_t<T>;
  using Vec = typename Simd<Acc>::Vec;
  const Affine<Acc> affine(p, cut.inner, arena);
  const ColumnSums<Acc> columns(cut, arena);
  const T* dout = static_cast<const T*>(p.dout);
  const T* x = static_cast<const T*>(p.x);
  const T* saved = static_cast<const T*>(p.saved);
  T* dresidual = static_cast<T*>(p.dresidual);
  T* dx = static_cast<T*>(p.dx);
  T* kept = kept_dz<T, kAct>(p);
  T* stores_dz = kept != nullptr ? kept : dresidual;
  const bool stream_out = streams<T>(cut.rows * cut.width(), kStreamBytes);
  const Acc param = static_cast<Acc>(p.act_param);

  const auto set_gradient = [&](int64_t set, int64_t column, Acc* dz_sum, Acc* dz_xhat_sum) {
    const int64_t at = set * cut.length;
    const T* saved_at = saved == nullptr ? nullptr : saved + at;
    Acc slope, offset, rstd = rstd_of(static_cast<const Acc*>(p.var)[set], p.eps);
    const Constants<Acc> k{const_cast<Acc*>(static_cast<const Acc*>(p.mean)) + set,
                           affine.weight + column,
                           affine.bias + column,
                           &slope,
                           &offset,
                           &rstd};
    const ChannelValue<Acc, true> weight(affine.weight + column);
    const Vec rstd_vec = broadcast(rstd);
    SetSums total;
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
                // Not beyond the set: its neighbour's sums may be another thread's.
                lanes.write(down, lanes.read(down) + counted);
                lanes.write(down_xhat, lanes.read(down_xhat) + product * rstd_vec);
                // Past the set lie its neighbour's weights, whatever they are, or nothing.
                const Vec weights = lanes.counted(weight.at(begin + i));
                sum[index.value] += counted * weights;
                centred_sum[index.value] += product * weights;
              });
      total.dz += lane_sum((sum[0] + sum[1]) + (sum[2] + sum[3]));
      total.dz_centred +=
          lane_sum((centred_sum[0] + centred_sum[1]) + (centred_sum[2] + centred_sum[3]));
    }
    if (dx == nullptr) return;
    total.finish(static_cast<double>(cut.length), rstd, &slope, &offset);
    if (kept != nullptr) {
      gradient_run<T, BackwardAct::kept, AffinePerElement>(
          kept + at, x + at, nullptr, dx + at, cut.length, k, 0, p.act, param, true, stream_out);
    } else {
      gradient_run<T, kAct, AffinePerElement>(dout + at, x + at, saved_at, dx + at, cut.length, k,
                                              0, p.act, param, true, stream_out);
    }
  };

  // The columns of different sets are apart: chunks of one set each, where there are few rows.
  const int64_t tasks = columns.chunks * cut.sets;
  parallel_ranges(tasks, cut.rows * cut.length / columns.chunks, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t chunk = task / cut.sets, column = task % cut.sets * cut.length;
      columns.clear(chunk, column, cut.length);
      const int64_t first = chunk * cut.rows / columns.chunks;
      const int64_t last = (chunk + 1) * cut.rows / columns.chunks;
      for (int64_t row = first; row < last; ++row) {
        set_gradient(row * cut.sets + task % cut.sets, column,
                     columns.dz + chunk * columns.stride + column,
                     columns.dz_xhat + chunk * columns.stride + column);
        if ((row - first) % kMaxRows == kMaxRows - 1) columns.flush(chunk, column, cut.length);
      }
      columns.flush(chunk, column, cut.length);
    }
    if (stream_out) stream_fence();
  });
  if (p.dweight != nullptr)
    sum_parts<Acc>(p, columns.dbias, columns.dweight, columns.chunks, cut.inner);
}

}  // namespace

void contiguous_sets_forward(const GroupNormForward& p, const ContiguousSets& cut, Arena arena) {
  dispatch_forward(p, [&]<class T, ForwardAct kAct, bool kResidual>() {
    forward<T, kAct, kResidual>(p, cut, arena);
  });
}

void contiguous_sets_backward(const GroupNormBackward& p, const ContiguousSets& cut, Arena arena) {
  dispatch_backward(p, [&]<class T, BackwardAct kAct>() { backward<T, kAct>(p, cut, arena); });
}

template <class Acc>
static void count_workspace(const GroupNormShape& shape, const ContiguousSets& cut, bool backward,
                            Arena& arena) {
  Affine<Acc>(shape, cut.inner, arena);
  if (backward) ColumnSums<Acc>(cut, arena);
}

void contiguous_sets_workspace(const GroupNormShape& shape, const ContiguousSets& cut,
                               bool backward, Arena& arena) {
  shape.dtype == DType::f64 ? count_workspace<double>(shape, cut, backward, arena)
                            : count_workspace<float>(shape, cut, backward, arena);
}

}  // namespace ADVDL_CAPABILITY_NAMESPACE
}  // namespace advdl_ops
