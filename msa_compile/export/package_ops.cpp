// The msa operators of an AOTInductor package: what its generated code calls, by the C interface of torch, around the
// CPU kernels. Arguments and results as in msa_compile.kernels; of what shows keys, only those that an export leaves.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>
#if defined(_OPENMP)
#include <omp.h>
#endif

#include "block_sparse_attention.cpp"
#include "select_blocks.cpp"

namespace msa {
namespace {

using Handle = AtenTensorHandle;

struct Failed {};

void check(AOTITorchError code) {
  if (code != AOTI_TORCH_SUCCESS) throw Failed();
}

// A tensor of up to four dimensions; missing ones in front are of size 1.
struct View {
  char* data = nullptr;
  int64_t size[4] = {1, 1, 1, 1}, stride[4] = {0, 0, 0, 0};  // strides in bytes
  int32_t dtype = 0;
  int64_t element = 0;
  std::vector<char> copy;

  explicit View(Handle tensor) {
    void* at = nullptr;
    int64_t dims = 0;
    check(aoti_torch_get_data_ptr(tensor, &at));
    check(aoti_torch_get_dim(tensor, &dims));
    check(aoti_torch_get_dtype(tensor, &dtype));
    data = static_cast<char*>(at);
    element = int64_t(aoti_torch_dtype_element_size(dtype));
    for (int64_t dim = 0; dim < dims; ++dim) {
      check(aoti_torch_get_size(tensor, dim, &size[4 - dims + dim]));
      check(aoti_torch_get_stride(tensor, dim, &stride[4 - dims + dim]));
      stride[4 - dims + dim] *= element;
    }
  }

  char* at(int64_t i, int64_t j, int64_t k) const { return data + i * stride[0] + j * stride[1] + k * stride[2]; }

  // The numbers of a row side by side, as the kernels read them.
  void make_readable() {
    if (size[3] <= 1 || stride[3] == element) return;
    copy.resize(size[0] * size[1] * size[2] * size[3] * element);
    char* to = copy.data();
    for (int64_t row = 0; row < size[0] * size[1] * size[2]; ++row) {
      const char* from = at(row / size[2] / size[1], row / size[2] % size[1], row % size[2]);
      for (int64_t i = 0; i < size[3]; ++i, to += element) std::memcpy(to, from + i * stride[3], element);
    }
    data = copy.data();
    stride[3] = element;
    for (int dim = 2; dim >= 0; --dim) stride[dim] = stride[dim + 1] * size[dim + 1];
  }

  int64_t number(int64_t i) const {  // of a vector of int32 or int64
    const char* from = data + i * stride[3];
    return element == 8 ? load<int64_t>(from) : load<int32_t>(from);
  }
};

int64_t dtype_number(int32_t dtype) {
  if (dtype == aoti_torch_dtype_float32()) return 0;
  if (dtype == aoti_torch_dtype_bfloat16()) return 1;
  if (dtype == aoti_torch_dtype_float16()) return 2;
  throw Failed();
}

void read_row(int64_t dtype, const char* from, int64_t width, float* to) {
  const int64_t padded = round_up(width, kLanes);
  if (dtype == 0) copy_row<FloatProduct, Float32>(from, width, padded, to);
  if (dtype == 1) copy_row<FloatProduct, BFloat16>(from, width, padded, to);
  if (dtype == 2) copy_row<FloatProduct, Float16>(from, width, padded, to);
}

int64_t threads_for(double work) {
#if defined(_OPENMP)
  return std::max<int64_t>(1, std::min<int64_t>(omp_get_max_threads(), int64_t(work) >> 18));
#else
  return 1;
#endif
}

Handle make(const int64_t (&size)[4], int32_t dtype) {
  const int64_t stride[4] = {size[1] * size[2] * size[3], size[2] * size[3], size[3], 1};
  Handle made = nullptr;
  check(aoti_torch_empty_strided(4, size, stride, dtype, aoti_torch_device_type_cpu(), 0, &made));
  return made;
}

// What the queries of a row see: slots from `anchor` on, up to their own and below `end`, and of those what `shown` says.
struct Row {
  int64_t offset, anchor, end;
  bool has_holes = false;
  std::vector<uint8_t> shown;

