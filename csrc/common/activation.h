// The activations that every fused kernel applies, and their derivatives. CPU and CUDA share the formulas.
//
// T is float or double (CUDA, scalar CPU) or a SIMD vector of them (csrc/cpu/simd.h). The primitives that differ
// between these types (exp, expm1, one_plus_exp, tanh, normal_cdf, select) are overloads in `math`, here and in
// csrc/cpu/simd.h and simd_math.h, so that each formula is written once. Formulas and derivatives follow
// torch.nn.functional.
#pragma once

#include <cmath>

#include "tensor_types.h"

namespace advdl_ops {

namespace math {
ADVDL_HOST_DEVICE float exp(float x) { return ::expf(x); }
ADVDL_HOST_DEVICE double exp(double x) { return ::exp(x); }
// The denominator of the sigmoid. The vector version saves a multiplication (csrc/cpu/simd_math.h).
ADVDL_HOST_DEVICE float one_plus_exp(float x) { return 1.0f + ::expf(x); }
ADVDL_HOST_DEVICE double one_plus_exp(double x) { return 1.0 + ::exp(x); }
ADVDL_HOST_DEVICE float expm1(float x) { return ::expm1f(x); }
ADVDL_HOST_DEVICE double expm1(double x) { return ::expm1(x); }
ADVDL_HOST_DEVICE float tanh(float x) { return ::tanhf(x); }
ADVDL_HOST_DEVICE double tanh(double x) { return ::tanh(x); }
// torch's formula. The vector version uses erfc, which does not cancel for negative z and there costs no more than erf
// (csrc/cpu/simd_math.h).
ADVDL_HOST_DEVICE float normal_cdf(float z) {
  return 0.5f * (1.0f + ::erff(z * 0.70710678118654752440f));
}
ADVDL_HOST_DEVICE double normal_cdf(double z) {
  return 0.5 * (1.0 + ::erf(z * 0.70710678118654752440));
}
template <class T>
ADVDL_HOST_DEVICE T select(bool condition, T a, T b) {
  return condition ? a : b;
}
}  // namespace math

// Scalar type of T and a broadcast of a constant; SIMD vectors specialise this.
template <class T>
struct Lanes {
  static ADVDL_HOST_DEVICE T set(double value) { return static_cast<T>(value); }
};

template <class T>
ADVDL_HOST_DEVICE T sigmoid(T z) {
  return Lanes<T>::set(1.0) / math::one_plus_exp(-z);
}

// Whether dz, the gradient of the pre-activation, is stored without rounding in elements of `bytes` bytes. Half
// precision rounds it, except for relu and identity, where dz is dout or 0. It matters because dx and the sums must use
// the same dz.
ADVDL_HOST_DEVICE bool stored_dz_is_exact(int bytes, Activation act) {
  return bytes >= 4 || act == Activation::identity || act == Activation::relu;
}

// y = act(z). NaN passes through every activation, as in torch.
template <class T>
ADVDL_HOST_DEVICE T activate(Activation act, T z, T param) {
  const T zero = Lanes<T>::set(0.0), half = Lanes<T>::set(0.5), one = Lanes<T>::set(1.0);
  switch (act) {
    case Activation::relu:
      return math::select(z < zero, zero, z);
    case Activation::leaky_relu:
      return math::select(z > zero, z, z * param);
    case Activation::elu:
      return math::select(z > zero, z, param * math::expm1(z));
    case Activation::silu:
      return z / math::one_plus_exp(-z);
    case Activation::gelu:
      return z * math::normal_cdf(z);
    case Activation::gelu_tanh: {
      const T inner =
          Lanes<T>::set(0.79788456080286535588) * (z + Lanes<T>::set(0.044715) * z * z * z);
      return half * z * (one + math::tanh(inner));
    }
    case Activation::sigmoid:
      return sigmoid(z);
    case Activation::tanh:
      return math::tanh(z);
    case Activation::hardswish: {
      const T three = Lanes<T>::set(3.0), six = Lanes<T>::set(6.0);
      const T t = z + three;
      const T gate = math::select(t < zero, zero, math::select(t > six, six, t));
      return z * gate / six;
    }
    case Activation::relu6: {
      const T six = Lanes<T>::set(6.0);
      return math::select(z < zero, zero, math::select(z > six, six, z));
    }
    default:
      return z;
  }
}

// d act(z) / dz.
template <class T>
ADVDL_HOST_DEVICE T activate_grad(Activation act, T z, T param) {
  const T zero = Lanes<T>::set(0.0), half = Lanes<T>::set(0.5), one = Lanes<T>::set(1.0);
  switch (act) {
    case Activation::relu:
      return math::select(z <= zero, zero, one);  // 1 at NaN, as in torch
    case Activation::leaky_relu:
      return math::select(z > zero, one, param);
    case Activation::elu:
      return math::select(z > zero, one, param * math::exp(z));
    case Activation::silu: {
      const T s = sigmoid(z);
      return s * (one + z * (one - s));
    }
    case Activation::gelu: {
      const T pdf = Lanes<T>::set(0.39894228040143267794) * math::exp(-half * z * z);
      return math::normal_cdf(z) + z * pdf;
    }
    case Activation::gelu_tanh: {
      const T beta = Lanes<T>::set(0.79788456080286535588), kappa = Lanes<T>::set(0.044715);
      const T t = math::tanh(beta * (z + kappa * z * z * z));
      const T inner_grad = beta * (one + Lanes<T>::set(3.0) * kappa * z * z);
      return half * (one + t) + half * z * (one - t * t) * inner_grad;
    }
    case Activation::sigmoid: {
      const T s = sigmoid(z);
      return s * (one - s);
    }
    case Activation::tanh: {
      const T t = math::tanh(z);
      return one - t * t;
    }
    case Activation::hardswish: {
      const T three = Lanes<T>::set(3.0);
      const T middle = z / three + half;
      return math::select(z <= -three, zero, math::select(z >= three, one, middle));
    }
    case Activation::relu6:  // 0 at both kinks and 1 at NaN, as in torch
      return math::select(z <= zero, zero, math::select(z >= Lanes<T>::set(6.0), zero, one));
    default:
      return one;
  }
}

}  // namespace advdl_ops
