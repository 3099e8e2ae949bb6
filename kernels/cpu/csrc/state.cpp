#include "state.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>

namespace molehill {
namespace {

constexpr size_t kLine = 64;
constexpr size_t kHugePage = 2 << 20;

size_t rounded_up(size_t bytes, size_t multiple) {
  return (bytes + multiple - 1) / multiple * multiple;
}

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

// [out, rows] as tiles [padded ranks / P][64][P], expert by expert.
template <class T>
void pack_tiles(const T* dense, int rows, const std::vector<int>& place, int p, LowRank& pair) {
  for (int i = 0; i < rows; ++i) {
    const int e = pair.panel_expert[place[i] / kPanelRows];
    const int first = pair.first_rank[e], ranks = pair.first_rank[e + 1] - first;
    const int rank = place[i] - first;
    T* expert_b = pair.b.as<T>() + size_t(first) * pair.columns();
    for (int o = 0; o < pair.out; ++o) {
      T* tile = expert_b + size_t(o / kTileColumns) * ranks * kTileColumns;
      tile[size_t(rank / p) * kTileColumns * p + o % kTileColumns * p + rank % p] =
          dense[size_t(o) * rows + i];
    }
  }
}

template <class T>
void pack(LowRank& pair, const Dense& a, const Dense& b, const std::vector<int>& place, int p) {
  pack_panels(static_cast<const T*>(a.data), a.rows, a.columns, place, pair.a.as<T>());
  pack_tiles(static_cast<const T*>(b.data), b.columns, place, p, pair);
}

}  // namespace

// Blocks that one step filled become one block, so that a steady state allocates nothing.
void Arena::reset() {
  used_ = 0;
  if (blocks_.size() < 2) return;
  size_t bytes = 0;
  for (const Block& block : blocks_) bytes += block.bytes;
  blocks_.clear();
  add_block(bytes);
}

void Arena::add_block(size_t bytes) {
  const size_t page = bytes < kHugePage ? kLine : kHugePage;
  bytes = rounded_up(bytes, page);
  Block block{{std::aligned_alloc(page, bytes), {}}, bytes};
  if (!block.data) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
  if (page == kHugePage) madvise(block.data.get(), bytes, MADV_HUGEPAGE);
#endif
  blocks_.push_back(std::move(block));
  used_ = 0;
}

void* Arena::take_bytes(size_t bytes) {
  bytes = rounded_up(bytes, kLine);
  if (blocks_.empty() || used_ + bytes > blocks_.back().bytes) add_block(std::max(bytes, block_));
  void* p = static_cast<char*>(blocks_.back().data.get()) + used_;
  used_ += bytes;
  return p;
}

Buffer Arena::zeros(size_t bytes) {
  if (bytes == 0) return {};
  Buffer buffer(take_bytes(bytes), bytes);
  std::memset(buffer.as<void>(), 0, bytes);
  return buffer;
}

LowRank::LowRank(const Dense& dense_a, const Dense& dense_b, const std::vector<int>& expert_ranks,
                 int ranks_per_step, Arena& memory)
    : in(dense_a.columns), out(dense_b.rows), first_rank{0} {
  std::vector<int> place;
  for (size_t e = 0; e < expert_ranks.size(); ++e) {
    const int first = ranks(), padded = rounded_up(expert_ranks[e], kPanelRows);
    for (int i = 0; i < expert_ranks[e]; ++i) place.push_back(first + i);
    panel_expert.insert(panel_expert.end(), padded / kPanelRows, static_cast<uint16_t>(e));
    first_rank.push_back(first + padded);
  }
  const size_t element = dense_a.element;
  a = memory.zeros(panel_expert.size() * panel_elements() * element);
  b = memory.zeros(size_t(columns()) * ranks() * element);
  if (element == 2)
    pack<uint16_t>(*this, dense_a, dense_b, place, ranks_per_step);
  else
    pack<uint32_t>(*this, dense_a, dense_b, place, ranks_per_step);
}

ptrdiff_t LowRank::panel_elements() const {
  return ptrdiff_t(rounded_up(in, kPanelInputs)) * kPanelRows;
}

Buffer pack_router(const float* router, int rows, int in, Arena& memory) {
  std::vector<int> place(rows);
  for (int i = 0; i < rows; ++i) place[i] = i;
  const size_t padded = rounded_up(rows, kPanelRows);
  const Buffer packed = memory.zeros(padded * rounded_up(in, kPanelInputs) * sizeof(float));
  pack_panels(router, rows, in, place, packed.as<float>());
  return packed;
}

Buffer copy_floats(const float* values, size_t count, Arena& memory) {
  const Buffer copy = memory.zeros(count * sizeof(float));
  std::copy_n(values, count, copy.as<float>());
  return copy;
}

size_t Slot::bytes() const {
  size_t total = 0;
  for (const auto& [handle, pieces] : linears)
    for (const LinearPiece& piece : pieces)
      total += piece.site.router.bytes() + piece.experts.bytes() + piece.output_scale.bytes() +
               piece.bias.bytes() + piece.added_bias.bytes();
  for (const auto& [handle, piece] : ffns)
    total += piece.site.router.bytes() + piece.gate.bytes() + piece.up.bytes() +
             piece.down.bytes() + piece.bias.bytes() + piece.gate_scale.bytes() +
             piece.up_scale.bytes() + piece.gate_bias.bytes() + piece.up_bias.bytes();
  for (const auto& [handle, pieces] : scales)
    for (const ScalePiece& piece : pieces)
      total += piece.site.router.bytes() + piece.vectors.bytes();
  for (const auto& [handle, piece] : ffn_scales)
    total += piece.site.router.bytes() + piece.vectors.bytes();
  return total;
}

}  // namespace molehill
