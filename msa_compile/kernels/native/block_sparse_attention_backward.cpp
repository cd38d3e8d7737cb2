// Gradients of block-sparse attention, in float32: see ../block_sparse_attention/cpu.py for what is computed.
//
// Two passes, each without two threads that write to one place, so that results never differ. A tile of queries attends
// again and takes its own gradients from the blocks that pass by; then a block of keys meets all the queries that
// selected it. With P the softmax and delta = rowsum(dO * O):
//
//     dV = P^T dO,  dS = P * (dO V^T - delta) * (1 - tanh^2) * scale,  dQ = dS K,  dK = dS^T Q,
//     dsink = -sum(P_sink delta)
#include "tile.h"

namespace msa {
namespace {

struct Backward {
  Attention forward;
  const char* grad_output;                       // [rows, groups * group, queries, width], dtype of the queries
  int64_t grad_row, grad_head, grad_step;        // strides in bytes
  float* grad_query;                             // [rows, groups * group, queries, width], zeros
  float *grad_key, *grad_value;                  // [rows, groups, length, width], added to
  float* of_sinks;                               // [rows, groups * group, queries], P_sink delta; or null
  int64_t grad_query_row, grad_query_head, grad_query_step;  // strides in floats, as the next
  int64_t grad_key_row, grad_key_group, grad_key_step;       // of values too
  int64_t of_sinks_row, of_sinks_head;
};

// Rows of a product whose inner dimension they are.
constexpr int64_t kDeep = 64;

// Blocks of keys as rows, and of values as panels, besides what attention needs.
struct Blocks : Packed<FloatProduct> {
  std::unique_ptr<float[]> value_panels, key_rows;

  Blocks(const Attention& call, int64_t heads)
      : Packed(call, heads),
        value_panels(new float[heads * call.count_blocks() * key_elements]),
        key_rows(new float[heads * call.count_blocks() * value_elements]) {}
};

// What is known of a row (head and query) after the forward pass: its highest logit, one over the sum of exponentials
// below it, and delta. The highest and the sum stay apart: their logarithm would lose the sum of a large logit.
struct Known {
  float highest, inverse, delta;
};

// Makes products of a row with keys into probabilities, and products of its gradient with values into gradients of the
// products with keys.
void differentiate_row(const Attention& call, int64_t first, int64_t stop, int64_t slots, const Known& known,
                       float* products, float* slopes) {
  const Logits logits{call.scale, call.softcap};
  for (int64_t at = 0; at < round_up(slots, kColumns); at += kLanes) {
    // As in the forward pass, to the last bit: no logit is above the highest.
    const Floats logit = logits(load<Floats>(products + at));
    Floats bend = fill(1.0f);
    if (call.softcap != 0) {
      const Floats curve = logit / (call.softcap * kLog2E);
      bend = 1.0f - curve * curve;
    }
    const Ints slot = count() + int32_t(at);
    const Ints seen = (slot >= int32_t(first)) & (slot < int32_t(stop));
    const Floats probability = exp2_of(seen ? logit - known.highest : fill(-kInfinity)) * known.inverse;
    const Floats slope = probability * (load<Floats>(slopes + at) - known.delta) * bend * call.scale;
    store(products + at, probability);
    // A hidden value may be so large that its product is infinite.
    store(slopes + at, seen ? slope : Floats{});
  }
}

class Differentiation {
 public:
  Differentiation(const Backward& backward, CopyRow copy_row)
      : backward_(backward), call_(backward.forward), copy_row_(copy_row) {}

