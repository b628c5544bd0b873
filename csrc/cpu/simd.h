// SIMD vectors of float and double for the CPU kernels: load, store, convert, and the loops over runs of elements.
// simd_math.h adds the element-wise functions, such as exp and the activations.
//
// It uses the compiler's vector types, so that one source serves every capability: a kernel file is compiled
// once for each, with another register width (16, 32 or 64 bytes). Everything is in a namespace of the
// capability or is always inlined: otherwise the linker could merge a copy compiled for AVX-512 with those for other
// CPUs. For the same reason kernel files use no templates of the standard library.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../common/tensor_types.h"

// ADVDL_CPU_CAPABILITY is default, avx2 or avx512, given by the build.
#define ADVDL_CONCAT_(a, b) a##b
#define ADVDL_CONCAT(a, b) ADVDL_CONCAT_(a, b)
#define ADVDL_CAPABILITY_NAMESPACE ADVDL_CONCAT(capability_, ADVDL_CPU_CAPABILITY)

#define ADVDL_INLINE inline __attribute__((always_inline))

#if defined(__AVX512F__)
#define ADVDL_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define ADVDL_VECTOR_BYTES 32
#else
#define ADVDL_VECTOR_BYTES 16
#endif

namespace advdl_ops {

typedef float FloatVec __attribute__((vector_size(ADVDL_VECTOR_BYTES)));
typedef int32_t IntVec __attribute__((vector_size(ADVDL_VECTOR_BYTES)));
typedef double DoubleVec __attribute__((vector_size(ADVDL_VECTOR_BYTES)));
typedef int64_t LongVec __attribute__((vector_size(ADVDL_VECTOR_BYTES)));

template <class Acc>
struct Simd;
template <>
struct Simd<float> {
  using Vec = FloatVec;
  static constexpr int64_t lanes = ADVDL_VECTOR_BYTES / 4;
};
template <>
struct Simd<double> {
  using Vec = DoubleVec;
  static constexpr int64_t lanes = ADVDL_VECTOR_BYTES / 8;
};

ADVDL_INLINE FloatVec broadcast(float v) { return v - FloatVec{}; }
ADVDL_INLINE DoubleVec broadcast(double v) { return v - DoubleVec{}; }

// 0, 1, 2 ...
template <class Mask>
ADVDL_INLINE Mask lane_index() {
  Mask v;
  for (size_t i = 0; i < sizeof(v) / sizeof(v[0]); ++i) v[i] = i;
  return v;
}

// Half of a vector, without a detour through memory, which would make a sum of lanes as slow as a short run.
template <bool kHigh, class Half, class Vec>
ADVDL_INLINE Half half_of(const Vec& v) {
  Half half;
#if defined(__AVX512F__) && defined(__GNUC__) && __GNUC__ >= 12
  // For the widest registers, gcc does not turn the loop below into an extraction.
  constexpr int lanes = sizeof(half) / sizeof(half[0]), first = kHigh ? lanes : 0;
  if constexpr (lanes == 8)
    return __builtin_shufflevector(v, v, first, first + 1, first + 2, first + 3, first + 4,
                                   first + 5, first + 6, first + 7);
  if constexpr (lanes == 4 && sizeof(half) == 32)
    return __builtin_shufflevector(v, v, first, first + 1, first + 2, first + 3);
#endif
  for (size_t i = 0; i < sizeof(half) / sizeof(half[0]); ++i)
    half[i] = v[i + (kHigh ? sizeof(half) / sizeof(half[0]) : 0)];
  return half;
}

// Transposes as many vectors as each has lanes: rows[i][j] = rows[j][i]. Each stage swaps blocks of 1, 2, 4 ... lanes
// between two vectors.
template <class Mask, class Vec>
ADVDL_INLINE void transpose(Vec (&rows)[sizeof(Vec) / sizeof(Vec{}[0])]) {
  constexpr int lanes = sizeof(Vec) / sizeof(Vec{}[0]);
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC unroll 8
  for (int block = 1; block < lanes; block *= 2) {
    auto bit = Mask{}[0];  // of the type of a lane
    bit = block;
    const decltype(bit) all = lanes, rest = lanes - block;
    const Mask lane = lane_index<Mask>();
    const Mask low = (lane & bit) ? lane + rest : lane;
    const Mask high = (lane & bit) ? lane + all : lane + bit;
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) {
      if (i & block) continue;
      const Vec a = rows[i], b = rows[i + block];
      rows[i] = __builtin_shuffle(a, b, low);
      rows[i + block] = __builtin_shuffle(a, b, high);
    }
  }
#else
  for (int i = 0; i < lanes; ++i) {
    for (int j = 0; j < i; ++j) {
      const auto kept = rows[i][j];
      rows[i][j] = rows[j][i];
      rows[j][i] = kept;
    }
  }
#endif
}

