"""How much clients may ask for, together."""

from dataclasses import dataclass


@dataclass(frozen=True)
class AdmissionLimits:
    """adapters: names that may be served. loads: at once, waiting ones too, and uploads. mixes:
    that requests ask for, alive at once; those that are not in use make room. upload_bytes: of one
    upload's body."""

    adapters: int = 1024
    loads: int = 8
    mixes: int = 32
    upload_bytes: int = 1 << 30
