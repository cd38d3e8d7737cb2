// The softmax of attention, a block of keys at a time: what has been seen so far is scaled down when a higher logit
// comes, so no logit overflows, however large.
#pragma once

#include <cmath>

#include "product.h"

namespace msa {

constexpr float kLog2E = 1.4426950408889634f;

struct Logits {
  float scale;
  float softcap;  // 0 for none

  // Logits, times log2(e), from products.
  Floats operator()(Floats products) const {
    if (softcap == 0) return products * (scale * kLog2E);
    return tanh_of(products * (scale / softcap)) * (softcap * kLog2E);
  }
};

// What a row has seen: the highest logit, times log2(e), and the sum of the exponentials below it.
struct Seen {
  float highest = -kInfinity;
  float total = 0;
};

// Makes products of a row with `slots` keys, of which it sees first .. stop - 1, into weights, and scales `output` down
// to the new highest logit. The weights behind `slots`, up to the next multiple of the columns, become 0.
inline void weigh(const Logits& logits, int64_t first, int64_t stop, int64_t slots, float* row, Seen& seen,
                  float* output, int64_t width) {
  const int64_t padded = round_up(slots, kColumns);
  Floats best = fill(-kInfinity);
  const bool sees_all = first <= 0 && stop >= padded;
  for (int64_t at = 0; at < padded; at += kLanes) {
    Floats logit = logits(load<Floats>(row + at));
    if (!sees_all) {
      const Ints slot = count() + int32_t(at);
      logit = (slot >= int32_t(first)) & (slot < int32_t(stop)) ? logit : fill(-kInfinity);
    }
    store(row + at, logit);
    best = largest(logit, best);
  }
  const float highest = std::max(largest(best), seen.highest);
  // Nothing but -inf has no share, unless there is a NaN, which the largest passed over.
  const float base = highest == -kInfinity ? 0 : highest;
  Floats total = {};
  for (int64_t at = 0; at < padded; at += kLanes) {
    const Floats weight = exp2_of(load<Floats>(row + at) - base);
    store(row + at, weight);
    total += weight;
  }
  if (highest > seen.highest) {
    const float kept = seen.highest == -kInfinity ? 0 : std::exp2(seen.highest - highest);
    seen.total *= kept;
    for (int64_t at = 0; at < width; at += kLanes) store(output + at, load<Floats>(output + at) * kept);
    seen.highest = highest;
  }
  seen.total += sum(total);
}

// Adds a logit without a value, and returns the factor that makes the weighted values an average. A row that saw
// nothing has none: 0.
inline float finish(Seen& seen, const float* sink) {
  float kept = 1;
  const float logit = sink == nullptr ? -kInfinity : *sink * kLog2E, highest = std::max(seen.highest, logit);
  if (!(logit == -kInfinity)) {  // NaN too
    kept = seen.highest == -kInfinity ? 0 : std::exp2(seen.highest - highest);
    seen.total = seen.total * kept + std::exp2(logit - highest);
    seen.highest = highest;
  }
  return seen.total == 0 ? 0 : kept / seen.total;
}

}  // namespace msa
