// The gradients of y = act(batch_norm(x) + residual) on CUDA. Algorithms, bytes and launches: docs/kernels.md.
//
//   training         fused, or reduce + apply (channels_last: + finalize_grads between)
//   eval, or no dx   reduce (which writes dx) + finalize_grads
//   means given      apply
#include "batch_norm_act_plan.h"

namespace advdl_ops::cuda {
namespace {

using Backward = BatchNormActBackward;

// Sets constants 0 (mean), 1 (rstd * weight) and 2 (bias). Ends with a barrier.
template <class A>
__device__ __forceinline__ void backward_constants(const Backward& p, const Plan& plan,
                                                   int64_t tile, int width, A* constants) {
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < width; i += static_cast<int>(blockDim.x)) {
    const int64_t c = tile * width + i;
    if (c >= plan.channels) continue;
    constants[i] = static_cast<const A*>(p.mean)[c];
    constants[width + i] =
        static_cast<const A*>(p.rstd)[c] * load_param<A>(p.weight, p.shape.weight_dtype, c, A(1));
    constants[2 * width + i] = load_param<A>(p.bias, p.shape.weight_dtype, c, A(0));
  }
  __syncthreads();
}

// Sets constants 3 (shift) and 4 (slope) from the channel's sums of dz and dz * (x - mean), or without sums from dbias
// and dweight, which are sums too, or given means. With sums and `write`, writes dbias and dweight. Ends with a barrier.
template <class A>
__device__ __forceinline__ void gradient_constants(const Backward& p, const Plan& plan,
                                                   int64_t tile, bool write, int width,
                                                   const GradientSums<A>* sums, A* constants) {
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < width; i += static_cast<int>(blockDim.x)) {
    const int64_t c = tile * width + i;
    if (c >= plan.channels) continue;
    A dbias, dweight;
    const A rstd = static_cast<const A*>(p.rstd)[c];
    if (sums != nullptr) {
      dbias = sums[i].dz;
      dweight = sums[i].dz_x * rstd;
      if (write) {
        static_cast<A*>(p.dbias)[c] = dbias;
        static_cast<A*>(p.dweight)[c] = dweight;
      }
    } else {
      dbias = static_cast<const A*>(p.dbias)[c];
      dweight = static_cast<const A*>(p.dweight)[c];
    }
    if (constants != nullptr) {
      const A share = constants[width + i] / (p.means_given ? A(1) : static_cast<A>(plan.count));
      constants[3 * width + i] = share * dbias;
      constants[4 * width + i] = share * dweight * rstd;
    }
  }
  __syncthreads();
}

template <class T, int V, bool CL, bool Simple>
__global__ void __launch_bounds__(kThreads, 2)
    batch_norm_act_backward_reduce(const Backward p, const Plan plan, acc_t<T>* workspace) {
  using A = acc_t<T>;
  constexpr int Lanes = CL ? V : 1;
  ADVDL_DYNAMIC_SHARED(memory);
  const BatchNormShared<T, V, CL, GradientSums> shared(memory, plan, 3, 0, true);
  const int width = shared.width(plan);
  const Place place = block_place(plan);
  backward_constants(p, plan, place.tile, width, shared.constants);
  ForwardLanes<A, Lanes> lanes;
  lanes.load(shared.constants, plan.columns);
  GradientSums<A> sums[Lanes] = {};
  accumulate_gradients<T, V, CL, Simple>(
      p, plan, block_work<V, CL>(plan, place), lanes, p.training ? nullptr : static_cast<T*>(p.dx),
      static_cast<Pack<T, V>*>(nullptr), static_cast<Pack<T, V>*>(nullptr), sums);
  block_reduce(sums, plan.columns, shared.reduction.scratch, shared.reduction.result);
  store_partials(plan, place, width, shared.reduction.result, workspace);
}

template <class A>
__global__ void __launch_bounds__(kFinalizeThreads, 1)
    batch_norm_finalize_grads(const Backward p, const Plan plan, const A* workspace) {
  ADVDL_DYNAMIC_SHARED(memory);
  SharedArena arena(memory);
  const Reduction<GradientSums<A>> reduction(arena, static_cast<int>(blockDim.x), kFinalizeColumns,
                                             1);
  const int64_t tile = blockIdx.x;
  merge_partials(workspace, plan.splits, plan.channels, tile * kFinalizeColumns, kFinalizeColumns,
                 reduction.scratch, reduction.result);
  gradient_constants(p, plan, tile, true, kFinalizeColumns, reduction.result,
                     static_cast<A*>(nullptr));
}

template <class T, int V, bool CL, bool Simple>
__global__ void __launch_bounds__(kThreads, 2)
    batch_norm_act_backward_apply(const Backward p, const Plan plan, const acc_t<T>* workspace) {
  using A = acc_t<T>;
  ADVDL_DYNAMIC_SHARED(memory);
  const BatchNormShared<T, V, CL, GradientSums> shared(memory, plan, 5, 0, !CL);
  const int width = shared.width(plan);
  const Place place = block_place(plan);
  backward_constants(p, plan, place.tile, width, shared.constants);
  if (!CL && !p.means_given)
    merge_partials(workspace, plan.splits, plan.channels, place.tile, 1, shared.reduction.scratch,
                   shared.reduction.result);
  gradient_constants(p, plan, place.tile, place.split == 0, width,
                     CL || p.means_given ? nullptr : shared.reduction.result, shared.constants);
  BackwardLanes<A, CL ? V : 1> lanes;
  lanes.load(shared.constants, plan.columns);
  apply_backward<T, V, CL, Simple>(p, plan, block_work<V, CL>(plan, place), lanes,
                                   static_cast<const Pack<T, V>*>(nullptr),
                                   static_cast<const Pack<T, V>*>(nullptr));
}

