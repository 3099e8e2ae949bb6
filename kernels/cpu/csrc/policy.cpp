#include "policy.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

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

// All zero if nothing was kept.
void divide_by_sum_if_any(float* weights, int experts) {
  if (std::any_of(weights, weights + experts, [](float w) { return w != 0; }))
    divide_by_sum(weights, experts);
}

void softmax(const Kernels& kernels, float* logits, int rows, int experts) {
  for (float* row = logits; row < logits + rows * experts; row += experts) {
    const float most = *std::max_element(row, row + experts);
    for (int e = 0; e < experts; ++e) row[e] -= most;
  }
  kernels.exponentials(logits, size_t(rows) * experts);
  for (float* row = logits; row < logits + rows * experts; row += experts) divide_by_sum(row, experts);
}

// sigmoid(extra logit + offset) * threshold of each row; the experts' logits close up.
void take_thresholds(const Policy& policy, float* logits, int rows, int experts, float* thresholds) {
  for (int i = 0; i < rows; ++i) {
    const float* row = logits + i * (experts + 1);
    thresholds[i] = policy.threshold / (1 + std::exp(-(row[experts] + policy.offset)));
    std::copy_n(row, experts, logits + i * experts);
  }
}

// 1 - lambda of LD-MoLE: eps + softplus(-output of the MLP).
float sparsity(const Policy& policy, const float* hidden) {
  constexpr double kEps = 1e-2;
  double output = policy.offset;
  for (size_t j = 0; j < policy.hidden_biases.size(); ++j)
    output += policy.hidden_weights[j] * std::max(hidden[j] + policy.hidden_biases[j], 0.0f);
  return static_cast<float>(kEps + std::max(-output, 0.0) + std::log1p(std::exp(-std::abs(output))));
}

// The distribution nearest to the logits, in place.
void sparsemax(const Kernels& kernels, float* logits, int experts) {
  uint16_t order[kMaxRouterRows];
  kernels.rank(logits, experts, order);
  double sum = 0, threshold = 0;
  for (int i = 0; i < experts; ++i) {
    const float value = logits[order[i]];
    sum += value;
    if (i > 0 && 1 + (i + 1) * double(value) <= sum) break;
    threshold = (sum - 1) / (i + 1);
  }
  for (int e = 0; e < experts; ++e)
    logits[e] = std::max(logits[e] - static_cast<float>(threshold), 0.0f);
}

void sparsegen(const Kernels& kernels, const Policy& policy, float* logits, int rows, int experts) {
  for (int i = 0; i < rows; ++i) {
    const float* row = logits + i * (experts + policy.extra_rows);
    const float most = *std::max_element(row, row + experts);
    const float scale = sparsity(policy, row + experts);
    float* p = logits + i * experts;
    for (int e = 0; e < experts; ++e) p[e] = (row[e] - most) / scale;
    sparsemax(kernels, p, experts);
  }
}

void keep_top_k(const Kernels& kernels, const Policy& policy, const float* p, int experts, float* weights) {
  uint16_t order[kMaxRouterRows];
  kernels.rank(p, experts, order);
  std::fill_n(weights, experts, 0.0f);
  for (int i = 0; i < std::min(policy.k, experts); ++i) weights[order[i]] = p[order[i]];
  if (policy.normalize) divide_by_sum(weights, experts);
}

