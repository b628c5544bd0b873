// Convolution by a 3x3 filter with stride 1 by Winograd's minimal filtering: forward, and the gradient of the input,
// which is the same by the turned weight.
//
// The products of all channels at one point are a matrix product: rows are tiles, the depth is C_in, columns are C_out.
// A block of tiles is transformed (into V), multiplied (into `products`) panel by panel and transformed back, with V
// and the products in the second-level cache.
#include "dispatch.h"
#include "winograd_conv2d_images.h"

namespace advdl_ops {
namespace ADVDL_CAPABILITY_NAMESPACE {
namespace {

// Tiles of a block, a multiple of kTileRows.
template <class T>
inline constexpr int64_t kBlock = T::points > 24 ? 24 : 36;

// How a forward is divided among threads, and its memory. There are two ways:
// - by tiles: a thread transforms a block of tiles, multiplies it with all panels of the weight and transforms the
//   outputs;
// - by panels, for few tiles or a weight larger than the caches: the threads transform many tiles together. Then each
//   takes panels of the weight for itself, packs them chunk by chunk if they are not kept, and multiplies all tiles
//   with them.
// Each thread has a slot of memory. The sums do not depend on any of this.
template <class T>
struct ForwardSpace {
  static constexpr int64_t kManyTiles = 128;  // of the second way
  static constexpr int64_t of_packed_chunk =
      (kChunk + 1) * kPanel<float>;                 // elements of a point, no power of two
  static constexpr int64_t kLargeWeight = 4 << 20;  // bytes
  Grid<T> grid;
  int64_t tiles, panels;
  int64_t together;  // tiles that are finished together: the stage of a dilated row holds it whole
  bool by_panels, packs;
  int64_t stride, of_chunk, of_v;  // elements from one tile, chunk and point of V to the next
  int64_t most;                    // tiles that V holds
  int64_t splits;                  // parts of the tiles of V that are different units of work
  int64_t slots;
  int64_t v_size, of_products, products_size, packed_size, slot_size;  // elements

  explicit ForwardSpace(const WinogradConv2dForward& p)
      : grid(p.shape),
        tiles(grid.tiles()),
        panels(ceil_div(p.shape.c_out, kPanel<float>)),
        together(p.shape.layout != Layout::channels_last && grid.stages_rows() ? grid.columns.count
                                                                               : kTileRows),
        packs(p.packed == nullptr),
        stride(min_of(kChunk, round_up(p.shape.c_in, kLanes))) {
    const int64_t threads = max_of(1, p.threads), all_packed = packed_size_of<T>(p.shape);
    by_panels = all_packed * int64_t{4} > kLargeWeight || tiles < 2 * threads * kBlock<T>;
    most = by_panels ? round_up(min_of(tiles, kManyTiles), together)
                     : max_of(1, (kBlock<T> + together / 2) / together) * together;
    splits = by_panels
                 ? max_of(1, min_of(threads / common_divisor(threads, panels), most / together))
                 : 1;
    slots = min_of(threads, by_panels ? panels * splits : ceil_div(tiles, most));
    of_chunk = most * stride;
    of_v = ceil_div(p.shape.c_in, kChunk) * of_chunk + kChunk;  // no power of two
    v_size = T::points * of_v;
    of_products = most * kPanel<float>;
    products_size = T::points * of_products;
    packed_size = !packs ? 0 : by_panels ? T::points * of_packed_chunk : all_packed;
    slot_size = products_size + (by_panels ? packed_size : v_size);
  }
  // What all threads share comes first: V, or the packed weight.
  int64_t shared_size() const { return by_panels ? v_size : packed_size; }
  size_t bytes() const {
    return grid.bytes() + (shared_size() + slots * slot_size) * sizeof(float);
  }

  static int64_t common_divisor(int64_t a, int64_t b) {
    while (b != 0) {
      const int64_t rest = a % b;
      a = b;
      b = rest;
    }
    return max_of(1, a);
  }
};

// One group of channels.
template <class T>
class Forward {
 public:
  // memory: of `space`, whose grid is filled
  Forward(const WinogradConv2dForward& p, const ForwardSpace<T>& space, int64_t group, void* memory)
      : p_(p),
        s_(p.shape),
        space_(space),
        x_(s_, p.x, s_.h.in, s_.w.in, s_.c_in, group),
        out_(s_, p.out, s_.h.out, s_.w.out, s_.c_out, group),
        residual_(s_, p.residual, s_.h.out, s_.w.out, s_.c_out, group),
        weight_(of_group(s_, p.weight, group)),
        packed_(p.packed == nullptr ? nullptr : p.packed + group * packed_size_of<T>(s_)),
        scale_(p.scale == nullptr ? nullptr : p.scale + group * s_.c_out),
        shift_(p.shift == nullptr ? nullptr : p.shift + group * s_.c_out),
        shared_(reinterpret_cast<float*>(static_cast<char*>(memory) + space_.grid.bytes())) {}

