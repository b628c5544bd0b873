// Winograd's transforms of a tile of outputs, its inputs and its filter.
//
// A tile of MH x MW outputs is made of (MH + 2) x (MW + 2) inputs d: out = A^T [(G g G^T) * (B^T d B)] A, with one
// product per *point* (an element of the transformed tile) in place of nine per output: 4 for each output of 2x2, 3 of
// 2x4, 2.25 of 4x4.
#pragma once

#include "../common/winograd_conv2d.h"
#include "simd.h"

namespace advdl_ops {
namespace ADVDL_CAPABILITY_NAMESPACE {

using Vec = Simd<float>::Vec;
inline constexpr int64_t kLanes = Simd<float>::lanes;
inline constexpr int64_t kTaps = 9;

// One axis: M outputs, T = M + 2 points.

template <int M>
struct Axis;

// Points 0, 1, -1 and infinity.
template <>
struct Axis<2> {
  static constexpr int T = 4;
  static constexpr double kWeights[T][3] = {{1, 0, 0}, {.5, .5, .5}, {.5, -.5, .5}, {0, 0, 1}};
  // to[i * to_step] = row i of G (kWeights) times from[j * step]
  ADVDL_INLINE static void weights(const DoubleVec* from, int step, DoubleVec* to, int to_step) {
    const DoubleVec even = (from[0] + from[2 * step]) * .5, odd = from[step] * .5;
    to[0] = from[0];
    to[to_step] = even + odd;
    to[2 * to_step] = even - odd;
    to[3 * to_step] = from[2 * step];
  }
  // to[i * step] = row i of B^T times from[j * step]
  ADVDL_INLINE static void inputs(const Vec* from, int step, Vec* to) {
    const Vec d0 = from[0], d1 = from[step], d2 = from[2 * step], d3 = from[3 * step];
    to[0] = d0 - d2;
    to[step] = d1 + d2;
    to[2 * step] = d2 - d1;
    to[3 * step] = d1 - d3;
  }
  // to[i * to_step] = row i of A^T times from[j * step]
  ADVDL_INLINE static void outputs(const Vec* from, int step, Vec* to, int to_step) {
    const Vec m1 = from[step], m2 = from[2 * step];
    to[0] = from[0] + m1 + m2;
    to[to_step] = m1 - m2 - from[3 * step];
  }
  // to[i * step] = row i of A times from[j * from_step]
  ADVDL_INLINE static void gradients(const Vec* from, int from_step, Vec* to, int step) {
    const Vec z0 = from[0], z1 = from[from_step];
    to[0] = z0;
    to[step] = z0 + z1;
    to[2 * step] = z0 - z1;
    to[3 * step] = -z1;
  }
};

// Points 0, +-a, +-b and infinity.
inline constexpr double kA = 0.625, kB = 1.5, kA2 = kA * kA, kB2 = kB * kB;
template <>
struct Axis<4> {
  static constexpr int T = 6;
  static constexpr double kNa = 2 * kA2 * (kA2 - kB2), kNb = 2 * kB2 * (kB2 - kA2);
  static constexpr double kWeights[T][3] = {
      {1 / (kA2 * kB2), 0, 0},         {1 / kNa, kA / kNa, kA2 / kNa},
      {1 / kNa, -kA / kNa, kA2 / kNa}, {1 / kNb, kB / kNb, kB2 / kNb},
      {1 / kNb, -kB / kNb, kB2 / kNb}, {0, 0, 1}};
  ADVDL_INLINE static void weights(const DoubleVec* from, int step, DoubleVec* to, int to_step) {
    const DoubleVec g0 = from[0], g1 = from[step], g2 = from[2 * step];
    const DoubleVec even_a = g0 * (1 / kNa) + g2 * (kA2 / kNa), odd_a = g1 * (kA / kNa);
    const DoubleVec even_b = g0 * (1 / kNb) + g2 * (kB2 / kNb), odd_b = g1 * (kB / kNb);
    to[0] = g0 * (1 / (kA2 * kB2));
    to[to_step] = even_a + odd_a;
    to[2 * to_step] = even_a - odd_a;
    to[3 * to_step] = even_b + odd_b;
    to[4 * to_step] = even_b - odd_b;
    to[5 * to_step] = g2;
  }
  ADVDL_INLINE static void inputs(const Vec* from, int step, Vec* to) {
    constexpr float a = kA, b = kB, a2 = kA2, b2 = kB2, ab = kA2 * kB2, sum = kA2 + kB2;
    const Vec d0 = from[0], d1 = from[step], d2 = from[2 * step], d3 = from[3 * step];
    const Vec d4 = from[4 * step], d5 = from[5 * step];
    const Vec even_a = d4 - d2 * b2, odd_a = d3 - d1 * b2, even_b = d4 - d2 * a2,
              odd_b = d3 - d1 * a2;
    to[0] = d0 * ab + (d4 - d2 * sum);
    to[step] = even_a + odd_a * a;
    to[2 * step] = even_a - odd_a * a;
    to[3 * step] = even_b + odd_b * b;
    to[4 * step] = even_b - odd_b * b;
    to[5 * step] = d1 * ab + (d5 - d3 * sum);
  }
  ADVDL_INLINE static void outputs(const Vec* from, int step, Vec* to, int to_step) {
    constexpr float a = kA, b = kB, a2 = kA2, b2 = kB2, a3 = kA2 * kA, b3 = kB2 * kB;
    const Vec m1 = from[step], m2 = from[2 * step], m3 = from[3 * step], m4 = from[4 * step];
    const Vec sum_a = m1 + m2, sum_b = m3 + m4, odd_a = m1 - m2, odd_b = m3 - m4;
    to[0] = from[0] + sum_a + sum_b;
    to[to_step] = odd_a * a + odd_b * b;
    to[2 * to_step] = sum_a * a2 + sum_b * b2;
    to[3 * to_step] = odd_a * a3 + odd_b * b3 + from[5 * step];
  }
  ADVDL_INLINE static void gradients(const Vec* from, int from_step, Vec* to, int step) {
    constexpr float a = kA, b = kB, a2 = kA2, b2 = kB2, a3 = kA2 * kA, b3 = kB2 * kB;
    const Vec z0 = from[0], z1 = from[from_step], z2 = from[2 * from_step],
              z3 = from[3 * from_step];
    const Vec even_a = z0 + z2 * a2, odd_a = z1 * a + z3 * a3;
    const Vec even_b = z0 + z2 * b2, odd_b = z1 * b + z3 * b3;
    to[0] = z0;
    to[step] = even_a + odd_a;
    to[2 * step] = even_a - odd_a;
    to[3 * step] = even_b + odd_b;
    to[4 * step] = even_b - odd_b;
    to[5 * step] = z3;
  }
};

template <int MH_, int MW_>
struct Tile {
  static constexpr int MH = MH_, MW = MW_;
  using H = Axis<MH>;
  using W = Axis<MW>;
  static constexpr int TH = H::T, TW = W::T, points = TH * TW;

