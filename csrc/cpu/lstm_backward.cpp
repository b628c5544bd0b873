// The LSTM's gradients on the CPU, from the last step to the first. Each step is a product with packed weights, whose
// tiles become the gradients of the pre-activations. After every few hundred rows of these, while they are in cache,
// their products give dx and the gradients of the weights.
#include "lstm.h"

namespace advdl_ops {
namespace ADVDL_CAPABILITY_NAMESPACE {
namespace {

// The most rows of a chunk, unless a single step has more. The gradients of the weights are read and written once for
// each chunk.
constexpr int64_t kChunkRows = 512;
// With fewer rows a weight [4H, columns] is not packed: a row of a panel is contiguous in it already.
constexpr int64_t kPackedRows = 256;

template <class T>
class Backward {
  using A = acc_t<T>;
  using Vec = typename Simd<A>::Vec;
  static constexpr int64_t kLanes = Simd<A>::lanes;

  // The step and sequence of a row of a chunk.
  struct Place {
    int64_t step, k;
  };
  // The gradients of some steps, in the order in which they are computed.
  struct Chunk {
    A* gates;        // [rows][4H]: of the pre-activations
    A* products;     // [rows][4H]: of w_hh h; without layer norm the same array as `gates`
    A* projected{};  // [rows][P]: of w_hr's product
    int64_t rows = 0;
    int64_t last = 0;  // where the rows of the step that was added last begin
  };

 public:
  Backward(const LstmBackward& params, void* workspace)
      : p_(params),
        w_(params.weights),
        times_{params.shape.sequences},
        size_(params.shape),
        few_(times_.rows() < kFewRows),
        packs_(times_.rows() >= kPackedRows || (!few_ && sizeof(T) != sizeof(A))),
        scratch_(workspace) {
    const int64_t batch = p_.shape.sequences.batch;
    const int64_t rows = min_of(kChunkRows - 1, times_.rows()) + batch;
    dh_ = scratch_.take<A>(batch * size_.recurrent_row);
    dc_ = scratch_.take<A>(batch * size_.hidden_row);
    for (Chunk& chunk : chunks_) {
      chunk.gates = scratch_.take<A>(rows * size_.gates_row);
      chunk.products = w_.norm.on() ? scratch_.take<A>(rows * size_.gates_row) : chunk.gates;
      if (w_.w_hr != nullptr) chunk.projected = scratch_.take<A>(rows * size_.recurrent);
    }
    places_ = scratch_.take<Place>(rows);
    if (w_.w_hr != nullptr) {
      dhidden_ = scratch_.take<A>(batch * size_.hidden_row);
      hidden_ = scratch_.take<A>(rows * size_.hidden_row);
    }
    if (w_.norm.on()) {
      dhh_weight_ = scratch_.take<A>(rows * size_.gates_row);
      dc_weight_ = scratch_.take<A>(rows * size_.hidden);
      dc_bias_ = scratch_.take<A>(rows * size_.hidden);
      normal_ = scratch_.take<A>(batch * 4 * size_.hidden_row);
    }
    transposed_ =
        scratch_.take<A>(round_up(max_of(size_.gates, size_.recurrent), kTileRows) * rows);
    const int64_t widest = panels(size_.input) + panels(size_.recurrent);
    columns_ = scratch_.take<A>(max_of(widest, panels(size_.hidden)) * rows * kPanel<A>);
    packed_hh_ = scratch_.take<A>(!packs_ ? 0 : panels(size_.recurrent) * size_.gates * kPanel<A>);
    packed_ih_ = scratch_.take<A>(
        !packs_ || !multiplies_for_x() ? 0 : panels(size_.input) * size_.gates * kPanel<A>);
    if (w_.w_hr != nullptr && packs_)
      packed_hr_ = scratch_.take<A>(panels(size_.hidden) * size_.recurrent * kPanel<A>);
  }

  size_t workspace() const { return static_cast<size_t>(scratch_.bytes); }

