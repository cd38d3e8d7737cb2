// A tile of queries that stays in the core's cache, with its outputs, while the blocks that it selected pass by.
#pragma once

#include <memory>
#include <new>

#include "attention.h"

namespace msa {

// Where a weight is 0, a value that is infinite or NaN would still count.
inline bool is_finite(const float* row, int64_t size) {
  float zero = 0;
  for (int64_t at = 0; at < size; ++at) zero += row[at] * 0.0f;
  return zero == 0;
}

template <class Product>
struct Packed {
  int64_t depth, columns, key_elements, value_elements;
  std::unique_ptr<float[]> keys, values;
  std::unique_ptr<char[]> is_finite;

  // `heads` are the heads that are packed at once.
  Packed(const Attention& call, int64_t heads)
      : depth(round_up(call.width, kColumns) / Product::kPair),
        columns(round_up(call.width, kColumns)),
        key_elements(round_up(call.block_size, kColumns) * depth),
        value_elements(round_up(call.block_size, Product::kPair) / Product::kPair * columns),
        keys(new float[heads * call.count_blocks() * key_elements]),
        values(new float[heads * call.count_blocks() * value_elements]),
        is_finite(new char[heads * call.count_blocks()]) {}
};

// Copies a block of values: element k of a row holds the slots k * kPair .. of a column.
template <class Product>
bool pack_values(const char* from, int64_t step, int64_t slots, int64_t width, int64_t columns, CopyRow read,
                 float* rows, float* to) {
  bool finite = true;
  const int64_t pair = Product::kPair;
  for (int64_t slot = 0; slot < slots; slot += pair, to += columns) {
    for (int64_t one = 0; one < pair; ++one) {
      float* row = rows + one * columns;
      if (slot + one < slots)
        read(from + (slot + one) * step, width, columns, row);
      else
        std::fill_n(row, columns, 0.0f);
      finite = finite && msa::is_finite(row, columns);
    }
    if (pair == 1) {
      std::copy_n(rows, columns, to);
    } else {
      float mixed[kLanes];
      for (int64_t column = 0; column < columns; column += kLanes / 2) {
        for (int64_t i = 0; i < kLanes / 2; ++i)
          for (int64_t one = 0; one < 2; ++one) mixed[2 * i + one] = rows[one * columns + column + i];
        Product::write(to + column, mixed, kLanes);
      }
    }
  }
  return finite;
}

// Where a tile of queries works.
template <class Product>
struct Tile {
  std::vector<float> queries, outputs, products, weights;
  std::vector<Seen> seen;
  std::vector<int32_t> places;
  std::vector<Pair> pairs;
  int64_t slots;  // of a row of products