template <class T, int V, bool CL, bool Simple>
__global__ void __launch_bounds__(kFusedThreads, 1)
    batch_norm_act_backward_fused(const Backward p, const Plan plan) {
  using A = acc_t<T>;
  constexpr int Lanes = CL ? V : 1;
  ADVDL_DYNAMIC_SHARED(memory);
  const BatchNormShared<T, V, CL, GradientSums> shared(memory, plan, 5, plan.keep_dz ? 2 : 1, true);
  Pack<T, V>* const kept_dz = plan.keep_dz ? shared.dz : nullptr;
  const int width = shared.width(plan);
  const Place place = block_place(plan);
  const Work work = block_work<V, CL>(plan, place);
  backward_constants(p, plan, place.tile, width, shared.constants);
  GradientSums<A> sums[Lanes] = {};
  {
    ForwardLanes<A, Lanes> lanes;
    lanes.load(shared.constants, plan.columns);
    accumulate_gradients<T, V, CL, Simple>(p, plan, work, lanes, static_cast<T*>(nullptr), shared.x,
                                           kept_dz, sums);
  }
  block_reduce(sums, plan.columns, shared.reduction.scratch, shared.reduction.result);
  gradient_constants(p, plan, place.tile, true, width, shared.reduction.result, shared.constants);
  BackwardLanes<A, Lanes> lanes;
  lanes.load(shared.constants, plan.columns);
  apply_backward<T, V, CL, Simple>(p, plan, work, lanes, static_cast<const Pack<T, V>*>(shared.x),
                                   static_cast<const Pack<T, V>*>(kept_dz));
}

// In training mode, dx needs a second pass because it depends on the sums of the first.
bool has_second_pass(const Backward& p) { return p.training && p.dx != nullptr; }

// Slabs that the fused backward keeps in shared memory: 2 (x and dz), 1 (x), or 0 if the fused path is not used.
int fused_slabs(const Backward& p) {
  if (!has_second_pass(p) || p.means_given) return 0;
  const int slabs =
      slabs_that_fit(p.shape, stored_dz_is_exact(element_bytes(p.shape.dtype), p.act) ? 2 : 1);
  const bool fused =
      slabs > 0 && fused_is_faster(p.shape, backward_traffic(p, slabs), backward_traffic(p, 0));
  return fused ? slabs : 0;
}

}  // namespace

size_t batch_norm_act_backward_workspace(const BatchNormActBackward& p) {
  const bool none = p.shape.c == 0 || is_empty(p.shape) || p.means_given || fused_slabs(p) > 0;
  return none ? 0 : partials_bytes(p.shape, 2);
}

void batch_norm_act_backward(const BatchNormActBackward& p, void* workspace, void* stream) {
  if (p.shape.c == 0) return;
  if (is_empty(p.shape)) {
    if (p.means_given) return;
    zero_values(p.dweight, p.shape.c, p.shape.dtype, stream);
    zero_values(p.dbias, p.shape.c, p.shape.dtype, stream);
    return;
  }
  const int slabs = fused_slabs(p);
  dispatch(
      p.shape, p.act, vector_aligned(p.x, p.dout, p.saved, p.dx, p.dresidual),
      [&]<class T, int V, bool CL, bool Simple>() {
        using A = acc_t<T>;
        Plan plan = make_plan(p.shape, V, slabs > 0, kBackwardUnroll);
        plan.reads_dz = stored_dz_is_exact(element_bytes(p.shape.dtype), p.act);
        const auto config = [&](int which, int slabs, bool reduces) {
          const BatchNormShared<T, V, CL, GradientSums> shared(nullptr, plan, which, slabs,
                                                               reduces);
          return tile_config(plan, shared.arena.bytes, stream);
        };
        if (slabs > 0) {
          plan.keep_dz = slabs > 1;
          launch("batch_norm_act_backward_fused", &batch_norm_act_backward_fused<T, V, CL, Simple>,
                 config(5, slabs, true), p, plan);
          return;
        }
        Arena arena(workspace);
        A* partials = p.means_given ? nullptr : BatchNormPartials<A>(p.shape, 2, arena).values;
        if (!p.means_given)
          launch("batch_norm_act_backward_reduce",
                 &batch_norm_act_backward_reduce<T, V, CL, Simple>, config(3, 0, true), p, plan,
                 partials);
        if (!p.means_given && (CL || !has_second_pass(p)))
          launch("batch_norm_finalize_grads", &batch_norm_finalize_grads<A>,
                 finalize_config<GradientSums<A>>(divide_up(plan.channels, kFinalizeColumns),
                                                  plan.splits * kFinalizeColumns, kFinalizeColumns,
                                                  stream),
                 p, plan, partials);
        if (!has_second_pass(p)) return;
        plan.backwards = !p.means_given;
        launch("batch_norm_act_backward_apply", &batch_norm_act_backward_apply<T, V, CL, Simple>,
               config(5, 0, !CL), p, plan, partials);
      });
}

}  // namespace advdl_ops::cuda