void keep_top_p(const Kernels& kernels, const Policy& policy, const float* probabilities,
                int experts, float* weights) {
  float p[kMaxRouterRows];
  const float divisor = policy.temperature > 0 ? policy.temperature : 1;
  for (int e = 0; e < experts; ++e) p[e] = probabilities[e] / divisor;
  uint16_t order[kMaxRouterRows];
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
  uint16_t order[kMaxRouterRows];
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

void probabilities(const Kernels& kernels, const Policy& policy, float* logits, int rows,
                   int experts, float* thresholds) {
  switch (policy.kind) {
    case PolicyKind::sparsegen:
      return sparsegen(kernels, policy, logits, rows, experts);
    case PolicyKind::adamole:
      take_thresholds(policy, logits, rows, experts, thresholds);
      break;
    case PolicyKind::arrow:
      for (int i = 0; i < rows * experts; ++i) logits[i] = std::abs(logits[i]) / policy.temperature;
      break;
    default:
      break;
  }
  softmax(kernels, logits, rows, experts);
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
                const float* terms, float threshold, int experts, float* weights) {
  Decision decision{entropy(policy, terms, experts), false};
  switch (policy.kind) {
    case PolicyKind::constant:
      std::copy_n(policy.weights.begin(), experts, weights);
      break;
    case PolicyKind::soft:
    case PolicyKind::sparsegen:
      std::copy_n(probabilities, experts, weights);
      break;
    case PolicyKind::top_k:
    case PolicyKind::arrow:
      keep_top_k(kernels, policy, probabilities, experts, weights);
      break;
    case PolicyKind::top_p:
      keep_top_p(kernels, policy, probabilities, experts, weights);
      break;
    case PolicyKind::threshold:
      for (int e = 0; e < experts; ++e)
        weights[e] = probabilities[e] < policy.threshold ? 0 : probabilities[e];
      divide_by_sum_if_any(weights, experts);
      break;
    case PolicyKind::adamole:
      for (int e = 0; e < experts; ++e) weights[e] = std::max(probabilities[e] - threshold, 0.0f);
      divide_by_sum_if_any(weights, experts);
      break;
    case PolicyKind::dynmole:
      decision.soft = keep_by_entropy(kernels, policy, decision.entropy, probabilities, experts, weights);
      break;
  }
  return decision;
}

Policy parse_policy(const std::string& name, const std::vector<double>& n) {
  Policy policy;
  if (name == "Constant") {
    policy.kind = PolicyKind::constant;
    policy.weights.assign(n.begin(), n.end());
  } else if (name == "Soft") {
    policy.kind = PolicyKind::soft;
  } else if (name == "TopK") {
    policy.kind = PolicyKind::top_k;
    policy.k = int(n.at(0));
    policy.normalize = n.at(1) != 0;
  } else if (name == "TopP") {
    policy.kind = PolicyKind::top_p;
    policy.top_p = float(n.at(0));
    policy.temperature = float(n.at(1));
  } else if (name == "Threshold") {
    policy.kind = PolicyKind::threshold;
    policy.threshold = float(n.at(0));
  } else if (name == "Arrow") {
    policy.kind = PolicyKind::arrow;
    policy.k = int(n.at(0));
    policy.temperature = float(n.at(1));
  } else if (name == "AdaMoLE") {
    policy.kind = PolicyKind::adamole;
    policy.threshold = float(n.at(0));
    policy.offset = float(n.at(1));
    policy.extra_rows = 1;
  } else if (name == "Sparsegen") {
    policy.kind = PolicyKind::sparsegen;
    policy.extra_rows = int(n.at(0));
    if (n.size() != 2 + 2 * size_t(policy.extra_rows))
      throw std::invalid_argument("molehill_cpu: Sparsegen's parameters");
    const auto biases = n.begin() + 1, weights = biases + policy.extra_rows;
    policy.hidden_biases.assign(biases, weights);
    policy.hidden_weights.assign(weights, n.end() - 1);
    policy.offset = float(n.back());
  } else {
    if (name != "DynMoLE") throw std::invalid_argument("molehill_cpu: unknown policy " + name);
    policy.kind = PolicyKind::dynmole;
    policy.top_p = float(n.at(0));
    policy.keep_top_k = int(n.at(1));
    policy.entropy_threshold = float(n.at(2));
    policy.entropy_index = n.at(3);
    policy.entropy_eps = float(n.at(4));
    policy.renyi = n.at(5) != 0;
    policy.normalize_weights = n.at(6) != 0;
    policy.include_crossing = n.at(7) != 0;
    policy.normalize_entropy = n.at(8) != 0;
  }
  return policy;
}

}  // namespace molehill
