#include "policy.h"

#include <algorithm>
#include <cmath>

namespace molehill {
namespace {

// Running sums as torch makes them on a CPU: added in double, rounded to float at each rank.
struct RunningSum {
  double total = 0;
  float add(float value) { return static_cast<float>(total += value); }
};

bool is_shannon(const Policy& policy) {
  return policy.kind != PolicyKind::dynmole || policy.entropy_index == 1;
}

// Terms are summed in double: 1 - sum p^q loses most of its digits.
float entropy(const Policy& policy, const float* terms, int experts) {
  if (experts == 1) return 0;
  double sum = 0;
  for (int e = 0; e < experts; ++e) sum += terms[e];
  const double index = policy.entropy_index;
  if (!is_shannon(policy))
    sum = policy.renyi ? std::log(sum + 1e-10) / (1 - index) : (1 - sum) / (index - 1);
  return static_cast<float>(sum / policy.entropy_unit);
}

void divide_by_sum(float* weights, int experts) {
  double sum = 0;
  for (int e = 0; e < experts; ++e) sum += weights[e];
  for (int e = 0; e < experts; ++e) weights[e] /= static_cast<float>(sum);
}

void keep_top_k(const Kernels& kernels, const Policy& policy, const float* p, int experts, float* weights) {
  uint16_t order[kMaxExperts];
  kernels.rank(p, experts, order);
  std::fill_n(weights, experts, 0.0f);
  for (int i = 0; i < std::min(policy.k, experts); ++i) weights[order[i]] = p[order[i]];
  if (policy.normalize) divide_by_sum(weights, experts);
}

void keep_top_p(const Kernels& kernels, const Policy& policy, const float* probabilities,
                int experts, float* weights) {
  float p[kMaxExperts];
  const float divisor = policy.temperature > 0 ? policy.temperature : 1;
  for (int e = 0; e < experts; ++e) p[e] = probabilities[e] / divisor;
  uint16_t order[kMaxExperts];
  kernels.rank(p, experts, order);
  std::fill_n(weights, experts, 0.0f);
  RunningSum sum;
  for (int i = 0; i < experts; ++i) {
    weights[order[i]] = p[order[i]];
    if (sum.add(p[order[i]]) > policy.top_p) break;
  }
}

bool keep_by_entropy(const Kernels& kernels, const Policy& policy, float entropy, const float* p,
                     int experts, float* weights) {
  const bool soft = policy.entropy_threshold < 1 && entropy > policy.entropy_threshold;
  uint16_t order[kMaxExperts];
  kernels.rank(p, experts, order);
  RunningSum sum;
  for (int i = 0; i < experts; ++i) {
    const float value = p[order[i]], total = sum.add(value);
    const bool below =
        policy.include_crossing ? total - value < policy.top_p : total <= policy.top_p;
    weights[order[i]] = soft || below || i < policy.keep_top_k ? value : 0;
  }
  if (policy.normalize_weights) divide_by_sum(weights, experts);
  return soft;
}

}  // namespace

double entropy_unit(const Policy& policy, int experts) {
  if (policy.kind == PolicyKind::dynmole && !policy.normalize_entropy) return 1;
  const double index = policy.entropy_index;
  if (is_shannon(policy) || policy.renyi) return std::log(experts);
  return (1 - std::pow(experts, 1 - index)) / (index - 1);
}

void softmax(const Kernels& kernels, float* logits, int rows, int experts) {
  for (float* row = logits; row < logits + rows * experts; row += experts) {
    const float most = *std::max_element(row, row + experts);
    for (int e = 0; e < experts; ++e) row[e] -= most;
  }
  kernels.exponentials(logits, size_t(rows) * experts);
  for (float* row = logits; row < logits + rows * experts; row += experts) divide_by_sum(row, experts);
}

void entropy_terms(const Kernels& kernels, const Policy& policy, const float* probabilities,
                   int rows, int experts, float* terms) {
  const size_t count = size_t(rows) * experts;
  const bool shifted = policy.kind == PolicyKind::dynmole && policy.normalize_entropy;
  for (size_t i = 0; i < count; ++i)
    terms[i] = probabilities[i] + (shifted ? policy.entropy_eps : 0);
  if (is_shannon(policy))
    kernels.entropies(terms, terms, count);
  else
    kernels.powers(terms, static_cast<float>(policy.entropy_index), terms, count);
}

Decision decide(const Kernels& kernels, const Policy& policy, const float* probabilities,
                const float* terms, int experts, float* weights) {
  Decision decision{entropy(policy, terms, experts), false};
  switch (policy.kind) {
    case PolicyKind::constant:
      std::copy_n(policy.weights.begin(), experts, weights);
      break;
    case PolicyKind::soft:
      std::copy_n(probabilities, experts, weights);
      break;
    case PolicyKind::top_k:
      keep_top_k(kernels, policy, probabilities, experts, weights);
      break;
    case PolicyKind::top_p:
      keep_top_p(kernels, policy, probabilities, experts, weights);
      break;
    case PolicyKind::dynmole:
      decision.soft = keep_by_entropy(kernels, policy, decision.entropy, probabilities, experts, weights);
      break;
  }
  return decision;
}

}  // namespace molehill