  void run() {
    if (space_.by_panels)
      by_panels();
    else
      by_tiles();
  }

 private:
  void transform(int64_t first, int64_t begin, int64_t end, float* v) const {
    transform_inputs<T>(space_.grid, x_, first, begin, end,
                        Transformed<kChunk>{v, space_.of_v, space_.stride, space_.of_chunk});
  }

  int64_t panel_size() const { return T::points * packed_of_point(s_); }
  float* slot(int64_t index) const {
    return shared_ + space_.shared_size() + index * space_.slot_size;
  }

  void by_tiles() const {
    float* own = shared_;
    if (space_.packs) pack<T>(s_, weight_, own);
    const float* packed = space_.packs ? own : packed_;
    const int64_t together = space_.together, groups = ceil_div(space_.tiles, together);
    in_slots(space_.slots, [&](int64_t index) {
      const int64_t begin = index * groups / space_.slots * together;
      const int64_t end = min_of(space_.tiles, (index + 1) * groups / space_.slots * together);
      const int64_t blocks = max_of(1, ceil_div(end - begin, space_.most));
      const int64_t block = round_up(ceil_div(end - begin, blocks), together);
      float *v = slot(index), *products = v + space_.v_size;
      for (int64_t first = begin; first < end; first += block) {
        const int64_t count = min_of(block, end - first);
        transform(first, 0, count, v);
        for (int64_t q = 0; q < space_.panels; ++q)
          finish(first, count, v, q, packed + q * panel_size(), nullptr, products);
      }
    });
  }

  void by_panels() const {
    float* v = shared_;
    for (int64_t first = 0; first < space_.tiles; first += space_.most) {
      const int64_t count = min_of(space_.most, space_.tiles - first);
      const int64_t part = round_up(ceil_div(count, space_.splits), space_.together);
      cpu::parallel_ranges(count, T::points * s_.c_in * 4,
                           [&](int64_t begin, int64_t end) { transform(first, begin, end, v); });
      const int64_t units = space_.panels * space_.splits;
      in_slots(space_.slots, [&](int64_t index) {
        float* products = slot(index);
        const int64_t end = (index + 1) * units / space_.slots;
        for (int64_t unit = index * units / space_.slots, next; unit < end; unit = next) {
          // All parts of a panel that are this thread's, so that it packs the panel once.
          const int64_t q = unit / space_.splits;
          next = min_of(end, (q + 1) * space_.splits);
          const int64_t t = unit % space_.splits * part;
          const int64_t after = min_of(count, t + (next - unit) * part);
          if (t < after)
            finish(first + t, after - t, v + t * space_.stride, q,
                   space_.packs ? nullptr : packed_ + q * panel_size(),
                   products + space_.products_size, products);
        }
      });
    }
  }

  // Weights and rows of V come from the last-level cache, in pieces too short for its own prefetches.
  static void fetch(const float* from, int64_t count) {
    for (int64_t i = 0; i < count; i += kLineFloats) prefetch(from + i);
  }

  // products[tile][panel] (+)= the products of `count` tiles at one point with the channels of a chunk, whose first is
  // c.
  void multiply(int64_t point, int64_t c, int64_t count, const float* v, const float* weights,
                float* products) const {
    constexpr int64_t panel = kPanel<float>;
    const float* from = v + point * space_.of_v + c / kChunk * space_.of_chunk;
    const int64_t depth = min_of(kChunk, s_.c_in - c);
    const int64_t share =
        round_up(ceil_div(depth * panel, ceil_div(count, kTileRows)), kLineFloats);
    for (int64_t t = 0; t < count; t += kTileRows) {
      const int64_t rows = min_of(kTileRows, count - t);
      const float* row[kTileRows];
      for (int64_t i = 0; i < rows; ++i) row[i] = from + (t + i) * space_.stride;
      if (space_.by_panels) {
        if (!space_.packs) fetch(weights + depth * panel + t / kTileRows * share, share);
        fetch(from + space_.of_chunk + t * space_.stride, kTileRows * space_.stride);
      }
      multiply_in_parts<kPart>(rows, row, 1, weights, panel, depth,
                               products + point * space_.of_products + t * panel, panel, c > 0);
    }
  }

