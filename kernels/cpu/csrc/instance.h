// What the ops of one backend share: its state, the slots that are being packed, and the handles
// that Python knows its layers by.
#pragma once

#include <ATen/core/Tensor.h>

#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "state.h"

namespace molehill {

using at::Tensor;
using Ints = std::vector<int64_t>;

struct Instance {
  Backend state;
  std::string isa;
  std::vector<at::ScalarType> dtypes;  // of the linears' activations
  // Slots that are being packed, by ticket: by one thread while another runs a step.
  std::map<int64_t, Slot> staged;
  int64_t tickets = 0;
  std::mutex staging;  // held to find, add and take away, not to pack

  Slot& packing(int64_t ticket) {
    const std::lock_guard lock(staging);
    const auto entry = staged.find(ticket);
    TORCH_CHECK(entry != staged.end(), "molehill_cpu: no staged slot ", ticket);
    return entry->second;  // stays where it is, whatever else comes and goes
  }
};

struct Handle {
  Instance* instance;
  int index;
};

// By handle. An entry outlives its backend without an instance, so that a stale handle is an error,
// no crash.
extern std::vector<Handle> linears, ffns;

// Throws if there is none.
Instance& instance(int64_t backend);
// Null if there is none.
Instance* find_instance(int64_t backend);
// Throws if the layer or its backend is gone.
Handle find(const std::vector<Handle>& handles, int64_t handle);

template <class Visit>
void each_site(const Slot& slot, const Visit& visit) {
  for (const auto& [handle, pieces] : slot.linears)
    for (const LinearPiece& piece : pieces) visit(piece.site);
  for (const auto& [handle, piece] : slot.ffns) visit(piece.site);
  for (const auto& [handle, pieces] : slot.scales)
    for (const ScalePiece& piece : pieces) visit(piece.site);
  for (const auto& [handle, piece] : slot.ffn_scales) visit(piece.site);
}

}  // namespace molehill
