// Routing policies: what molehill.kernels.policy defines, for one row at a time.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "kernels.h"

namespace molehill {

enum class PolicyKind {
  constant, soft, top_k, top_p, dynmole, threshold, arrow, adamole, sparsegen
};

// The fields of the policy's dataclass; those of other kinds are not read.
struct Policy {
  PolicyKind kind = PolicyKind::soft;
  std::vector<float> weights;  // constant
  int k = 0;                   // top_k, arrow
  bool normalize = true;
  float top_p = 0;  // top_p, dynmole
  float temperature = 0;       // top_p, arrow
  int keep_top_k = 0;  // dynmole
  float entropy_threshold = 1, entropy_eps = 0;
  double entropy_index = 1;
  double entropy_unit = 1;  // what entropies are divided by
  float threshold = 0;  // threshold; the greatest of adamole
  float offset = 0;     // of adamole's extra logit, of the output of sparsegen's MLP
  std::vector<float> hidden_biases, hidden_weights;  // sparsegen
  int extra_rows = 0;   // of the router, after the experts'
  bool renyi = false, normalize_weights = false, include_crossing = false, normalize_entropy = true;
};

// From the name and the numbers that molehill.kernels.cpu.backend makes of the dataclass. Throws
// std::invalid_argument.
Policy parse_policy(const std::string& name, const std::vector<double>& numbers);

struct Decision {
  float entropy;
  bool soft;
};

// The largest entropy of so many experts, or 1 where the policy does not normalise.
double entropy_unit(const Policy& policy, int experts);

// Probabilities [rows][experts] out of logits [rows][experts + extra_rows], in place, and the
// thresholds [rows] of a policy that has one for each row.
void probabilities(const Kernels& kernels, const Policy& policy, float* logits, int rows,
                   int experts, float* thresholds);

// The terms whose sum over the experts is the policy's entropy, before it is normalised.
void entropy_terms(const Kernels& kernels, const Policy& policy, const float* probabilities,
                   int rows, int experts, float* terms);

// weights[e] of one row from its probabilities, terms and threshold; zero for an expert that is not
// chosen.
Decision decide(const Kernels& kernels, const Policy& policy, const float* probabilities,
                const float* terms, float threshold, int experts, float* weights);

// Of one router, extra rows counted.
constexpr int kMaxRouterRows = 1024;

}  // namespace molehill
