"""The golden cases, and what the readers make of them."""

from molehill.kernels.policy import Constant, DynMoLE, Soft, TopK, TopP

CASES = {
    "lora": ("lora", 28, Constant((1.0,))),
    "rslora": ("lora", 12, Constant((1.0,))),
    "dora": ("dora", 16, Constant((1.0,))),
    "mixlora": ("mixlora", 4, TopK(2)),
    "mixlora-expert-lora": ("mixlora", 20, TopK(2)),
    "mixlora-dynamic-t0": ("mixlora", 8, TopP(0.8)),
    "mixlora-dynamic-t05": ("mixlora", 4, TopP(0.8, 0.5)),
    "mixlora-switch": ("mixlora", 8, TopK(1, normalize=False)),
    "mola": ("mola", 12, TopK(2)),
    "mola-official": ("mola", 8, TopK(2)),
    "loramoe": ("loramoe", 12, Soft()),
    "loramoe-official": ("loramoe", 8, Soft()),
    "hydralora": ("hydralora", 8, Soft()),
    "dynmole-default": ("dynmole", 28, DynMoLE()),
    "dynmole-soft": ("dynmole", 8, DynMoLE(entropy_threshold=0.5)),
    "dynmole-sparse": ("dynmole", 12, DynMoLE(0.85, 1, 1.0, 1.0)),
    "dynmole-renyi": ("dynmole", 8, DynMoLE(0.9, 2, 0.6, 2.0, "renyi")),
    "dynmole-k1": ("dynmole", 8, DynMoLE(0.95, 1, 0.85)),
    "mov": ("mov", 12, Soft()),
}
