#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "policy.h"

namespace molehill {
namespace {

// Running sums as torch makes them on a CPU: added in double, rounded to float at each rank.
struct RunningSum {
  double total = 0;
  float add(float value) { return static_cast<float>(total += value); }
};

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
  for (float* row = logits; row < logits + rows * experts; row += experts)
    divide_by_sum(row, experts);
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

void keep_top_k(const Kernels& kernels, const float* p, int k, int experts, float* weights) {
  uint16_t order[kMaxRouterRows];
  kernels.rank(p, experts, order);
  std::fill_n(weights, experts, 0.0f);
  for (int i = 0; i < std::min(k, experts); ++i) weights[order[i]] = p[order[i]];
}

}  // namespace

Policy::Policy(int experts) : experts_(experts), log_experts_(std::log(experts)) {}

void Policy::probabilities(const Kernels& kernels, float* logits, int rows, float*) const {
  softmax(kernels, logits, rows, experts_);
}

void Policy::entropy_terms(const Kernels& kernels, const float* probabilities, int rows,
                           float* terms) const {
  kernels.entropies(probabilities, terms, size_t(rows) * experts_);
}

Decision Policy::decide(const Kernels& kernels, const float* probabilities, const float* terms,
                        float threshold, float* weights) const {
  Row row{probabilities, 0, threshold};
  if (experts_ > 1) {
    // In double: 1 - sum p^q loses most of its digits.
    double sum = 0;
    for (int e = 0; e < experts_; ++e) sum += terms[e];
    row.entropy = static_cast<float>(entropy(sum));
  }
  const bool soft = weigh(kernels, row, weights);
  return {row.entropy, soft};
}

namespace {

class Constant : public Policy {
 public:
  Constant(PolicyFields& fields, int experts)
      : Policy(experts), weights_(fields.numbers("weights", experts)) {}
  const float* constant_weights() const override { return weights_.data(); }

 protected:
  bool weigh(const Kernels&, const Row&, float* weights) const override {
    std::copy_n(weights_.begin(), experts_, weights);
    return false;
  }

 private:
  const std::vector<float> weights_;
};

class Soft : public Policy {
 public:
  Soft(PolicyFields&, int experts) : Policy(experts) {}

 protected:
  bool weigh(const Kernels&, const Row& row, float* weights) const override {
    std::copy_n(row.probabilities, experts_, weights);
    return false;
  }
};

class TopK : public Policy {
 public:
  TopK(PolicyFields& fields, int experts)
      : Policy(experts), k_(fields.count("k")), normalize_(fields.flag("normalize")) {}

 protected:
  bool weigh(const Kernels& kernels, const Row& row, float* weights) const override {
    keep_top_k(kernels, row.probabilities, k_, experts_, weights);
    if (normalize_) divide_by_sum(weights, experts_);
    return false;
  }

 private:
  const int k_;
  const bool normalize_;
};

class TopP : public Policy {
 public:
  TopP(PolicyFields& fields, int experts)
      : Policy(experts),
        top_p_(float(fields.number("top_p"))),
        temperature_(float(fields.number("temperature"))) {}

 protected:
  bool weigh(const Kernels& kernels, const Row& row, float* weights) const override {
    float p[kMaxRouterRows];
    const float divisor = temperature_ > 0 ? temperature_ : 1;
    for (int e = 0; e < experts_; ++e) p[e] = row.probabilities[e] / divisor;
    uint16_t order[kMaxRouterRows];
    kernels.rank(p, experts_, order);
    std::fill_n(weights, experts_, 0.0f);
    RunningSum sum;
    for (int i = 0; i < experts_; ++i) {
      weights[order[i]] = p[order[i]];
      if (sum.add(p[order[i]]) > top_p_) break;
    }
    return false;
  }

 private:
  const float top_p_, temperature_;
};

class DynMole : public Policy {
 public:
  DynMole(PolicyFields& fields, int experts)
      : Policy(experts),
        top_p_(float(fields.number("top_p"))),
        keep_top_k_(fields.count("keep_top_k")),
        entropy_threshold_(float(fields.number("entropy_threshold"))),
        index_(fields.number("entropy_index")),
        renyi_(fields.choice("entropy_type", {"tsallis", "renyi"}) == 1),
        eps_(float(fields.number("entropy_eps"))),
        normalize_weights_(fields.flag("normalize_weights")),
        include_crossing_(fields.flag("include_crossing")),
        normalize_entropy_(fields.flag("normalize_entropy")),
        unit_(!normalize_entropy_     ? 1
              : index_ == 1 || renyi_ ? log_experts_
                                      : (1 - std::pow(experts, 1 - index_)) / (index_ - 1)) {}