  void run() {
    pack();
    begin();
    for (int64_t step = p_.shape.sequences.steps - 1; step >= 0; --step) {
      Chunk& chunk = chunks_[turn_];
      if (chunk.rows + times_.active(step) > kChunkRows && chunk.rows > 0) finish_chunk();
      go_back(step);
    }
    // The gradient of h0.
    take_feedback(-1);
    finish_chunk();
    end();
  }

 private:
  const LstmBackward& p_;
  const LstmWeights& w_;
  const Times times_;
  const LstmSizes<A> size_;
  const bool few_, packs_;
  Arena scratch_;
  A* dh_;  // [B][R]: of h, without the part through w_hh
  A* dc_;  // [B][H]: of c
  Chunk chunks_[2];
  int turn_ = 0;                                 // the chunk that is being filled
  const Chunk* later_{};                         // the chunk that holds the step after this one
  Place* places_;                                // [rows] of the chunk that is being filled
  A* dhidden_{};                                 // [B][H]: of o tanh(c), the input of w_hr
  A* hidden_{};                                  // [rows][H]: o tanh(c)
  A *dhh_weight_{}, *dc_weight_{}, *dc_bias_{};  // [rows][4H], [rows][H], [rows][H]
  A* normal_{};                                  // [B][4][H]
  A* transposed_;                                // [tiles of 4H or P][rows][kTileRows]
  A* columns_;                                   // [panels][rows][panel]
  A *packed_hh_, *packed_ih_,
      *packed_hr_{};  // [panels of R][4H], [of I][4H], [of H][P], each [panel]
  bool first_chunk_ = true;

  static const T* typed(const void* pointer) { return static_cast<const T*>(pointer); }
  static int64_t panels(int64_t columns) { return ceil_div(columns, kPanel<A>); }
  bool multiplies_for_x() const { return p_.dx.data != nullptr && w_.w_ih != nullptr; }

  void pack() {
    if (!packs_) return;
    pack_matrix(w_.w_hh, size_.gates, size_.recurrent, packed_hh_);
    if (multiplies_for_x()) pack_matrix(w_.w_ih, size_.gates, size_.input, packed_ih_);
    if (w_.w_hr != nullptr) pack_matrix(w_.w_hr, size_.recurrent, size_.hidden, packed_hr_);
  }

  void pack_matrix(const void* matrix, int64_t depth, int64_t columns, A* packed) {
    cpu::parallel_ranges(panels(columns), depth * kPanel<A>, [&](int64_t begin, int64_t end) {
      for (int64_t panel = begin; panel < end; ++panel) {
        const int64_t column = panel * kPanel<A>;
        pack_columns<A>(columns - column, depth, packed + panel * depth * kPanel<A>,
                        [&](int64_t k) { return typed(matrix) + k * columns + column; });
      }
    });
  }

  // tile += a [rows][depth] times the panel's columns of `matrix` [depth][columns].
  void multiply(int64_t rows, const A* const* a, const void* matrix, int64_t columns,
                const A* packed, int64_t panel, int64_t depth, A* tile) {
    if (packs_)
      return multiply_tile<1>(rows, a, packed + panel * depth * kPanel<A>, kPanel<A>, depth, tile,
                              kPanel<A>);
    const int64_t column = panel * kPanel<A>, left = columns - column;
    if constexpr (sizeof(T) == sizeof(A)) {
      if (!few_ && left >= kPanel<A>)
        return multiply_tile<1>(rows, a, typed(matrix) + column, columns, depth, tile, kPanel<A>);
    }
    multiply_columns(rows, a, typed(matrix) + column, columns, left, depth, tile);
  }

