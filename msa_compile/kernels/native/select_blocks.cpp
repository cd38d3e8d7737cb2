// Block selection: see ../select_blocks/cpu.py for what is computed, here for how.
//
// Prompt: the keys are packed once; eight queries meet a block in one tile of registers, whose scores are never stored,
// only their largest. Few queries: the keys are read where they are, once. A token score that is NaN is passed over.
#include <algorithm>
#include <memory>
#include <new>
#include <vector>

#include "product.h"

namespace msa {
namespace {

struct Selection {
  const char* query;  // [rows, groups, queries, width]
  const char* key;    // [rows, groups | 1, length, width]
  int32_t* ids;       // [rows, groups, queries, topk], all -1
  int64_t query_row, query_group, query_step, key_row, key_group, key_step;  // strides in bytes
  int64_t ids_row, ids_group, ids_step;                                      // strides in ids
  int64_t rows, groups, key_heads, queries, length, width;
  int64_t position;  // slot of the first query, counted from the anchor, where the keys start
  int64_t block_size, topk, local_blocks, sink_blocks;
  int64_t is_few, dtype, threads;
  int64_t tile;  // queries of a task
};

// Blocks with a slot that the last query sees.
int64_t count_blocks(const Selection& call) {
  const int64_t last = call.position + call.queries - 1;
  return std::min(last / call.block_size + 1, (call.length + call.block_size - 1) / call.block_size);
}

// Writes the ids of one query, whose scores are those of the blocks 0 .. its own.
void choose(const Selection& call, int64_t query, int64_t blocks, const float* scores, std::vector<uint64_t>& order,
            int32_t* ids) {
  const int64_t local = (call.position + query) / call.block_size;
  const int64_t visible = std::min(local + 1, blocks);
  if (visible <= call.topk) {
    for (int64_t block = 0; block < visible; ++block) ids[block] = int32_t(block);
    return;
  }
  order.resize(visible);
  for (int64_t block = 0; block < visible; ++block) {
    // A finite score leaves infinity to the blocks that are always chosen. NaN becomes the lowest.
    float score = scores[block];
    if (!(score >= std::numeric_limits<float>::lowest())) score = std::numeric_limits<float>::lowest();
    score = std::min(score, std::numeric_limits<float>::max());
    if (block > local - call.local_blocks || block < call.sink_blocks) score = kInfinity;
    // Bits that are ordered as the scores are (-0 as 0), and below them the id, lower ones first.
    uint32_t bits = load<uint32_t>(&(score += 0.0f));
    bits = bits >> 31 ? ~bits : bits | 0x80000000u;
    order[block] = uint64_t(bits) << 32 | (0xffffffffu - uint32_t(block));
  }
  std::nth_element(order.begin(), order.begin() + call.topk - 1, order.end(), std::greater<>());
  for (int64_t place = 0; place < call.topk; ++place) ids[place] = int32_t(0xffffffffu - uint32_t(order[place]));
  std::sort(ids, ids + call.topk);
}

template <class Product>
void select_prompt(const Selection& call, CopyRow copy_row) {
  const int64_t blocks = count_blocks(call);
  const int64_t padded = round_up(call.width, kLanes), depth = padded / Product::kPair;
  const int64_t block_slots = round_up(call.block_size, kColumns), block_elements = block_slots * depth;
  const int64_t tiles = (call.queries + call.tile - 1) / call.tile;
  // Keys of as many heads as are worth packing before they are used.
  const std::unique_ptr<float[]> packed(new float[blocks * block_elements]);
  const int64_t heads = call.rows * call.key_heads, groups = call.groups / call.key_heads;
#pragma omp parallel num_threads(call.threads)
  {
    std::vector<float> row(padded), queries(call.tile * depth), scores(call.tile * blocks);
    std::vector<uint64_t> order;
    for (int64_t head = 0; head < heads; ++head) {
      const int64_t of_row = head / call.key_heads, key_head = head % call.key_heads;
      const char* key = call.key + of_row * call.key_row + key_head * call.key_group;
#pragma omp for schedule(static)
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t first = block * call.block_size, slots = std::min(call.block_size, call.length - first);
        pack_panels(slots, depth, packed.get() + block * block_elements, row.data(), [&](int64_t slot, float* to) {
          copy_row(key + (first + slot) * call.key_step, call.width, padded, to);
        });
      }
      // The longest tasks first, so that no thread is left alone with one at the end.
#pragma omp for schedule(dynamic, 1)
      for (int64_t task = tiles * groups - 1; task >= 0; --task) {
        const int64_t group = key_head * groups + task % groups, start = task / groups * call.tile;
        const int64_t size = std::min(call.tile, call.queries - start);
        const char* query = call.query + of_row * call.query_row + group * call.query_group;
        for (int64_t i = 0; i < size; ++i)
          copy_row(query + (start + i) * call.query_step, call.width, padded, &queries[i * depth]);
        const int64_t seen = std::min((call.position + start + size - 1) / call.block_size + 1, blocks);
        for (int64_t block = 0; block < (seen > call.topk ? seen : 0); ++block) {
          // The last block may be cut off by the end of the keys: its other panels were not packed.
          const int64_t places = round_up(std::min(call.block_size, call.length - block * call.block_size), kColumns);
          for (int64_t first = 0, rows; first < size; first += rows) {
            rows = take_rows(size - first);
            const float* left[kRows];
            for (int r = 0; r < rows; ++r) left[r] = &queries[(first + r) * depth];
            with_rows(int(rows), [&](auto constant) {
              constexpr int count = decltype(constant)::value;
              Floats best[count];
              for (int r = 0; r < count; ++r) best[r] = fill(-kInfinity);
              const float* panel = packed.get() + block * block_elements;
              for (int64_t slot = 0; slot < places; slot += kColumns, panel += depth * kColumns) {
                Floats sums[count][2] = {};
                add_tile<Product, count>(left, 1, panel, kColumns, depth, sums);
                for (int r = 0; r < count; ++r) best[r] = largest(sums[r][0], largest(sums[r][1], best[r]));
              }
              for (int r = 0; r < count; ++r) scores[(first + r) * blocks + block] = largest(best[r]);
            });
          }
        }
        int32_t* ids = call.ids + of_row * call.ids_row + group * call.ids_group + start * call.ids_step;
        for (int64_t i = 0; i < size; ++i)
          choose(call, start + i, blocks, &scores[i * blocks], order, ids + i * call.ids_step);
      }
    }
  }
}

template <class Type>
void select_few(const Selection& call) {
  const int64_t blocks = count_blocks(call), padded = round_up(call.width, kLanes);
  const int64_t heads = call.rows * call.key_heads, groups = call.groups / call.key_heads;
  const int64_t left_rows = groups * call.queries;
  const std::unique_ptr<float[]> queries(new float[heads * left_rows * padded]);
  const std::unique_ptr<float[]> scores(new float[heads * left_rows * blocks]);
  // The queries that read a key head, one behind the other.
  for (int64_t at = 0; at < heads * left_rows; ++at) {
    const int64_t group = at / call.queries % call.groups, of_row = at / call.queries / call.groups;
    const char* query = call.query + of_row * call.query_row + group * call.query_group;
    copy_row<FloatProduct, Type>(query + at % call.queries * call.query_step, call.width, padded,
                                 &queries[at * padded]);
  }
  const bool reads_in_place = padded == call.width;
#pragma omp parallel num_threads(call.threads)
  {
    std::vector<float> of_tokens(kRows * round_up(call.block_size, kLanes)), copy;
    if (!reads_in_place) copy.resize(call.block_size * padded);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < heads * blocks; ++task) {
      const int64_t head = task / blocks, block = task % blocks, first_slot = block * call.block_size;
      const int64_t slots = std::min(call.block_size, call.length - first_slot);
      const char* key = call.key + head / call.key_heads * call.key_row + head % call.key_heads * call.key_group +
                        first_slot * call.key_step;
      if (!reads_in_place)
        for (int64_t slot = 0; slot < slots; ++slot)
          copy_row<FloatProduct, Type>(key + slot * call.key_step, call.width, padded, &copy[slot * padded]);
      for (int64_t first = 0, rows; first < left_rows; first += rows) {
        rows = take_rows(left_rows - first);
        const float* left[kRows];
        float* to[kRows];
        for (int r = 0; r < rows; ++r) {
          left[r] = &queries[(head * left_rows + first + r) * padded];
          to[r] = &of_tokens[r * round_up(call.block_size, kLanes)];
        }
        if (reads_in_place)
          score_rows<Type>(int(rows), left, key, call.key_step, slots, padded, to);
        else
          score_rows<Float32>(int(rows), left, copy.data(), 4 * padded, slots, padded, to);
        for (int r = 0; r < rows; ++r) {
          Floats best = fill(-kInfinity);
          for (int64_t slot = 0; slot < slots; slot += kLanes) best = largest(load<Floats>(to[r] + slot), best);
          scores[(head * left_rows + first + r) * blocks + block] = largest(best);
        }
      }
    }
    std::vector<uint64_t> order;
#pragma omp for schedule(static)
    for (int64_t at = 0; at < heads * left_rows; ++at) {
      const int64_t query = at % call.queries, group = at / call.queries % call.groups;
      int32_t* ids = call.ids + at / call.queries / call.groups * call.ids_row + group * call.ids_group;
      choose(call, query, blocks, &scores[at * blocks], order, ids + query * call.ids_step);
    }
  }
}

template <class Type>
void select(const Selection& call) {
  if (call.is_few) return select_few<Type>(call);
#if defined(__AVX512BF16__)
  // Products of bfloat16 are exact in float32, so pairs lose nothing.
  if (std::is_same_v<Type, BFloat16>) return select_prompt<PairProduct>(call, copy_row<PairProduct, Type>);
#endif
  return select_prompt<FloatProduct>(call, copy_row<FloatProduct, Type>);
}

}  // namespace

// Whether there was memory enough.
extern "C" int msa_select_blocks(const Selection* call) try {
  if (call->dtype == 0) select<Float32>(*call);
  if (call->dtype == 1) select<BFloat16>(*call);
  if (call->dtype == 2) select<Float16>(*call);
  return 1;
} catch (const std::bad_alloc&) {
  return 0;
}

}  // namespace msa
