// The gradient of the weight of a convolution by a 3x3 filter with stride 1 by Winograd's minimal filtering.
//
// By the tiles of the forward, transposed: dweight = G^T [sum over tiles of (B^T d B) * (A dz A^T)] G. At each point
// the sum over tiles is a matrix product: rows are output channels, the depth is tiles, columns are input channels.
#include "dispatch.h"
#include "winograd_conv2d_images.h"

namespace advdl_ops {
namespace ADVDL_CAPABILITY_NAMESPACE {
namespace {

// How it is divided among threads, and its memory. There are two ways:
// - by ranges of tiles, for sums that fit in a cache: a thread transforms blocks of a range and adds their products to
//   the sums of the range. The ranges depend on the shape alone;
// - by panels of input channels: the threads transform many tiles together, and each adds the products of its points
//   and panels.
template <class T>
struct WeightSpace {
  static constexpr int64_t kBlockTiles = 48;  // of a range
  static constexpr int64_t kRangeTiles = 96, kMostRanges = 16;
  static constexpr int64_t kSmallSums = 3 << 19, kStaged = 12 << 20;  // bytes
  Grid<T> grid;
  int64_t tiles, panels;
  bool by_ranges;
  int64_t ranges, slots;
  int64_t most;        // tiles that V and Z hold
  int64_t of_v, of_z;  // elements of a point
  int64_t v_size,
      slot_size;  // V [points][panels][most][panel], and Z [points][vectors][most][lanes]
  int64_t of_sums, sums_size;  // [ranges][points][panels][C_out][panel]

  explicit WeightSpace(const WinogradConv2dBackward& p)
      : grid(p.shape), tiles(grid.tiles()), panels(ceil_div(p.shape.c_in, kPanel<float>)) {
    const int64_t in = panels * kPanel<float>, out = round_up(p.shape.c_out, kLanes);
    of_sums = round_up(p.shape.c_out, kTileRows) * kPanel<float>;
    sums_size = T::points * panels * of_sums;
    const int64_t bytes = sums_size * int64_t{4};
    ranges = max_of(1, min_of(tiles / kRangeTiles, min_of(kMostRanges, kStaged / bytes)));
    by_ranges = bytes <= kSmallSums && ranges > 1;
    if (!by_ranges) ranges = 1;
    slots = by_ranges ? min_of(max_of(1, p.threads), ranges) : 1;
    const int64_t of_tile = T::points * (in + out) * int64_t{4};
    most =
        by_ranges ? kBlockTiles : max_of(kPart, min_of(tiles, kStaged / of_tile) / kPart * kPart);
    of_v = most * in + kLineFloats;  // no power of two
    of_z = most * out + kLineFloats;
    v_size = T::points * of_v;
    slot_size = v_size + T::points * of_z;
  }
  size_t bytes() const {
    return grid.bytes() + (ranges * sums_size + slots * slot_size) * sizeof(float);
  }
};

// One group of channels.
template <class T>
class Backward {
 public:
  // memory: of `space`, whose grid is filled
  Backward(const WinogradConv2dBackward& p, const WeightSpace<T>& space, int64_t group,
           void* memory)
      : s_(p.shape),
        space_(space),
        x_(s_, p.x, s_.h.in, s_.w.in, s_.c_in, group),
        dz_(s_, p.dz, s_.h.out, s_.w.out, s_.c_out, group),
        is_last_(p.weight_layout == Layout::channels_last),
        dweight_(p.dweight + group * s_.c_out * s_.c_in * kTaps),
        sums_(reinterpret_cast<float*>(static_cast<char*>(memory) + space_.grid.bytes())) {}

  void run() {
    if (space_.by_ranges)
      by_ranges();
    else
      by_panels();
    finish();
  }

 private:
  float* slot(int64_t index) const {
    return sums_ + space_.ranges * space_.sums_size + index * space_.slot_size;
  }

  // Tiles [begin, end) of those that V and Z hold, which are `first` and the following ones.
  void transform(int64_t first, int64_t begin, int64_t end, float* v) const {
    constexpr int64_t panel = kPanel<float>;
    transform_inputs<T>(space_.grid, x_, first, begin, end,
                        Transformed<panel>{v, space_.of_v, panel, space_.most * panel});
    transform_gradients<T>(
        space_.grid, dz_, first, begin, end,
        Transformed<kLanes>{v + space_.v_size, space_.of_z, kLanes, space_.most * kLanes});
  }

  // sums[C_out][panel] (+)= the products of `count` tiles at one point, for one panel.
  void multiply(const float* v, int64_t count, int64_t point, int64_t panel, float* sums,
                bool adds) const {
    const float* columns = v + point * space_.of_v + panel * space_.most * kPanel<float>;
    const float* z = v + space_.v_size + point * space_.of_z;
    sums += (point * space_.panels + panel) * space_.of_sums;
    for (int64_t t = 0; t < count; t += kChunk) {
      for (int64_t o = 0; o < s_.c_out; o += kTileRows) {
        const int64_t rows = min_of(kTileRows, s_.c_out - o);
        const float* row[kTileRows];
        for (int64_t i = 0; i < rows; ++i)
          row[i] = z + ((o + i) / kLanes * space_.most + t) * kLanes + (o + i) % kLanes;
        multiply_in_parts<kPart>(rows, row, kLanes, columns + t * kPanel<float>, kPanel<float>,
                                 min_of(kChunk, count - t), sums + o * kPanel<float>, kPanel<float>,
                                 adds || t > 0);
      }
    }
  }

