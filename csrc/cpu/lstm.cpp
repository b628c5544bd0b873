// The LSTM's forward pass on the CPU. Each step is a product with packed weights. Its tiles become gates, cells and
// outputs while they are in registers and L1. docs/kernels.md has more.
#include "lstm.h"

namespace advdl_ops {
namespace ADVDL_CAPABILITY_NAMESPACE {
namespace {

// w_ih x is computed for a chunk of steps with at least this many rows, before these steps. A panel of w_ih is then
// read once for all of these rows.
constexpr int64_t kChunkRows = 48;

template <class T>
class Forward {
  using A = acc_t<T>;
  using Vec = typename Simd<A>::Vec;
  static constexpr int64_t kLanes = Simd<A>::lanes;
  static constexpr bool kConverts = sizeof(T) != sizeof(A);

 public:
  Forward(const LstmForward& params, void* workspace)
      : p_(params),
        w_(params.weights),
        times_{params.shape.sequences},
        size_(params.shape),
        few_(times_.rows() < kFewRows),
        scratch_(workspace) {
    const int64_t batch = p_.shape.sequences.batch;
    chunk_rows_ = min_of(kChunkRows - 1, times_.rows()) + batch;
    biases_ = scratch_.take<A>(size_.units * kPanel<A>);
    projected_ = scratch_.take<A>(size_.units * chunk_rows_ * kPanel<A>);
    if (kConverts) converted_ = scratch_.take<A>(chunk_rows_ * size_.input);
    rows_ = scratch_.take<const A*>(chunk_rows_);
    cell_ = scratch_.take<A>(batch * size_.hidden_row);
    for (int turn = 0; turn < 2; ++turn) {
      state_[turn] = scratch_.take<A>(batch * size_.recurrent_row);
      fed_[turn] = w_.recurrent_mask == nullptr ? state_[turn]
                                                : scratch_.take<A>(batch * size_.recurrent_row);
    }
    if (w_.w_hr != nullptr) hidden_ = scratch_.take<A>(batch * size_.hidden_row);
    if (w_.norm.on()) product_ = scratch_.take<A>(batch * kLstmGates * size_.hidden_row);
    if (few_) return;
    packed_ih_ = scratch_.take<A>(w_.w_ih == nullptr ? 0 : size_.units * size_.input * kPanel<A>);
    packed_hh_ = scratch_.take<A>(size_.units * size_.recurrent * kPanel<A>);
    if (w_.w_hr != nullptr)
      packed_hr_ = scratch_.take<A>(output_panels() * size_.hidden * kPanel<A>);
  }

  size_t workspace() const { return static_cast<size_t>(scratch_.bytes); }

  void run() {
    pack();
    begin();
    const int64_t steps = p_.shape.sequences.steps;
    for (int64_t step = 0; step < steps;) {
      int64_t end = step, rows = 0;
      while (end < steps && rows < kChunkRows) rows += times_.active(end++);
      project(step, end, rows);
      int64_t row = 0;
      for (; step < end; ++step) {
        advance(step, row);
        row += times_.active(step);
      }
    }
  }

 private:
  const LstmForward& p_;
  const LstmWeights& w_;
  const Times times_;
  const LstmSizes<A> size_;
  const bool few_;
  Arena scratch_;
  int64_t chunk_rows_;
  A* biases_;       // [units][panel]
  A* projected_;    // [units][chunk rows][panel]: w_ih x + biases
  A* converted_{};  // [chunk rows][I]
  const A** rows_;  // [chunk rows]: rows of x
  A* cell_;         // [B][H]: c
  A* state_[2];     // [B][R]: h of the previous step and of this one, alternating
  A* fed_[2];       // [B][R]: h * recurrent_mask
  A* hidden_{};     // [B][H]: o tanh(c), the input of w_hr
  A* product_{};    // [B][4][H]: w_hh h, with layer norm
  A* packed_ih_{};  // [units][I][panel]
  A* packed_hh_{};  // [units][R][panel]
  A* packed_hr_{};  // [panels of P][H][panel]

