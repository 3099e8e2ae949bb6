// torch.ops.molehill_cpu: what the model's forward calls, and what molehill.kernels.cpu.backend
// manages the state with.
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/from_blob.h>
#include <torch/library.h>

#include <chrono>
#include <mutex>

#include "state.h"

namespace molehill {
namespace {

using at::Tensor;
using Numbers = std::vector<double>;
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
    const auto found = staged.find(ticket);
    TORCH_CHECK(found != staged.end(), "molehill_cpu: no staged slot ", ticket);
    return found->second;  // stays where it is, whatever else comes and goes
  }
};

struct Handle {
  Instance* instance;
  int index;
};

// By handle. An entry outlives its backend as null, so that a stale handle is an error, no crash.
std::vector<std::unique_ptr<Instance>> instances;
std::vector<Handle> linears, ffns;

Instance& instance(int64_t backend) {
  TORCH_CHECK(backend >= 0 && backend < int64_t(instances.size()) && instances[backend],
              "molehill_cpu: no backend ", backend);
  return *instances[backend];
}

Handle find(const std::vector<Handle>& handles, int64_t handle) {
  TORCH_CHECK(handle >= 0 && handle < int64_t(handles.size()) && handles[handle].instance,
              "molehill_cpu: no layer with handle ", handle);
  return handles[handle];
}

