// The experts inside an FFN: u_e = act(gate + d_gate,e) (up + d_up,e), h = sum_e w_e u_e, and
// z_e = w_e A_down,e u_e for the down linear.
#include <algorithm>
#include <cstring>

#include "state.h"
#include "team.h"

namespace molehill {
namespace {

class FfnCall {
 public:
  FfnCall(Backend& backend, int handle, Rows h, Rows gate_up)
      : states_(backend.ffn_states),
        kernels_(*backend.linears[backend.ffns[handle].gate_up].kernels),
        intermediate_(backend.ffns[handle].intermediate),
        h_(h),
        gate_up_(gate_up),
        threads_(1) {
    int rows = 0;
    int64_t work = 0;
    for (const FfnState& state : states_) {
      const FfnPiece& piece = *state.piece;
      const int64_t ranks = piece.gate.ranks() + piece.up.ranks() + piece.down.ranks();
      offsets_.push_back(size_);
      size_ += size_t(state.chunk.rows) * piece.down.ranks();
      rows += state.chunk.rows;
      work += state.chunk.rows * ranks * intermediate_;
    }
    threads_ = team_size(work);
    by_chunk_ = share_rows(rows, threads_);
    const size_t copies = by_chunk_ ? 1 : threads_, sums = size_;
    sums_ = backend.scratch.take<float>(copies * sums);
    std::memset(sums_, 0, copies * sums * sizeof(float));
  }

  void run() {
    Tickets tickets, finishes;
    const int tiles = (intermediate_ + kTileColumns - 1) / kTileColumns;
    const int chunks = int(states_.size());
    team(threads_, [&](int thread) {
      if (by_chunk_) {
        for (int s; (s = tickets.next()) < chunks;) {
          for (int tile = 0; tile < tiles; ++tile) apply(s, tile, 0);
          finish(s, 0, states_[s].chunk.rows, 1);
        }
        return;
      }
      for (int i; (i = tickets.next()) < chunks * tiles;) apply(i / tiles, i % tiles, thread);
      barrier();
      for (int s; (s = finishes.next()) < chunks;) finish(s, 0, states_[s].chunk.rows, threads_);
    });
  }

 private:
  void apply(int s, int tile, int copy) {
    const FfnState& state = states_[s];
    const FfnPiece& piece = *state.piece;
    const int column = tile * kTileColumns, row = state.chunk.start;
    const ptrdiff_t element = kernels_.element;
    const auto side = [&](const LowRank& pair, const void* z, const Buffer& scale,
                          const Buffer& bias) {
      const auto at = [&](const Buffer& table) {
        return table.bytes() ? table.as<float>() + column : nullptr;
      };
      return FfnSide{z,
                     pair.ranks(),
                     pair.first_rank.data(),
                     pair.b.as<char>(),
                     column,
                     pair.columns(),
                     at(scale),
                     intermediate_,
                     at(bias)};
    };
    const char* base = static_cast<const char*>(gate_up_.data) + row * gate_up_.stride * element;
    char* h = static_cast<char*>(h_.data) + (row * h_.stride + column) * element;
    const char* down = piece.down.a.as<char>();
    kernels_.ffn(
        {state.routing.choice(), base + column * element, base + (intermediate_ + column) * element,
         gate_up_.stride, h, h_.stride, std::min(kTileColumns, intermediate_ - column),
         piece.activation, side(piece.gate, state.gate, piece.gate_scale, piece.gate_bias),
         side(piece.up, state.up, piece.up_scale, piece.up_bias),
         down ? down + column * kPanelRows * element : nullptr, piece.down.panel_elements(),
         piece.down.first_rank.data(), sums(s, copy), piece.down.ranks()});
  }

  float* sums(int s, int copy) const { return sums_ + copy * size_ + offsets_[s]; }

  // Sums the threads' parts of A_down u and weighs them.
  void finish(int s, int first, int stop, int copies) {
    const FfnState& state = states_[s];
    const LowRank& down = state.piece->down;
    const int ranks = down.ranks();
    for (int row = first; row < stop; ++row) {
      float* total = sums(s, 0) + size_t(row) * ranks;
      double weight_sum = 0;
      for (int e = 0; e < state.routing.site->experts; ++e) {
        const float weight = state.routing.weights[size_t(e) * state.chunk.rows + row];
        weight_sum += weight;
        if (ranks == 0) continue;
        for (int k = down.first_rank[e]; k < down.first_rank[e + 1]; ++k) {
          for (int copy = 1; copy < copies; ++copy)
            total[k] += sums(s, copy)[size_t(row) * ranks + k];
          total[k] *= weight;
        }
      }
      state.factor[row] = float(weight_sum - 1);
      kernels_.narrow(
          total, static_cast<char*>(state.down) + size_t(row) * ranks * kernels_.operand, ranks);
    }
  }

  const std::vector<FfnState>& states_;
  const Kernels& kernels_;
  const int intermediate_;
  const Rows h_, gate_up_;
  int threads_;
  bool by_chunk_;
  std::vector<size_t> offsets_;
  size_t size_ = 0;
  float* sums_;  // by thread: A_down u, [rows][ranks] of every chunk
};

}  // namespace

void apply_ffn(Backend& backend, int ffn, Rows h, Rows gate_up, Reduce* reduce) {
  if (backend.ffn_of_state == ffn && !backend.ffn_states.empty()) {
    backend.scratch.reset();
    FfnCall(backend, ffn, h, gate_up).run();
  }
  apply_ffn_scales(backend, ffn, h, reduce);
}

}  // namespace molehill
