// torch.ops.molehill_cpu: how an adapter's weights come into a slot, and out of it.
#include <torch/library.h>

#include "instance.h"

namespace molehill {
namespace {

// Python's dictionary of a policy's fields.
using PolicyDict = c10::Dict<std::string, c10::List<double>>;

FieldValues field_values(const PolicyDict& fields) {
  FieldValues values;
  for (const auto& field : fields) values[field.key()] = field.value().vec();
  return values;
}

Site make_site(int64_t id, int64_t column, int64_t experts, const std::string& policy,
               const PolicyDict& fields, const std::optional<Tensor>& router, Arena& memory) {
  Site site;
  site.id = id;
  site.column = int(column);
  site.experts = int(experts);
  site.policy = make_policy(policy, field_values(fields), int(experts));
  TORCH_CHECK(experts > 0 && site.router_rows() <= kMaxRouterRows, "molehill_cpu: ", experts,
              " experts, ", site.router_rows(), " router rows");
  site.routed = router.has_value();
  TORCH_CHECK(site.routed == (site.policy->constant_weights() == nullptr), "molehill_cpu: ", policy,
              site.routed ? " beside a router" : " without a router");
  site.counters.expert_tokens.resize(experts);
  if (site.routed) {
    TORCH_CHECK(router->size(0) == site.router_rows(), "molehill_cpu: ", router->size(0),
                " router rows, expected ", site.router_rows());
    site.router = pack_router(router->const_data_ptr<float>(), site.router_rows(),
                              int(router->size(1)), memory);
  }
  return site;
}

Dense dense(const Tensor& t) {
  return {t.const_data_ptr(), int(t.size(0)), int(t.size(1)), int(t.element_size())};
}

LowRank make_pair(const Kernels& table, const std::optional<Tensor>& a,
                  const std::optional<Tensor>& b, const Ints& ranks, int64_t experts,
                  Arena& memory) {
  if (!a) return LowRank(int(experts));
  return LowRank(dense(*a), dense(*b), std::vector<int>(ranks.begin(), ranks.end()),
                 table.ranks_per_step, memory);
}

Buffer floats(const std::optional<Tensor>& t, Arena& memory) {
  return t ? copy_floats(t->const_data_ptr<float>(), t->numel(), memory) : Buffer();
}

void pack_linear(int64_t ticket, int64_t linear, int64_t site, int64_t column, int64_t start,
                 const Tensor& a, const Tensor& b, const Ints& ranks, const std::string& policy,
                 const PolicyDict& fields, const std::optional<Tensor>& router,
                 const std::optional<Tensor>& output_scale, const std::optional<Tensor>& bias,
                 const std::optional<Tensor>& added_bias) {
  const Handle handle = find(linears, linear);
  Backend& state = handle.instance->state;
  Slot& owner = handle.instance->packing(ticket);
  Arena& memory = owner.memory;
  LinearPiece piece;
  piece.site = make_site(site, column, int64_t(ranks.size()), policy, fields, router, memory);
  piece.start = int(start);
  piece.experts =
      make_pair(*state.linears[handle.index].kernels, a, b, ranks, int64_t(ranks.size()), memory);
  piece.output_scale = floats(output_scale, memory);
  piece.bias = floats(bias, memory);
  piece.added_bias = floats(added_bias, memory);
  owner.linears[handle.index].push_back(std::move(piece));
}

void pack_ffn(int64_t ticket, int64_t ffn, int64_t site, int64_t column, int64_t experts,
              int64_t activation, const std::optional<Tensor>& gate_a,
              const std::optional<Tensor>& gate_b, const Ints& gate_ranks,
              const std::optional<Tensor>& up_a, const std::optional<Tensor>& up_b,
              const Ints& up_ranks, const std::optional<Tensor>& down_a,
              const std::optional<Tensor>& down_b, const Ints& down_ranks,
              const std::string& policy, const PolicyDict& fields, const Tensor& router,
              const std::optional<Tensor>& bias, const std::optional<Tensor>& gate_scale,
              const std::optional<Tensor>& gate_bias, const std::optional<Tensor>& up_scale,
              const std::optional<Tensor>& up_bias) {
  const Handle handle = find(ffns, ffn);
  Backend& state = handle.instance->state;
  const Kernels& table = *state.linears[state.ffns[handle.index].gate_up].kernels;
  Slot& owner = handle.instance->packing(ticket);
  Arena& memory = owner.memory;
  FfnPiece piece;
  piece.site = make_site(site, column, experts, policy, fields, router, memory);
  piece.activation = Activation(activation);
  piece.gate = make_pair(table, gate_a, gate_b, gate_ranks, experts, memory);
  piece.up = make_pair(table, up_a, up_b, up_ranks, experts, memory);
  piece.down = make_pair(table, down_a, down_b, down_ranks, experts, memory);
  piece.bias = floats(bias, memory);
  piece.gate_scale = floats(gate_scale, memory);
  piece.gate_bias = floats(gate_bias, memory);
  piece.up_scale = floats(up_scale, memory);
  piece.up_bias = floats(up_bias, memory);
  owner.ffns.insert_or_assign(handle.index, std::move(piece));
}

ScalePiece make_scale(int64_t site, int64_t column, int64_t start, const std::string& policy,
                      const PolicyDict& fields, const Tensor& router, const Tensor& vectors,
                      Arena& memory) {
  ScalePiece piece;
  piece.site = make_site(site, column, router.size(0), policy, fields, router, memory);
  piece.start = int(start);
  piece.heads = int(vectors.size(0));
  piece.width = int(vectors.size(2));
  piece.vectors = floats(vectors, memory);
  return piece;
}

void pack_scale(int64_t ticket, int64_t linear, int64_t site, int64_t column, int64_t start,
                const std::string& policy, const PolicyDict& fields, const Tensor& router,
                const Tensor& vectors) {
  const Handle handle = find(linears, linear);
  Slot& owner = handle.instance->packing(ticket);
  owner.scales[handle.index].push_back(
      make_scale(site, column, start, policy, fields, router, vectors, owner.memory));
}

void pack_ffn_scale(int64_t ticket, int64_t ffn, int64_t site, int64_t column,
                    const std::string& policy, const PolicyDict& fields, const Tensor& router,
                    const Tensor& vectors) {
  const Handle handle = find(ffns, ffn);
  Slot& owner = handle.instance->packing(ticket);
  owner.ffn_scales.insert_or_assign(
      handle.index, make_scale(site, column, 0, policy, fields, router, vectors, owner.memory));
}

// A slot to pack into, in any thread. bytes: that it will take, more or less.
int64_t stage(int64_t backend, int64_t bytes) {
  Instance& owner = instance(backend);
  const std::lock_guard lock(owner.staging);
  owner.staged[owner.tickets].memory = Arena(size_t(bytes));
  return owner.tickets++;
}

// A staged slot is served from the next step on. One without pieces changes nothing on this rank.
void store(int64_t backend, int64_t ticket, int64_t slot) {
  Instance& owner = instance(backend);
  const std::lock_guard lock(owner.staging);
  auto packed = owner.staged.extract(ticket);
  TORCH_CHECK(!packed.empty(), "molehill_cpu: no staged slot ", ticket);
  owner.state.slots.insert_or_assign(int(slot), std::move(packed.mapped()));
}

// Whatever is left of a staged slot, also of a backend that is gone.
void drop(int64_t backend, int64_t ticket) {
  Instance* owner = find_instance(backend);
  if (!owner) return;
  const std::lock_guard lock(owner->staging);
  owner->staged.erase(ticket);
}

// Makes a slot a staged one again, that has counted nothing yet. Its ticket; -1 if it held nothing.
// What is left of the announced step must not look into it.
int64_t unstore(int64_t backend, int64_t slot) {
  Instance& owner = instance(backend);
  Backend& state = owner.state;
  auto taken = state.slots.extract(int(slot));
  if (taken.empty()) return -1;
  Slot& gone = taken.mapped();
  for (Run& run : state.runs)
    if (run.slot == &gone) run.slot = nullptr;
  std::erase_if(state.ffn_states, [&](const FfnState& ffn) { return ffn.chunk.slot == &gone; });
  gone.tokens = 0;
  each_site(gone, [](const Site& site) {
    site.counters = {0, 0, 0, std::vector<int64_t>(site.counters.expert_tokens.size())};
  });
  const std::lock_guard lock(owner.staging);
  owner.staged.emplace(owner.tickets, std::move(gone));
  return owner.tickets++;
}

int64_t resident_bytes(int64_t backend, int64_t slot) {
  const Backend& state = instance(backend).state;
  const auto entry = state.slots.find(int(slot));
  return entry == state.slots.end() ? 0 : int64_t(entry->second.bytes());
}

}  // namespace
}  // namespace molehill

