// The gate arithmetic of one LSTM step and its derivatives: one text for CPU vectors and CUDA scalars.
//
// Hochreiter & Schmidhuber 1997 with a forget gate (Gers et al. 2000); torch's order of the gates: i, f, g, o.
#pragma once

#include "activation.h"

namespace advdl_ops {

inline constexpr int kLstmGates = 4;

template <class V>
struct LstmGates {
  V i, f, g, o;
};

// What is kept of `old`, where `keep` is 1, 0 or, in evaluation, the rate of the zoneout (Krueger et al. 2017).
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

// The gradients of the pre-activations; dcell, that of c' beside its way through the hidden state, becomes that of c.
// With t = tanh(c'), or of what the layer norm makes of c': dhidden is the gradient of o t, and dcell includes its way through t.
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