// The sum of the lanes, in double and in a fixed order: the halves are added until one lane is left.
template <class Vec>
ADVDL_INLINE double halves_sum(const Vec& v) {
  if constexpr (sizeof(v) == 16) {
    return v[0] + v[1];
  } else {
    typedef double Half __attribute__((vector_size(sizeof(v) / 2)));
    return halves_sum(half_of<false, Half>(v) + half_of<true, Half>(v));
  }
}
ADVDL_INLINE double lane_sum(DoubleVec v) { return halves_sum(v); }
ADVDL_INLINE double lane_sum(FloatVec v) {
  typedef float HalfVec __attribute__((vector_size(ADVDL_VECTOR_BYTES / 2)));
  return halves_sum(__builtin_convertvector((half_of<false, HalfVec>(v)), DoubleVec) +
                    __builtin_convertvector((half_of<true, HalfVec>(v)), DoubleVec));
}

ADVDL_INLINE bool has_nan(FloatVec v) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps(_mm256_cmp_ps(v, v, _CMP_UNORD_Q)) != 0;
#else
  return v[0] != v[0] || v[1] != v[1] || v[2] != v[2] || v[3] != v[3];
#endif
}

namespace math {

ADVDL_INLINE FloatVec select(IntVec condition, FloatVec a, FloatVec b) { return condition ? a : b; }
ADVDL_INLINE DoubleVec select(LongVec condition, DoubleVec a, DoubleVec b) {
  return condition ? a : b;
}

}  // namespace math

// Storage types.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

typedef uint16_t HalfBits __attribute__((vector_size(ADVDL_VECTOR_BYTES / 2)));

ADVDL_INLINE FloatVec load(const float* p) {
  FloatVec v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
ADVDL_INLINE void store(float* p, FloatVec v) { std::memcpy(p, &v, sizeof(v)); }
ADVDL_INLINE DoubleVec load(const double* p) {
  DoubleVec v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
ADVDL_INLINE void store(double* p, DoubleVec v) { std::memcpy(p, &v, sizeof(v)); }

ADVDL_INLINE FloatVec load(const BFloat16* p) {
  HalfBits bits;
  std::memcpy(&bits, p, sizeof(bits));
  return (FloatVec)(__builtin_convertvector(bits, IntVec) << 16);
}
// Rounds to nearest even, as torch does. NaN stays NaN.
ADVDL_INLINE void store(BFloat16* p, FloatVec v) {
  const IntVec bits = (IntVec)v;
  const IntVec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const IntVec result = v == v ? rounded : ((bits >> 16) | 0x40);
  const HalfBits narrow = __builtin_convertvector(result, HalfBits);
  std::memcpy(p, &narrow, sizeof(narrow));
}

ADVDL_INLINE float to_float(BFloat16 v) {
  const uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
  float f;
  std::memcpy(&f, &bits, sizeof(f));
  return f;
}

// Without F16C, fp16 is converted by its bits, including subnormals, infinities and NaN.
ADVDL_INLINE float to_float(Float16 v) {
#if defined(__F16C__)
  return _cvtsh_ss(v.bits);
#else
  const uint32_t sign = static_cast<uint32_t>(v.bits & 0x8000) << 16;
  const uint32_t magnitude = v.bits & 0x7fff;
  uint32_t bits;
  float f;
  if (magnitude >= 0x7c00) {
    bits = sign | 0x7f800000 | (magnitude & 0x3ff) << 13;
    std::memcpy(&f, &bits, sizeof(f));
    return f;
  }
  // After the shift into fp32 the exponent is too small by 112. The product corrects that, for subnormals too.
  bits = magnitude << 13;
  std::memcpy(&f, &bits, sizeof(f));
  f *= 5.192296858534828e+33f;  // 2^112
  std::memcpy(&bits, &f, sizeof(f));
  bits |= sign;
  std::memcpy(&f, &bits, sizeof(f));
  return f;
#endif
}
ADVDL_INLINE Float16 to_half(float f) {
#if defined(__F16C__)
  return {static_cast<uint16_t>(_cvtss_sh(f, _MM_FROUND_TO_NEAREST_INT))};
#else
  uint32_t bits;
  std::memcpy(&bits, &f, sizeof(f));
  const uint32_t sign = (bits >> 16) & 0x8000;
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return {static_cast<uint16_t>(sign | 0x7e00)};
  if (bits >= 0x477ff000) return {static_cast<uint16_t>(sign | 0x7c00)};
  if (bits < 0x38800000) {
    // Subnormal: adding 0.5 puts the rounded value into the low bits.
    float magnitude;
    std::memcpy(&magnitude, &bits, sizeof(bits));
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, sizeof(bits));
    return {static_cast<uint16_t>(sign | (bits - 0x3f000000))};
  }
  bits += 0xc8000fff + ((bits >> 13) & 1);
  return {static_cast<uint16_t>(sign | (bits >> 13))};
#endif
}

ADVDL_INLINE FloatVec load(const Float16* p) {
  FloatVec v;
#if defined(__AVX512F__)
  // Masked as in clamp() of simd_math.h.
  v = (FloatVec)_mm512_maskz_cvtph_ps(0xffff,
                                      _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  v = (FloatVec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  for (int i = 0; i < Simd<float>::lanes; ++i) v[i] = to_float(p[i]);
#endif
  return v;
}
ADVDL_INLINE void store(Float16* p, FloatVec v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < Simd<float>::lanes; ++i) p[i] = to_half(v[i]);
#endif
}

// Stores past the caches, for outputs too large to stay there: a plain store would read the line first. p must be
// aligned to the vector. Every thread that streams must call stream_fence() at the end.
template <class T, class Vec>
ADVDL_INLINE void stream(T* p, Vec v) {
#if defined(__x86_64__)
  constexpr int bytes = Simd<acc_t<T>>::lanes * sizeof(T);
  alignas(bytes) T packed[Simd<acc_t<T>>::lanes];
  store(packed, v);
#if defined(__AVX512F__)
  if constexpr (bytes == 64) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), *reinterpret_cast<const __m512i*>(packed));
    return;
  }
