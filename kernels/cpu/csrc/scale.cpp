// Vectors that multiply an activation head by head: u *= sum_e w_e l_e, with w routed from u.
#include <algorithm>

#include "state.h"
#include "team.h"

namespace molehill {
namespace {

// One piece on one run's rows. Unit i is head i % heads of row start + i / heads.
struct Part {
  const ScalePiece* piece;
  int start, units;
  size_t first_unit;  // among those of all parts
};

// Units of one part that a thread takes at once.
struct Block {
  int part, first, units;
};

class ScaleCall {
 public:
  // by_head: the trace has an axis for the heads.
  ScaleCall(Backend& backend, const Kernels& kernels, Rows u, bool by_head)
      : backend_(backend), kernels_(kernels), u_(u), by_head_(by_head) {}

  void add(const ScalePiece& piece, const Run& run) {
    const int rows = std::min(run.stop, u_.rows) - run.start;
    if (rows <= 0) return;
    const Part part{&piece, run.start, rows * piece.heads, units_};
    for (int i = 0; i < part.units; i += kBlockRows)
      blocks_.push_back({int(parts_.size()), i, std::min(kBlockRows, part.units - i)});
    parts_.push_back(part);
    units_ += part.units;
    experts_ = std::max(experts_, piece.site.experts);
    inputs_ = std::max(inputs_, inputs(piece));
    work_ += int64_t(2) * part.units * piece.width * piece.site.experts;
  }

  void run(Reduce* reduce) {
    if (parts_.empty()) return;
    backend_.scratch.reset();
    // Records grow in the order of the units.
    const int threads = backend_.tracing ? 1 : team_size(work_);
    logits_ = backend_.scratch.take<float>(units_ * experts_);
    std::fill_n(logits_, units_ * experts_, 0.0f);
    heads_ = backend_.scratch.take<float>(size_t(threads) * kBlockRows * inputs_);
    if (backend_.tracing) open_records();
    if (reduce != nullptr) {
      each_block(threads, [&](const Block& block, int thread) { compute_logits(block, thread); });
      (*reduce)(logits_, int(units_), experts_);
    }
    each_block(threads, [&](const Block& block, int thread) {
      if (reduce == nullptr) compute_logits(block, thread);
      scale(block);
    });
  }

 private:
  static int inputs(const ScalePiece& piece) {
    return (piece.width + kPanelInputs - 1) / kPanelInputs * kPanelInputs;
  }

  template <class Apply>
  void each_block(int threads, const Apply& apply) {
    Tickets tickets;
    team(threads, [&](int thread) {
      for (size_t i; (i = tickets.next()) < blocks_.size();) apply(blocks_[i], thread);
    });
  }

  void open_records() {
    first_record_ = backend_.trace.size();
    for (const Part& part : parts_) {
      const int heads = by_head_ ? part.piece->heads : 0;
      const int experts = part.piece->site.experts;
      backend_.trace.push_back({part.piece->site.id,
                                part.start,
                                part.units / part.piece->heads,
                                experts,
                                {},
                                {},
                                {},
                                heads});
    }
  }

  void* head(const Part& part, int unit) const {
    const ScalePiece& piece = *part.piece;
    const ptrdiff_t row = part.start + unit / piece.heads;
    const ptrdiff_t column = piece.start + unit % piece.heads * piece.width;
    return static_cast<char*>(u_.data) + (row * u_.stride + column) * kernels_.element;
  }

  float* logits(const Block& block, int i) const {
    return logits_ + (parts_[block.part].first_unit + block.first + i) * experts_;
  }

  void compute_logits(const Block& block, int thread) {
    const Part& part = parts_[block.part];
    const ScalePiece& piece = *part.piece;
    const int padded = inputs(piece);
    const float* x[kBlockRows];
    for (int i = 0; i < block.units; ++i) {
      float* wide = heads_ + (size_t(thread) * kBlockRows + i) * inputs_;
      kernels_.widen(head(part, block.first + i), wide, piece.width);
      std::fill(wide + piece.width, wide + padded, 0.0f);
      x[i] = wide;
    }
    for (int panel = 0; panel < piece.site.panels(); ++panel) {
      float sums[kBlockRows * kPanelRows];
      const float* router = piece.site.router.as<float>() + size_t(panel) * padded * kPanelRows;
      kernels_.route(x, block.units, router, padded / kPanelInputs, sums);
      const int first = panel * kPanelRows,
                count = std::min(kPanelRows, piece.site.experts - first);
      for (int i = 0; i < block.units; ++i)
        std::copy_n(sums + i * kPanelRows, count, logits(block, i) + first);
    }
  }

