// torch.ops.molehill_cpu: what the model's forward calls, and what is counted meanwhile.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <chrono>

#include "instance.h"

namespace molehill {
namespace {

// A slot that holds nothing is not served.
void begin_step(int64_t backend, const Ints& runs) {
  Backend& state = instance(backend).state;
  state.runs.clear();
  state.ffn_states.clear();
  state.capture = {};
  for (size_t i = 0; i + 2 < runs.size(); i += 3) {
    const auto slot = state.slots.find(int(runs[i]));
    const bool served = slot != state.slots.end();
    state.runs.push_back({served ? &slot->second : nullptr, int(runs[i + 1]), int(runs[i + 2])});
    if (served) slot->second.tokens += runs[i + 2] - runs[i + 1];
  }
}

// Has the gate weights of rows of the announced step kept: those of rows[i] in weights[i], float
// [rows, columns], which its owner keeps until the next step is announced.
void capture(int64_t backend, const Ints& rows, Tensor weights) {
  Capture& capture = instance(backend).state.capture;
  capture = {};
  if (rows.empty()) return;
  capture.places.assign(size_t(*std::max_element(rows.begin(), rows.end())) + 1, -1);
  for (size_t i = 0; i < rows.size(); ++i) capture.places[rows[i]] = int(i);
  capture.weights = weights.mutable_data_ptr<float>();
  capture.columns = weights.size(1);
}

// tokens; by routed site: id, experts; int64 [sites, 2 + E] with decisions, soft decisions and the
// decisions that chose each expert; summed entropy, double [sites].
std::tuple<int64_t, Ints, Ints, Tensor, Tensor> counters(int64_t backend, int64_t slot) {
  const Backend& state = instance(backend).state;
  const auto entry = state.slots.find(int(slot));
  int64_t tokens = 0;
  std::vector<const Site*> sites;
  if (entry != state.slots.end()) {
    tokens = entry->second.tokens;
    each_site(entry->second, [&](const Site& site) {
      if (site.routed) sites.push_back(&site);
    });
  }
  Ints ids, experts;
  for (const Site* site : sites) {
    ids.push_back(site->id);
    experts.push_back(site->experts);
  }
  const int64_t most = sites.empty() ? 0 : *std::max_element(experts.begin(), experts.end());
  const Tensor counts = at::zeros({int64_t(sites.size()), 2 + most}, at::kLong);
  const Tensor entropy = at::zeros({int64_t(sites.size())}, at::kDouble);
  auto* count = counts.mutable_data_ptr<int64_t>();
  auto* summed = entropy.mutable_data_ptr<double>();
  for (const Site* site : sites) {
    const Counters& c = site->counters;
    count[0] = c.decisions;
    count[1] = c.soft;
    std::copy(c.expert_tokens.begin(), c.expert_tokens.end(), count + 2);
    *summed++ = c.entropy;
    count += 2 + most;
  }
  return {tokens, ids, experts, counts, entropy};
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
  apply_ffn(state, layer.index, rows(output), rows(input),
            shape.reduced_as < 0 ? nullptr : &reduce);
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
  m.def("begin_step(int backend, int[] runs) -> ()", begin_step);
  m.def("capture(int backend, int[] rows, Tensor(a!) weights) -> ()", capture);
  m.def("counters(int backend, int slot) -> (int, int[], int[], Tensor, Tensor)", counters);
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
