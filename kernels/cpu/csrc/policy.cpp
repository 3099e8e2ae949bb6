#include "policy.h"

#include <algorithm>
#include <cmath>

namespace molehill {
namespace {

// Falling probability, ties by index. An insertion sort: rows are short, and no comparison of NaNs
// can lead it out of bounds.
void rank(const float* values, int experts, uint16_t* order) {
  for (int e = 0; e < experts; ++e) {
    int at = e;
    for (; at > 0 && values[order[at - 1]] < values[e]; --at) order[at] = order[at - 1];
    order[at] = static_cast<uint16_t>(e);
  }
}

// Running sums as torch makes them on a CPU: added in double, rounded to float at each rank.
struct RunningSum {
  double total = 0;
  float add(float value) { return static_cast<float>(total += value); }
};

float shannon_sum(const float* p, int experts) {
  double sum = 0;
  for (int e = 0; e < experts; ++e)
    if (p[e] > 0) sum -= p[e] * std::log(p[e]);
  return static_cast<float>(sum);
}

float shannon(const float* p, int experts) {
  return experts == 1 ? 0 : shannon_sum(p, experts) / std::log(static_cast<float>(experts));
}

float dynmole_entropy(const Policy& policy, const float* probabilities, int experts) {
  if (experts == 1) return 0;
  const double index = policy.entropy_index;
  const float eps = policy.normalize_entropy ? policy.entropy_eps : 0;
  float p[kMaxExperts];
  for (int e = 0; e < experts; ++e) p[e] = probabilities[e] + eps;
  if (index == 1) {
    const float value = shannon_sum(p, experts);
    return policy.normalize_entropy ? value / std::log(static_cast<float>(experts)) : value;
  }
  double sum = 0;
  for (int e = 0; e < experts; ++e) sum += std::pow(p[e], static_cast<float>(index));
  double value = 0, most = 0;
  if (policy.renyi) {
    value = std::log(sum + 1e-10) / (1 - index);
    most = std::log(static_cast<double>(experts));
  } else {
    value = (1 - sum) / (index - 1);
    most = (1 - std::pow(experts, 1 - index)) / (index - 1);
  }
  return static_cast<float>(policy.normalize_entropy ? value / most : value);
}

void divide_by_sum(float* weights, int experts) {
  double sum = 0;
  for (int e = 0; e < experts; ++e) sum += weights[e];
  for (int e = 0; e < experts; ++e) weights[e] /= static_cast<float>(sum);
}

void keep_top_k(const Policy& policy, const float* p, int experts, float* weights) {
  uint16_t order[kMaxExperts];
  rank(p, experts, order);
  std::fill_n(weights, experts, 0.0f);
  for (int i = 0; i < std::min(policy.k, experts); ++i) weights[order[i]] = p[order[i]];
  if (policy.normalize) divide_by_sum(weights, experts);
}

void keep_top_p(const Policy& policy, const float* probabilities, int experts, float* weights) {
  float p[kMaxExperts];
  const float divisor = policy.temperature > 0 ? policy.temperature : 1;
  for (int e = 0; e < experts; ++e) p[e] = probabilities[e] / divisor;
  uint16_t order[kMaxExperts];
  rank(p, experts, order);
  std::fill_n(weights, experts, 0.0f);
  RunningSum sum;
  for (int i = 0; i < experts; ++i) {
    weights[order[i]] = p[order[i]];
    if (sum.add(p[order[i]]) > policy.top_p) break;
  }
}

Decision keep_by_entropy(const Policy& policy, const float* p, int experts, float* weights) {
  const float entropy = dynmole_entropy(policy, p, experts);
  const bool soft = policy.entropy_threshold < 1 && entropy > policy.entropy_threshold;
  uint16_t order[kMaxExperts];
  rank(p, experts, order);
  RunningSum sum;
  for (int i = 0; i < experts; ++i) {
    const float value = p[order[i]], total = sum.add(value);
    const bool below =
        policy.include_crossing ? total - value < policy.top_p : total <= policy.top_p;
    weights[order[i]] = soft || below || i < policy.keep_top_k ? value : 0;
  }
  if (policy.normalize_weights) divide_by_sum(weights, experts);
  return {entropy, soft};
}

}  // namespace

void softmax(float* logits, int experts) {
  const float most = *std::max_element(logits, logits + experts);
  double sum = 0;
  for (int e = 0; e < experts; ++e) sum += logits[e] = std::exp(logits[e] - most);
  for (int e = 0; e < experts; ++e) logits[e] /= static_cast<float>(sum);
}

Decision decide(const Policy& policy, const float* probabilities, int experts, float* weights) {
  switch (policy.kind) {
    case PolicyKind::constant:
      std::copy_n(policy.weights.begin(), experts, weights);
      break;
    case PolicyKind::soft:
      std::copy_n(probabilities, experts, weights);
      break;
    case PolicyKind::top_k:
      keep_top_k(policy, probabilities, experts, weights);
      break;
    case PolicyKind::top_p:
      keep_top_p(policy, probabilities, experts, weights);
      break;
    case PolicyKind::dynmole:
      return keep_by_entropy(policy, probabilities, experts, weights);
  }
  return {shannon(probabilities, experts), false};
}

}  // namespace molehill
