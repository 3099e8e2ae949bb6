#include "state.h"

#include <algorithm>
#include <cstring>

namespace molehill {
namespace {

constexpr size_t kLine = 64;
constexpr size_t kBlock = 1 << 18;

size_t whole_lines(size_t bytes) { return (bytes + kLine - 1) / kLine * kLine; }

int rounded_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

// [rows, in] as panels [in / 4][8][4]; row i goes to padded row place[i].
template <class T>
void pack_panels(const T* dense, int rows, int in, const std::vector<int>& place, T* packed) {
  const int steps = rounded_up(in, kPanelInputs) / kPanelInputs;
  for (int i = 0; i < rows; ++i) {
    T* panel = packed + size_t(place[i] / kPanelRows) * steps * kPanelRows * kPanelInputs;
    T* row = panel + place[i] % kPanelRows * kPanelInputs;
    for (int k = 0; k < in; ++k)
      row[size_t(k / kPanelInputs) * kPanelRows * kPanelInputs + k % kPanelInputs] =
          dense[size_t(i) * in + k];
  }
}

// [out, rows] as tiles [padded ranks / P][64][P].
template <class T>
void pack_tiles(const T* dense, int out, int rows, const std::vector<int>& place, int ranks, int p,
                T* packed) {
  for (int o = 0; o < out; ++o) {
    T* tile = packed + size_t(o / kTileColumns) * ranks * kTileColumns;
    for (int i = 0; i < rows; ++i)
      tile[size_t(place[i] / p) * kTileColumns * p + o % kTileColumns * p + place[i] % p] =
          dense[size_t(o) * rows + i];
  }
}

template <class T>
void pack(LowRank& pair, const Dense& a, const Dense& b, const std::vector<int>& place, int p) {
  pack_panels(static_cast<const T*>(a.data), a.rows, a.columns, place, pair.a.as<T>());
  pack_tiles(static_cast<const T*>(b.data), b.rows, b.columns, place, pair.ranks(), p,
             pair.b.as<T>());
}

}  // namespace

Buffer::Buffer(size_t bytes) : bytes_(bytes) {
  if (bytes == 0) return;
  data_.reset(std::aligned_alloc(kLine, whole_lines(bytes)));
  if (!data_) throw std::bad_alloc();
  std::memset(data_.get(), 0, whole_lines(bytes));
}

// Blocks that one step filled become one block, so that a steady state allocates nothing.
void Arena::reset() {
  used_ = 0;
  if (blocks_.size() < 2) return;
  size_t bytes = 0;
  for (const Buffer& block : blocks_) bytes += block.bytes();
  blocks_.clear();
  blocks_.emplace_back(bytes);
}

void* Arena::take_bytes(size_t bytes) {
  bytes = whole_lines(bytes);
  if (blocks_.empty() || used_ + bytes > blocks_.back().bytes()) {
    blocks_.emplace_back(std::max(bytes, kBlock));
    used_ = 0;
  }
  void* p = blocks_.back().as<char>() + used_;
  used_ += bytes;
  return p;
}

LowRank::LowRank(const Dense& dense_a, const Dense& dense_b, const std::vector<int>& expert_ranks,
                 int ranks_per_step)
    : in(dense_a.columns), out(dense_b.rows), first_rank{0} {
  std::vector<int> place;
  for (size_t e = 0; e < expert_ranks.size(); ++e) {
    const int first = ranks(), padded = rounded_up(expert_ranks[e], kPanelRows);
    for (int i = 0; i < expert_ranks[e]; ++i) place.push_back(first + i);
    panel_expert.insert(panel_expert.end(), padded / kPanelRows, static_cast<uint16_t>(e));
    first_rank.push_back(first + padded);
  }
  const size_t element = dense_a.element;
  a = Buffer(panel_expert.size() * panel_elements() * element);
  b = Buffer(size_t(rounded_up(out, kTileColumns)) * ranks() * element);
  if (element == 2)
    pack<uint16_t>(*this, dense_a, dense_b, place, ranks_per_step);
  else
    pack<uint32_t>(*this, dense_a, dense_b, place, ranks_per_step);
}

ptrdiff_t LowRank::panel_elements() const {
  return ptrdiff_t(rounded_up(in, kPanelInputs)) * kPanelRows;
}

Buffer pack_router(const float* router, int experts, int in) {
  std::vector<int> place(experts);
  for (int e = 0; e < experts; ++e) place[e] = e;
  const size_t rows = rounded_up(experts, kPanelRows);
  Buffer packed(rows * rounded_up(in, kPanelInputs) * sizeof(float));
  pack_panels(router, experts, in, place, packed.as<float>());
  return packed;
}

Buffer copy_floats(const float* values, size_t count) {
  Buffer copy(count * sizeof(float));
  std::copy_n(values, count, copy.as<float>());
  return copy;
}

size_t Slot::bytes() const {
  size_t total = 0;
  for (const auto& [handle, pieces] : linears)
    for (const LinearPiece& piece : pieces)
      total += piece.site.router.bytes() + piece.experts.bytes() + piece.output_scale.bytes() +
               piece.bias.bytes();
  for (const auto& [handle, piece] : ffns)
    total += piece.site.router.bytes() + piece.gate.bytes() + piece.up.bytes() +
             piece.down.bytes() + piece.bias.bytes();
  return total;
}

}  // namespace molehill
