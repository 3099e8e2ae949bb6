// Routing policies: what molehill.kernels.policy defines, for one row at a time.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "kernels.h"
#include "policy_fields.h"

namespace molehill {

struct Decision {
  float entropy;
  bool soft;
};

// One policy over a router of so many experts. The base class is what a policy is unless it says
// otherwise: a function of p = softmax(logits), with Shannon's entropy over its maximum.
class Policy {
 public:
  explicit Policy(int experts);
  virtual ~Policy() = default;

  // Of the router, after the experts'.
  virtual int extra_rows() const { return 0; }
  // [experts], whatever the row; null where a router decides.
  virtual const float* constant_weights() const { return nullptr; }
  // Probabilities [rows][experts] out of logits [rows][experts + extra_rows], in place, and the
  // thresholds [rows] of a policy that has one for each row.
  virtual void probabilities(const Kernels& kernels, float* logits, int rows,
                             float* thresholds) const;
  // The terms [rows][experts] whose sum over the experts is the policy's entropy, before it is
  // normalised.
  virtual void entropy_terms(const Kernels& kernels, const float* probabilities, int rows,
                             float* terms) const;
  // weights [experts] of one row from its probabilities, terms and threshold; zero for an expert
  // that is not chosen.
  Decision decide(const Kernels& kernels, const float* probabilities, const float* terms,
                  float threshold, float* weights) const;

 protected:
  struct Row {
    const float* probabilities;
    float entropy, threshold;
  };
  // Whether the row fell back to soft routing.
  virtual bool weigh(const Kernels& kernels, const Row& row, float* weights) const = 0;
  // Of two experts or more, from the sum of the terms.
  virtual double entropy(double sum) const { return sum / log_experts_; }

  const int experts_;
  const double log_experts_;
};

// A policy by its class name and what Python says of it. Throws std::invalid_argument for a name
// that is not one of `policy_names`, and for a field that is missing, unknown or of another length.
std::unique_ptr<const Policy> make_policy(const std::string& name, const FieldValues& values,
                                          int experts);
std::vector<std::string> policy_names();

}  // namespace molehill