  void begin() {
    cpu::parallel_ranges(p_.shape.sequences.batch, size_.hidden + size_.recurrent,
                         [&](int64_t first, int64_t end) {
                           for (int64_t k = first; k < end; ++k) {
                             copy_in(times_.template state<T>(p_.dh_n, size_.recurrent, k),
                                     size_.recurrent, dh_ + k * size_.recurrent_row);
                             copy_in(times_.template state<T>(p_.dc_n, size_.hidden, k),
                                     size_.hidden, dc_ + k * size_.hidden_row);
                           }
                         });
  }
  void end() {
    cpu::parallel_ranges(p_.shape.sequences.batch, size_.hidden + size_.recurrent,
                         [&](int64_t first, int64_t end) {
                           for (int64_t k = first; k < end; ++k) {
                             copy_out(dh_ + k * size_.recurrent_row, size_.recurrent,
                                      static_cast<T*>(p_.dh0) + times_.number(k) * size_.recurrent);
                             copy_out(dc_ + k * size_.hidden_row, size_.hidden,
                                      static_cast<T*>(p_.dc0) + times_.number(k) * size_.hidden);
                           }
                         });
  }
  static void copy_in(const T* from, int64_t size, A* to) {
    for (int64_t j = 0; j < size; j += kLanes) {
      with_lanes<A>(size - j, [&](auto part) { store(to + j, read_or_zero<A>(from, j, part)); });
    }
  }
  static void copy_out(const A* from, int64_t size, T* to) {
    for_vectors<A, 1>(size,
                      [&](int64_t j, auto part, auto) { part.write(to + j, part.read(from + j)); });
  }

  // --- a step -----------------------------------------------------------------------------------

  void go_back(int64_t step) {
    Chunk& chunk = chunks_[turn_];
    const int64_t active = times_.active(step);
    for (int64_t k = 0; k < active; ++k) places_[chunk.rows + k] = {step, k};
    take_feedback(step);
    if (w_.w_hr != nullptr) {
      for_tiles<A>(panels(size_.hidden), active, size_.recurrent,
                   [&](int64_t panel, int64_t first, int64_t count) {
                     alignas(64) A tile[kTileRows * kPanel<A>] = {};
                     const A* a[kTileRows] = {};
                     for (int64_t i = 0; i < count; ++i)
                       a[i] = chunk.projected + (chunk.rows + first + i) * size_.recurrent;
                     multiply(count, a, w_.w_hr, size_.hidden, packed_hr_, panel, size_.recurrent,
                              tile);
                     for_vectors_of(tile, count, panel, size_.hidden,
                                    [&](int64_t i, int64_t j, Vec dhidden, auto part) {
                                      hidden_gradient(step, first + i, j, dhidden, part);
                                    });
                   });
    }
    if (w_.norm.on()) {
      cpu::parallel_ranges(active, 32 * size_.gates, [&](int64_t begin, int64_t end) {
        for (int64_t k = begin; k < end; ++k) normalize(step, k);
      });
    }
    clear_ended(step, active);
    chunk.last = chunk.rows;
    chunk.rows += active;
    later_ = &chunk;
  }

  // Calls f(row of the tile, column, values, lanes) for the columns of the tile that exist.
  template <class F>
  ADVDL_INLINE void for_vectors_of(const A* tile, int64_t rows, int64_t panel, int64_t columns,
                                   F&& f) {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t v = 0; v < kPanelVectors; ++v) {
        const int64_t j = panel * kPanel<A> + v * kLanes;
        with_lanes<A>(columns - j,
                      [&](auto part) { f(i, j, load(tile + i * kPanel<A> + v * kLanes), part); });
      }
    }
  }

  // The part of the gradient of h that comes through w_hh from the step after this one. Sequences that have this step
  // continue with its other gradients; for the others it is added to dh_.
  void take_feedback(int64_t step) {
    const int64_t active = times_.active(step);
    const int64_t fed = later_ == nullptr ? 0 : later_->rows - later_->last;
    for_tiles<A>(
        panels(size_.recurrent), max_of(active, fed), size_.gates,
        [&](int64_t panel, int64_t first, int64_t count) {
          alignas(64) A tile[kTileRows * kPanel<A>] = {};
          const A* a[kTileRows] = {};
          const int64_t with = max_of(0, min_of(count, fed - first));
          for (int64_t i = 0; i < with; ++i)
            a[i] = later_->products + (later_->last + first + i) * size_.gates_row;
          if (with > 0)
            multiply(with, a, w_.w_hh, size_.recurrent, packed_hh_, panel, size_.gates, tile);
          for_vectors_of(tile, count, panel, size_.recurrent,
                         [&](int64_t i, int64_t j, Vec dfed, auto part) {
                           output_gradient(step, first + i, j, dfed, first + i < active, part);
                         });
        });
  }