  // The outputs of `count` tiles from `first` on in panel q. packed: of the panel; if null, it is packed into `chunk`.
  void finish(int64_t first, int64_t count, const float* v, int64_t q, const float* packed,
              float* chunk, float* products) const {
    constexpr int64_t panel = kPanel<float>;
    if (packed != nullptr) {
      for (int64_t point = 0; point < T::points; ++point) {
        for (int64_t c = 0; c < s_.c_in; c += kChunk)
          multiply(point, c, count, v, packed + point * packed_of_point(s_) + c * panel, products);
      }
    } else {
      // A chunk of all points stays in the second-level cache.
      for (int64_t c = 0; c < s_.c_in; c += kChunk) {
        pack_panel<T>(s_, weight_, q, c, min_of(c + kChunk, s_.c_in), chunk,
                      space_.of_packed_chunk);
        for (int64_t point = 0; point < T::points; ++point)
          multiply(point, c, count, v, chunk + point * space_.of_packed_chunk, products);
      }
    }
    with_stored(out_.dtype, [&]<class S>() {
      if (out_.is_last())
        write_directly<S>(first, count, products, q * panel);
      else
        write_by_stage<S>(first, count, products, q * panel);
    });
  }

  template <class S>
  Epilogue<S> epilogue() const {
    return {scale_,
            shift_,
            static_cast<const S*>(residual_.data),
            static_cast<S*>(const_cast<void*>(out_.data)),
            p_.act,
            static_cast<float>(p_.act_param),
            scale_ != nullptr || shift_ != nullptr};
  }

  // Outputs of one tile, for a vector of output channels from o on, `products` from theirs on.
  template <class Part>
  ADVDL_INLINE void outputs(int64_t tile, const float* products, int64_t o, const Part& part,
                            Vec (&out)[T::MH * T::MW]) const {
    Vec m[T::points];
#pragma GCC unroll 36
    for (int q = 0; q < T::points; ++q) m[q] = load(products + q * space_.of_products);
    T::outputs(m, out);
    if (!is_finite(out)) compute_directly(tile, o, part.count(kLanes), out);
  }

  // The outputs of `count` tiles from `first` on, for the panel whose first output channel is o.
  template <class S>
  void write_directly(int64_t first, int64_t count, const float* products, int64_t o) const {
    constexpr int64_t panel = kPanel<float>;
    const Epilogue<S> epilogue = this->epilogue<S>();
    const int64_t step = s_.w.dilation * out_.channels;
    const Vec one = broadcast(1.0f), none{};
    for (int64_t t = 0; t < count; ++t) {
      const auto place = space_.grid.place(first + t);
      const auto& rows = *space_.grid.rows.at(place.row);
      const auto& columns = *space_.grid.columns.at(place.column);
      int64_t row[T::MH], column[T::MW];
      for (int i = 0; i < T::MH; ++i) row[i] = out_.at(place.n, rows.out[i], 0, o);
      for (int j = 0; j < T::MW; ++j) column[j] = out_.at(0, 0, columns.out[j], 0);
      for_vectors<float, 1, false>(min_of(panel, s_.c_out - o), [&](int64_t c, auto part, auto) {
        Vec out[T::MH * T::MW];
        outputs(first + t, products + t * panel + c, o + c, part, out);
        const Vec scale = scale_ == nullptr ? one : part.read(scale_ + o + c);
        const Vec shift = shift_ == nullptr ? none : part.read(shift_ + o + c);
        for (int i = 0; i < T::MH; ++i) {
          if (rows.out[i] >= out_.height) continue;
          if (columns.is_full) {
            epilogue.template finish<T::MW>(*reinterpret_cast<Vec(*)[T::MW]>(out + i * T::MW),
                                            scale, shift, row[i] + column[0] + c, step, part);
            continue;
          }
          for (int j = 0; j < T::MW; ++j) {
            if (columns.out[j] >= out_.width) continue;
            Vec sum[1] = {out[i * T::MW + j]};
            epilogue.template finish<1>(sum, scale, shift, row[i] + column[j] + c, 0, part);
          }
        }
      });
    }
  }