  void by_ranges() const {
    in_slots(space_.slots, [&](int64_t index) {
      float* v = slot(index);
      for (int64_t r = index * space_.ranges / space_.slots;
           r < (index + 1) * space_.ranges / space_.slots; ++r) {
        const int64_t begin = r * space_.tiles / space_.ranges;
        const int64_t after = (r + 1) * space_.tiles / space_.ranges;
        for (int64_t first = begin; first < after; first += space_.most) {
          const int64_t count = min_of(space_.most, after - first);
          transform(first, 0, count, v);
          for (int64_t point = 0; point < T::points; ++point) {
            for (int64_t panel = 0; panel < space_.panels; ++panel)
              multiply(v, count, point, panel, sums_ + r * space_.sums_size, first > begin);
          }
        }
      }
    });
  }

  void by_panels() const {
    float* v = slot(0);
    for (int64_t first = 0; first < space_.tiles; first += space_.most) {
      const int64_t count = min_of(space_.most, space_.tiles - first);
      cpu::parallel_ranges(count, T::points * (s_.c_in + s_.c_out) * 4,
                           [&](int64_t begin, int64_t end) { transform(first, begin, end, v); });
      cpu::parallel_ranges(T::points * space_.panels, s_.c_out * kPanel<float> * count / 16,
                           [&](int64_t begin, int64_t end) {
                             for (; begin < end; ++begin)
                               multiply(v, count, begin / space_.panels, begin % space_.panels,
                                        sums_, first > 0);
                           });
    }
  }

  // The taps of `count` input channels from c on, directly, as the forward does where its sums are not finite.
  __attribute__((noinline)) void compute_directly(int64_t o, int64_t c, int64_t count,
                                                  Vec* g) const {
    for (int64_t t = 0; t < kTaps; ++t) {
      alignas(64) float sums[kLanes] = {};
      for (int64_t lane = 0; lane < count; ++lane) {
        double sum = 0;
        for (int64_t row = 0; row < s_.n * s_.h.out && sum == sum; ++row) {
          const int64_t n = row / s_.h.out, i = row % s_.h.out;
          const int64_t y = i + t / 3 * s_.h.dilation - s_.h.padding;
          for (int64_t j = 0; j < s_.w.out && sum == sum; ++j) {
            const int64_t x = j + t % 3 * s_.w.dilation - s_.w.padding;
            if (x_.has(y, x))
              sum += double(element(x_.dtype, x_.data, x_.at(n, y, x, c + lane))) *
                     element(dz_.dtype, dz_.data, dz_.at(n, i, j, o));
          }
        }
        sums[lane] = static_cast<float>(sum);
      }
      g[t] = load(sums);
    }
  }

  // dweight of the sums.
  void finish() const {
    cpu::parallel_ranges(s_.c_out, s_.c_in * T::points * 2, [&](int64_t begin, int64_t end) {
      for (int64_t o = begin; o < end; ++o) {
        float* to = dweight_ + o * s_.c_in * kTaps;
        for_vectors<float, 1, false>(s_.c_in, [&](int64_t c, auto part, auto) {
          const float* from =
              sums_ + c / kPanel<float> * space_.of_sums + o * kPanel<float> + c % kPanel<float>;
          Vec m[T::points], g[kTaps];
          for (int q = 0; q < T::points; ++q) {
            const float* of_point = from + q * space_.panels * space_.of_sums;
            m[q] = load(of_point);
            for (int64_t r = 1; r < space_.ranges; ++r)
              m[q] += load(of_point + r * space_.sums_size);
          }
          T::filters(m, g);
          if (!is_finite(g)) compute_directly(o, c, part.count(kLanes), g);
          if (is_last_) {
            for (int t = 0; t < kTaps; ++t) part.write(to + t * s_.c_in + c, g[t]);
          } else {
            alignas(64) float taps[kTaps][kLanes];
            for (int t = 0; t < kTaps; ++t) store(taps[t], g[t]);
            for (int64_t lane = 0; lane < part.count(kLanes); ++lane) {
              for (int t = 0; t < kTaps; ++t) to[(c + lane) * kTaps + t] = taps[t][lane];
            }
          }
        });
      }
    });
  }

  const WinogradConv2dShape& s_;
  const WeightSpace<T>& space_;
  const Images x_, dz_;
  const bool is_last_;
  float* const dweight_;
  float* const sums_;
};

void run_backward(const WinogradConv2dBackward& p, void* workspace) {
  if (p.shape.n == 0) {
    const int64_t count = p.shape.groups * p.shape.c_out * p.shape.c_in * kTaps;
    for (int64_t i = 0; i < count; ++i) p.dweight[i] = 0;
    return;
  }
  with_tile(p.shape.tile, [&](auto tile) {
    WeightSpace<decltype(tile)> space(p);
    space.grid.fill(workspace);
    for (int64_t group = 0; group < p.shape.groups; ++group)
      Backward<decltype(tile)>(p, space, group, workspace).run();
  });
}
size_t backward_workspace(const WinogradConv2dBackward& p) {
  if (p.shape.n == 0) return 0;
  return with_tile(p.shape.tile, [&](auto tile) { return WeightSpace<decltype(tile)>(p).bytes(); });
}

}  // namespace

void add_winograd_conv2d_backward(cpu::KernelTable& table) {
  table.winograd_conv2d.backward_workspace = backward_workspace;
  table.winograd_conv2d.backward = run_backward;
}

}  // namespace ADVDL_CAPABILITY_NAMESPACE
}  // namespace advdl_ops