  void scale(const Block& block) {
    const Part& part = parts_[block.part];
    const ScalePiece& piece = *part.piece;
    const Site& site = piece.site;
    const int experts = site.experts;
    float p[kBlockRows * kMaxRouterRows], terms[kBlockRows * kMaxRouterRows];
    float weights[kMaxRouterRows], thresholds[kBlockRows] = {};
    int64_t soft = 0;
    double entropy = 0;
    for (int i = 0; i < block.units; ++i) std::copy_n(logits(block, i), experts, p + i * experts);
    site.policy->probabilities(kernels_, p, block.units, thresholds);
    site.policy->entropy_terms(kernels_, p, block.units, terms);
    for (int i = 0; i < block.units; ++i) {
      const int unit = block.first + i;
      const Decision decision = site.policy->decide(kernels_, p + i * experts, terms + i * experts,
                                                    thresholds[i], weights);
      entropy += decision.entropy;
      soft += decision.soft;
      count_experts(site, weights);
      const float* vectors =
          piece.vectors.as<float>() + size_t(unit % piece.heads) * experts * piece.width;
      kernels_.scale({head(part, unit), piece.width, vectors, weights, experts});
      if (!backend_.capture.empty()) keep(part, unit, weights);
      if (backend_.tracing) record(block.part, p + i * experts, weights, decision.entropy);
    }
#pragma omp atomic
    site.counters.decisions += block.units;
#pragma omp atomic
    site.counters.soft += soft;
#pragma omp atomic
    site.counters.entropy += entropy;
  }

  static void count_experts(const Site& site, const float* weights) {
    for (int e = 0; e < site.experts; ++e) {
      if (weights[e] == 0) continue;
#pragma omp atomic
      site.counters.expert_tokens[e] += 1;
    }
  }

  void keep(const Part& part, int unit, const float* weights) const {
    const Site& site = part.piece->site;
    const int heads = part.piece->heads;
    float* kept = backend_.capture.row(part.start + unit / heads, site);
    if (kept != nullptr) std::copy_n(weights, site.experts, kept + unit % heads * site.experts);
  }

  void record(int part, const float* p, const float* weights, float entropy) {
    TraceRecord& record = backend_.trace[first_record_ + part];
    record.probabilities.insert(record.probabilities.end(), p, p + record.experts);
    record.weights.insert(record.weights.end(), weights, weights + record.experts);
    record.entropy.push_back(entropy);
  }

  Backend& backend_;
  const Kernels& kernels_;
  const Rows u_;
  const bool by_head_;
  std::vector<Part> parts_;
  std::vector<Block> blocks_;
  size_t units_ = 0, first_record_ = 0;
  int experts_ = 0, inputs_ = 0;
  int64_t work_ = 0;
  float* logits_ = nullptr;  // [units][experts]
  float* heads_ = nullptr;   // [threads][kBlockRows][inputs]
};

}  // namespace

void apply_scales(Backend& backend, int linear, Rows out) {
  ScaleCall call(backend, *backend.linears[linear].kernels, out, true);
  for (const Run& run : backend.runs) {
    if (run.slot == nullptr) continue;
    const auto pieces = run.slot->scales.find(linear);
    if (pieces == run.slot->scales.end()) continue;
    for (const ScalePiece& piece : pieces->second) call.add(piece, run);
  }
  call.run(nullptr);
}

void apply_ffn_scales(Backend& backend, int ffn, Rows h, Reduce* reduce) {
  ScaleCall call(backend, *backend.linears[backend.ffns[ffn].down].kernels, h, false);
  for (const Run& run : backend.runs) {
    if (run.slot == nullptr) continue;
    const auto piece = run.slot->ffn_scales.find(ffn);
    if (piece != run.slot->ffn_scales.end()) call.add(piece->second, run);
  }
  call.run(reduce);
}

bool changes_ffn(const Backend& backend, int ffn) {
  if (backend.ffn_of_state == ffn && !backend.ffn_states.empty()) return true;
  return std::any_of(backend.runs.begin(), backend.runs.end(), [&](const Run& run) {
    return run.slot != nullptr && run.slot->ffn_scales.count(ffn) > 0;
  });
}

}  // namespace molehill
