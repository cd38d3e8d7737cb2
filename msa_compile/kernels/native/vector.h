// Vectors of the widest kind that the machine has, by the vector extensions that GCC and Clang share: one source for
// AVX-512, AVX2, NEON and the rest. A lane has four bytes: a float, or two bfloat16 that belong together.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace msa {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

constexpr float kInfinity = std::numeric_limits<float>::infinity();

template <class Vector>
inline Vector load(const void* from) {
  Vector vector;
  std::memcpy(&vector, from, sizeof(Vector));
  return vector;
}

template <class Vector>
inline void store(void* to, Vector vector) {
  std::memcpy(to, &vector, sizeof(Vector));
}

inline Floats fill(float value) { return value - Floats{}; }

inline Ints count() {
  Ints lanes;
  for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = lane;
  return lanes;
}

// A NaN on the left is dropped, one on the right is kept.
inline Floats largest(Floats left, Floats right) { return left > right ? left : right; }

inline float sum(Floats vector) {
  float total = 0;
  for (int lane = 0; lane < kLanes; ++lane) total += vector[lane];
  return total;
}

inline float largest(Floats vector) {
  float best = -kInfinity;
  for (int lane = 0; lane < kLanes; ++lane) best = vector[lane] > best ? vector[lane] : best;
  return best;
}

// 2^x for x <= 0, relative error 2e-7 (Taylor's polynomial on [-1/2, 1/2]); 0 below 2^-125, NaN for NaN.
inline Floats exp2_of(Floats x) {
  const Floats magic = fill(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Floats shifted = x + magic;
  const Floats fraction = x - (shifted - magic);
  Floats power = fill(1.5403530e-4f);
  power = power * fraction + 1.3333558e-3f;
  power = power * fraction + 9.6181291e-3f;
  power = power * fraction + 5.5504109e-2f;
  power = power * fraction + 2.4022651e-1f;
  power = power * fraction + 6.9314718e-1f;
  power = power * fraction + 1.0f;
  const Ints exponent = (Ints)shifted << 23;
  const Floats result = (Floats)((Ints)power + exponent);
  // NaN compares false and is kept, because a NaN plus anything in its upper bits might not be one.
  const Floats kept = x < -125.0f ? Floats{} : result;
  return x == x ? kept : x;
}

// tanh(x), relative error 3e-7: a series for small x, else 1 - 2 / (e^2x + 1).
inline Floats tanh_of(Floats x) {
  const Floats size = x < 0.0f ? -x : x;
  const Floats square = x * x;
  Floats series = fill(-5.70498872745e-3f);
  series = series * square + 2.06390887954e-2f;
  series = series * square - 5.37397155531e-2f;
  series = series * square + 1.33314422036e-1f;
  series = series * square - 3.33332819422e-1f;
  series = series * square * x + x;
  const Floats inverse = exp2_of(size * -2.8853900817779268f);  // e^-2|x|
  const Floats far = (1.0f - inverse) / (1.0f + inverse);
  const Floats result = size < 0.625f ? series : (x < 0.0f ? -far : far);
  return x == x ? result : x;
}

// What a tensor holds, read as floats.
struct Float32 {
  using Stored = float;
  static Floats read(const float* from) { return load<Floats>(from); }
  static float read_one(float stored) { return stored; }
};

struct BFloat16 {
  using Stored = uint16_t;
  static Floats read(const uint16_t* from) {
    return (Floats)(__builtin_convertvector(load<Halves>(from), Words) << 16);
  }
  static float read_one(uint16_t stored) {
    const uint32_t bits = uint32_t(stored) << 16;
    return load<float>(&bits);
  }
};

struct Float16 {
  using Stored = uint16_t;
  static Floats read(const uint16_t* from) {
    const Words half = __builtin_convertvector(load<Halves>(from), Words);
    // Exponent and mantissa, moved; a factor mends the bias and makes subnormal numbers right.
    const Floats size = (Floats)((half & 0x7fff) << 13) * 5.192296858534828e33f;  // 2^112
    const Words special = (half & 0x7fff) << 13 | 0x7f800000;
    const Words bits = (half & 0x7c00) == 0x7c00 ? special : (Words)size;
    return (Floats)(bits | (half & 0x8000) << 16);
  }
  static float read_one(uint16_t stored) {
    uint16_t halves[kLanes] = {stored};
    return read(halves)[0];
  }
};

}  // namespace msa