  Row(int64_t row, int64_t queries, int64_t keys, const View* query_start, const View* key_start, const View* mask)
      : offset(query_start ? query_start->number(row) : keys - queries),
        anchor(std::max<int64_t>(0, key_start ? key_start->number(row) : 0)),
        end(keys),
        shown(keys, 1) {
    if (mask == nullptr) return;
    const char* from = mask->data + (mask->size[0] == 1 ? 0 : row) * mask->stride[0];
    for (int64_t slot = 0; slot < keys; ++slot) shown[slot] = *(from + (mask->size[3] == 1 ? 0 : slot) * mask->stride[3]);
    end = anchor;
    while (end < keys && shown[end]) ++end;
    for (int64_t slot = end; slot < std::min(keys, offset + queries); ++slot) has_holes |= shown[slot] != 0;
  }

  bool equals(const Row& other) const {
    return offset == other.offset && anchor == other.anchor && end == other.end && !has_holes && !other.has_holes;
  }
  bool sees(int64_t query, int64_t slot) const { return slot >= anchor && slot <= offset + query && shown[slot]; }
};

std::vector<Row> rows_of(int64_t batch, int64_t queries, int64_t keys, Handle* query_start, Handle* key_start,
                         Handle* mask) {
  const auto view_of = [](Handle* tensor) { return tensor == nullptr ? nullptr : std::make_unique<View>(*tensor); };
  const auto starts = view_of(query_start), anchors = view_of(key_start), shown = view_of(mask);
  std::vector<Row> rows;
  for (int64_t row = 0; row < batch; ++row)
    rows.emplace_back(row, queries, keys, starts.get(), anchors.get(), shown.get());
  return rows;
}

// How many rows from one on see the same, and so are one call of a kernel.
int64_t count_equal(const std::vector<Row>& rows, int64_t first) {
  int64_t end = first + 1;
  while (end < int64_t(rows.size()) && rows[end].equals(rows[first])) ++end;
  return end - first;
}

// Rows with padding in between, which no model makes of itself: plainly, one query after the other.
void select_with_holes(const Row& row, const View& query, const View& key, const Selection& call, int64_t of_row,
                       int32_t* ids) {
  const int64_t padded = round_up(call.width, kLanes), length = call.length;
  const int64_t blocks = std::max<int64_t>(0, (length - row.anchor + call.block_size - 1) / call.block_size);
  std::vector<float> left(padded), right(padded);
  std::vector<std::pair<float, int64_t>> order;
  for (int64_t group = 0; group < call.groups; ++group)
    for (int64_t at = 0; at < call.queries; ++at) {
      read_row(call.dtype, query.at(of_row, group, at), call.width, left.data());
      const int64_t slot = row.offset + at, local = (slot - row.anchor) / call.block_size;
      order.clear();
      for (int64_t block = 0; slot >= row.anchor && block < std::min(blocks, local + 1); ++block) {
        float best = -kInfinity;
        bool is_seen = false;
        for (int64_t place = 0; place < call.block_size; ++place) {
          const int64_t j = row.anchor + block * call.block_size + place;
          if (j >= length || !row.sees(at, j)) continue;
          read_row(call.dtype, key.at(of_row, call.key_heads == 1 ? 0 : group, j), call.width, right.data());
          float score = 0;
          for (int64_t k = 0; k < call.width; ++k) score += left[k] * right[k];
          best = std::max(best, score);
          is_seen = true;
        }
        if (block > local - call.local_blocks || block < call.sink_blocks) best = kInfinity;
        if (is_seen) order.push_back({-best, block});
      }
      std::sort(order.begin(), order.end());
      order.resize(std::min<size_t>(order.size(), call.topk));
      int32_t* to = ids + group * call.ids_group + at * call.ids_step;
      for (const auto& [score, block] : order) *to++ = int32_t(block);
      std::sort(ids + group * call.ids_group + at * call.ids_step, to);
    }
}

void attend_with_holes(const Row& row, const Attention& call, int64_t of_row, const View& query, const View& key,
                       const View& value, float* output) {
  const int64_t padded = round_up(call.width, kLanes);
  std::vector<float> left(padded), right(padded), logits;
  std::vector<int64_t> slots;
  for (int64_t head = 0; head < call.groups * call.group; ++head)
    for (int64_t at = 0; at < call.queries; ++at) {
      const int64_t group = head / call.group;
      read_row(call.dtype, query.at(of_row, head, at), call.width, left.data());
      const int32_t* ids = call.ids_of(of_row, group, at);
      slots.clear();
      for (int64_t place = 0; place < call.topk; ++place)
        for (int64_t j = row.anchor + ids[place] * call.block_size, i = 0; ids[place] >= 0 && i < call.block_size; ++i)
          if (j + i < call.length && row.sees(at, j + i)) slots.push_back(j + i);
      if (slots.empty()) continue;
      logits.clear();
      float highest = call.sinks == nullptr ? -kInfinity : call.sinks[head];
      for (int64_t slot : slots) {
        read_row(call.dtype, key.at(of_row, group, slot), call.width, right.data());
        float logit = 0;
        for (int64_t k = 0; k < call.width; ++k) logit += left[k] * right[k];
        logit *= call.scale;
        if (call.softcap != 0) logit = call.softcap * std::tanh(logit / call.softcap);
        highest = std::max(highest, logit);
        logits.push_back(logit);
      }
      float mass = call.sinks == nullptr ? 0 : std::exp(call.sinks[head] - highest);
      for (float& logit : logits) mass += logit = std::exp(logit - highest);
      float* to = output + of_row * call.output_row + head * call.output_head + at * call.output_step;
      for (size_t i = 0; i < slots.size(); ++i) {
        read_row(call.dtype, value.at(of_row, group, slots[i]), call.width, right.data());
        for (int64_t k = 0; k < call.width; ++k) to[k] += logits[i] / mass * right[k];
      }
    }
}

Handle select_all(Handle index_query, Handle index_key, int64_t block_size, int64_t topk, int64_t local_blocks,
                  int64_t sink_blocks, Handle* query_start, Handle* key_start, Handle* mask) {
  View query(index_query), key(index_key);
  query.make_readable(), key.make_readable();
  const int64_t batch = query.size[0], groups = query.size[1], queries = query.size[2], keys = key.size[2];
  const Handle result = make({batch, groups, queries, topk}, aoti_torch_dtype_int32());
  View chosen(result);
  int32_t* ids = reinterpret_cast<int32_t*>(chosen.data);
  std::fill(ids, ids + batch * groups * queries * topk, -1);
  const std::vector<Row> rows = rows_of(batch, queries, keys, query_start, key_start, mask);
  for (int64_t at = 0, count; at < batch; at += count) {
    const Row& row = rows[at];
    count = count_equal(rows, at);
    Selection call{};
    call.query_row = query.stride[0], call.query_group = query.stride[1], call.query_step = query.stride[2];
    call.key_row = key.stride[0], call.key_group = key.stride[1], call.key_step = key.stride[2];
    call.ids_row = groups * queries * topk, call.ids_group = queries * topk, call.ids_step = topk;
    call.rows = count, call.groups = groups, call.key_heads = key.size[1], call.width = query.size[3];
    call.queries = queries, call.length = keys, call.block_size = block_size, call.topk = topk;
    call.local_blocks = local_blocks, call.sink_blocks = sink_blocks;
    call.dtype = dtype_number(query.dtype), call.tile = 64;
    if (row.has_holes) {
      select_with_holes(row, query, key, call, at, ids + at * call.ids_row);
      continue;
    }
    const int64_t first = std::max<int64_t>(0, row.anchor - row.offset);
    call.queries = queries - first;
    call.length = std::min(row.end, row.offset + queries) - row.anchor;
    if (call.queries < 1 || call.length < 1) continue;
    call.position = row.offset + first - row.anchor;
    call.block_size = std::min(block_size, call.length);
    call.query = query.at(at, 0, first), call.key = key.at(at, 0, row.anchor);
    call.ids = ids + at * call.ids_row + first * topk;
    call.is_few = call.queries <= 16;
    call.threads = threads_for(double(count) * groups * call.queries * (call.position + call.queries / 2) * call.width);
    if (!msa_select_blocks(&call)) throw Failed();
  }
  return result;
}

Handle attend_all(Handle of_query, Handle of_key, Handle of_value, Handle block_ids, int64_t block_size,
                  const double* scale, const double* softcap, Handle* sinks, Handle* query_start, Handle* key_start,
                  Handle* mask) {
  View query(of_query), key(of_key), value(of_value), chosen(block_ids);
  query.make_readable(), key.make_readable(), value.make_readable(), chosen.make_readable();
  const int64_t batch = query.size[0], heads = query.size[1], queries = query.size[2], width = query.size[3];
  const int64_t groups = key.size[1], keys = key.size[2], numbers = batch * heads * queries * width;
  std::vector<float> of_sinks, wide;
  if (sinks != nullptr) {
    const View given(*sinks);
    std::vector<float> row(round_up(heads, kLanes));
    read_row(dtype_number(given.dtype), given.data, heads, row.data());
    of_sinks.assign(row.begin(), row.begin() + heads);
  }
  const Handle result = make({batch, heads, queries, width}, query.dtype);
  View output(result);
  const int64_t dtype = dtype_number(query.dtype);
  if (dtype != 0) wide.resize(numbers);
  float* to = dtype == 0 ? reinterpret_cast<float*>(output.data) : wide.data();
  std::fill(to, to + numbers, 0.0f);
  const std::vector<Row> rows = rows_of(batch, queries, keys, query_start, key_start, mask);
  for (int64_t at = 0, count; at < batch; at += count) {
    const Row& row = rows[at];
    count = count_equal(rows, at);
    Attention call{};
    call.query_row = query.stride[0], call.query_head = query.stride[1], call.query_step = query.stride[2];
    call.key_row = key.stride[0], call.key_group = key.stride[1], call.key_step = key.stride[2];
    call.value_row = value.stride[0], call.value_group = value.stride[1], call.value_step = value.stride[2];
    call.ids_row = chosen.stride[0] / 4, call.ids_group = chosen.stride[1] / 4, call.ids_step = chosen.stride[2] / 4;
    call.output_row = heads * queries * width, call.output_head = queries * width, call.output_step = width;
    call.rows = count, call.groups = groups, call.group = heads / groups, call.queries = queries, call.length = keys;
    call.width = width, call.block_size = block_size, call.topk = chosen.size[3], call.dtype = dtype;
    call.scale = scale == nullptr ? 1.0f / std::sqrt(float(width)) : float(*scale);
    call.softcap = softcap == nullptr ? 0.0f : float(*softcap);
    call.sinks = sinks == nullptr ? nullptr : of_sinks.data();
    call.ids = reinterpret_cast<const int32_t*>(chosen.data), call.output = to;
    call.tile_floats = 1 << 16, call.packed_bytes = 1 << 28;
    if (row.has_holes) {
      attend_with_holes(row, call, at, query, key, value, to);
      continue;
    }
    const int64_t first = std::max<int64_t>(0, row.anchor - row.offset);
    call.queries = queries - first;
    call.length = std::min(row.end, row.offset + queries) - row.anchor;
    if (call.queries < 1 || call.length < 1) continue;
    call.position = row.offset + first - row.anchor;
    call.block_size = std::min(block_size, call.length);
    call.query = query.at(at, 0, first), call.key = key.at(at, 0, row.anchor), call.value = value.at(at, 0, row.anchor);
    call.ids = reinterpret_cast<const int32_t*>(chosen.at(at, 0, first));
    call.output = to + at * call.output_row + first * width;
    call.is_few = call.queries <= 16;
    call.threads = threads_for(2.0 * count * heads * call.queries * width * call.topk * block_size);
    if (!msa_block_sparse_attention(&call)) throw Failed();
  }
  if (dtype == 1) std::copy(wide.begin(), wide.end(), reinterpret_cast<c10::BFloat16*>(output.data));
  if (dtype == 2) std::copy(wide.begin(), wide.end(), reinterpret_cast<c10::Half*>(output.data));
  return result;
}

// In place: nobody but the caller, who takes it back as the result, has the cache.
Handle write_in_place(Handle cache, Handle update, Handle position) {
  View kept(cache), fresh(update);
  const View starts(position);
  fresh.make_readable();
  for (int64_t row = 0; row < fresh.size[0]; ++row)
    for (int64_t head = 0; head < fresh.size[1]; ++head)
      for (int64_t step = 0; step < fresh.size[2]; ++step) {
        const int64_t slot = starts.number(row) + step;
        if (slot < 0 || slot >= kept.size[2] || kept.stride[3] != kept.element) throw Failed();
        std::memcpy(kept.at(row, head, slot), fresh.at(row, head, step), fresh.size[3] * fresh.element);
      }
  Handle result = nullptr;
  check(aoti_torch_new_tensor_handle(cache, &result));
  return result;
}

template <class Function>
AOTITorchError guarded(Handle* result, Function&& function) {
  try {
    *result = function();
    return AOTI_TORCH_SUCCESS;
  } catch (...) {
    return AOTI_TORCH_FAILURE;
  }
}

}  // namespace
}  // namespace msa