TORCH_LIBRARY_FRAGMENT(molehill_cpu, m) {
  using namespace molehill;
  m.def("policies() -> str[]", policy_names);
  m.def("stage(int backend, int bytes) -> int", stage);
  m.def(
      "pack_linear(int ticket, int linear, int site, int column, int start, Tensor a, Tensor b, int[] ranks, "
      "str policy, Dict(str, float[]) fields, Tensor? router, Tensor? output_scale, Tensor? bias, "
      "Tensor? added_bias) -> ()",
      pack_linear);
  m.def(
      "pack_ffn(int ticket, int ffn, int site, int column, int experts, int activation, Tensor? gate_a, "
      "Tensor? gate_b, "
      "int[] gate_ranks, Tensor? up_a, Tensor? up_b, int[] up_ranks, Tensor? down_a, "
      "Tensor? down_b, int[] down_ranks, str policy, Dict(str, float[]) fields, Tensor router, "
      "Tensor? bias, Tensor? gate_scale, Tensor? gate_bias, Tensor? up_scale, "
      "Tensor? up_bias) -> ()",
      pack_ffn);
  m.def(
      "pack_scale(int ticket, int linear, int site, int column, int start, str policy, Dict(str, float[]) "
      "fields, "
      "Tensor router, Tensor vectors) -> ()",
      pack_scale);
  m.def(
      "pack_ffn_scale(int ticket, int ffn, int site, int column, str policy, Dict(str, float[]) fields, "
      "Tensor router, "
      "Tensor vectors) -> ()",
      pack_ffn_scale);
  m.def("store(int backend, int ticket, int slot) -> ()", store);
  m.def("drop(int backend, int ticket) -> ()", drop);
  m.def("unstore(int backend, int slot) -> int", unstore);
  m.def("resident_bytes(int backend, int slot) -> int", resident_bytes);
}