#endif
#if defined(__AVX__)
  if constexpr (bytes == 32) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), *reinterpret_cast<const __m256i*>(packed));
    return;
  }
#endif
  if constexpr (bytes == 16) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), *reinterpret_cast<const __m128i*>(packed));
    return;
  }
#endif
  store(p, v);
}
ADVDL_INLINE void stream_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// All bits set in the first `count` lanes, none in the others.
template <class Mask>
ADVDL_INLINE Mask first_lanes(int64_t count) {
  return lane_index<Mask>() < static_cast<int32_t>(count);
}

// The first `count` < lanes elements; the other lanes are zero.
template <class T>
ADVDL_INLINE auto load_partial(const T* p, int64_t count) {
#if defined(__AVX512F__)
  const auto wanted = static_cast<uint16_t>((1u << count) - 1u);
  if constexpr (sizeof(T) == 8) {
    return (DoubleVec)_mm512_maskz_loadu_pd(static_cast<__mmask8>(wanted), p);
  } else if constexpr (sizeof(T) == 4) {
    return (FloatVec)_mm512_maskz_loadu_ps(wanted, p);
  } else {
    T buffer[Simd<float>::lanes];
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(buffer), _mm256_maskz_loadu_epi16(wanted, p));
    return load(buffer);
  }
#else
#if defined(__AVX2__)
  if constexpr (sizeof(T) == 8) {
    return (DoubleVec)_mm256_maskload_pd(p, (__m256i)first_lanes<LongVec>(count));
  } else if constexpr (sizeof(T) == 4) {
    return (FloatVec)_mm256_maskload_ps(p, (__m256i)first_lanes<IntVec>(count));
  }
#endif
  T buffer[Simd<acc_t<T>>::lanes];
  std::memset(buffer, 0, sizeof(buffer));
  std::memcpy(buffer, p, count * sizeof(T));
  return load(buffer);
#endif
}
template <class T, class Vec>
ADVDL_INLINE void store_partial(T* p, Vec v, int64_t count) {
#if defined(__AVX512F__)
  const auto wanted = static_cast<uint16_t>((1u << count) - 1u);
  if constexpr (sizeof(T) == 8) {
    _mm512_mask_storeu_pd(p, static_cast<__mmask8>(wanted), (__m512d)v);
  } else if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_ps(p, wanted, (__m512)v);
  } else {
    T buffer[Simd<float>::lanes];
    store(buffer, v);
    _mm256_mask_storeu_epi16(p, wanted,
                             _mm256_loadu_si256(reinterpret_cast<const __m256i*>(buffer)));
  }
#else
#if defined(__AVX2__)
  if constexpr (sizeof(T) == 8) {
    return _mm256_maskstore_pd(p, (__m256i)first_lanes<LongVec>(count), (__m256d)v);
  } else if constexpr (sizeof(T) == 4) {
    return _mm256_maskstore_ps(p, (__m256i)first_lanes<IntVec>(count), (__m256)v);
  }
#endif
  T buffer[Simd<acc_t<T>>::lanes];
  store(buffer, v);
  std::memcpy(p, buffer, count * sizeof(T));
#endif
}

// --- loops over runs of contiguous elements, one vector at a time; they handle an incomplete last vector ---

