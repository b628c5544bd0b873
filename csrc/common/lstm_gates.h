// The gate arithmetic of one LSTM step and its derivatives: one source for CPU vectors and CUDA scalars.
//
// Hochreiter & Schmidhuber 1997 with a forget gate (Gers et al. 2000). The gates are in torch's order: i, f, g, o.
#pragma once

#include "activation.h"

namespace advdl_ops {

inline constexpr int kLstmGates = 4;

template <class V>
struct LstmGates {
  V i, f, g, o;
};

// Zoneout (Krueger et al. 2017). In training `keep` is 1 or 0, in evaluation it is the rate.
template <class V>
ADVDL_HOST_DEVICE V lstm_zoneout(V keep, V old, V now) {
  return keep * old + (Lanes<V>::set(1.0) - keep) * now;
}

// c' = f c + i g.
template <class V>
ADVDL_HOST_DEVICE V lstm_cell_state(const LstmGates<V>& gates, V cell) {
  return gates.f * cell + gates.i * gates.g;
}

// In place: pre-activations become gates.
template <class V>
ADVDL_HOST_DEVICE void lstm_activate(LstmGates<V>& gates) {
  gates.i = sigmoid(gates.i);
  gates.f = sigmoid(gates.f);
  gates.g = math::tanh(gates.g);
  gates.o = sigmoid(gates.o);
}

// Returns the gradients of the pre-activations. `cell` is c, t is tanh(c') or, with layer norm, tanh of the normalized
// c'; dhidden is the gradient of o t. dcell comes in as the whole gradient of c', including the part through t, and
// becomes that of c.
template <class V>
ADVDL_HOST_DEVICE LstmGates<V> lstm_gates_backward(const LstmGates<V>& gates, V cell, V t,
                                                   V dhidden, V& dcell) {
  const V one = Lanes<V>::set(1.0);
  const LstmGates<V> d{
      dcell * gates.g * (gates.i * (one - gates.i)), dcell * cell * (gates.f * (one - gates.f)),
      dcell * gates.i * (one - gates.g * gates.g), dhidden * t * (gates.o * (one - gates.o))};
  dcell = dcell * gates.f;
  return d;
}

}  // namespace advdl_ops