  void run() {
    const int64_t blocks = call_.count_blocks(), heads = call_.rows * call_.groups;
    const int64_t rows = call_.group * call_.queries;
    const Blocks one(call_, 0);
    const int64_t bytes = 8 * blocks * (one.key_elements + one.value_elements) + 8 * call_.queries * call_.topk;
    const int64_t at_once = std::clamp<int64_t>(call_.packed_bytes / bytes, 1, heads);
    Blocks packed(call_, at_once);
    const std::unique_ptr<Known[]> known(new Known[at_once * rows]);
    std::vector<std::vector<Pair>> pairs(at_once);
    std::vector<std::vector<int32_t>> ends(at_once);
    const int64_t step = tile_queries(call_), tiles = (call_.queries + step - 1) / step;
#pragma omp parallel num_threads(call_.threads)
    {
      Tile<FloatProduct> tile(call_, packed, step * call_.group);
      Space space(call_, step * call_.group);
      for (int64_t from = 0; from < heads; from += at_once) {
        const int64_t count = std::min(at_once, heads - from);
#pragma omp for schedule(static)
        for (int64_t at = 0; at < count * blocks; ++at) pack(packed, at, from + at / blocks, at % blocks, space);
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = count * tiles - 1; task >= 0; --task) {
          const int64_t start = task / count * step;
          differentiate_queries(packed, known.get(), tile, space, from + task % count, task % count, start,
                                std::min(step, call_.queries - start));
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t at = 0; at < count; ++at)
          order_pairs(call_, (from + at) / call_.groups, (from + at) % call_.groups, 0, call_.queries, ends[at],
                      pairs[at]);
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < count * blocks; ++task) {
          const int64_t at = task % count, block = task / count;
          // order_pairs() leaves the end of each block's pairs, which is where the next one's start.
          const int64_t first = block == 0 ? 0 : ends[at][block - 1];
          differentiate_block(packed, known.get(), space, from + at, at, block, &pairs[at][0] + first,
                              ends[at][block] - first);
        }
      }
    }
  }

 private:
  // Where a thread works.
  struct Space {
    std::vector<float> grads, queries, products, slopes, of_query, of_key, of_value, row;

    Space(const Attention& call, int64_t rows)
        : grads(std::max(rows, kDeep) * round_up(call.width, kColumns)),
          queries(kDeep * round_up(call.width, kColumns)),
          products(kDeep * round_up(call.block_size, kColumns)),
          slopes(kDeep * round_up(call.block_size, kColumns)),
          of_query(rows * round_up(call.width, kColumns)),
          of_key(call.block_size * round_up(call.width, kColumns)),
          of_value(call.block_size * round_up(call.width, kColumns)),
          row(round_up(call.width, kColumns)) {}
  };

  void pack(Blocks& blocks, int64_t at, int64_t head, int64_t block, Space& space) const {
    const int64_t columns = blocks.columns, first = block * call_.block_size, slots = call_.block_length(block);
    const char* key = call_.key + head / call_.groups * call_.key_row + head % call_.groups * call_.key_group;
    const char* value = call_.value + head / call_.groups * call_.value_row + head % call_.groups * call_.value_group;
    float* key_rows = &blocks.key_rows[at * blocks.value_elements];
    float* value_rows = &blocks.values[at * blocks.value_elements];
    for (int64_t slot = 0; slot < slots; ++slot) {
      copy_row_(key + (first + slot) * call_.key_step, call_.width, columns, key_rows + slot * columns);
      copy_row_(value + (first + slot) * call_.value_step, call_.width, columns, value_rows + slot * columns);
    }
    const auto from = [&](const float* rows) {
      return [=](int64_t slot, float* to) { std::copy_n(rows + slot * columns, columns, to); };
    };
    pack_panels(slots, columns, &blocks.keys[at * blocks.key_elements], space.row.data(), from(key_rows));
    pack_panels(slots, columns, &blocks.value_panels[at * blocks.key_elements], space.row.data(), from(value_rows));
    blocks.is_finite[at] = true;  // or the call would not be here
  }

  const char* query_of(int64_t head, int64_t of_group, int64_t query) const {
    return call_.query + head / call_.groups * call_.query_row +
           (head % call_.groups * call_.group + of_group) * call_.query_head + query * call_.query_step;
  }

  const char* grad_of(int64_t head, int64_t of_group, int64_t query) const {
    return backward_.grad_output + head / call_.groups * backward_.grad_row +
           (head % call_.groups * call_.group + of_group) * backward_.grad_head + query * backward_.grad_step;
  }

