// The sums of every norm on CPU and CUDA: the moments of a set of elements, and the two sums that the gradients need.
#pragma once

#include "tensor_types.h"

namespace advdl_ops {

// Running moments: the number of elements, their mean, and the sum of their squared deviations from it. Two disjoint
// sets are merged after Welford 1962 and Chan, Golub & LeVeque 1979. The variance is never computed as E[x^2] - E[x]^2.
template <class T>
struct Moments {
  T count = T(0), mean = T(0), m2 = T(0);

  // An empty side changes nothing. The order of the products avoids 0 * inf: a square of delta could overflow.
  ADVDL_HOST_DEVICE void merge(const Moments& other) {
    if (other.count == T(0)) return;
    const T total = count + other.count, share = other.count / total;
    const T delta = other.mean - mean;
    m2 += other.m2 + delta * (count * share) * delta;
    mean += delta * share;
    count = total;
  }
};

// The sum of dz, and the sum of dz times the centred x: (x - mean), or (x - mean) * rstd if the kernel says so.
template <class T>
struct GradientSums {
  T dz = T(0), dz_x = T(0);

  ADVDL_HOST_DEVICE void merge(const GradientSums& other) {
    dz += other.dz;
    dz_x += other.dz_x;
  }
};

}  // namespace advdl_ops
