// What lives between calls: slots with packed weights, linears, FFNs, the step's runs.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <map>
#include <memory>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include "kernels.h"
#include "policy.h"

namespace molehill {

// Bytes of an arena, aligned to a cache line; or none.
class Buffer {
 public:
  Buffer() = default;
  Buffer(void* data, size_t bytes) : data_(data), bytes_(bytes) {}
  size_t bytes() const { return bytes_; }
  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

// Memory that is taken piece by piece and given back all at once: a step's intermediate results,
// the weights of a slot. Blocks are at least `block` bytes; of 2 MiB or more, they lie in huge
// pages, for a step reads far more weights than the processor keeps translations of small pages.
class Arena {
 public:
  explicit Arena(size_t block = 1 << 18) : block_(block) {}
  void reset();
  template <class T>
  T* take(size_t count) {
    return static_cast<T*>(take_bytes(count * sizeof(T)));
  }
  // Zeroed; none for no bytes.
  Buffer zeros(size_t bytes);

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  struct Block {
    std::unique_ptr<void, Free> data;
    size_t bytes;
  };
  void* take_bytes(size_t bytes);
  void add_block(size_t bytes);
  std::vector<Block> blocks_;
  size_t block_, used_ = 0;
};

// Dense [rows, columns] weights of `element` bytes each, as they come from Python.
struct Dense {
  const void* data;
  int rows, columns, element;
};

// E pairs A_e [r_e, in], B_e [out, r_e]. Every expert's ranks are padded to whole panels by zeros.
// What one expert has of A, and of B, lies side by side.
struct LowRank {
  int in = 0, out = 0;
  std::vector<int> first_rank;         // [E + 1], padded
  std::vector<uint16_t> panel_expert;  // whose panel it is
  Buffer a, b;

  // No ranks: a projection that is not adapted.
  explicit LowRank(int experts = 0) : first_rank(experts + 1) {}
  LowRank(const Dense& a, const Dense& b, const std::vector<int>& ranks, int ranks_per_step,
          Arena& memory);
  int ranks() const { return first_rank.back(); }
  int experts() const { return int(first_rank.size()) - 1; }
  ptrdiff_t panel_elements() const;
  // Columns of B, whole tiles.
  int columns() const { return (out + kTileColumns - 1) / kTileColumns * kTileColumns; }
  size_t bytes() const { return a.bytes() + b.bytes(); }
};

struct Counters {
  int64_t decisions = 0, soft = 0;
  double entropy = 0;
  std::vector<int64_t> expert_tokens;
};

// One router and its policy, or constant weights where there is no router.
struct Site {
  int64_t id = 0;
  int experts = 0;
  bool routed = false;
  int column = 0;  // of its gate weights in a captured row
  std::unique_ptr<const Policy> policy;
  Buffer router;  // float panels of 8 rows
  mutable Counters counters;

  int router_rows() const { return experts + policy->extra_rows(); }
  int panels() const { return (router_rows() + kPanelRows - 1) / kPanelRows; }
};

struct LinearPiece {
  Site site;
  int start = 0;
  LowRank experts;
  Buffer output_scale;  // float [E, out], or empty
  Buffer bias;          // float [out], or empty
  Buffer added_bias;    // float [out], or empty: added to every row
};

struct FfnPiece {
  Site site;
  Activation activation = Activation::silu;
  LowRank gate, up, down;       // no ranks where the projection is not adapted
  Buffer bias;                  // float [d], or empty
  Buffer gate_scale, up_scale;  // float [E, intermediate], or empty
  Buffer gate_bias, up_bias;    // float [intermediate], or empty; only read with a scale
};

struct ScalePiece {
  Site site;
  int start = 0, heads = 1, width = 0;
  Buffer vectors;  // float [heads, E, width]
};

struct Slot {
  Arena memory;
  int64_t tokens = 0;
  std::map<int, std::vector<LinearPiece>> linears;
  std::map<int, FfnPiece> ffns;
  std::map<int, std::vector<ScalePiece>> scales;  // by linear
  std::map<int, ScalePiece> ffn_scales;
  size_t bytes() const;
};

struct Linear {
  const Kernels* kernels = nullptr;  // for the type of its activations
  int in = 0, out = 0;
  bool reduced = false;           // router logits are summed over tensor-parallel ranks
  int ffn_in = -1, ffn_out = -1;  // the FFN whose gate_up or down this is
};

struct Ffn {
  int gate_up = 0, down = 0, intermediate = 0;
  int64_t reduced_as =
      -1;  // handle that sums logits of the intermediate over tensor-parallel ranks
};

struct Run {
  const Slot* slot;  // null: rows whose adapter is not at hand
  int start, stop;
};

// Rows of one slot that one thread may process alone.
struct Chunk {
  const Slot* slot;
  int start, rows;
};

// Where the gate weights of some rows of a step are kept.
struct Capture {
  std::vector<int> places;   // by row of the step, -1 for one that is not kept; empty: none is
  float* weights = nullptr;  // [kept rows][columns]
  int64_t columns = 0;

