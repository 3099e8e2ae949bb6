// The inner loops' interface: one table of functions per instruction set and activation type.
//
// A translation unit that is compiled for a newer processor must not emit inline functions that
// others share (the linker may keep the newer copy), so this header includes no library code.
#pragma once
#include <cstddef>
#include <cstdint>

namespace molehill {

// A is packed in panels of 8 rank rows: [inputs / 4][8 rows][4 inputs]. Routers likewise, by
// expert.
constexpr int kPanelRows = 8;
constexpr int kPanelInputs = 4;
// B is packed by expert, in tiles of 64 output columns: [ranks / P][64 columns][P ranks], P =
// ranks_per_step. Expert e's first tile is first_rank[e] * (all columns) elements from the start.
constexpr int kTileColumns = 64;
// Rows of the batch that one unit of work looks at, and that one inner loop keeps in registers.
constexpr int kChunkRows = 64;
constexpr int kBlockRows = 8;

enum class Activation : int { silu, gelu, gelu_tanh, relu };

// The experts that each row of a chunk chose, and their gate weights.
struct Choice {
  const float* weights;     // [experts][rows]
  const uint16_t* experts;  // [rows][max_experts], the first counts[row] of each row are valid
  const uint16_t* counts;   // [rows]
  int rows, max_experts;
};

// z[row][panel] = weight[row] * (panel x_row), for the rows that chose the panel's expert.
struct ShrinkJob {
  const float* weights;  // the expert's, [rows]: 0 where it was not chosen
  int rows;
  bool weighted;  // else the weights only select
  const void* x;  // operands
  ptrdiff_t x_stride;
  const void* panel;
  int steps;  // groups of 4 inputs
  void* z;    // operands, at the panel's first rank
  int ranks;
};

// out[:, columns] += z B^T, for the columns of neighbouring tiles.
struct ExpandJob {
  Choice choice;
  void* out;  // at the first column
  ptrdiff_t out_stride;
  int columns;
  const void* z;  // operands [rows][ranks], gate weights folded in
  int ranks;
  const int* first_rank;    // [experts + 1]
  const void* b;            // packed
  int column, all_columns;  // the first column's place among B's, whole tiles
  const float* scale;       // DoRA: [experts][scale_stride] at the first column, or null
  ptrdiff_t scale_stride;
  const float* bias;    // the base's, at the first column; only read with a scale
  const float* shift;   // out += factor[row] * shift[column], or null
  const float* factor;  // null: 1
};

// One side (gate or up) of the experts inside an FFN.
struct FfnSide {
  const void* z;  // operands [rows][ranks], or null: the base alone
  int ranks;
  const int* first_rank;
  const void* b;  // packed
  int column, all_columns;
  const float* scale;  // DoRA: [experts][scale_stride] at the tile's first column, or null
  ptrdiff_t scale_stride;
  const float* bias;  // the base's, at the tile's first column; only read with a scale
};

// h[:, tile] = sum_e w_e u_e and down_e += A_down,e[:, tile] u_e, for one tile of the intermediate.
struct FfnJob {
  Choice choice;
  const void* gate;  // base pre-activations, at the tile's first column
  const void* up;
  ptrdiff_t gate_up_stride;
  void* h;
  ptrdiff_t h_stride;
  int columns;
  Activation activation;
  FfnSide gate_side, up_side;
  const void* down;        // packed A of the first panel at the tile's inputs, or null
  ptrdiff_t panel_stride;  // elements from one panel of A to the next
  const int* down_first_rank;
  float* down_sums;  // [rows][down_ranks], accumulated
  int down_ranks;
};

// u *= sum_e weight_e vector_e, for one head of one row.
struct ScaleJob {
  void* u;
  int width;
  const float* vectors;  // [experts][width]
  const float* weights;  // [experts]
  int experts;
};

struct Kernels {
  const char* name;
  int element;         // bytes of an activation and of a weight: 4 float, 2 bfloat16
  int operand;         // bytes of what the dot products multiply: 2 where bfloat16 is multiplied
  int ranks_per_step;  // P
  // Activations as floats; as operands; floats as operands.
  void (*widen)(const void* x, void* y, size_t count);
  void (*stage)(const void* x, void* y, size_t count);
  void (*narrow)(const float* x, void* y, size_t count);
  // logits[row][8] = panel x_row, for up to kBlockRows rows.
  void (*route)(const float* const* x, int rows, const float* panel, int steps, float* logits);
  // In place e^x; x^exponent; -x ln x (0 where x is 0).
  void (*exponentials)(float* values, size_t count);
  void (*powers)(const float* values, float exponent, float* results, size_t count);
  void (*entropies)(const float* values, float* results, size_t count);
  // Experts by falling value, ties by index. NaNs spoil the order, but every entry is an expert.
  void (*rank)(const float* values, int experts, uint16_t* order);
  void (*shrink)(const ShrinkJob& job);
  void (*expand)(const ExpandJob& job);
  void (*ffn)(const FfnJob& job);
  void (*scale)(const ScaleJob& job);
};

// The tables of one instruction set; `bf16` selects the activations' type.
namespace portable {
const Kernels& kernels(bool bf16);
}
#ifdef MOLEHILL_X86
namespace avx2 {
const Kernels& kernels(bool bf16);
}
namespace avx512 {
const Kernels& kernels(bool bf16);
}
namespace avx512_bf16 {
const Kernels& kernels(bool bf16);
}
#endif

}  // namespace molehill
