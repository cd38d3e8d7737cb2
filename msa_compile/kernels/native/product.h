// Products of small matrices. Four bytes are one element: a float, or, where the machine multiplies them, a pair of
// bfloat16 along the inner dimension.
#pragma once

#include <algorithm>
#include <type_traits>
#include <utility>

#include "vector.h"

namespace msa {

// Rows and columns of a tile of results: as many as registers hold.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRows = 8;
#else
constexpr int kRows = 4;
#endif
constexpr int kColumns = 2 * kLanes;

inline int64_t round_up(int64_t size, int64_t step) { return (size + step - 1) / step * step; }

// Products of floats.
struct FloatProduct {
  static constexpr int kPair = 1;  // numbers in an element
  static Floats add(Floats sum, float left, Floats right) { return sum + left * right; }
  static Floats add(Floats sum, Floats left, Floats right) { return sum + left * right; }
  static void write(void* to, const float* from, int64_t size) { std::memcpy(to, from, 4 * size); }
};

#if defined(__AVX512BF16__)
// Products of pairs of bfloat16, summed in float32.
struct PairProduct {
  static constexpr int kPair = 2;
  static Floats add(Floats sum, Floats left, Floats right) {
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)left, (__m512bh)right);
  }
  static Floats add(Floats sum, float left, Floats right) {
    return add(sum, (Floats)_mm512_set1_ps(left), right);
  }
  // Rounds `size` floats, a multiple of the lanes, to bfloat16.
  static void write(void* to, const float* from, int64_t size) {
    for (int64_t i = 0; i < size; i += kLanes)
      store((uint16_t*)to + i, _mm512_cvtneps_pbh((__m512)load<Floats>(from + i)));
  }
};
#endif

// sums[r][.] += left[r][0 .. depth) * right[0 .. depth)[.]; `right` has a row of columns every `stride` elements, and
// element k of a row of `left` is `step` elements behind element k - 1.
template <class Product, int rows>
inline void add_tile(const float* const* left, int64_t step, const float* right, int64_t stride, int64_t depth,
                     Floats (&sums)[rows][2]) {
  for (int64_t k = 0; k < depth; ++k, right += stride) {
    const Floats first = load<Floats>(right), second = load<Floats>(right + kLanes);
    for (int r = 0; r < rows; ++r) {
      const float element = left[r][k * step];
      sums[r][0] = Product::add(sums[r][0], element, first);
      sums[r][1] = Product::add(sums[r][1], element, second);
    }
  }
}

// How many of the rows that are left to take at once: a power of two up to kRows.
inline int take_rows(int64_t left) {
  int rows = kRows;
  while (rows > left) rows /= 2;
  return rows;
}

// Calls `run` with `rows`, a power of two, as a constant.
template <int most = kRows, class Run>
inline void with_rows(int rows, Run&& run) {
  if constexpr (most == 1) {
    run(std::integral_constant<int, 1>());
  } else {
    if (rows == most) return run(std::integral_constant<int, most>());
    with_rows<most / 2>(rows, run);
  }
}

// Results `to[r][0 .. columns)` from or added to what is there; `columns` is a multiple of kColumns.
template <class Product, bool adds>
inline void multiply(int rows, const float* const* left, int64_t step, const float* right, int64_t stride,
                     int64_t depth, float* const* to, int64_t columns, int64_t panel) {
  with_rows(rows, [&](auto constant) {
    constexpr int count = decltype(constant)::value;
    for (int64_t column = 0; column < columns; column += kColumns, right += panel) {
      Floats sums[count][2];
      for (int r = 0; r < count; ++r)
        for (int half = 0; half < 2; ++half)
          sums[r][half] = adds ? load<Floats>(to[r] + column + half * kLanes) : Floats{};
      add_tile<Product, count>(left, step, right, stride, depth, sums);
      for (int r = 0; r < count; ++r)
        for (int half = 0; half < 2; ++half) store(to[r] + column + half * kLanes, sums[r][half]);
    }
  });
}