  static const T* typed(const void* pointer) { return static_cast<const T*>(pointer); }
  int64_t output_panels() const { return ceil_div(p_.shape.projection, kPanel<A>); }
  // The rows of w_ih or w_hh for a panel: one vector of each gate.
  RowRuns gate_rows(int64_t panel) const {
    return {panel * kLanes, size_.hidden, size_.hidden - panel * kLanes, 0};
  }
  RowRuns output_rows(int64_t panel) const {
    return {panel * kPanel<A>, kLanes, p_.shape.projection - panel * kPanel<A>, kLanes};
  }

  void pack() {
    cpu::parallel_ranges(size_.units, kLstmGates * kLanes, [&](int64_t begin, int64_t end) {
      for (int64_t panel = begin; panel < end; ++panel) {
        for (int64_t gate = 0; gate < kLstmGates; ++gate) {
          Vec sum{};
          with_lanes<A>(size_.hidden - panel * kLanes, [&](auto part) {
            const int64_t at = gate * size_.hidden + panel * kLanes;
            if (w_.b_ih != nullptr) sum += part.read(typed(w_.b_ih) + at);
            if (w_.b_hh != nullptr) sum += part.read(typed(w_.b_hh) + at);
          });
          store(biases_ + panel * kPanel<A> + gate * kLanes, sum);
        }
      }
    });
    if (few_) return;
    const int64_t input = w_.w_ih == nullptr ? 0 : size_.input;
    cpu::parallel_ranges(size_.units, (input + size_.recurrent) * kPanel<A>,
                         [&](int64_t begin, int64_t end) {
                           for (int64_t panel = begin; panel < end; ++panel) {
                             if (input > 0)
                               pack_rows(typed(w_.w_ih), gate_rows(panel), input,
                                         packed_ih_ + panel * input * kPanel<A>);
                             pack_rows(typed(w_.w_hh), gate_rows(panel), size_.recurrent,
                                       packed_hh_ + panel * size_.recurrent * kPanel<A>);
                           }
                         });
    if (w_.w_hr == nullptr) return;
    cpu::parallel_ranges(output_panels(), size_.hidden * kPanel<A>,
                         [&](int64_t begin, int64_t end) {
                           for (int64_t panel = begin; panel < end; ++panel)
                             pack_rows(typed(w_.w_hr), output_rows(panel), size_.hidden,
                                       packed_hr_ + panel * size_.hidden * kPanel<A>);
                         });
  }

  // Fills both buffers with the initial states, because in reverse a shorter sequence begins at a later step.
  void begin() {
    const int64_t batch = p_.shape.sequences.batch;
    cpu::parallel_ranges(batch, size_.hidden + size_.recurrent, [&](int64_t first, int64_t end) {
      for (int64_t k = first; k < end; ++k) {
        const T* c = times_.template state<T>(p_.c0, size_.hidden, k);
        for (int64_t j = 0; j < size_.hidden; j += kLanes) {
          with_lanes<A>(size_.hidden - j, [&](auto part) {
            store(cell_ + k * size_.hidden_row + j, read_or_zero<A>(c, j, part));
          });
        }
        const T* h = times_.template state<T>(p_.h0, size_.recurrent, k);
        for (int64_t j = 0; j < size_.recurrent; j += kLanes) {
          with_lanes<A>(size_.recurrent - j, [&](auto part) {
            const Vec value = read_or_zero<A>(h, j, part);
            for (int turn = 0; turn < 2; ++turn) write_state(turn, k, j, value, part);
          });
        }
      }
    });
  }