extern "C" {

AOTITorchError aoti_torch_cpu_select_blocks(AtenTensorHandle index_query, AtenTensorHandle index_key,
                                            int64_t block_size, int64_t topk, int64_t local_blocks, int64_t sink_blocks,
                                            AtenTensorHandle* query_start, AtenTensorHandle* key_start,
                                            AtenTensorHandle*, AtenTensorHandle*, AtenTensorHandle* mask, int64_t,
                                            int32_t, int64_t, AtenTensorHandle* result) {
  return msa::guarded(result, [&] {
    return msa::select_all(index_query, index_key, block_size, topk, local_blocks, sink_blocks, query_start, key_start,
                           mask);
  });
}

AOTITorchError aoti_torch_cpu_block_sparse_attention(AtenTensorHandle query, AtenTensorHandle key,
                                                     AtenTensorHandle value, AtenTensorHandle block_ids,
                                                     int64_t block_size, double* scale, double* softcap,
                                                     AtenTensorHandle* sinks, int64_t*, AtenTensorHandle* query_start,
                                                     AtenTensorHandle* key_start, AtenTensorHandle*, AtenTensorHandle*,
                                                     AtenTensorHandle* mask, int64_t, int32_t,
                                                     AtenTensorHandle* result) {
  return msa::guarded(result, [&] {
    return msa::attend_all(query, key, value, block_ids, block_size, scale, softcap, sinks, query_start, key_start,
                           mask);
  });
}

AOTITorchError aoti_torch_cpu_write_cache(AtenTensorHandle cache, AtenTensorHandle update, AtenTensorHandle position,
                                          AtenTensorHandle* result) {
  return msa::guarded(result, [&] { return msa::write_in_place(cache, update, position); });
}
}
