// From logits to chosen experts, with the figures that metrics and traces are made of.
#include <algorithm>

#include "state.h"

namespace molehill {
namespace {

void count(const Routing& routing, int row, int rows, double entropy, int64_t soft) {
  Counters& counters = routing.site->counters;
#pragma omp atomic
  counters.decisions += rows;
#pragma omp atomic
  counters.soft += soft;
#pragma omp atomic
  counters.entropy += entropy;
  for (int e = 0; e < routing.site->experts; ++e) {
    int64_t tokens = 0;
    for (int i = row; i < row + rows; ++i)
      tokens += routing.weights[size_t(e) * routing.chunk.rows + i] != 0;
#pragma omp atomic
    counters.expert_tokens[e] += tokens;
  }
}

void keep(const Routing& routing, int row, const float* weights) {
  float* kept = routing.capture->row(routing.chunk.start + row, *routing.site);
  if (kept != nullptr) std::copy_n(weights, routing.site->experts, kept);
}

void append(TraceRecord& record, const Routing& routing) {
  const int experts = routing.site->experts, rows = routing.chunk.rows;
  record.rows += rows;
  record.probabilities.insert(record.probabilities.end(), routing.probabilities,
                              routing.probabilities + size_t(rows) * experts);
  record.entropy.insert(record.entropy.end(), routing.entropy, routing.entropy + rows);
  for (int row = 0; row < rows; ++row)
    for (int e = 0; e < experts; ++e)
      record.weights.push_back(routing.weights[size_t(e) * rows + row]);
}

}  // namespace

void choose(const Routing& routing, int row, const float* weights) {
  const int experts = routing.site->experts;
  uint16_t* list = routing.experts + size_t(row) * experts;
  int chosen = 0;
  for (int e = 0; e < experts; ++e) {
    routing.weights[size_t(e) * routing.chunk.rows + row] = weights[e];
    list[chosen] = uint16_t(e);
    chosen += weights[e] != 0;
  }
  routing.counts[row] = uint16_t(chosen);
}

void decide_rows(const Kernels& kernels, const Routing& routing, float* logits, int row, int rows) {
  const Site& site = *routing.site;
  float weights[kMaxRouterRows], terms[kBlockRows * kMaxRouterRows], thresholds[kBlockRows] = {};
  double entropy = 0;
  int64_t soft = 0;
  site.policy->probabilities(kernels, logits, rows, thresholds);
  site.policy->entropy_terms(kernels, logits, rows, terms);
  for (int i = 0; i < rows; ++i) {
    const float* p = logits + i * site.experts;
    const Decision decision =
        site.policy->decide(kernels, p, terms + i * site.experts, thresholds[i], weights);
    entropy += decision.entropy;
    soft += decision.soft;
    choose(routing, row + i, weights);
    if (routing.capture != nullptr) keep(routing, row + i, weights);
    if (routing.probabilities == nullptr) continue;
    std::copy_n(p, site.experts, routing.probabilities + size_t(row + i) * site.experts);
    routing.entropy[row + i] = decision.entropy;
  }
  count(routing, row, rows, entropy, soft);
}

void record(std::vector<TraceRecord>& trace, const std::vector<Routing>& routings) {
  const size_t before = trace.size();
  for (const Routing& routing : routings) {
    if (!routing.site->routed) continue;
    const auto same =
        std::find_if(trace.begin() + before, trace.end(), [&](const TraceRecord& record) {
          return record.site == routing.site->id &&
                 record.start + record.rows == routing.chunk.start;
        });
    if (same != trace.end()) {
      append(*same, routing);
      continue;
    }
    trace.push_back({routing.site->id, routing.chunk.start, 0, routing.site->experts, {}, {}, {}});
    append(trace.back(), routing);
  }
}

}  // namespace molehill
