// Mean and sum of squared deviations of a set, and the merge of two disjoint sets (Chan, Golub, LeVeque 1979):
// the statistics of every norm, on CPU and CUDA. Never E[x^2] - E[x]^2.
#pragma once

#include "activation.h"

namespace advdl_ops {

template <class T>
struct Welford {
  T count = T(0), mean = T(0), m2 = T(0);

  // An empty side changes nothing. The products are ordered so that a zero weight cannot meet an overflow.
  ADVDL_HOST_DEVICE void merge(const Welford& other) {
    if (other.count == T(0)) return;
    const T total = count + other.count, share = other.count / total;
    const T delta = other.mean - mean;
    m2 += other.m2 + delta * (count * share) * delta;
    mean += delta * share;
    count = total;
  }
};

// Two sums that belong together (bias and weight gradient of a norm).
template <class T>
struct SumPair {
  T first = T(0), second = T(0);

  ADVDL_HOST_DEVICE void merge(const SumPair& other) {
    first += other.first;
    second += other.second;
  }
};

}  // namespace advdl_ops
