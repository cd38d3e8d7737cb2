// What a call of block-sparse attention is: a segment (../segments.py), so that a query sees the slots 0 .. its own.
#pragma once

#include <algorithm>
#include <vector>

#include "softmax.h"

namespace msa {

struct Attention {
  const char* query;   // [rows, groups * group, queries, width]
  const char* key;     // [rows, groups, length, width]
  const char* value;   // [rows, groups, length, width]
  const int32_t* ids;  // [rows, groups, queries, topk]
  const float* sinks;  // [groups * group], or null
  float* output;       // [rows, groups * group, queries, width], zeros
  int64_t query_row, query_head, query_step;  // strides in bytes, as those of keys and values
  int64_t key_row, key_group, key_step, value_row, value_group, value_step;
  int64_t ids_row, ids_group, ids_step;           // strides in ids
  int64_t output_row, output_head, output_step;  // strides in floats
  int64_t rows, groups, group, queries, length, width;
  int64_t position;  // slot of the first query, counted from the anchor, where keys and values start
  int64_t block_size, topk;
  int64_t window;  // 0 for none
  float scale, softcap;  // 0 for none
  int64_t is_few, dtype, threads;
  int64_t tile_floats;   // floats of the outputs that a tile of queries has
  int64_t packed_bytes;  // most bytes of packed keys and values at once, where one head needs no more

  int64_t count_blocks() const { return (length + block_size - 1) / block_size; }
  int64_t block_length(int64_t block) const { return std::min(block_size, length - block * block_size); }

  // The part of a block that a query sees, as slots of the block; empty where stop <= first.
  void visible(int64_t query, int64_t block, int64_t& first, int64_t& stop) const {
    const int64_t slot = position + query, start = block * block_size;
    first = window == 0 ? 0 : std::max<int64_t>(0, slot - window + 1 - start);
    stop = std::min({slot + 1 - start, length - start, block_size});
  }
  const int32_t* ids_of(int64_t row, int64_t of_group, int64_t query_) const {
    return ids + row * ids_row + of_group * ids_group + query_ * ids_step;
  }
};

// A block that a query of a tile selected and sees.
struct Pair {
  int32_t block, query;
};

// The pairs of the queries start .. start + size - 1 of a group, by block, in a block by query.
inline void order_pairs(const Attention& call, int64_t row, int64_t group, int64_t start, int64_t size,
                        std::vector<int32_t>& places, std::vector<Pair>& pairs) {
  const int64_t blocks = call.count_blocks();
  places.assign(blocks + 1, 0);
  const auto each = [&](auto&& visit) {
    for (int64_t query = start; query < start + size; ++query) {
      const int32_t* ids = call.ids_of(row, group, query);
      for (int64_t place = 0; place < call.topk; ++place) {
        int64_t first, stop;
        if (ids[place] < 0 || ids[place] >= blocks) continue;
        call.visible(query, ids[place], first, stop);
        if (first < stop) visit(ids[place], int32_t(query - start));
      }
    }
  };
  each([&](int32_t block, int32_t) { ++places[block + 1]; });
  for (int64_t block = 0; block < blocks; ++block) places[block + 1] += places[block];
  pairs.resize(places[blocks]);
  each([&](int32_t block, int32_t query) { pairs[places[block]++] = {block, query}; });
}

}  // namespace msa
