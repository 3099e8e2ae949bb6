// A policy's fields, as molehill.kernels.cpu.policy_codec names them.
#pragma once
#include <algorithm>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

namespace molehill {

// Of one router, extra rows counted.
constexpr int kMaxRouterRows = 1024;

// Numbers by field; a flag is 0 or 1, a choice is a field `name=chosen` without numbers.
using FieldValues = std::map<std::string, std::vector<double>>;

// Takes the fields one by one. Throws std::invalid_argument, with the policy's name and the field.
class PolicyFields {
 public:
  PolicyFields(std::string policy, FieldValues values)
      : policy_(std::move(policy)), values_(std::move(values)) {}

  std::vector<float> numbers(const std::string& name, size_t count) {
    const auto entry = values_.find(name);
    if (entry == values_.end()) fail("no field " + name);
    const std::vector<double> values = std::move(entry->second);
    values_.erase(entry);
    if (values.size() != count)
      fail(name + " has " + std::to_string(values.size()) + " numbers, expected " +
           std::to_string(count));
    return {values.begin(), values.end()};
  }

  double number(const std::string& name) {
    const auto entry = values_.find(name);
    const double value = entry == values_.end() || entry->second.empty() ? 0 : entry->second[0];
    numbers(name, 1);
    return value;
  }

  bool flag(const std::string& name) { return number(name) != 0; }

  // More experts than there can be are as good as all.
  int count(const std::string& name) { return int(std::min(number(name), double(kMaxRouterRows))); }

  // The place of what was chosen.
  size_t choice(const std::string& name, const std::vector<std::string>& known) {
    for (size_t i = 0; i < known.size(); ++i)
      if (values_.erase(name + "=" + known[i]) > 0) return i;
    fail("no field " + name + " with a known value");
  }

  // Whatever was not taken is unknown.
  void finish() const {
    if (!values_.empty()) fail("unknown field " + values_.begin()->first);
  }

 private:
  [[noreturn]] void fail(const std::string& what) const {
    throw std::invalid_argument("molehill_cpu: " + policy_ + ": " + what);
  }

  std::string policy_;
  FieldValues values_;
};

}  // namespace molehill