  // Products of up to kRows rows with the keys of a block, and of their gradients with its values.
  void multiply_rows(const Blocks& blocks, int64_t at, int64_t slots, int count, const float* const* queries,
                     const float* const* grads, float* const* products, float* const* slopes) const {
    const int64_t places = round_up(slots, kColumns), panel = blocks.columns * kColumns;
    multiply<FloatProduct, false>(count, queries, 1, &blocks.keys[at * blocks.key_elements], kColumns,
                                  blocks.columns, products, places, panel);
    multiply<FloatProduct, false>(count, grads, 1, &blocks.value_panels[at * blocks.key_elements], kColumns,
                                  blocks.columns, slopes, places, panel);
  }

  void differentiate_queries(const Blocks& blocks, Known* known, Tile<FloatProduct>& tile, Space& space, int64_t head,
                             int64_t at_head, int64_t start,
                             int64_t size) {
    const int64_t columns = blocks.columns, row = head / call_.groups, group = head % call_.groups;
    attend_tile<FloatProduct>(call_, blocks, tile, row, group, at_head, start, size, copy_row_);
    known += (at_head * call_.queries + start) * call_.group;
    std::fill(space.of_query.begin(), space.of_query.end(), 0.0f);
    for (int64_t at = 0; at < size * call_.group; ++at) {
      const int64_t of_group = at % call_.group, of_head = group * call_.group + of_group, query = start + at / call_.group;
      float* grad = &space.grads[at * columns];
      copy_row_(grad_of(head, of_group, query), call_.width, columns, grad);
      const float factor = finish(tile.seen[at], call_.sinks == nullptr ? nullptr : call_.sinks + of_head);
      Floats products = {};
      for (int64_t k = 0; k < columns; k += kLanes)
        products += load<Floats>(grad + k) * load<Floats>(&tile.outputs[at * columns + k]);
      // A row that saw nothing has no share of anything.
      const Seen& seen = tile.seen[at];
      const bool is_empty = seen.total == 0;
      known[at] = {is_empty ? 0 : seen.highest, is_empty ? 0 : 1 / seen.total, sum(products) * factor};
      if (backward_.of_sinks != nullptr)
        backward_.of_sinks[row * backward_.of_sinks_row + of_head * backward_.of_sinks_head + query] =
            std::exp2(call_.sinks[of_head] * kLog2E - known[at].highest) * known[at].inverse * known[at].delta;
    }
    const int64_t places = round_up(call_.block_size, kColumns);
    for (size_t pair = 0; pair < tile.pairs.size();) {
      const int64_t block = tile.pairs[pair].block, slots = call_.block_length(block);
      const int64_t at = at_head * call_.count_blocks() + block;
      size_t end = pair;
      while (end < tile.pairs.size() && tile.pairs[end].block == block) ++end;
      const int64_t rows = int64_t(end - pair) * call_.group;
      int count;
      for (int64_t first = 0; first < rows; first += count) {
        count = take_rows(rows - first);
        const float *queries[kRows], *grads[kRows];
        float *products[kRows], *slopes[kRows], *to[kRows];
        int64_t row_of[kRows];
        for (int r = 0; r < count; ++r) {
          row_of[r] = tile.pairs[pair + (first + r) / call_.group].query * call_.group + (first + r) % call_.group;
          queries[r] = &tile.queries[row_of[r] * columns];
          grads[r] = &space.grads[row_of[r] * columns];
          products[r] = &space.products[r * places];
          slopes[r] = &space.slopes[r * places];
          to[r] = &space.of_query[row_of[r] * columns];
        }
        multiply_rows(blocks, at, slots, count, queries, grads, products, slopes);
        for (int r = 0; r < count; ++r) {
          int64_t first_slot, stop;
          call_.visible(start + row_of[r] / call_.group, block, first_slot, stop);
          differentiate_row(call_, first_slot, stop, slots, known[row_of[r]], products[r], slopes[r]);
        }
        multiply<FloatProduct, true>(count, slopes, 1, &blocks.key_rows[at * blocks.value_elements], columns, slots, to,
                                     columns, kColumns);
      }
      pair = end;
    }
    for (int64_t at = 0; at < size * call_.group; ++at)
      std::copy_n(&space.of_query[at * columns], call_.width,
                  backward_.grad_query + row * backward_.grad_query_row +
                      (group * call_.group + at % call_.group) * backward_.grad_query_head +
                      (start + at / call_.group) * backward_.grad_query_step);
  }