  template <class Lanes>
  ADVDL_INLINE void output_gradient(int64_t step, int64_t k, int64_t j, Vec dfed, bool active,
                                    Lanes part) {
    if (w_.recurrent_mask != nullptr)
      dfed *= part.read(times_.template state<T>(w_.recurrent_mask, size_.recurrent, k) + j);
    A* state = dh_ + k * size_.recurrent_row + j;
    Vec dh = load(state) + dfed;
    if (!active) return store(state, dh);
    if (p_.dy.data != nullptr) dh += part.read(times_.template row<const T>(p_.dy, step, k) + j);
    Vec kept{};
    if (p_.zoneout_h.on()) {
      kept = zoneout_keep<A>(times_, p_.zoneout_h, step, k, j, size_.recurrent) * dh;
      dh -= kept;
    }
    store(state, kept);
    if (w_.w_hr == nullptr) return hidden_gradient(step, k, j, dh, part);
    const Chunk& chunk = chunks_[turn_];
    part.write(chunk.projected + (chunk.rows + k) * size_.recurrent + j, dh);
  }

  // Continues from the gradient of o tanh(c) to the gates. With layer norm it is stored until the row is complete.
  template <class Lanes>
  ADVDL_INLINE void hidden_gradient(int64_t step, int64_t k, int64_t j, Vec dhidden, Lanes part) {
    if (w_.norm.on()) return store(normal_row(k, 3) + j, dhidden);
    const LstmGates<Vec> gates = gates_of(step, k, j, part);
    const Vec before = cell_before(step, k, j, part);
    const Vec t = math::tanh(lstm_cell_state(gates, before));
    gates_gradient(step, k, j, gates, before, t, dhidden, dhidden * gates.o * (1 - t * t), part);
  }

  template <class Lanes>
  ADVDL_INLINE LstmGates<Vec> gates_of(int64_t step, int64_t k, int64_t j, Lanes part) const {
    const T* row = times_.template row<const T>(p_.gates, step, k) + j;
    return {part.read(row), part.read(row + size_.hidden), part.read(row + 2 * size_.hidden),
            part.read(row + 3 * size_.hidden)};
  }

  // Whether the sequence has the step before this one. Otherwise it began here.
  bool continues(int64_t step, int64_t k) const { return k < times_.active(step - 1); }
  template <class Lanes>
  ADVDL_INLINE Vec cell_before(int64_t step, int64_t k, int64_t j, Lanes part) const {
    return read_or_zero<A>(continues(step, k) ? times_.template row<const T>(p_.cells, step - 1, k)
                                              : times_.template state<T>(p_.c0, size_.hidden, k),
                           j, part);
  }

  // dcell: the part of the cell's gradient that comes through the hidden state.
  template <class Lanes>
  ADVDL_INLINE void gates_gradient(int64_t step, int64_t k, int64_t j, const LstmGates<Vec>& gates,
                                   Vec before, Vec t, Vec dhidden, Vec dcell, Lanes part) {
    A* state = dc_ + k * size_.hidden_row + j;
    Vec dc = load(state), kept{};
    if (p_.zoneout_c.on()) {
      kept = zoneout_keep<A>(times_, p_.zoneout_c, step, k, j, size_.hidden) * dc;
      dc -= kept;
    }
    dcell += dc;
    const LstmGates<Vec> d = lstm_gates_backward(gates, before, t, dhidden, dcell);
    store(state, kept + dcell);
    const Chunk& chunk = chunks_[turn_];
    A* row = chunk.gates + (chunk.rows + k) * size_.gates_row + j;
    part.write(row, d.i);
    part.write(row + size_.hidden, d.f);
    part.write(row + 2 * size_.hidden, d.g);
    part.write(row + 3 * size_.hidden, d.o);
    if (w_.w_hr != nullptr) store(hidden_ + (chunk.rows + k) * size_.hidden_row + j, gates.o * t);
  }

