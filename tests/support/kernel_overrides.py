"""For the warm server, which imports this last.

On CPU every worker puts vLLM's C++ functions in the place of its Triton kernels, and looks through
all modules for those. Here that is done once, for all workers that are forked.
"""

from vllm.platforms import current_platform

current_platform.register_triton_kernel_overrides()
type(current_platform).register_triton_kernel_overrides = classmethod(lambda cls: None)  # type: ignore[assignment]
