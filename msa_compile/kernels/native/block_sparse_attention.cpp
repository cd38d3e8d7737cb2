// Block-sparse attention: see ../block_sparse_attention/cpu.py for what is computed, here for how.
//
// Prompt: a tile of queries and its outputs stay in the core's cache while the blocks that its queries selected pass by,
// once each. The rows (query and head) that selected a block meet it eight at a time: products, softmax and weighted
// values of those eight are done while they are in the nearest cache, and nothing is stored but the outputs. Few queries:
// keys and values are read where they are.
#include "tile.h"

namespace msa {
namespace {

template <class Product>
void attend_prompt(const Attention& call, CopyRow copy_row, CopyRow read_row) {
  const int64_t blocks = call.count_blocks(), heads = call.rows * call.groups;
  const int64_t columns = round_up(call.width, kColumns);
  const int64_t step = tile_queries(call);
  const int64_t tiles = (call.queries + step - 1) / step;
  const Packed<Product> one_block(call, 0);
  const int64_t bytes = 4 * blocks * (one_block.key_elements + one_block.value_elements);
  // As many heads at once as the memory allows: few of them would leave threads without work at the end of each.
  const int64_t at_once = std::clamp<int64_t>(call.packed_bytes / bytes, 1, heads);
  Packed<Product> packed(call, at_once);
#pragma omp parallel num_threads(call.threads)
  {
    Tile<Product> tile(call, packed, step * call.group);
    std::vector<float> rows(2 * std::max(columns, packed.depth));
    for (int64_t from = 0; from < heads; from += at_once) {
      const int64_t count = std::min(at_once, heads - from);
#pragma omp for schedule(static)
      for (int64_t at = 0; at < count * blocks; ++at) {
        const int64_t head = from + at / blocks, block = at % blocks, first = block * call.block_size;
        const int64_t slots = call.block_length(block);
        const char* key = call.key + head / call.groups * call.key_row + head % call.groups * call.key_group;
        const char* value = call.value + head / call.groups * call.value_row + head % call.groups * call.value_group;
        pack_panels(slots, packed.depth, &packed.keys[at * packed.key_elements], rows.data(),
                    [&](int64_t slot, float* to) {
                      copy_row(key + (first + slot) * call.key_step, call.width, packed.depth * Product::kPair, to);
                    });
        packed.is_finite[at] =
            pack_values<Product>(value + first * call.value_step, call.value_step, slots, call.width, columns, read_row,
                                 rows.data(), &packed.values[at * packed.value_elements]);
      }
      // The longest tasks first, so that no thread is left alone with one at the end.
#pragma omp for schedule(dynamic, 1)
      for (int64_t task = count * tiles - 1; task >= 0; --task) {
        const int64_t head = from + task % count, start = task / count * step;
        const int64_t size = std::min(step, call.queries - start), row = head / call.groups, group = head % call.groups;
        attend_tile(call, packed, tile, row, group, task % count, start, size, copy_row);
        for (int64_t at = 0; at < size * call.group; ++at) {
          const int64_t of_head = group * call.group + at % call.group;
          const float factor = finish(tile.seen[at], call.sinks == nullptr ? nullptr : call.sinks + of_head);
          float* to = call.output + row * call.output_row + of_head * call.output_head +
                      (start + at / call.group) * call.output_step;
          if (factor != 0)
            for (int64_t k = 0; k < call.width; ++k) to[k] = tile.outputs[at * columns + k] * factor;
        }
      }
    }
  }
}

// One part of the blocks of one query, for all heads of a group.
template <class Type>
void attend_part(const Attention& call, int64_t row, int64_t group, int64_t query, int64_t from, int64_t end,
                 const float* queries, float* outputs, Seen* seen, std::vector<float>& products,
                 std::vector<float>& copies) {
  const int64_t columns = round_up(call.width, kColumns), slots_padded = round_up(call.block_size, kColumns);
  const int32_t* ids = call.ids_of(row, group, query);
  const Logits logits{call.scale, call.softcap};
  for (int64_t place = from; place < end; ++place) {
    int64_t first, stop;
    if (ids[place] < 0 || ids[place] >= call.count_blocks()) continue;
    call.visible(query, ids[place], first, stop);
    if (first >= stop) continue;
    // Only the slots that are seen: no other is touched.
    const int64_t slots = stop - first, slot = ids[place] * call.block_size + first;
    const char* key = call.key + row * call.key_row + group * call.key_group + slot * call.key_step;
    const char* value = call.value + row * call.value_row + group * call.value_group + slot * call.value_step;
    const bool reads_in_place = call.width == columns;
    if (!reads_in_place)
      for (int64_t at = 0; at < slots; ++at)
        copy_row<FloatProduct, Type>(key + at * call.key_step, call.width, columns, &copies[at * columns]);
    for (int64_t start = 0, rows; start < call.group; start += rows) {
      rows = take_rows(call.group - start);
      const float* left[kRows];
      float *of_rows[kRows], *to[kRows];
      for (int r = 0; r < rows; ++r) {
        left[r] = queries + (start + r) * columns;
        of_rows[r] = &products[(start + r) * slots_padded];
        to[r] = outputs + (start + r) * columns;
      }
      if (reads_in_place)
        score_rows<Type>(int(rows), left, key, call.key_step, slots, columns, of_rows);
      else
        score_rows<Float32>(int(rows), left, copies.data(), 4 * columns, slots, columns, of_rows);
      for (int r = 0; r < rows; ++r)
        weigh(logits, 0, slots, slots, of_rows[r], seen[start + r], to[r], columns);
    }
    const bool is_as_stored = reads_in_place && std::is_same_v<Type, Float32>;
    if (!is_as_stored)
      for (int64_t at = 0; at < slots; ++at)
        copy_row<FloatProduct, Type>(value + at * call.value_step, call.width, columns, &copies[at * columns]);
    const float* values = is_as_stored ? (const float*)value : copies.data();
    const int64_t value_stride = is_as_stored ? call.value_step / 4 : columns;
    for (int64_t start = 0, rows; start < call.group; start += rows) {
      rows = take_rows(call.group - start);
      const float* left[kRows];
      float* to[kRows];
      for (int r = 0; r < rows; ++r) {
        left[r] = &products[(start + r) * slots_padded];
        to[r] = outputs + (start + r) * columns;
      }
      multiply<FloatProduct, true>(int(rows), left, 1, values, value_stride, slots, to, columns, kColumns);
    }
  }
}

template <class Type>
void attend_few(const Attention& call) {
  const int64_t columns = round_up(call.width, kColumns), tasks = call.rows * call.groups * call.queries;
  // Where there are fewer queries than threads, the blocks of a query are shared out.
  const int64_t parts = std::clamp<int64_t>(call.threads / tasks, 1, call.topk);
  const std::unique_ptr<float[]> outputs(new float[tasks * parts * call.group * columns]());
  std::vector<Seen> seen(tasks * parts * call.group);
#pragma omp parallel num_threads(call.threads)
  {
    std::vector<float> products(call.group * round_up(call.block_size, kColumns));
    std::vector<float> copies(call.block_size * columns), queries(call.group * columns);
#pragma omp for schedule(static)
    for (int64_t at = 0; at < tasks * parts; ++at) {
      const int64_t task = at / parts, part = at % parts, query = task % call.queries;
      const int64_t group = task / call.queries % call.groups, row = task / call.queries / call.groups;
      for (int64_t head = 0; head < call.group; ++head)
        copy_row<FloatProduct, Type>(call.query + row * call.query_row +
                                         (group * call.group + head) * call.query_head + query * call.query_step,
                                     call.width, columns, &queries[head * columns]);
      attend_part<Type>(call, row, group, query, part * call.topk / parts, (part + 1) * call.topk / parts,
                        queries.data(), &outputs[at * call.group * columns], &seen[at * call.group], products, copies);
    }
  }
  for (int64_t at = 0; at < tasks * call.group; ++at) {
    const int64_t task = at / call.group, query = task % call.queries;
    const int64_t head = task / call.queries % call.groups * call.group + at % call.group;
    float* to = call.output + task / call.queries / call.groups * call.output_row + head * call.output_head +
                query * call.output_step;
    Seen whole;
    const auto place = [&](int64_t part) { return (task * parts + part) * call.group + at % call.group; };
    for (int64_t part = 0; part < parts; ++part) whole.highest = std::max(whole.highest, seen[place(part)].highest);
    std::vector<float> kept(parts);
    for (int64_t part = 0; part < parts; ++part) {
      const Seen& one = seen[place(part)];
      kept[part] = one.highest == -kInfinity ? 1 : std::exp2(one.highest - whole.highest);
      whole.total += one.total * kept[part];
    }
    const float factor = finish(whole, call.sinks == nullptr ? nullptr : call.sinks + head);
    if (factor == 0) continue;
    for (int64_t part = 0; part < parts; ++part)
      for (int64_t k = 0; k < call.width; ++k) to[k] += outputs[place(part) * columns + k] * kept[part] * factor;
  }
}

template <class Type>
void attend(const Attention& call) {
  if (call.is_few) return attend_few<Type>(call);
#if defined(__AVX512BF16__)
  if (std::is_same_v<Type, BFloat16>)
    return attend_prompt<PairProduct>(call, copy_row<PairProduct, Type>, copy_row<FloatProduct, Type>);
#endif
  attend_prompt<FloatProduct>(call, copy_row<FloatProduct, Type>, copy_row<FloatProduct, Type>);
}

}  // namespace

// Whether there was memory enough.
extern "C" int msa_block_sparse_attention(const Attention* call) try {
  if (call->dtype == 0) attend<Float32>(*call);
  if (call->dtype == 1) attend<BFloat16>(*call);
  if (call->dtype == 2) attend<Float16>(*call);
  return 1;
} catch (const std::bad_alloc&) {
  return 0;
}

}  // namespace msa
