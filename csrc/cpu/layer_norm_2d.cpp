// Layer norm over the channels of each position, residual addition and activation on the CPU. ../common/group_norm.h
// has the formulas.
//
// channels_last: a position is a contiguous run (norm_elementwise_affine.cpp). channels_first: neighbouring positions
// form a tile of C rows, each of up to kMaxTileWidth elements, S apart. The moments and gradient sums of the positions
// are taken over the tile's columns, the gradients of weight and bias over its rows. A tile is small enough to be still
// in L2 at its second pass.
#include "../common/group_norm.h"

#include "dispatch.h"
#include "norm_columns.h"
#include "norm_elementwise_affine.h"
#include "norm_sets.h"

namespace advdl_ops {
namespace ADVDL_CAPABILITY_NAMESPACE {
namespace {

using cpu::parallel_ranges;

constexpr int64_t kTileBytes = 256 << 10;  // of x; backward reads two or three tensors of that size
constexpr int64_t kMinTileWidth = 128, kMaxTileWidth = 512;

// How positions are cut into tiles, and tiles into chunks with partial sums of dweight and dbias. Depends on the shape
// only.
struct Tiles {
  int64_t c, s, width, per_sample, count, chunks;
  explicit Tiles(const GroupNormShape& shape, int64_t element_bytes) : c(shape.c), s(shape.s) {
    const int64_t wanted = kTileBytes / max_of(1, c * element_bytes) / 64 * 64;
    width = min_of(clamp(wanted, kMinTileWidth, kMaxTileWidth), s);
    per_sample = ceil_div(s, width);
    count = shape.n * per_sample;
    chunks = min_of(count, kMaxChunks);
  }
  int64_t first_of(int64_t chunk) const { return chunk * count / chunks; }
  // Calls f(offset of the tile's first element, offset of its first position's statistics, its width).
  template <class F>
  void with_tile(int64_t tile, const F& f) const {
    const int64_t n = tile / per_sample, begin = tile % per_sample * width;
    f(n * c * s + begin, n * s + begin, min_of(width, s - begin));
  }
};

// The statistics of a tile's positions, one for each column.
template <class Acc>
struct TileStatistics {
  alignas(64) Acc mean[kMaxTileWidth + kPad], rstd[kMaxTileWidth + kPad];
  template <class Params>
  void read(const Params& p, int64_t position, int64_t width) {
    for (int64_t i = 0; i < width; ++i) {
      mean[i] = static_cast<const Acc*>(p.mean)[position + i];
      rstd[i] = rstd_of(static_cast<const Acc*>(p.var)[position + i], p.eps);
    }
  }
};

template <class T, ForwardAct kAct, bool kResidual>
void forward_channels_first(const GroupNormForward& p, Arena arena) {
  using Acc = acc_t<T>;
  const Tiles cut(p.shape, sizeof(T));
  const Affine<Acc> affine(p.shape.c, arena);
  affine.fill(p);
  const T* x = static_cast<const T*>(p.x);
  const T* residual = static_cast<const T*>(p.residual);
  T* out = static_cast<T*>(p.out);
  const bool stream_out = streams<T>(p.shape.n * cut.c * cut.s, kStreamBytes);
  parallel_ranges(cut.count, cut.width * cut.c, [&](int64_t begin, int64_t end) {
    TileStatistics<Acc> statistics;
    double mean[kMaxTileWidth], m2[kMaxTileWidth];
    for (int64_t tile = begin; tile < end; ++tile) {
      cut.with_tile(tile, [&](int64_t offset, int64_t position, int64_t width) {
        column_moments(x + offset, cut.s, cut.c, width, mean, m2);
        for (int64_t i = 0; i < width; ++i)
          write_statistics<Acc>(p, position + i, {static_cast<double>(cut.c), mean[i], m2[i]});
        statistics.read(p, position, width);
        for (int64_t c = cut.c - 1; c >= 0; --c) {
          const Constants<Acc> k{statistics.mean, affine.weight + c, affine.bias + c,
                                 nullptr,         nullptr,           statistics.rstd};
          const int64_t at = offset + c * cut.s;
          apply_run<T, kAct, StatisticsPerElement, kResidual>(
              x + at, residual + (kResidual ? at : 0), out + at, width, k, 0, p.act,
              static_cast<Acc>(p.act_param), stream_out);
        }
      });
    }
    if (stream_out) stream_fence();
  });
}

template <class Acc>
struct TilesBackwardMemory {
  Affine<Acc> affine;
  double *dbias, *dweight;  // [chunks, C]
  TilesBackwardMemory(const Tiles& cut, Arena& arena)
      : affine(cut.c, arena),
        dbias(arena.take<double>(cut.chunks * cut.c)),
        dweight(arena.take<double>(cut.chunks * cut.c)) {}
};

template <class T, BackwardAct kAct>
void backward_channels_first(const GroupNormBackward& p, Arena arena) {
  using Acc = acc_t<T>;
  using Vec = typename Simd<Acc>::Vec;
  const Tiles cut(p.shape, sizeof(T));
  const TilesBackwardMemory<Acc> memory(cut, arena);
  const auto& [affine, dbias, dweight] = memory;
  affine.fill(p);
  auto [dout, x, saved, dresidual, dx, kept, stores_dz] = gradient_tensors<T, kAct>(p);
  const bool stream_out = streams_dx<T>(p.shape.n * cut.c * cut.s, kept, dx);
  const Acc param = static_cast<Acc>(p.act_param);

  const auto do_tile = [&](int64_t offset, int64_t position, int64_t width, int64_t chunk) {
    TileStatistics<Acc> statistics;
    alignas(64) Acc slope[kMaxTileWidth + kPad], offsets[kMaxTileWidth + kPad];
    alignas(64) Acc sum[kMaxTileWidth + kPad] = {}, centred_sum[kMaxTileWidth + kPad] = {};
    GradientSums<double> total[kMaxTileWidth];
    statistics.read(p, position, width);
    const auto constants = [&](int64_t c) {
      return Constants<Acc>{statistics.mean, affine.weight + c, affine.bias + c,
                            slope,           offsets,           statistics.rstd};
    };
    const ChannelValue<Acc, true> rstd(statistics.rstd);
    for (int64_t c = 0; c < cut.c; ++c) {
      const int64_t at = offset + c * cut.s;
      const Vec weight = broadcast(affine.weight[c]);
      Vec dz_sum[4] = {}, dz_xhat_sum[4] = {};
      for_gradients<T, kAct, StatisticsPerElement, 4>(
          dout + at, x + at, saved == nullptr ? nullptr : saved + at, width, constants(c), 0, p.act,
          param,
          [&](int64_t i, const auto& lanes, auto index, auto dz, auto centred)
              __attribute__((always_inline)) {
                if (stores_dz != nullptr) lanes.write(stores_dz + at + i, dz);
                const Vec counted = lanes.counted(dz), product = lanes.counted(dz * centred);
                store(sum + i, load(sum + i) + weight * counted);
                store(centred_sum + i, load(centred_sum + i) + weight * product);
                dz_sum[index.value] += counted;
                dz_xhat_sum[index.value] += product * lanes.counted(rstd.at(i));
              });
      dbias[chunk * cut.c + c] += lane_sum((dz_sum[0] + dz_sum[1]) + (dz_sum[2] + dz_sum[3]));
      dweight[chunk * cut.c + c] +=
          lane_sum((dz_xhat_sum[0] + dz_xhat_sum[1]) + (dz_xhat_sum[2] + dz_xhat_sum[3]));
      if (c % kMaxRows != kMaxRows - 1 && c != cut.c - 1) continue;
      for (int64_t i = 0; i < width; ++i) {
        total[i].dz += sum[i];
        total[i].dz_x += centred_sum[i];
        sum[i] = centred_sum[i] = Acc(0);
      }
    }
    if (dx == nullptr) return;
    for (int64_t i = 0; i < width; ++i)
      finish_gradients(total[i], static_cast<double>(cut.c), statistics.rstd[i], slope + i,
                       offsets + i);
    for (int64_t c = cut.c - 1; c >= 0; --c) {
      const int64_t at = offset + c * cut.s;
      if (kept != nullptr) {
        gradient_run<T, BackwardAct::kept, StatisticsPerElement>(
            kept + at, x + at, nullptr, dx + at, width, constants(c), 0, p.act, param, stream_out);
      } else {
        gradient_run<T, kAct, StatisticsPerElement>(
            dout + at, x + at, saved == nullptr ? nullptr : saved + at, dx + at, width,
            constants(c), 0, p.act, param, stream_out);
      }
    }
  };

  parallel_ranges(cut.chunks, cut.count * cut.width * cut.c / cut.chunks,
                  [&](int64_t begin, int64_t end) {
                    for (int64_t chunk = begin; chunk < end; ++chunk) {
                      std::memset(dbias + chunk * cut.c, 0, cut.c * sizeof(double));
                      std::memset(dweight + chunk * cut.c, 0, cut.c * sizeof(double));
                      for (int64_t t = cut.first_of(chunk); t < cut.first_of(chunk + 1); ++t) {
                        cut.with_tile(t, [&](int64_t offset, int64_t position, int64_t width) {
                          do_tile(offset, position, width, chunk);
                        });
                      }
                    }
                    if (stream_out) stream_fence();
                  });
  if (p.dweight != nullptr) sum_parts<Acc>(p, dbias, dweight, cut.chunks, 1);
}

// With a single position, its channels are contiguous in either layout.
bool positions_are_runs(const GroupNormShape& shape) {
  return shape.layout == Layout::channels_last || shape.s == 1;
}

ContiguousSets position_sets(const GroupNormShape& shape) {
  return {shape.n * shape.s, 1, shape.c, 1};
}

void forward(const GroupNormForward& p, void* workspace) {
  if (p.shape.is_empty()) return;
  const Arena arena(workspace);
  if (positions_are_runs(p.shape))
    return elementwise_affine_forward(p, position_sets(p.shape), arena);
  dispatch_forward(p, [&]<class T, ForwardAct kAct, bool kResidual>() {
    forward_channels_first<T, kAct, kResidual>(p, arena);
  });
}

void backward(const GroupNormBackward& p, void* workspace) {
  if (p.shape.is_empty()) return zero_parameter_gradients(p);
  const Arena arena(workspace);
  if (positions_are_runs(p.shape))
    return elementwise_affine_backward(p, position_sets(p.shape), arena);
  dispatch_backward(
      p, [&]<class T, BackwardAct kAct>() { backward_channels_first<T, kAct>(p, arena); });
}

size_t workspace_bytes(const GroupNormShape& shape, bool backward) {
  if (shape.is_empty()) return 0;
  return bytes_taken([&](Arena& arena) {
    with_type(shape.dtype, [&]<class T>() {
      using Acc = acc_t<T>;
      if (positions_are_runs(shape))
        take_elementwise_affine<Acc>(position_sets(shape), backward, arena);
      else if (backward)
        TilesBackwardMemory<Acc>(Tiles(shape, sizeof(T)), arena);
      else
        Affine<Acc>(shape.c, arena);
    });
  });
}

}  // namespace

void add_layer_norm_2d(cpu::KernelTable& table) {
  table.layer_norm_2d = {[](const GroupNormForward& p) { return workspace_bytes(p.shape, false); },
                         [](const GroupNormBackward& p) { return workspace_bytes(p.shape, true); },
                         forward, backward};
}

}  // namespace ADVDL_CAPABILITY_NAMESPACE
}  // namespace advdl_ops
