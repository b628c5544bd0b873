// The gradients of act(group_norm(x) + residual) on CUDA, channels_first. A team of threads, at most a warp, takes a
// row (the S elements of one channel in one sample) or a part of it. So the sums per channel need no lookup and no
// barrier. Algorithms, bytes and launches: docs/kernels.md.
//
//   fused + finalize_grads, or reduce + finalize_grads + apply
#include "group_norm_plan.h"

namespace advdl_ops::cuda {
namespace {

constexpr int64_t kPartElements = 1024;  // a part of a row has about this many elements, or more

template <class T, int V>
struct RowsShared {
  using A = acc_t<T>;
  SharedArena arena;
  Pack<T, V>*x, *dz;
  GradientSums<A>* items;
  Reduction<GradientSums<A>> reduction;

  ADVDL_HOST_DEVICE RowsShared(unsigned char* base, const GroupPlan& plan, int slabs)
      : arena(base),
        x(arena.take<Pack<T, V>>(slots(plan))),
        dz(arena.take<Pack<T, V>>(slabs > 1 ? slots(plan) : 0)),
        items(arena.take<GradientSums<A>>(tile_items(plan))),
        reduction(arena, plan.threads, plan.columns, 1, plan.columns == 1) {}

  static ADVDL_HOST_DEVICE int64_t tile_items(const GroupPlan& plan) {
    return plan.columns * plan.set_channels * plan.splits;
  }
  // Packs of a thread in one part of a row.
  static ADVDL_HOST_DEVICE int64_t rounds(const GroupPlan& plan) {
    return (plan.per_split + plan.team - 1) / plan.team;
  }
  static ADVDL_HOST_DEVICE int64_t waves(const GroupPlan& plan) {
    const int64_t teams = plan.threads / plan.team;
    return (tile_items(plan) + teams - 1) / teams;
  }
  static ADVDL_HOST_DEVICE int64_t slots(const GroupPlan& plan) {
    return waves(plan) * rounds(plan) * plan.threads;
  }
};

// A team's share of the work: part item % splits of row item / splits. It is empty past the last item.
__device__ __forceinline__ Work row_work(const GroupPlan& plan, int64_t item) {
  Work work;
  work.row = item / plan.splits;
  work.stride = plan.team;
  work.member = static_cast<int>(threadIdx.x) % plan.team;
  work.slot = static_cast<int>(threadIdx.x);
  work.slot_step = static_cast<int>(blockDim.x);
  if (work.row >= plan.channels) return work;
  work.begin = item % plan.splits * plan.per_split;
  work.end =
      work.begin + plan.per_split < plan.positions ? work.begin + plan.per_split : plan.positions;
  return work;
}

template <class A>
struct RowLanes : BackwardLanes<A, 1> {
  A rstd = A(0);