  void clear_ended(int64_t step, int64_t active) {
    if (p_.shape.sequences.starts != nullptr || p_.dx.data == nullptr) return;
    for (int64_t k = active; k < p_.shape.sequences.batch; ++k)
      std::memset(times_.template row<T>(p_.dx, step, k), 0, size_.input * sizeof(T));
  }

  // --- layer norm -------------------------------------------------------------------------------

  A* normal_row(int64_t k, int64_t part) const {
    return normal_ + (k * 4 + part) * size_.hidden_row;
  }

  // The input gradient of y = xhat weight + bias, from the means of dxhat and of dxhat xhat over the row.
  struct Means {
    Vec first{}, second{};
    template <class Lanes>
    ADVDL_INLINE void add(Vec dxhat, Vec xhat, Lanes part) {
      first += part.counted(dxhat);
      second += part.counted(dxhat * xhat);
    }
    A mean, mean_product;
    void finish(int64_t count) {
      mean = static_cast<A>(lane_sum(first) / static_cast<double>(count));
      mean_product = static_cast<A>(lane_sum(second) / static_cast<double>(count));
    }
    ADVDL_INLINE Vec gradient(Vec dxhat, Vec xhat, A rstd) const {
      return (dxhat - mean - xhat * mean_product) * rstd;
    }
  };

  void normalize(int64_t step, int64_t k) {
    const LstmLayerNorm& norm = w_.norm;
    const int64_t at = chunks_[turn_].rows + k;
    A *cell = normal_row(k, 0), *dnormal = normal_row(k, 1), *t = normal_row(k, 2);
    const A* dhidden = normal_row(k, 3);
    const auto for_units = [&](auto f) {
      for (int64_t j = 0; j < size_.hidden; j += kLanes)
        with_lanes<A>(size_.hidden - j, [&](auto part) { f(j, part); });
    };
    for_units([&](int64_t j, auto part) {
      store(cell + j, lstm_cell_state(gates_of(step, k, j, part), cell_before(step, k, j, part)));
    });
    const RowStatistics<A> of_cell(cell, 1, size_.hidden, size_.hidden_row, norm.eps);
    Means cell_means;
    for_units([&](int64_t j, auto part) {
      const Vec weight = part.read(typed(norm.c_weight) + j),
                xhat = of_cell.normalized(load(cell + j));
      const Vec tanh = math::tanh(xhat * weight + part.read(typed(norm.c_bias) + j));
      const Vec o =
          part.read(times_.template row<const T>(p_.gates, step, k) + 3 * size_.hidden + j);
      const Vec d = load(dhidden + j) * o * (1 - tanh * tanh);
      store(t + j, tanh);
      store(dnormal + j, d);
      part.write(dc_weight_ + at * size_.hidden + j, d * xhat);
      part.write(dc_bias_ + at * size_.hidden + j, d);
      cell_means.add(d * weight, xhat, part);
    });
    cell_means.finish(size_.hidden);
    for_units([&](int64_t j, auto part) {
      const Vec weight = part.read(typed(norm.c_weight) + j);
      const Vec dcell = cell_means.gradient(load(dnormal + j) * weight,
                                            of_cell.normalized(load(cell + j)), of_cell.rstd);
      gates_gradient(step, k, j, gates_of(step, k, j, part), cell_before(step, k, j, part),
                     load(t + j), load(dhidden + j), dcell, part);
    });
    normalize_product(step, k, at);
  }