  // The same through the stage.
  template <class S>
  void write_by_stage(int64_t first, int64_t count, const float* products, int64_t o) const {
    constexpr int64_t panel = kPanel<float>;
    alignas(64) float stage[kStagePixels * kLanes];
    for_rectangles<T>(space_.grid, first, count, [&](const TileRectangle<T>& tiles) {
      const Rectangle r = tiles.outputs();
      for_vectors<float, 1, false>(min_of(panel, s_.c_out - o), [&](int64_t c, auto part, auto) {
        for (int64_t y = 0; y < tiles.rows; ++y) {
          float* row = stage + y * T::MH * r.columns * kLanes;
          for (int64_t x = 0; x < tiles.columns; ++x) {
            const auto& columns = tiles.column(x);
            const int64_t tile = tiles.tile(y, x);
            Vec out[T::MH * T::MW];
            outputs(tile, products + (tile - first) * panel + c, o + c, part, out);
#pragma GCC unroll 4
            for (int i = 0; i < T::MH; ++i) {
#pragma GCC unroll 4
              for (int j = 0; j < T::MW; ++j)
                store(row + (i * r.columns + columns.out[j] - r.x) * kLanes, out[i * T::MW + j]);
            }
          }
        }
        write_stage<S>(out_, r, o + c, part.count(kLanes), epilogue<S>(), stage);
      });
    });
  }

  // out[y][x] of one tile directly, for `count` output channels from o on: where the sums of the transformed tile are
  // not finite. Inf and NaN then reach the outputs that they reach in a direct convolution, and no others.
  __attribute__((noinline)) void compute_directly(int64_t tile, int64_t o, int64_t count,
                                                  Vec* out) const {
    const Taps taps(s_, weight_);
    const auto place = space_.grid.place(tile);
    const auto& rows = *space_.grid.rows.at(place.row);
    const auto& columns = *space_.grid.columns.at(place.column);
    for (int64_t i = 0; i < T::MH; ++i) {
      for (int64_t j = 0; j < T::MW; ++j) {
        if (rows.out[i] >= out_.height || columns.out[j] >= out_.width) continue;
        alignas(64) float sums[kLanes] = {};
        for (int64_t lane = 0; lane < count; ++lane) {
          double sum = 0;
          for (int64_t t = 0; t < kTaps; ++t) {
            const int64_t y = rows.in[i + t / 3], x = columns.in[j + t % 3];
            if (!x_.has(y, x)) continue;
            const int64_t from = x_.at(place.n, y, x, 0), tap = weight_.turned ? kTaps - 1 - t : t;
            const int64_t weight = (o + lane) * taps.of_out + tap * taps.tap;
            // NaN does not leave a sum, so nothing is added to it.
            for (int64_t c = 0; c < s_.c_in && sum == sum; ++c)
              sum += double(element(x_.dtype, x_.data, from + c * x_.channel())) *
                     element(weight_.dtype, weight_.data, weight + c * taps.of_in);
          }
          sums[lane] = static_cast<float>(sum);
        }
        out[i * T::MW + j] = load(sums);
      }
    }
  }

  const WinogradConv2dForward& p_;
  const WinogradConv2dShape& s_;
  const ForwardSpace<T>& space_;
  const Images x_, out_, residual_;
  const WinogradWeight weight_;
  const float *const packed_, *const scale_, *const shift_;
  float* const shared_;
};

void run_forward(const WinogradConv2dForward& p, void* workspace) {
  if (p.shape.n == 0) return;
  with_tile(p.shape.tile, [&](auto tile) {
    ForwardSpace<decltype(tile)> space(p);
    space.grid.fill(workspace);
    for (int64_t group = 0; group < p.shape.groups; ++group)
      Forward<decltype(tile)>(p, space, group, workspace).run();
  });
}
size_t forward_workspace(const WinogradConv2dForward& p) {
  if (p.shape.n == 0) return 0;
  return with_tile(p.shape.tile,
                   [&](auto tile) { return ForwardSpace<decltype(tile)>(p).bytes(); });
}

int64_t packed_size(const WinogradFilters& f) {
  return f.groups * with_tile(f.tile, [&](auto tile) { return packed_size_of<decltype(tile)>(f); });
}
void run_pack(const WinogradFilters& f, const WinogradWeight& w, float* packed) {
  with_tile(f.tile, [&](auto tile) {
    for (int64_t group = 0; group < f.groups; ++group)
      pack<decltype(tile)>(f, of_group(f, w, group),
                           packed + group * packed_size_of<decltype(tile)>(f));
  });
}

}  // namespace

void add_winograd_conv2d(cpu::KernelTable& table) {
  table.winograd_packed_size = packed_size;
  table.winograd_pack = run_pack;
  table.winograd_conv2d.forward_workspace = forward_workspace;
  table.winograd_conv2d.forward = run_forward;
}

}  // namespace ADVDL_CAPABILITY_NAMESPACE
}  // namespace advdl_ops