namespace ADVDL_CAPABILITY_NAMESPACE {

ADVDL_INLINE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
ADVDL_INLINE int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
// Rounded towards minus and plus infinity; b > 0.
ADVDL_INLINE int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -((b - 1 - a) / b); }
ADVDL_INLINE int64_t ceil_div(int64_t a, int64_t b) { return -floor_div(-a, b); }
ADVDL_INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

template <int i>
struct Index {
  static constexpr int value = i;
};

// How a vector at the current position is read, written and counted.
struct FullLanes {
  ADVDL_INLINE int64_t count(int64_t lanes) const { return lanes; }
  template <class T>
  ADVDL_INLINE auto read(const T* p) const {
    return load(p);
  }
  template <class T, class Vec>
  ADVDL_INLINE void write(T* p, Vec v) const {
    store(p, v);
  }
  // Writes to an output, past the caches if `streams`; p must then be aligned to the vector.
  template <class T, class Vec>
  ADVDL_INLINE void write_out(T* p, Vec v, bool streams) const {
    streams ? stream(p, v) : store(p, v);
  }
  // v with zeros in the lanes that must not be counted in sums.
  template <class Vec>
  ADVDL_INLINE Vec counted(Vec v) const {
    return v;
  }
};
// The last vector of a run, moved back to end with it: its first `seen` lanes were processed before.
struct OverlapLanes : FullLanes {
  int32_t seen;
  ADVDL_INLINE explicit OverlapLanes(int64_t n) : seen(static_cast<int32_t>(n)) {}
  template <class T, class Vec>
  ADVDL_INLINE void write_out(T* p, Vec v, bool) const {
    store(p, v);
  }
  template <class Vec>
  ADVDL_INLINE Vec counted(Vec v) const {
    return math::select(lane_index<decltype(v < v)>() >= seen, v, Vec{});
  }
};
// A run shorter than a vector.
struct PartialLanes {
  int32_t first;
  ADVDL_INLINE int64_t count(int64_t) const { return first; }
  template <class T>
  ADVDL_INLINE auto read(const T* p) const {
    return load_partial(p, first);
  }
  template <class T, class Vec>
  ADVDL_INLINE void write(T* p, Vec v) const {
    store_partial(p, v, first);
  }
  template <class T, class Vec>
  ADVDL_INLINE void write_out(T* p, Vec v, bool) const {
    store_partial(p, v, first);
  }
  template <class Vec>
  ADVDL_INLINE Vec counted(Vec v) const {
    return math::select(lane_index<decltype(v < v)>() < first, v, Vec{});
  }
};

// Calls f(position, lanes, Index<k>) for the vectors of [0, n). With kChains = 4, k cycles through 0..3, so that sums
// can keep four additions in flight. With kOverlap, the last vector may overlap the one before: f must not read what it
// wrote.
template <class Acc, int kChains, bool kOverlap = true, class F>
ADVDL_INLINE void for_vectors(int64_t n, F&& f) {
  constexpr int64_t lanes = Simd<Acc>::lanes;
  int64_t i = 0;
  if constexpr (kChains == 4) {
    for (; i + 4 * lanes <= n; i += 4 * lanes) {
      f(i, FullLanes{}, Index<0>{});
      f(i + lanes, FullLanes{}, Index<1>{});
      f(i + 2 * lanes, FullLanes{}, Index<2>{});
      f(i + 3 * lanes, FullLanes{}, Index<3>{});
    }
  }
  for (; i + lanes <= n; i += lanes) f(i, FullLanes{}, Index<0>{});
  if (i == n) return;
  if (kOverlap && n >= lanes) {
    f(n - lanes, OverlapLanes{lanes - (n - i)}, Index<0>{});
  } else {
    f(i, PartialLanes{static_cast<int32_t>(n - i)}, Index<0>{});
  }
}

// A constant of the channels along a run: the same for every element (channels_first), or one for each (channels_last;
// the array must be readable up to a full vector past the end).
template <class Acc, bool kVary>
struct ChannelValue {
  typename Simd<Acc>::Vec same;
  const Acc* each;
  ADVDL_INLINE explicit ChannelValue(const Acc* p) : same{}, each(p) {
    if constexpr (!kVary) same = broadcast(*p);
  }
  ADVDL_INLINE typename Simd<Acc>::Vec at(int64_t i) const {
    if constexpr (kVary) return load(each + i);
    return same;
  }
};

// Calls f<T>() for the element type.
template <class F>
void with_type(DType dtype, F f) {
  switch (dtype) {
    case DType::f32:
      return f.template operator()<float>();
    case DType::f64:
      return f.template operator()<double>();
    case DType::f16:
      return f.template operator()<Float16>();
    case DType::bf16:
      return f.template operator()<BFloat16>();
  }
}

}  // namespace ADVDL_CAPABILITY_NAMESPACE
}  // namespace advdl_ops