  void normalize_product(int64_t step, int64_t k, int64_t at) {
    const LstmLayerNorm& norm = w_.norm;
    const Chunk& chunk = chunks_[turn_];
    const T* product = times_.template row<const T>(p_.products, step, k);
    A* wide = normal_row(k, 0);
    const auto for_gates = [&](auto f) {
      for (int64_t gate = 0; gate < kLstmGates; ++gate) {
        for_vectors<A, 1, false>(size_.hidden, [&](int64_t j, auto part, auto) {
          f(gate * size_.hidden + j, gate * size_.hidden_row + j, part);
        });
      }
    };
    for_gates([&](int64_t i, int64_t padded, auto part) {
      store(wide + padded, part.read(product + i));
    });
    const RowStatistics<A> statistics(wide, kLstmGates, size_.hidden, size_.hidden_row, norm.eps);
    const A* d = chunk.gates + at * size_.gates_row;
    Means means;
    for_gates([&](int64_t i, int64_t padded, auto part) {
      const Vec xhat = statistics.normalized(load(wide + padded)), dgate = part.read(d + i);
      part.write(dhh_weight_ + at * size_.gates_row + i, dgate * xhat);
      means.add(dgate * part.read(typed(norm.hh_weight) + i), xhat, part);
    });
    means.finish(size_.gates);
    for_gates([&](int64_t i, int64_t padded, auto part) {
      const Vec xhat = statistics.normalized(load(wide + padded));
      part.write(chunk.products + at * size_.gates_row + i,
                 means.gradient(part.read(d + i) * part.read(typed(norm.hh_weight) + i), xhat,
                                statistics.rstd));
    });
  }

  // --- the products of a chunk ------------------------------------------------------------------

  void finish_chunk() {
    const Chunk& chunk = chunks_[turn_];
    if (p_.dx.data != nullptr) gradient_of_x(chunk);
    const auto x_row = [&](int64_t row, int64_t column, auto&& f) {
      const auto [step, k] = places_[row];
      f(times_.template row<const T>(p_.x, step, k) + column, static_cast<const T*>(nullptr));
    };
    const auto h_row = [&](int64_t row, int64_t column, auto&& f) {
      const auto [step, k] = places_[row];
      const T* h = continues(step, k) ? times_.template row<const T>(p_.y, step - 1, k)
                                      : times_.template state<T>(p_.h0, size_.recurrent, k);
      const T* mask = times_.template state<T>(w_.recurrent_mask, size_.recurrent, k);
      f(h == nullptr ? h : h + column, mask == nullptr ? mask : mask + column);
    };
    const bool same = chunk.products == chunk.gates;
    if (p_.dw_ih != nullptr || (same && p_.dw_hh != nullptr))
      transpose(chunk.gates, size_.gates_row, size_.gates, chunk.rows);
    if (p_.dw_ih != nullptr)
      add_products(size_.gates, chunk.rows, size_.input, x_row, static_cast<A*>(p_.dw_ih));
    if (p_.dw_hh != nullptr) {
      if (!same) transpose(chunk.products, size_.gates_row, size_.gates, chunk.rows);
      add_products(size_.gates, chunk.rows, size_.recurrent, h_row, static_cast<A*>(p_.dw_hh));
    }
    if (p_.dw_hr != nullptr) {
      transpose(chunk.projected, size_.recurrent, size_.recurrent, chunk.rows);
      const auto hidden_row = [&](int64_t row, int64_t column, auto&& f) {
        f(hidden_ + row * size_.hidden_row + column, static_cast<const A*>(nullptr));
      };
      add_products(size_.recurrent, chunk.rows, size_.hidden, hidden_row,
                   static_cast<A*>(p_.dw_hr));
    }
    add_rows(chunk.gates, size_.gates_row, size_.gates, chunk.rows, p_.dbias);
    if (w_.norm.on()) {
      add_rows(dhh_weight_, size_.gates_row, size_.gates, chunk.rows, p_.dhh_weight);
      add_rows(dc_weight_, size_.hidden, size_.hidden, chunk.rows, p_.dc_weight);
      add_rows(dc_bias_, size_.hidden, size_.hidden, chunk.rows, p_.dc_bias);
    }
    first_chunk_ = false;
    turn_ = 1 - turn_;
    chunks_[turn_].rows = 0;
  }