  template <class Lanes>
  ADVDL_INLINE void write_state(int turn, int64_t k, int64_t j, Vec value, Lanes part) {
    store(state_[turn] + k * size_.recurrent_row + j, value);
    if (w_.recurrent_mask == nullptr) return;
    const T* mask = times_.template state<T>(w_.recurrent_mask, size_.recurrent, k);
    store(fed_[turn] + k * size_.recurrent_row + j, value * part.read(mask + j));
  }

  // projected_ = w_ih x + biases for the rows of the steps begin .. end.
  void project(int64_t begin, int64_t end, int64_t rows) {
    int64_t row = 0;
    for (int64_t step = begin; step < end; ++step) {
      for (int64_t k = 0; k < times_.active(step); ++k, ++row) {
        const T* x = times_.template row<const T>(p_.x, step, k);
        if constexpr (kConverts) {
          A* target = converted_ + row * size_.input;
          for_vectors<A, 1>(size_.input, [&](int64_t i, auto part, auto) {
            part.write(target + i, part.read(x + i));
          });
          rows_[row] = target;
        } else {
          rows_[row] = x;
        }
      }
    }
    const int64_t input = w_.w_ih == nullptr ? 0 : size_.input;
    for_tiles<A>(size_.units, rows, input + 1, [&](int64_t panel, int64_t first, int64_t count) {
      A* tile = projected_ + (panel * chunk_rows_ + first) * kPanel<A>;
      for (int64_t i = 0; i < count; ++i) {
        A* sums = tile + i * kPanel<A>;
        std::memcpy(sums, biases_ + panel * kPanel<A>, kPanel<A> * sizeof(A));
        if (w_.w_ih != nullptr) continue;
        const A* x = rows_[first + i] + panel * kLanes;
        with_lanes<A>(size_.hidden - panel * kLanes, [&](auto part) {
          for (int64_t gate = 0; gate < kLstmGates; ++gate)
            store(sums + gate * kLanes,
                  load(sums + gate * kLanes) + part.read(x + gate * size_.hidden));
        });
      }
      multiply(count, rows_ + first, w_.w_ih, packed_ih_, gate_rows(panel), panel, input, tile);
    });
  }

  // tile += a times the packed panel, or times the unpacked rows if there are few.
  void multiply(int64_t rows, const A* const* a, const void* matrix, const A* packed,
                const RowRuns& runs, int64_t panel, int64_t depth, A* tile) {
    if (depth == 0) return;
    if (few_) {
      multiply_runs(rows, a, typed(matrix), runs, depth, tile);
    } else {
      multiply_tile<1>(rows, a, packed + panel * depth * kPanel<A>, kPanel<A>, depth, tile,
                       kPanel<A>);
    }
  }

  // One step of all sequences that have it. Their rows in projected_ begin at `row`.
  void advance(int64_t step, int64_t row) {
    const int64_t active = times_.active(step);
    const A* fed = fed_[step % 2];
    for_tiles<A>(
        size_.units, active, size_.recurrent, [&](int64_t panel, int64_t first, int64_t count) {
          alignas(64) A tile[kTileRows * kPanel<A>];
          if (w_.norm.on()) {
            std::memset(tile, 0, sizeof(tile));
          } else {
            std::memcpy(tile, projected(panel, row + first), count * kPanel<A> * sizeof(A));
          }
          const A* a[kTileRows] = {};
          for (int64_t i = 0; i < count; ++i) a[i] = fed + (first + i) * size_.recurrent_row;
          multiply(count, a, w_.w_hh, packed_hh_, gate_rows(panel), panel, size_.recurrent, tile);
          for (int64_t i = 0; i < count; ++i) {
            if (w_.norm.on()) {
              keep_product(first + i, panel, tile + i * kPanel<A>);
            } else {
              with_lanes<A>(size_.hidden - panel * kLanes, [&](auto part) {
                become_gates(step, first + i, panel * kLanes, tile + i * kPanel<A>, part);
              });
            }
          }
        });
    if (w_.norm.on()) {
      cpu::parallel_ranges(active, 16 * size_.gates, [&](int64_t begin, int64_t end) {
        for (int64_t k = begin; k < end; ++k) normalize(step, k, row + k);
      });
    }
    if (w_.w_hr != nullptr) project_hidden(step, active);
    clear_ended(step, active);
  }