  __device__ __forceinline__ void load(const GroupNormBackward& p, const GroupPlan& plan,
                                       int64_t row) {
    if (row >= plan.channels) return;
    const auto statistics = load_statistics<A>(p, row / plan.set_channels);
    const int64_t c = row % plan.c;
    rstd = statistics.rstd;
    this->mean[0] = statistics.mean;
    this->scale[0] = rstd * load_param<A>(p.weight, p.shape.weight_dtype, c, A(1));
    this->bias[0] = load_param<A>(p.bias, p.shape.weight_dtype, c, A(0));
  }
  __device__ __forceinline__ void load(const SetGradient<A>& gradient) {
    this->shift[0] = gradient.shift;
    this->slope[0] = gradient.slope;
  }
};

// Returns the sums of dz and dz * xhat of a part of a row to every thread of the team.
template <class T, int V, bool Simple>
__device__ __forceinline__ GradientSums<acc_t<T>> accumulate_row(const GroupNormBackward& p,
                                                                 const GroupPlan& plan,
                                                                 const Work& work,
                                                                 Pack<T, V>* kept_x,
                                                                 Pack<T, V>* kept_dz) {
  using A = acc_t<T>;
  RowLanes<A> lanes;
  lanes.load(p, plan, work.row);
  GradientSums<A> sums[1] = {};
  accumulate_gradients<T, V, false, Simple>(p, plan, work,
                                            static_cast<const ForwardLanes<A, 1>&>(lanes),
                                            static_cast<T*>(nullptr), kept_x, kept_dz, sums);
  sums[0].dz_x *= lanes.rstd;
  team_reduce(sums[0], plan.team);
  return sums[0];
}

__device__ __forceinline__ int64_t team_item(const GroupPlan& plan) {
  const int64_t teams = static_cast<int>(blockDim.x) / plan.team;
  return block_place(plan).tile * teams + static_cast<int>(threadIdx.x) / plan.team;
}

template <class T, int V, bool Simple>
__global__ void __launch_bounds__(kThreads, 2)
    group_norm_backward_reduce_rows(const GroupNormBackward p, const GroupPlan plan,
                                    acc_t<T>* workspace) {
  const int64_t item = team_item(plan);
  const Work work = row_work(plan, item);
  const auto sums = accumulate_row<T, V, Simple>(p, plan, work, static_cast<Pack<T, V>*>(nullptr),
                                                 static_cast<Pack<T, V>*>(nullptr));
  if (work.member == 0 && work.row < plan.channels)
    store_partial(workspace, plan.splits, plan.channels, item % plan.splits, work.row, sums);
}

template <class T, int V, bool Simple>
__global__ void __launch_bounds__(kThreads, 2)
    group_norm_backward_apply_rows(const GroupNormBackward p, const GroupPlan plan,
                                   const SetGradient<acc_t<T>>* gradients) {
  using A = acc_t<T>;
  const Work work = row_work(plan, team_item(plan));
  if (work.row >= plan.channels) return;
  RowLanes<A> lanes;
  lanes.load(p, plan, work.row);
  lanes.load(gradients[work.row / plan.set_channels]);
  apply_backward<T, V, false, Simple>(p, plan, work, static_cast<const BackwardLanes<A, 1>&>(lanes),
                                      static_cast<const Pack<T, V>*>(nullptr),
                                      static_cast<const Pack<T, V>*>(nullptr));
}

// Also writes the sums of each channel of each sample to the workspace, for finalize_grads, unless that is null.
template <class T, int V, bool Simple>
__global__ void __launch_bounds__(kFusedThreads, 1)
    group_norm_backward_fused_rows(const GroupNormBackward p, const GroupPlan plan,
                                   acc_t<T>* workspace) {
  using A = acc_t<T>;
  using Shared = RowsShared<T, V>;
  ADVDL_DYNAMIC_SHARED(memory);
  const Shared shared(memory, plan, plan.keep_dz ? 2 : 1);
  Pack<T, V>* const kept_dz = plan.keep_dz ? shared.dz : nullptr;
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int64_t tile = block_place(plan).tile;
  const int64_t items = Shared::tile_items(plan), teams = threads / plan.team;
  const int wave_slots = static_cast<int>(Shared::rounds(plan)) * threads;
  // All threads take part in all waves, because a team's reduction needs its whole warp.
  const int64_t padded = Shared::waves(plan) * teams;
  int slots = 0;
#pragma unroll 1
  for (int64_t item = thread / plan.team; item < padded; item += teams, slots += wave_slots) {
    // Items past the end of the tile get no row. They must not become items of the next tile.
    Work work = row_work(plan, item < items ? tile * items + item : plan.channels * plan.splits);
    work.slot += slots;
    const auto sums = accumulate_row<T, V, Simple>(p, plan, work, shared.x, kept_dz);
    if (work.member == 0 && item < items) shared.items[item] = sums;
  }
  __syncthreads();

  const int64_t rows = plan.columns * plan.set_channels;
#pragma unroll 1
  for (int64_t i = thread; workspace != nullptr && i < rows; i += threads) {
    if (tile * rows + i >= plan.channels) break;
    GradientSums<A> sums{};
#pragma unroll 1
    for (int64_t part = 0; part < plan.splits; ++part)
      sums.merge(shared.items[i * plan.splits + part]);
    store_partial(workspace, 1, plan.channels, 0, tile * rows + i, sums);
  }

  const int set_threads = threads / plan.columns;
  const int64_t set_items = plan.set_channels * plan.splits, column = thread / set_threads;
  const int64_t first = (tile * plan.columns + column) % plan.groups * plan.set_channels;
  GradientSums<A> states[1] = {};
#pragma unroll 1
  for (int64_t i = thread % set_threads; i < set_items; i += set_threads)
    states[0].merge(weighted(p, first + i / plan.splits, shared.items[column * set_items + i]));
  reduce_columns<false>(states, plan.columns, shared.reduction.scratch, shared.reduction.result);

  slots = 0;
#pragma unroll 1
  for (int64_t item = thread / plan.team; item < items; item += teams, slots += wave_slots) {
    Work work = row_work(plan, tile * items + item);
    if (work.row >= plan.channels) return;
    work.slot += slots;
    RowLanes<A> lanes;
    lanes.load(p, plan, work.row);
    lanes.load(set_gradient(plan, lanes.rstd, shared.reduction.result[item / set_items]));
    apply_backward<T, V, false, Simple>(
        p, plan, work, static_cast<const BackwardLanes<A, 1>&>(lanes),
        static_cast<const Pack<T, V>*>(shared.x), static_cast<const Pack<T, V>*>(kept_dz));
  }
}

// ---- host ----

// Parts of a row, each for one team. There are many more of them than run at a time, so that the tail of the launch is
// short.
int64_t row_parts(const GroupNormShape& s) {
  const int64_t useful = divide_up(kMultiprocessors * 96, s.n * s.c);
  return std::max<int64_t>(1, std::min(divide_up(s.s, kPartElements), useful));
}

GroupPlan row_plan(const GroupNormShape& s, int v, bool fused) {
  GroupPlan plan = make_plan(s);
  set_rows(plan, s.n * s.c, s.s, v);
  // About four packs per thread, and at least 128 bytes per team if the row has them.
  const int64_t least = std::min<int64_t>(8, power_of_two_above(plan.packs));
  plan.team = static_cast<int>(
      std::min<int64_t>(kWarp, std::max(least, power_of_two_above(divide_up(plan.packs, 4)))));
  if (!fused) {
    plan.splits = row_parts(s);
    plan.tiles = divide_up(plan.channels * plan.splits, plan.threads / plan.team);
  } else {
    const int64_t set_packs = plan.set_channels * plan.packs;
    plan.threads = fused_threads(set_packs, kBackwardUnroll);
    if (set_packs <= kTeamPacks) {
      plan.threads = kTeamThreads;
      plan.columns = kTeamThreads;
      while (plan.columns * set_packs > 4 * kTeamPacks) plan.columns /= 2;
    }
    plan.tiles = divide_up(plan.sets, plan.columns);
    plan.splits = divide_up(plan.packs, 2 * plan.team);
  }
  plan.per_split = divide_up(plan.positions, plan.splits);
  return plan;
}

// Slabs that the fused kernel keeps in shared memory: 2 (x and dz), 1 (x), or 0 if the fused path is not used.
int fused_slabs(const GroupNormBackward& p) {
  const GroupNormShape& s = p.shape;
  if (p.dx == nullptr) return 0;
  const int v = pack_elements(s.dtype);
  const GroupPlan plan = row_plan(s, v, true);
  Balance balance{};
  balance.tensor_bytes = plan.size * element_bytes(s.dtype);
  balance.fused_tiles = plan.tiles;
  balance.tile_bytes = plan.columns * plan.count * element_bytes(s.dtype);
  balance.split_blocks = row_plan(s, v, false).tiles;
  balance.more_launches = p.dweight != nullptr ? 1 : 2;
  return slabs_of_fused(p, balance, [&](int slabs) {
    return fits<false>(s.dtype, row_takes_packs(s.s, v), [&]<class T, int V>() -> int64_t {
      return RowsShared<T, V>(nullptr, row_plan(s, V, true), slabs).arena.bytes;
    });
  });
}

template <class T, int V, bool Simple>
void row_path(const GroupNormBackward& p, int slabs, void* workspace, void* stream) {
  using A = acc_t<T>;
  Arena arena(workspace);
  GroupPlan plan = row_plan(p.shape, V, slabs > 0);
  plan.reads_dz = stored_dz_is_exact(element_bytes(p.shape.dtype), p.act);
  plan.keep_dz = slabs > 1;
  if (slabs > 0) {
    const GroupNormPartials<A> partials(2, p.dweight != nullptr, plan.channels, arena);
    const RowsShared<T, V> shared(nullptr, plan, slabs);
    launch("group_norm_backward_fused_rows", &group_norm_backward_fused_rows<T, V, Simple>,
           block_per_tile(plan, 1, shared.arena.bytes, stream), p, plan,
           p.dweight != nullptr ? partials.values : nullptr);
    plan.splits = 1;
    group_norm_finalize_gradients(p, plan, partials.values, nullptr, stream);
    return;
  }
  const GroupNormBackwardMemory<A> memory(plan.splits, plan.channels, plan.sets, arena);
  launch("group_norm_backward_reduce_rows", &group_norm_backward_reduce_rows<T, V, Simple>,
         block_per_tile(plan, 1, 0, stream), p, plan, memory.partials);
  group_norm_finalize_gradients(p, plan, memory.partials,
                                p.dx != nullptr ? memory.gradients : nullptr, stream);
  if (p.dx == nullptr) return;
  plan.backwards = true;
  launch("group_norm_backward_apply_rows", &group_norm_backward_apply_rows<T, V, Simple>,
         block_per_tile(plan, 1, 0, stream), p, plan, memory.gradients);
}

}  // namespace

size_t group_norm_backward_rows_workspace(const GroupNormBackward& p) {
  const GroupNormShape& s = p.shape;
  const bool fused = fused_slabs(p) > 0;
  return bytes_taken([&](Arena& arena) {
    with_acc_type(s.dtype, [&]<class A>() {
      if (fused)
        GroupNormPartials<A>(2, p.dweight != nullptr, s.n * s.c, arena);
      else
        GroupNormBackwardMemory<A>(row_parts(s), s.n * s.c, s.sets(), arena);
    });
  });
}

void group_norm_backward_rows(const GroupNormBackward& p, void* workspace, void* stream) {
  const int slabs = fused_slabs(p);
  const bool vectors = vector_aligned(p.x, p.dout, p.saved, p.dx, p.dresidual) &&
                       row_takes_packs(p.shape.s, pack_elements(p.shape.dtype));
  dispatch_packs<false>(p.shape.dtype, vectors, p.act, [&]<class T, int V, bool, bool Simple>() {
    row_path<T, V, Simple>(p, slabs, workspace, stream);
  });
}

}  // namespace advdl_ops::cuda