  void entropy_terms(const Kernels& kernels, const float* probabilities, int rows,
                     float* terms) const override {
    const size_t count = size_t(rows) * experts_;
    for (size_t i = 0; i < count; ++i)
      terms[i] = probabilities[i] + (normalize_entropy_ ? eps_ : 0);
    if (index_ == 1)
      kernels.entropies(terms, terms, count);
    else
      kernels.powers(terms, static_cast<float>(index_), terms, count);
  }

 protected:
  double entropy(double sum) const override {
    if (index_ != 1) sum = renyi_ ? std::log(sum + 1e-10) / (1 - index_) : (1 - sum) / (index_ - 1);
    return sum / unit_;
  }

  bool weigh(const Kernels& kernels, const Row& row, float* weights) const override {
    const bool soft = entropy_threshold_ < 1 && row.entropy > entropy_threshold_;
    uint16_t order[kMaxRouterRows];
    kernels.rank(row.probabilities, experts_, order);
    RunningSum sum;
    for (int i = 0; i < experts_; ++i) {
      const float value = row.probabilities[order[i]], total = sum.add(value);
      const bool below = include_crossing_ ? total - value < top_p_ : total <= top_p_;
      weights[order[i]] = soft || below || i < keep_top_k_ ? value : 0;
    }
    if (normalize_weights_) divide_by_sum(weights, experts_);
    return soft;
  }

 private:
  const float top_p_;
  const int keep_top_k_;
  const float entropy_threshold_;
  const double index_;
  const bool renyi_;
  const float eps_;
  const bool normalize_weights_, include_crossing_, normalize_entropy_;
  const double unit_;  // what entropies are divided by
};

class Threshold : public Policy {
 public:
  Threshold(PolicyFields& fields, int experts)
      : Policy(experts), threshold_(float(fields.number("threshold"))) {}

 protected:
  bool weigh(const Kernels&, const Row& row, float* weights) const override {
    for (int e = 0; e < experts_; ++e)
      weights[e] = row.probabilities[e] < threshold_ ? 0 : row.probabilities[e];
    divide_by_sum_if_any(weights, experts_);
    return false;
  }

 private:
  const float threshold_;
};

class Arrow : public Policy {
 public:
  Arrow(PolicyFields& fields, int experts)
      : Policy(experts), k_(fields.count("k")), temperature_(float(fields.number("temperature"))) {}

  void probabilities(const Kernels& kernels, float* logits, int rows, float*) const override {
    for (int i = 0; i < rows * experts_; ++i) logits[i] = std::abs(logits[i]) / temperature_;
    softmax(kernels, logits, rows, experts_);
  }

 protected:
  bool weigh(const Kernels& kernels, const Row& row, float* weights) const override {
    keep_top_k(kernels, row.probabilities, k_, experts_, weights);
    divide_by_sum(weights, experts_);
    return false;
  }

 private:
  const int k_;
  const float temperature_;
};

class AdaMole : public Policy {
 public:
  AdaMole(PolicyFields& fields, int experts)
      : Policy(experts),
        max_threshold_(float(fields.number("max_threshold"))),
        offset_(float(fields.number("parameters"))) {}
  int extra_rows() const override { return 1; }

  // A threshold is sigmoid(extra logit + offset) * the greatest; the experts' logits close up.
  void probabilities(const Kernels& kernels, float* logits, int rows,
                     float* thresholds) const override {
    for (int i = 0; i < rows; ++i) {
      const float* row = logits + i * (experts_ + 1);
      thresholds[i] = max_threshold_ / (1 + std::exp(-(row[experts_] + offset_)));
      std::copy_n(row, experts_, logits + i * experts_);
    }
    softmax(kernels, logits, rows, experts_);
  }

 protected:
  bool weigh(const Kernels&, const Row& row, float* weights) const override {
    for (int e = 0; e < experts_; ++e)
      weights[e] = std::max(row.probabilities[e] - row.threshold, 0.0f);
    divide_by_sum_if_any(weights, experts_);
    return false;
  }