  // m [TH][TW] = G g G^T of g [3][3]
  ADVDL_INLINE static void weights(const DoubleVec* g, DoubleVec* m) {
    DoubleVec rows[TH * 3];
    for (int b = 0; b < 3; ++b) H::weights(g + b, 3, rows + b, 3);
    for (int i = 0; i < TH; ++i) W::weights(rows + i * 3, 1, m + i * TW, 1);
  }
  // In place: B^T d B.
  ADVDL_INLINE static void inputs(Vec* d) {
    for (int j = 0; j < TW; ++j) H::inputs(d + j, TW, d + j);
    for (int i = 0; i < TH; ++i) W::inputs(d + i * TW, 1, d + i * TW);
  }
  // out [MH][MW] = A^T m A
  ADVDL_INLINE static void outputs(const Vec* m, Vec* out) {
    Vec rows[MH * TW];
    for (int j = 0; j < TW; ++j) H::outputs(m + j, TW, rows + j, TW);
    for (int i = 0; i < MH; ++i) W::outputs(rows + i * TW, 1, out + i * MW, 1);
  }
  // m = A dz A^T of dz [MH][MW]
  ADVDL_INLINE static void gradients(const Vec* dz, Vec* m) {
    Vec rows[MH * TW];
    for (int i = 0; i < MH; ++i) W::gradients(dz + i * MW, 1, rows + i * TW, 1);
    for (int j = 0; j < TW; ++j) H::gradients(rows + j, TW, m + j, TW);
  }
  // g [3][3] = G^T m G
  ADVDL_INLINE static void filters(const Vec* m, Vec* g) {
    for (int a = 0; a < 3; ++a) {
      Vec row[TW];
      for (int j = 0; j < TW; ++j) {
        row[j] = Vec{};
        for (int i = 0; i < TH; ++i)
          row[j] += m[i * TW + j] * static_cast<float>(H::kWeights[i][a]);
      }
      for (int b = 0; b < 3; ++b) {
        g[a * 3 + b] = Vec{};
        for (int j = 0; j < TW; ++j) g[a * 3 + b] += row[j] * static_cast<float>(W::kWeights[j][b]);
      }
    }
  }
};

// f(Tile<..>{})
template <class F>
auto with_tile(WinogradTile tile, F&& f) {
  switch (tile) {
    case WinogradTile::two_by_two:
      return f(Tile<2, 2>{});
    case WinogradTile::two_by_four:
      return f(Tile<2, 4>{});
    default:
      return f(Tile<4, 4>{});
  }
}

}  // namespace ADVDL_CAPABILITY_NAMESPACE
}  // namespace advdl_ops