  const A* projected(int64_t panel, int64_t row) const {
    return projected_ + (panel * chunk_rows_ + row) * kPanel<A>;
  }
  bool last(int64_t step, int64_t k) const { return k >= times_.active(step + 1); }

  // Finishes the units of one row from j on. `sums` [panel] are the pre-activations.
  template <class Lanes>
  ADVDL_INLINE void become_gates(int64_t step, int64_t k, int64_t j, const A* sums, Lanes part) {
    LstmGates<Vec> gates{load(sums), load(sums + kLanes), load(sums + 2 * kLanes),
                         load(sums + 3 * kLanes)};
    const Vec cell = next_cell(step, k, j, gates, part);
    output_hidden(step, k, j, gates.o * math::tanh(cell), part);
  }

  // Activates the gates, writes them and the cell, and returns the cell before zoneout.
  template <class Lanes>
  ADVDL_INLINE Vec next_cell(int64_t step, int64_t k, int64_t j, LstmGates<Vec>& gates,
                             Lanes part) {
    lstm_activate(gates);
    A* state = cell_ + k * size_.hidden_row + j;
    const Vec before = load(state), cell = lstm_cell_state(gates, before);
    Vec after = cell;
    if (p_.zoneout_c.on()) {
      after = lstm_zoneout(zoneout_keep<A>(times_, p_.zoneout_c, step, k, j, size_.hidden), before,
                           cell);
    }
    store(state, after);
    if (p_.gates.data != nullptr) {
      T* row = times_.template row<T>(p_.gates, step, k) + j;
      part.write(row, gates.i);
      part.write(row + size_.hidden, gates.f);
      part.write(row + 2 * size_.hidden, gates.g);
      part.write(row + 3 * size_.hidden, gates.o);
      if (p_.cells.data != nullptr)
        part.write(times_.template row<T>(p_.cells, step, k) + j, after);
    }
    if (last(step, k))
      part.write(static_cast<T*>(p_.c_n) + times_.number(k) * size_.hidden + j, after);
    return cell;
  }

  template <class Lanes>
  ADVDL_INLINE void output_hidden(int64_t step, int64_t k, int64_t j, Vec hidden, Lanes part) {
    if (w_.w_hr != nullptr) {
      store(hidden_ + k * size_.hidden_row + j, hidden);
    } else {
      output(step, k, j, hidden, part);
    }
  }

  // Finishes h of this step: zoneout, then writes the state, y and h_n.
  template <class Lanes>
  ADVDL_INLINE void output(int64_t step, int64_t k, int64_t j, Vec h, Lanes part) {
    const int turn = step % 2;
    if (p_.zoneout_h.on()) {
      const Vec before = load(state_[turn] + k * size_.recurrent_row + j);
      h = lstm_zoneout(zoneout_keep<A>(times_, p_.zoneout_h, step, k, j, size_.recurrent), before,
                       h);
    }
    write_state(1 - turn, k, j, h, part);
    if (p_.y.data != nullptr) part.write(times_.template row<T>(p_.y, step, k) + j, h);
    if (last(step, k))
      part.write(static_cast<T*>(p_.h_n) + times_.number(k) * size_.recurrent + j, h);
  }