  bool empty() const { return places.empty(); }
  // Those of a site in one row of the step; null if the row is not kept.
  float* row(int row, const Site& site) const {
    if (row >= int(places.size()) || places[row] < 0) return nullptr;
    return weights + places[row] * columns + site.column;
  }
};

// What one site decided for one chunk.
struct Routing {
  const Site* site;
  Chunk chunk;
  float* weights;                    // [experts][rows]
  uint16_t* experts;                 // [rows][experts], chosen ones first
  uint16_t* counts;                  // [rows]
  float* probabilities = nullptr;    // [rows][experts], traced steps only
  float* entropy = nullptr;          // [rows], likewise
  int logits_column = -1;            // in the reduced logits
  const Capture* capture = nullptr;  // of steps that keep something
  Choice choice() const { return {weights, experts, counts, chunk.rows, site->experts}; }
};

// What an FFN mixture keeps of one chunk from its gate_up linear until its down linear.
struct FfnState {
  const FfnPiece* piece;
  Chunk chunk;
  Routing routing;
  void *gate, *up, *down;  // shrunk operands [rows][ranks]
  float* factor;           // sum of weights - 1, [rows]
};

struct TraceRecord {
  int64_t site;
  int start, rows, experts;
  std::vector<float> probabilities, weights, entropy;
  int heads = 0;  // an axis after the rows, if there is one
};

struct Backend {
  std::map<int, Slot> slots;
  std::vector<Linear> linears;
  std::vector<Ffn> ffns;
  std::vector<Run> runs;
  double seconds = 0;  // spent in ops that had something to do
  Arena scratch, ffn_scratch;
  int ffn_of_state = -1;
  std::vector<FfnState> ffn_states;
  bool tracing = false;
  std::vector<TraceRecord> trace;
  Capture capture;
};

Buffer pack_router(const float* router, int rows, int in, Arena& memory);
Buffer copy_floats(const float* values, size_t count, Arena& memory);

// Rows of a matrix whose columns are contiguous; the stride counts elements.
struct Rows {
  void* data;
  ptrdiff_t stride;
  int rows;
};

// Row `row` of the chunk gets these gate weights [experts].
void choose(const Routing& routing, int row, const float* weights);

// Decides and counts `rows` rows of the chunk from `row` on. Their logits become probabilities.
void decide_rows(const Kernels& kernels, const Routing& routing, float* logits, int row, int rows);

// Adds what one call decided; chunks of one run and site become one record.
void record(std::vector<TraceRecord>& trace, const std::vector<Routing>& routings);

// Sums the router logits [rows, columns] over the tensor-parallel ranks, in place.
struct Reduce {
  virtual void operator()(float* logits, int rows, int columns) = 0;
};

void apply_linear(Backend& backend, int linear, Rows out, Rows x, Reduce* reduce);
// reduce: for the logits of routers that read h.
void apply_ffn(Backend& backend, int ffn, Rows h, Rows gate_up, Reduce* reduce);
// Whether apply_ffn has anything to do in this step.
bool changes_ffn(const Backend& backend, int ffn);
void apply_scales(Backend& backend, int linear, Rows out);
void apply_ffn_scales(Backend& backend, int ffn, Rows h, Reduce* reduce);

}  // namespace molehill