  void gradient_of_x(const Chunk& chunk) {
    if (w_.w_ih == nullptr) {
      for (int64_t row = 0; row < chunk.rows; ++row)
        copy_out(chunk.gates + row * size_.gates_row, size_.gates, dx_row(row));
      return;
    }
    for_tiles<A>(panels(size_.input), chunk.rows, size_.gates,
                 [&](int64_t panel, int64_t first, int64_t count) {
                   alignas(64) A tile[kTileRows * kPanel<A>] = {};
                   const A* a[kTileRows] = {};
                   for (int64_t i = 0; i < count; ++i)
                     a[i] = chunk.gates + (first + i) * size_.gates_row;
                   multiply(count, a, w_.w_ih, size_.input, packed_ih_, panel, size_.gates, tile);
                   for_vectors_of(tile, count, panel, size_.input,
                                  [&](int64_t i, int64_t j, Vec dx, auto part) {
                                    part.write(dx_row(first + i) + j, dx);
                                  });
                 });
  }
  T* dx_row(int64_t row) const {
    return times_.template row<T>(p_.dx, places_[row].step, places_[row].k);
  }

  // transposed_ = the transposed rows, in tiles of kTileRows columns, padded with zeros.
  void transpose(const A* rows, int64_t stride, int64_t width, int64_t count) {
    constexpr int64_t kBlock =
        8;  // tiles that are read from a row before the next row, which is on another page
    const int64_t tiles = tiles_of(width);
    cpu::parallel_ranges(ceil_div(tiles, kBlock), kBlock * count * kTileRows,
                         [&](int64_t begin, int64_t end) {
                           for (int64_t block = begin; block < end; ++block) {
                             const int64_t last = min_of(tiles, (block + 1) * kBlock);
                             for (int64_t row = 0; row < count; ++row) {
                               for (int64_t tile = block * kBlock; tile < last; ++tile) {
                                 const int64_t first = tile * kTileRows;
                                 const A* from = rows + row * stride + first;
                                 A* to = transposed_ + first * count + row * kTileRows;
                                 if (first + kTileRows <= width) {
                                   std::memcpy(to, from, kTileRows * sizeof(A));
                                 } else {
                                   for (int64_t i = 0; i < kTileRows; ++i)
                                     to[i] = first + i < width ? from[i] : 0;
                                 }
                               }
                             }
                           }
                         });
  }

