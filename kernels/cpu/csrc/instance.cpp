// torch.ops.molehill_cpu: backends, and the layers that are registered with them.
#include "instance.h"

#include <torch/library.h>

namespace molehill {

std::vector<Handle> linears, ffns;

namespace {

// An entry outlives its backend as null.
std::vector<std::unique_ptr<Instance>> instances;

}  // namespace

Instance* find_instance(int64_t backend) {
  return backend >= 0 && backend < int64_t(instances.size()) ? instances[backend].get() : nullptr;
}

Instance& instance(int64_t backend) {
  Instance* entry = find_instance(backend);
  TORCH_CHECK(entry, "molehill_cpu: no backend ", backend);
  return *entry;
}

Handle find(const std::vector<Handle>& handles, int64_t handle) {
  TORCH_CHECK(handle >= 0 && handle < int64_t(handles.size()) && handles[handle].instance,
              "molehill_cpu: no layer with handle ", handle);
  return handles[handle];
}

namespace {

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

}  // namespace
}  // namespace molehill

TORCH_LIBRARY_FRAGMENT(molehill_cpu, m) {
  using namespace molehill;
  m.def("supports(str isa) -> bool", supports);
  m.def("create(str isa) -> int", create);
  m.def("destroy(int backend) -> ()", destroy);
  m.def(
      "register_linear(int backend, int inputs, int outputs, ScalarType dtype, bool reduced) -> "
      "int",
      register_linear);
  m.def("register_ffn(int gate_up, int down, int intermediate) -> int", register_ffn);
}