  Tile(const Attention& call, const Packed<Product>& packed, int64_t rows)
      : queries(rows * packed.depth),
        outputs(rows * packed.columns),
        products(kRows * round_up(call.block_size, kColumns)),
        weights(kRows * round_up(call.block_size, kColumns)),
        seen(rows),
        slots(round_up(call.block_size, kColumns)) {}
};

// Lets up to kRows rows, given by their numbers in the tile, attend to a block.
template <class Product>
void attend_rows(const Attention& call, const Packed<Product>& packed, Tile<Product>& tile, int64_t start, int64_t block,
                 const float* keys, const float* values, bool is_finite, int rows, const int64_t* row_of) {
  const int64_t slots = call.block_length(block);
  const float* left[kRows];
  float *products[kRows], *outputs[kRows];
  int64_t first[kRows], stop[kRows];
  bool sees_all = true;
  for (int r = 0; r < rows; ++r) {
    left[r] = &tile.queries[row_of[r] * packed.depth];
    products[r] = &tile.products[r * tile.slots];
    outputs[r] = &tile.outputs[row_of[r] * packed.columns];
    call.visible(start + row_of[r] / call.group, block, first[r], stop[r]);
    sees_all = sees_all && first[r] == 0 && stop[r] == slots;
  }
  multiply<Product, false>(rows, left, 1, keys, kColumns, packed.depth, products, round_up(slots, kColumns),
                           packed.depth * kColumns);
  const Logits logits{call.scale, call.softcap};
  for (int r = 0; r < rows; ++r) {
    weigh(logits, first[r], stop[r], slots, products[r], tile.seen[row_of[r]], outputs[r], packed.columns);
    if (Product::kPair == 2) {
      Product::write(&tile.weights[r * tile.slots / 2], products[r], round_up(slots, kColumns));
      products[r] = &tile.weights[r * tile.slots / 2];
    }
  }
  constexpr int pair = Product::kPair;
  const auto add = [&](int count, float* const* weights, float* const* to, int64_t from, int64_t to_slot) {
    multiply<Product, true>(count, weights, 1, values + from * packed.columns, packed.columns, to_slot - from, to,
                            packed.columns, kColumns);
  };
  if (sees_all || is_finite) return add(rows, products, outputs, 0, (slots + pair - 1) / pair);
  // A weight of 0 does not hide a value that is NaN: each row takes what it sees, and no more.
  for (int r = 0; r < rows; ++r) {
    for (int64_t slot = first[r]; slot < stop[r]; ++slot) {
      const float* value = values + slot / pair * packed.columns;
      float weight;
      if (pair == 1) weight = products[r][slot];
      // One of a pair: the other has the weight 0, and its value may still be NaN.
      if (pair == 2) weight = BFloat16::read_one(((const uint16_t*)products[r])[slot]);
      for (int64_t column = 0; column < packed.columns; ++column) {
        const float number = pair == 1 ? value[column]
                                       : BFloat16::read_one(((const uint16_t*)value)[2 * column + slot % 2]);
        outputs[r][column] += weight * number;
      }
    }
  }
}

// Lets the queries start .. start + size - 1 of a group attend; outputs are not yet divided by what their rows have seen.
template <class Product>
void attend_tile(const Attention& call, const Packed<Product>& packed, Tile<Product>& tile, int64_t row, int64_t group,
                 int64_t packed_head, int64_t start, int64_t size, CopyRow copy_row) {
  const int64_t rows = size * call.group, blocks = call.count_blocks();
  for (int64_t at = 0; at < rows; ++at)
    copy_row(call.query + row * call.query_row + (group * call.group + at % call.group) * call.query_head +
                 (start + at / call.group) * call.query_step,
             call.width, packed.depth * Product::kPair, &tile.queries[at * packed.depth]);
  std::fill(tile.outputs.begin(), tile.outputs.end(), 0.0f);
  std::fill(tile.seen.begin(), tile.seen.end(), Seen());
  order_pairs(call, row, group, start, size, tile.places, tile.pairs);
  for (size_t pair = 0; pair < tile.pairs.size();) {
    const int64_t block = tile.pairs[pair].block, at = packed_head * blocks + block;
    size_t end = pair;
    while (end < tile.pairs.size() && tile.pairs[end].block == block) ++end;
    const int64_t rows_of_block = int64_t(end - pair) * call.group;
    for (int64_t first = 0; first < rows_of_block;) {
      const int count = take_rows(rows_of_block - first);
      int64_t row_of[kRows];
      for (int r = 0; r < count; ++r)
        row_of[r] = tile.pairs[pair + (first + r) / call.group].query * call.group + (first + r) % call.group;
      attend_rows(call, packed, tile, start, block, &packed.keys[at * packed.key_elements],
                  &packed.values[at * packed.value_elements], packed.is_finite[at], count, row_of);
      first += count;
    }
    pair = end;
  }
}

// Queries of a tile.
inline int64_t tile_queries(const Attention& call) {
  return std::clamp<int64_t>(call.tile_floats / (call.group * round_up(call.width, kColumns)), 1, call.queries);
}

}  // namespace msa