  // sums [height][width] += transposed_^T times rows of `width`, or = for the first chunk. source(row, column, f) calls
  // f(values, factors): null values are zeros, null factors are ones.
  template <class Source>
  void add_products(int64_t height, int64_t depth, int64_t width, Source&& source, A* sums) {
    if (few_) return add_few_products(height, depth, width, source, sums);
    cpu::parallel_ranges(panels(width), depth * kPanel<A>, [&](int64_t begin, int64_t end) {
      for (int64_t panel = begin; panel < end; ++panel) {
        const int64_t column = panel * kPanel<A>;
        A* to = columns_ + panel * depth * kPanel<A>;
        for (int64_t row = 0; row < depth; ++row, to += kPanel<A>) {
          source(row, column, [&](const auto* values, const auto* factors) {
            for (int64_t v = 0; v < kPanelVectors; ++v) {
              store(to + v * kLanes, Vec{});
              with_lanes<A>(width - column - v * kLanes, [&](auto part) {
                Vec value = read_or_zero<A>(values, v * kLanes, part);
                if (factors != nullptr) value *= part.read(factors + v * kLanes);
                store(to + v * kLanes, value);
              });
            }
          });
        }
      }
    });
    for_tiles<A>(panels(width), height, depth, [&](int64_t panel, int64_t first, int64_t count) {
      const int64_t column = panel * kPanel<A>, columns = min_of(kPanel<A>, width - column);
      const A* a[kTileRows];
      for (int64_t i = 0; i < kTileRows; ++i) a[i] = transposed_ + first * depth + i;
      const A* b = columns_ + panel * depth * kPanel<A>;
      A* to = sums + first * width + column;
      if (columns == kPanel<A> && depth > 0)
        return multiply_tile<kTileRows>(count, a, b, kPanel<A>, depth, to, width, !first_chunk_);
      alignas(64) A tile[kTileRows * kPanel<A>] = {};
      multiply_tile<kTileRows>(count, a, b, kPanel<A>, depth, tile, kPanel<A>);
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t j = 0; j < columns; j += kLanes) {
          with_lanes<A>(columns - j, [&](auto part) {
            A* sum = to + i * width + j;
            const Vec own = load(tile + i * kPanel<A> + j);
            part.write(sum, first_chunk_ ? own : part.read(sum) + own);
          });
        }
      }
    });
  }

  // The same for a call with few rows, which is a single chunk. The sums are then larger than the factors.
  template <class Source>
  void add_few_products(int64_t height, int64_t depth, int64_t width, Source&& source, A* sums) {
    A* rows = columns_;  // [depth][width]
    for (int64_t row = 0; row < depth; ++row) {
      source(row, 0, [&](const auto* values, const auto* factors) {
        for (int64_t j = 0; j < width; j += kLanes) {
          with_lanes<A>(width - j, [&](auto part) {
            Vec value = read_or_zero<A>(values, j, part);
            if (factors != nullptr) value *= part.read(factors + j);
            part.write(rows + row * width + j, value);
          });
        }
      });
    }
    cpu::parallel_ranges(height, depth * width, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const A* factors = transposed_ + i / kTileRows * kTileRows * depth + i % kTileRows;
        for_vectors<A, 1>(width, [&](int64_t j, auto part, auto) {
          Vec sum{};
          for (int64_t row = 0; row < depth; ++row)
            sum += factors[row * kTileRows] * part.read(rows + row * width + j);
          part.write(sums + i * width + j, sum);
        });
      }
    });
  }

  // sums[width] += the sum of the rows, or = for the first chunk.
  void add_rows(const A* rows, int64_t stride, int64_t width, int64_t count, void* sums) {
    if (sums == nullptr) return;
    cpu::parallel_ranges(panels(width), count * kPanel<A>, [&](int64_t begin, int64_t end) {
      for (int64_t panel = begin; panel < end; ++panel) {
        const int64_t column = panel * kPanel<A>;
        if (column + kPanel<A> <= width) {
          add_vectors<kPanelVectors>(rows + column, stride, count, sums, column, FullLanes{});
          continue;
        }
        for (int64_t j = column; j < width; j += kLanes) {
          with_lanes<A>(width - j,
                        [&](auto part) { add_vectors<1>(rows + j, stride, count, sums, j, part); });
        }
      }
    });
  }

  template <int kVectors, class Lanes>
  void add_vectors(const A* rows, int64_t stride, int64_t count, void* sums, int64_t at,
                   Lanes part) {
    Vec sum[kVectors] = {};
    for (int64_t row = 0; row < count; ++row) {
      for (int v = 0; v < kVectors; ++v) sum[v] += part.read(rows + row * stride + v * kLanes);
    }
    for (int v = 0; v < kVectors; ++v) {
      A* to = static_cast<A*>(sums) + at + v * kLanes;
      part.write(to, first_chunk_ ? sum[v] : sum[v] + part.read(to));
    }
  }
};

}  // namespace

void add_lstm_backward(cpu::KernelTable& table) {
  table.lstm.backward_workspace = lstm_workspace<Backward, LstmBackward>;
  table.lstm.backward = lstm_run<Backward, LstmBackward>;
}

}  // namespace ADVDL_CAPABILITY_NAMESPACE
}  // namespace advdl_ops