  void project_hidden(int64_t step, int64_t active) {
    for_tiles<A>(
        output_panels(), active, size_.hidden, [&](int64_t panel, int64_t first, int64_t count) {
          alignas(64) A tile[kTileRows * kPanel<A>] = {};
          const A* a[kTileRows] = {};
          for (int64_t i = 0; i < count; ++i) a[i] = hidden_ + (first + i) * size_.hidden_row;
          multiply(count, a, w_.w_hr, packed_hr_, output_rows(panel), panel, size_.hidden, tile);
          for (int64_t i = 0; i < count; ++i) {
            for (int64_t v = 0; v < kPanelVectors; ++v) {
              const int64_t j = panel * kPanel<A> + v * kLanes;
              with_lanes<A>(size_.recurrent - j, [&](auto part) {
                output(step, first + i, j, load(tile + i * kPanel<A> + v * kLanes), part);
              });
            }
          }
        });
  }

  void clear_ended(int64_t step, int64_t active) {
    if (p_.shape.sequences.starts != nullptr || p_.y.data == nullptr)
      return;  // packed tensors have no rows for ended sequences
    for (int64_t k = active; k < p_.shape.sequences.batch; ++k)
      std::memset(times_.template row<T>(p_.y, step, k), 0, size_.recurrent * sizeof(T));
  }

  // --- layer norm: needs a whole row of the product before the gates ------------------------------

  A* product_row(int64_t k, int64_t gate) const {
    return product_ + (k * kLstmGates + gate) * size_.hidden_row;
  }
  void keep_product(int64_t k, int64_t panel, const A* sums) {
    for (int64_t gate = 0; gate < kLstmGates; ++gate)
      store(product_row(k, gate) + panel * kLanes, load(sums + gate * kLanes));
  }

  void normalize(int64_t step, int64_t k, int64_t row) {
    const LstmLayerNorm& norm = w_.norm;
    if (p_.products.data != nullptr) {
      T* saved = times_.template row<T>(p_.products, step, k);
      for (int64_t gate = 0; gate < kLstmGates; ++gate) {
        for_vectors<A, 1>(size_.hidden, [&](int64_t j, auto part, auto) {
          part.write(saved + gate * size_.hidden + j, part.read(product_row(k, gate) + j));
        });
      }
    }
    const RowStatistics<A> of_product(product_row(k, 0), kLstmGates, size_.hidden, size_.hidden_row,
                                      norm.eps);
    // The cell and the output gate overwrite the products of the first two gates, which are no longer needed.
    for (int64_t panel = 0; panel < size_.units; ++panel) {
      const int64_t j = panel * kLanes;
      with_lanes<A>(size_.hidden - j, [&](auto part) {
        const A* sums = projected(panel, row);
        Vec a[kLstmGates];
        for (int64_t gate = 0; gate < kLstmGates; ++gate) {
          const int64_t at = gate * size_.hidden + j;
          a[gate] = load(sums + gate * kLanes) +
                    of_product.normalized(load(product_row(k, gate) + j)) *
                        part.read(typed(norm.hh_weight) + at) +
                    part.read(typed(norm.hh_bias) + at);
        }
        LstmGates<Vec> gates{a[0], a[1], a[2], a[3]};
        store(product_row(k, 0) + j, next_cell(step, k, j, gates, part));
        store(product_row(k, 1) + j, gates.o);
      });
    }
    const RowStatistics<A> of_cell(product_row(k, 0), 1, size_.hidden, size_.hidden_row, norm.eps);
    for (int64_t j = 0; j < size_.hidden; j += kLanes) {
      with_lanes<A>(size_.hidden - j, [&](auto part) {
        const Vec cell =
            of_cell.normalized(load(product_row(k, 0) + j)) * part.read(typed(norm.c_weight) + j) +
            part.read(typed(norm.c_bias) + j);
        output_hidden(step, k, j, load(product_row(k, 1) + j) * math::tanh(cell), part);
      });
    }
  }
};

}  // namespace

void add_lstm(cpu::KernelTable& table) {
  table.lstm.forward_workspace = lstm_workspace<Forward, LstmForward>;
  table.lstm.forward = lstm_run<Forward, LstmForward>;
}

}  // namespace ADVDL_CAPABILITY_NAMESPACE
}  // namespace advdl_ops