  void differentiate_block(const Blocks& blocks, const Known* known, Space& space, int64_t head, int64_t at_head,
                           int64_t block, const Pair* pairs, int64_t count) {
    const int64_t columns = blocks.columns, slots = call_.block_length(block), at = at_head * call_.count_blocks() + block;
    const int64_t places = round_up(call_.block_size, kColumns);
    std::fill(space.of_key.begin(), space.of_key.end(), 0.0f);
    std::fill(space.of_value.begin(), space.of_value.end(), 0.0f);
    for (int64_t from = 0; from < count * call_.group; from += kDeep) {
      const int64_t size = std::min(kDeep, count * call_.group - from);
      const auto query_of_row = [&](int64_t r) { return int64_t(pairs[(from + r) / call_.group].query); };
      for (int64_t r = 0; r < size; ++r) {
        const int64_t of_group = (from + r) % call_.group, query = query_of_row(r);
        copy_row_(query_of(head, of_group, query), call_.width, columns, &space.queries[r * columns]);
        copy_row_(grad_of(head, of_group, query), call_.width, columns, &space.grads[r * columns]);
      }
      int taken;
      for (int64_t first = 0; first < size; first += taken) {
        taken = take_rows(size - first);
        const float *queries[kRows], *grads[kRows];
        float *products[kRows], *slopes[kRows];
        for (int r = 0; r < taken; ++r) {
          queries[r] = &space.queries[(first + r) * columns];
          grads[r] = &space.grads[(first + r) * columns];
          products[r] = &space.products[(first + r) * places];
          slopes[r] = &space.slopes[(first + r) * places];
        }
        multiply_rows(blocks, at, slots, taken, queries, grads, products, slopes);
        for (int r = 0; r < taken; ++r) {
          int64_t first_slot, stop;
          const int64_t query = query_of_row(first + r);
          const int64_t row = (at_head * call_.queries + query) * call_.group + (from + first + r) % call_.group;
          call_.visible(query, block, first_slot, stop);
          differentiate_row(call_, first_slot, stop, slots, known[row], products[r], slopes[r]);
        }
      }
      add_transposed(slots, size, space.slopes, places, space.queries, columns, space.of_key);
      add_transposed(slots, size, space.products, places, space.grads, columns, space.of_value);
    }
    const int64_t offset = head / call_.groups * backward_.grad_key_row + head % call_.groups * backward_.grad_key_group;
    for (int64_t slot = 0; slot < slots; ++slot) {
      const int64_t to = offset + (block * call_.block_size + slot) * backward_.grad_key_step;
      for (int64_t k = 0; k < call_.width; ++k) {
        backward_.grad_key[to + k] += space.of_key[slot * columns + k];
        backward_.grad_value[to + k] += space.of_value[slot * columns + k];
      }
    }
  }

  // to[slot][.] += sum over r of left[r][slot] right[r][.]
  static void add_transposed(int64_t slots, int64_t size, const std::vector<float>& left, int64_t step,
                             const std::vector<float>& right, int64_t columns, std::vector<float>& to) {
    int taken;
    for (int64_t slot = 0; slot < slots; slot += taken) {
      taken = take_rows(slots - slot);
      const float* of_slot[kRows];
      float* row[kRows];
      for (int r = 0; r < taken; ++r) of_slot[r] = &left[slot + r], row[r] = &to[(slot + r) * columns];
      multiply<FloatProduct, true>(taken, of_slot, step, right.data(), columns, size, row, columns, kColumns);
    }
  }

  const Backward& backward_;
  const Attention& call_;
  const CopyRow copy_row_;
};

}  // namespace

// Whether there was memory enough.
extern "C" int msa_block_sparse_attention_backward(const Backward* call) try {
  const CopyRow copies[] = {copy_row<FloatProduct, Float32>, copy_row<FloatProduct, BFloat16>,
                            copy_row<FloatProduct, Float16>};
  Differentiation(*call, copies[call->forward.dtype]).run();
  return 1;
} catch (const std::bad_alloc&) {
  return 0;
}

}  // namespace msa