const Kernels& kernels(const std::string& isa, bool bf16) {
  if (isa == "portable") return portable::kernels(bf16);
#ifdef MOLEHILL_X86
  if (isa == "avx2" && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    return avx2::kernels(bf16);
  const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (isa == "avx512" && wide) return avx512::kernels(bf16);
  if (isa == "avx512_bf16" && wide && __builtin_cpu_supports("avx512bf16"))
    return avx512_bf16::kernels(bf16);
#endif
  TORCH_CHECK(false, "molehill_cpu: this processor does not run instruction set '", isa, "'");
}

bool supports(const std::string& isa) {
  try {
    kernels(isa, false);
  } catch (const c10::Error&) {
    return false;
  }
  return true;
}

int64_t create(const std::string& isa) {
  auto created = std::make_unique<Instance>();
  created->isa = isa;
  instances.push_back(std::move(created));
  return int64_t(instances.size()) - 1;
}

void destroy(int64_t backend) {
  Instance* gone = &instance(backend);
  for (auto* handles : {&linears, &ffns})
    for (Handle& handle : *handles)
      if (handle.instance == gone) handle.instance = nullptr;
  instances[backend].reset();
}

int64_t register_linear(int64_t backend, int64_t in, int64_t out, at::ScalarType dtype,
                        bool reduced) {
  Instance& owner = instance(backend);
  const Kernels& table = kernels(owner.isa, dtype == at::kBFloat16);
  linears.push_back({&owner, int(owner.state.linears.size())});
  owner.state.linears.push_back({&table, int(in), int(out), reduced});
  owner.dtypes.push_back(dtype);
  return int64_t(linears.size()) - 1;
}

int64_t register_ffn(int64_t gate_up, int64_t down, int64_t intermediate) {
  const Handle first = find(linears, gate_up), last = find(linears, down);
  Backend& state = first.instance->state;
  const int ffn = int(state.ffns.size());
  const int64_t reduced_as = state.linears[last.index].reduced ? down : -1;
  state.ffns.push_back({first.index, last.index, int(intermediate), reduced_as});
  state.linears[first.index].ffn_in = ffn;
  state.linears[last.index].ffn_out = ffn;
  ffns.push_back({first.instance, ffn});
  return int64_t(ffns.size()) - 1;
}

Site make_site(int64_t id, int64_t experts, const std::string& policy, const Numbers& numbers,
               const std::optional<Tensor>& router, Arena& memory) {
  Site site;
  site.id = id;
  site.experts = int(experts);
  site.policy = parse_policy(policy, numbers);
  TORCH_CHECK(experts > 0 && site.router_rows() <= kMaxRouterRows, "molehill_cpu: ", experts,
              " experts, ", site.router_rows(), " router rows");
  site.policy.entropy_unit = entropy_unit(site.policy, int(experts));
  site.routed = router.has_value();
  site.counters.expert_tokens.resize(experts);
  if (site.routed) {
    TORCH_CHECK(router->size(0) == site.router_rows(), "molehill_cpu: ", router->size(0),
                " router rows, expected ", site.router_rows());
    site.router =
        pack_router(router->const_data_ptr<float>(), site.router_rows(), int(router->size(1)),
                    memory);
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

void pack_linear(int64_t ticket, int64_t linear, int64_t site, int64_t start, const Tensor& a,
                  const Tensor& b, const Ints& ranks, const std::string& policy,
                  const Numbers& numbers, const std::optional<Tensor>& router,
                  const std::optional<Tensor>& output_scale, const std::optional<Tensor>& bias) {
  const Handle handle = find(linears, linear);
  Backend& state = handle.instance->state;
  Slot& owner = handle.instance->packing(ticket);
  Arena& memory = owner.memory;
  LinearPiece piece;
  piece.site = make_site(site, int64_t(ranks.size()), policy, numbers, router, memory);
  piece.start = int(start);
  piece.experts = make_pair(*state.linears[handle.index].kernels, a, b, ranks,
                            int64_t(ranks.size()), memory);
  piece.output_scale = floats(output_scale, memory);
  piece.bias = floats(bias, memory);
  owner.linears[handle.index].push_back(std::move(piece));
}

void pack_ffn(int64_t ticket, int64_t ffn, int64_t site, int64_t activation,
               const std::optional<Tensor>& gate_a, const std::optional<Tensor>& gate_b,
               const Ints& gate_ranks, const std::optional<Tensor>& up_a,
               const std::optional<Tensor>& up_b, const Ints& up_ranks,
               const std::optional<Tensor>& down_a, const std::optional<Tensor>& down_b,
               const Ints& down_ranks, const std::string& policy, const Numbers& numbers,
               const Tensor& router, const std::optional<Tensor>& bias,
               const std::optional<Tensor>& gate_scale, const std::optional<Tensor>& gate_bias,
               const std::optional<Tensor>& up_scale, const std::optional<Tensor>& up_bias) {
  const Handle handle = find(ffns, ffn);
  Backend& state = handle.instance->state;
  const Kernels& table = *state.linears[state.ffns[handle.index].gate_up].kernels;
  const int64_t experts = router.size(0) - parse_policy(policy, numbers).extra_rows;
  Slot& owner = handle.instance->packing(ticket);
  Arena& memory = owner.memory;
  FfnPiece piece;
  piece.site = make_site(site, experts, policy, numbers, router, memory);
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

ScalePiece make_scale(int64_t site, int64_t start, const std::string& policy, const Numbers& numbers,
                      const Tensor& router, const Tensor& vectors, Arena& memory) {
  ScalePiece piece;
  piece.site = make_site(site, router.size(0), policy, numbers, router, memory);
  piece.start = int(start);
  piece.heads = int(vectors.size(0));
  piece.width = int(vectors.size(2));
  piece.vectors = floats(vectors, memory);
  return piece;
}

void pack_scale(int64_t ticket, int64_t linear, int64_t site, int64_t start,
                 const std::string& policy, const Numbers& numbers, const Tensor& router,
                 const Tensor& vectors) {
  const Handle handle = find(linears, linear);
  Slot& owner = handle.instance->packing(ticket);
  owner.scales[handle.index].push_back(
      make_scale(site, start, policy, numbers, router, vectors, owner.memory));
}

void pack_ffn_scale(int64_t ticket, int64_t ffn, int64_t site, const std::string& policy,
                     const Numbers& numbers, const Tensor& router, const Tensor& vectors) {
  const Handle handle = find(ffns, ffn);
  Slot& owner = handle.instance->packing(ticket);
  owner.ffn_scales.insert_or_assign(
      handle.index, make_scale(site, 0, policy, numbers, router, vectors, owner.memory));
}

// A slot that holds nothing is not served.
void begin_step(int64_t backend, const Ints& runs) {
  Backend& state = instance(backend).state;
  state.runs.clear();
  state.ffn_states.clear();
  for (size_t i = 0; i + 2 < runs.size(); i += 3) {
    const auto slot = state.slots.find(int(runs[i]));
    const bool served = slot != state.slots.end();
    state.runs.push_back({served ? &slot->second : nullptr, int(runs[i + 1]), int(runs[i + 2])});
    if (served) slot->second.tokens += runs[i + 2] - runs[i + 1];
  }
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
  if (backend >= int64_t(instances.size()) || !instances[backend]) return;
  Instance& owner = *instances[backend];
  const std::lock_guard lock(owner.staging);
  owner.staged.erase(ticket);
}

template <class Visit>
void each_site(const Slot& slot, const Visit& visit) {
  for (const auto& [handle, pieces] : slot.linears)
    for (const LinearPiece& piece : pieces) visit(piece.site);
  for (const auto& [handle, piece] : slot.ffns) visit(piece.site);
  for (const auto& [handle, pieces] : slot.scales)
    for (const ScalePiece& piece : pieces) visit(piece.site);
  for (const auto& [handle, piece] : slot.ffn_scales) visit(piece.site);
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
  const auto found = state.slots.find(int(slot));
  return found == state.slots.end() ? 0 : int64_t(found->second.bytes());
}

using Counts = std::tuple<int64_t, Ints, Ints, Ints, Numbers, Ints, Ints>;

// tokens; by site: id, decisions, soft, entropy, experts; tokens of all experts in a row.
Counts counters(int64_t backend, int64_t slot) {
  Counts result;
  auto& [tokens, ids, decisions, soft, entropy, experts, expert_tokens] = result;
  const auto add = [&](const Site& site) {
    if (!site.routed) return;
    const Counters& c = site.counters;
    ids.push_back(site.id);
    decisions.push_back(c.decisions);
    soft.push_back(c.soft);
    entropy.push_back(c.entropy);
    experts.push_back(site.experts);
    expert_tokens.insert(expert_tokens.end(), c.expert_tokens.begin(), c.expert_tokens.end());
  };
  const Backend& state = instance(backend).state;
  const auto found = state.slots.find(int(slot));
  if (found == state.slots.end()) return result;
  tokens = found->second.tokens;
  each_site(found->second, add);
  return result;
}

Tensor to_tensor(const std::vector<float>& values, at::IntArrayRef shape) {
  return at::from_blob(const_cast<float*>(values.data()), shape, at::kFloat).clone();
}

std::tuple<Ints, std::vector<Tensor>> trace(int64_t backend, bool enabled) {
  Backend& state = instance(backend).state;
  Ints sites;
  std::vector<Tensor> tensors;
  for (const TraceRecord& record : state.trace) {
    sites.push_back(record.site);
    std::vector<int64_t> shape{record.rows};
    if (record.heads > 0) shape.push_back(record.heads);
    const Tensor entropy = to_tensor(record.entropy, shape);
    shape.push_back(record.experts);
    tensors.push_back(to_tensor(record.probabilities, shape));
    tensors.push_back(to_tensor(record.weights, shape));
    tensors.push_back(entropy);
  }
  state.trace.clear();
  state.tracing = enabled;
  return {sites, tensors};
}

// Leaves the tensor-parallel all-reduce to Python, by way of the dispatcher.
struct PythonReduce final : Reduce {
  explicit PythonReduce(int64_t handle) : handle(handle) {}

  void operator()(float* logits, int rows, int columns) override {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("molehill_cpu::reduce", "")
                               .typed<void(Tensor, int64_t)>();
    op.call(at::from_blob(logits, {rows, columns}, at::kFloat), handle);
  }

  int64_t handle;
};

// x and out as the kernels read them; float stands in for float16.
Tensor readable(const Tensor& t, at::ScalarType dtype) {
  const Tensor same = dtype == at::kHalf ? t.to(at::kFloat) : t;
  return same.dim() == 2 && same.stride(1) == 1 ? same : same.contiguous();
}

Rows rows(const Tensor& t) { return {t.mutable_data_ptr(), t.stride(0), int(t.size(0))}; }

void check(const Tensor& t, const char* name, at::ScalarType dtype, int64_t columns) {
  TORCH_CHECK(t.dim() == 2 && t.size(1) == columns && t.scalar_type() == dtype,
              "molehill_cpu: ", name, ": found ", t.scalar_type(), " ", t.sizes(), ", expected ",
              dtype, " [rows, ", columns, "]");
}

int64_t number(const Tensor& handle) { return *handle.const_data_ptr<int64_t>(); }

// Adds its own lifetime to `total`.
class Stopwatch {
  using Clock = std::chrono::steady_clock;

 public:
  explicit Stopwatch(double& total) : total_(total) {}
  ~Stopwatch() { total_ += std::chrono::duration<double>(Clock::now() - start_).count(); }

 private:
  double& total_;
  const Clock::time_point start_ = Clock::now();
};

double seconds(int64_t backend) { return instance(backend).state.seconds; }

void linear(Tensor out, const Tensor& x, const Tensor& handle) {
  const Handle layer = find(linears, number(handle));
  Backend& state = layer.instance->state;
  if (state.runs.empty()) return;
  const Stopwatch stopwatch(state.seconds);
  const Linear& shape = state.linears[layer.index];
  const at::ScalarType dtype = layer.instance->dtypes[layer.index];
  check(x, "x", dtype, shape.in);
  check(out, "out", dtype, shape.out);
  const Tensor input = readable(x, dtype), output = readable(out, dtype);
  PythonReduce reduce(number(handle));
  apply_linear(state, layer.index, rows(output), rows(input), shape.reduced ? &reduce : nullptr);
  if (!output.is_same(out)) out.copy_(output);
}

void ffn(Tensor h, const Tensor& gate_up, const Tensor& handle) {
  const Handle layer = find(ffns, number(handle));
  Backend& state = layer.instance->state;
  if (!changes_ffn(state, layer.index)) return;
  const Stopwatch stopwatch(state.seconds);
  const Ffn& shape = state.ffns[layer.index];
  const at::ScalarType dtype = layer.instance->dtypes[shape.gate_up];
  check(h, "h", dtype, shape.intermediate);
  check(gate_up, "gate_up", dtype, 2 * shape.intermediate);
  const Tensor input = readable(gate_up, dtype), output = readable(h, dtype);
  PythonReduce reduce(shape.reduced_as);
  apply_ffn(state, layer.index, rows(output), rows(input), shape.reduced_as < 0 ? nullptr : &reduce);
  if (!output.is_same(h)) h.copy_(output);
}

void nothing(Tensor, const Tensor&, const Tensor&) {}

}  // namespace
}  // namespace molehill

TORCH_LIBRARY(molehill_cpu, m) {
  using namespace molehill;
  m.def("linear(Tensor(a!) out, Tensor x, Tensor handle) -> ()");
  m.def("ffn(Tensor(a!) h, Tensor gate_up, Tensor handle) -> ()");
  m.def("reduce(Tensor(a!) logits, int handle) -> ()");
  m.def("supports(str isa) -> bool", supports);
  m.def("create(str isa) -> int", create);
  m.def("destroy(int backend) -> ()", destroy);
  m.def(
      "register_linear(int backend, int inputs, int outputs, ScalarType dtype, bool reduced) -> int",
      register_linear);
  m.def("register_ffn(int gate_up, int down, int intermediate) -> int", register_ffn);
  m.def("stage(int backend, int bytes) -> int", stage);
  m.def(
      "pack_linear(int ticket, int linear, int site, int start, Tensor a, Tensor b, int[] ranks, "
      "str policy, float[] numbers, Tensor? router, Tensor? output_scale, Tensor? bias) -> ()",
      pack_linear);
  m.def(
      "pack_ffn(int ticket, int ffn, int site, int activation, Tensor? gate_a, Tensor? gate_b, "
      "int[] gate_ranks, Tensor? up_a, Tensor? up_b, int[] up_ranks, Tensor? down_a, "
      "Tensor? down_b, int[] down_ranks, str policy, float[] numbers, Tensor router, "
      "Tensor? bias, Tensor? gate_scale, Tensor? gate_bias, Tensor? up_scale, "
      "Tensor? up_bias) -> ()",
      pack_ffn);
  m.def(
      "pack_scale(int ticket, int linear, int site, int start, str policy, float[] numbers, "
      "Tensor router, Tensor vectors) -> ()",
      pack_scale);
  m.def(
      "pack_ffn_scale(int ticket, int ffn, int site, str policy, float[] numbers, Tensor router, "
      "Tensor vectors) -> ()",
      pack_ffn_scale);
  m.def("store(int backend, int ticket, int slot) -> ()", store);
  m.def("drop(int backend, int ticket) -> ()", drop);
  m.def("unstore(int backend, int slot) -> int", unstore);
  m.def("resident_bytes(int backend, int slot) -> int", resident_bytes);
  m.def("begin_step(int backend, int[] runs) -> ()", begin_step);
  m.def("counters(int backend, int slot) -> (int, int[], int[], int[], float[], int[], int[])",
        counters);
  m.def("seconds(int backend) -> float", seconds);
  m.def("trace(int backend, bool enabled) -> (int[], Tensor[])", trace);
}

TORCH_LIBRARY_IMPL(molehill_cpu, CPU, m) {
  m.impl("linear", molehill::linear);
  m.impl("ffn", molehill::ffn);
}

TORCH_LIBRARY_IMPL(molehill_cpu, Meta, m) {
  m.impl("linear", molehill::nothing);
  m.impl("ffn", molehill::nothing);
}