 private:
  const float max_threshold_, offset_;
};

class Sparsegen : public Policy {
 public:
  Sparsegen(PolicyFields& fields, int experts)
      : Policy(experts),
        hidden_(fields.count("hidden")),
        parameters_(fields.numbers("parameters", 2 * size_t(hidden_) + 1)) {}
  int extra_rows() const override { return hidden_; }

  void probabilities(const Kernels& kernels, float* logits, int rows, float*) const override {
    for (int i = 0; i < rows; ++i) {
      const float* row = logits + i * (experts_ + hidden_);
      const float most = *std::max_element(row, row + experts_);
      const float scale = sparsity(row + experts_);
      float* p = logits + i * experts_;
      for (int e = 0; e < experts_; ++e) p[e] = (row[e] - most) / scale;
      sparsemax(kernels, p, experts_);
    }
  }

 protected:
  bool weigh(const Kernels&, const Row& row, float* weights) const override {
    std::copy_n(row.probabilities, experts_, weights);
    return false;
  }

 private:
  // 1 - lambda of LD-MoLE: eps + softplus(-output of the MLP).
  float sparsity(const float* hidden) const {
    constexpr double kEps = 1e-2;
    const float *biases = parameters_.data(), *weights = biases + hidden_;
    double output = parameters_.back();
    for (int j = 0; j < hidden_; ++j) output += weights[j] * std::max(hidden[j] + biases[j], 0.0f);
    return static_cast<float>(kEps + std::max(-output, 0.0) +
                              std::log1p(std::exp(-std::abs(output))));
  }

  const int hidden_;
  const std::vector<float> parameters_;  // hidden biases, output weights, output bias
};

// Scores, logit + bias, have the place of probabilities: what the k greatest get is 1.
class FlyLora : public Policy {
 public:
  FlyLora(PolicyFields& fields, int experts)
      : Policy(experts),
        k_(fields.count("k")),
        biases_(fields.numbers("parameters", fields.count("experts"))) {
    if (int(biases_.size()) != experts)
      throw std::invalid_argument("molehill_cpu: FlyLoRA: biases of " +
                                  std::to_string(biases_.size()) + " experts, expected " +
                                  std::to_string(experts));
  }

  void probabilities(const Kernels&, float* logits, int rows, float*) const override {
    for (int i = 0; i < rows * experts_; ++i) logits[i] += biases_[i % experts_];
  }

  void entropy_terms(const Kernels& kernels, const float* scores, int rows,
                     float* terms) const override {
    const size_t count = size_t(rows) * experts_;
    std::copy_n(scores, count, terms);
    softmax(kernels, terms, rows, experts_);
    kernels.entropies(terms, terms, count);
  }

 protected:
  bool weigh(const Kernels& kernels, const Row& row, float* weights) const override {
    uint16_t order[kMaxRouterRows];
    kernels.rank(row.probabilities, experts_, order);
    for (int i = 0; i < experts_; ++i) weights[order[i]] = i < k_ ? 1 : 0;
    return false;
  }

 private:
  const int k_;
  const std::vector<float> biases_;
};

template <class Own>
std::unique_ptr<const Policy> make(PolicyFields& fields, int experts) {
  return std::make_unique<const Own>(fields, experts);
}

using Maker = std::unique_ptr<const Policy> (*)(PolicyFields& fields, int experts);

const std::map<std::string, Maker> kMakers = {
    {"Constant", make<Constant>}, {"Soft", make<Soft>},       {"TopK", make<TopK>},
    {"TopP", make<TopP>},         {"DynMoLE", make<DynMole>}, {"Threshold", make<Threshold>},
    {"Arrow", make<Arrow>},       {"AdaMoLE", make<AdaMole>}, {"Sparsegen", make<Sparsegen>},
    {"FlyLoRA", make<FlyLora>},
};

}  // namespace

std::unique_ptr<const Policy> make_policy(const std::string& name, const FieldValues& values,
                                          int experts) {
  const auto maker = kMakers.find(name);
  if (maker == kMakers.end()) throw std::invalid_argument("molehill_cpu: unknown policy " + name);
  PolicyFields fields(name, values);
  std::unique_ptr<const Policy> policy = maker->second(fields, experts);
  fields.finish();
  return policy;
}

std::vector<std::string> policy_names() {
  std::vector<std::string> names;
  for (const auto& [name, maker] : kMakers) names.push_back(name);
  return names;
}

}  // namespace molehill