// Even and odd places of `step` lanes of one vector added, from `low` and `high` in turn.
template <int step>
inline Floats add_places(Floats low, Floats high) {
#if defined(__clang__)
  return [&]<size_t... lane>(std::index_sequence<lane...>) {
    return __builtin_shufflevector(low, high, (lane & step ? kLanes + lane - step : lane)...) +
           __builtin_shufflevector(low, high, (lane & step ? kLanes + lane : lane + step)...);
  }(std::make_index_sequence<kLanes>());
#else
  const Ints lane = count(), is_high = (lane & step) != 0;
  return __builtin_shuffle(low, high, is_high ? kLanes + lane - step : lane) +
         __builtin_shuffle(low, high, is_high ? kLanes + lane : lane + step);
#endif
}

// Lane i of the result is the sum of the lanes of parts[i]; `parts` is overwritten.
template <int step = 1>
inline Floats sum_each(Floats* parts) {
  // Vectors whose numbers differ in one bit are combined: that bit of a lane then says whose sum it holds.
  for (int i = 0; i < kLanes / (2 * step); ++i) parts[i] = add_places<step>(parts[2 * i], parts[2 * i + 1]);
  if constexpr (2 * step < kLanes)
    return sum_each<2 * step>(parts);
  else
    return parts[0];
}

// scores[r][0 .. slots) = left[r][0 .. width) . keys[0 .. slots)[0 .. width) for up to kRows rows, without a copy of the
// keys, which lie `stride` bytes apart: for few rows, where the time goes into reading them. `width` is a multiple of the lanes; scores are written up
// to the next multiple of the lanes, and what stands there behind `slots` repeats the last slot.
template <class Type>
inline void score_rows(int rows, const float* const* left, const void* keys, int64_t stride, int64_t slots,
                       int64_t width, float* const* scores) {
  with_rows(rows, [&](auto constant) {
    constexpr int count = decltype(constant)::value;
    for (int64_t slot = 0; slot < slots; slot += kLanes) {
      Floats parts[count][kLanes];
      for (int lane = 0; lane < kLanes; ++lane) {
        const auto* key = (const typename Type::Stored*)((const char*)keys + std::min(slot + lane, slots - 1) * stride);
        Floats sums[count] = {};
        for (int64_t k = 0; k < width; k += kLanes) {
          const Floats right = Type::read(key + k);
          for (int r = 0; r < count; ++r) sums[r] += load<Floats>(left[r] + k) * right;
        }
        for (int r = 0; r < count; ++r) parts[r][lane] = sums[r];
      }
      for (int r = 0; r < count; ++r) store(scores[r] + slot, sum_each(parts[r]));
    }
  });
}

// Copies the keys of a block into panels of kColumns slots, an element of each in a row: element k of slot s of panel p
// is at to[(p * depth + k) * kColumns + s]. Places behind the last slot repeat it. `copy` writes the elements of a slot.
template <class Copy>
inline void pack_panels(int64_t slots, int64_t depth, float* to, float* row, Copy&& copy) {
  for (int64_t slot = 0; slot < round_up(slots, kColumns); ++slot) {
    if (slot < slots) copy(slot, row);
    float* column = to + slot / kColumns * depth * kColumns + slot % kColumns;
    for (int64_t k = 0; k < depth; ++k) column[k * kColumns] = row[k];
  }
}

// Copies `size` numbers as elements of `Product`, zeros up to `padded` numbers, a multiple of the lanes.
using CopyRow = void (*)(const void* from, int64_t size, int64_t padded, float* to);

template <class Product, class Type>
void copy_row(const void* from, int64_t size, int64_t padded, float* to) {
  const auto* stored = (const typename Type::Stored*)from;
  float numbers[kLanes];
  for (int64_t i = 0; i < padded; i += kLanes) {
    if (i + kLanes <= size)
      store(numbers, Type::read(stored + i));
    else
      for (int64_t j = 0; j < kLanes; ++j) numbers[j] = i + j < size ? Type::read_one(stored[i + j]) : 0.0f;
    Product::write(to + i / Product::kPair, numbers, kLanes);
  }
}

}  // namespace msa
