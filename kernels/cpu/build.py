"""The backend's shared library: shipped beside this file, or compiled once into a cache.

`molehill env --build` compiles it at installation, and so does `python -m molehill.kernels.cpu
[DIRECTORY]`, beside this file or into DIRECTORY, for images whose users have no compiler.

It takes from half a minute to several; what is going on is logged at once and every few seconds.

Not by torch.utils.cpp_extension or scikit-build-core: one library holds the same source compiled
for several instruction sets, torch's load() has the same flags for all files, needs ninja and says
nothing meanwhile, its lock outlives a process that is killed, and a wheel's build would tie the
package to one version of torch. Nor by filelock and platformdirs: kernels imports torch and triton
only, and a wait of minutes has to say what it waits for.
"""

import fcntl
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep

import torch

# vLLM shows what is logged below its own name.
logger = logging.getLogger("vllm.molehill.kernels")

HERE = Path(__file__).parent
SOURCES = HERE / "csrc"
COMMON = ["-std=gnu++20", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-fno-math-errno", "-w"]
# At once: each takes some hundred megabytes.
COMPILERS = min(4, os.cpu_count() or 1)
# One object per instruction set: a library that runs on any processor must not be compiled for
# the newest one as a whole.
X86_ISAS = {
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"],
    "avx512_bf16": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mavx512bf16"],
}


# Between two lines about a compilation that goes on.
PROGRESS_SECONDS = 10.0
LOOK_SECONDS = 0.2


class BuildError(RuntimeError):
    """The library is neither shipped nor can it be compiled; the message says why."""


class NoCompilerError(BuildError):
    """There is none on this machine."""


@dataclass(frozen=True)
class Library:
    """Where the loaded library lies, and whether this process compiled it."""

    path: Path
    compiled: bool


_loaded: list[Library] = []


def load() -> Library:
    """Makes `torch.ops.molehill_cpu` available. Raises BuildError; safe in many processes at once.

    Looks beside this file, then in `$MOLEHILL_CACHE_DIR` (default: `molehill` in the user's cache).
    """
    if not _loaded:
        library = _find_or_compile()
        try:
            torch.ops.load_library(str(library.path))
        except OSError as error:
            raise BuildError(f"{library.path}: {error}") from error
        _loaded.append(library)
    return _loaded[0]


def install() -> Library:
    """Finds or compiles the library without loading it, beside this file where that may be written,
    else in the cache. Raises BuildError, NoCompilerError."""
    name = library_name()
    if (HERE / name).exists():
        return Library(HERE / name, compiled=False)
    if not os.access(HERE, os.W_OK):
        return _find_or_compile()
    cached = cache_directory() / name
    if not cached.exists():
        return Library(compile_into(HERE), compiled=True)
    partial = HERE / f"{name}.partial"
    shutil.copyfile(cached, partial)
    return Library(partial.replace(HERE / name), compiled=False)


def compile_into(directory: Path) -> Path:
    """Compiles the library into `directory` and returns its path. Raises BuildError."""
    compiler = _compiler()
    target, units, start = directory / library_name(), _units(), monotonic()
    _tell(
        "compiling the C++ kernels",
        f"compiling the C++ kernels, {len(units)} files on {COMPILERS} processors: about a minute "
        f"on two, once; kept in {directory}, where later starts find them",
    )
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory) as scratch:
            objects = _compile_all(compiler, units, Path(scratch), start)
            linked = Path(scratch) / "linked.so"
            _run([compiler, "-shared", *map(str, objects), "-o", str(linked), *_link_flags()])
            linked.replace(target)
    except OSError as error:
        raise BuildError(f"cannot write the C++ backend to {directory}: {error}") from error
    logger.info("molehill: C++ kernels compiled in %.0f s", monotonic() - start)
    return target


def _compile_all(compiler: str, units: "list[_Unit]", directory: Path, start: float) -> list[Path]:
    """The objects, in the units' order. Raises BuildError for the first that fails, OSError."""
    with ThreadPoolExecutor(COMPILERS) as pool:
        results = [pool.submit(_compile, compiler, unit, directory) for unit in units]
        running: set[Future[Path]] = set(results)
        try:
            while running:
                done, running = wait(running, PROGRESS_SECONDS, FIRST_EXCEPTION)
                for result in done:
                    result.result()
                if running:
                    count = f"{len(units) - len(running)} of {len(units)} files"
                    what = f"compiling the C++ kernels: {count}"
                    _tell(what, f"{what} after {monotonic() - start:.0f} s")
        finally:
            pool.shutdown(cancel_futures=True)
    return [result.result() for result in results]


def _tell(stage: str, line: str) -> None:
    """A line of the log. stage: the same for clients, without this machine's paths."""
    logger.info("molehill: %s", line, extra={"stage": stage})


def library_name() -> str:
    """File name that changes with the sources, the flags, torch's version and ABI."""
    sha = hashlib.sha256(repr((COMMON, X86_ISAS, torch.compiled_with_cxx11_abi())).encode())
    for path in sorted(SOURCES.iterdir()):
        sha.update(path.name.encode() + path.read_bytes())
    return f"molehill_cpu-{torch.__version__}-{platform.machine()}-{sha.hexdigest()[:16]}.so"


def _find_or_compile() -> Library:
    name = library_name()
    cache = cache_directory()
    for directory in (HERE, cache):
        if (directory / name).exists():
            return Library(directory / name, compiled=False)
    try:
        with _locked(cache):
            if (cache / name).exists():
                return Library(cache / name, compiled=False)
            return Library(compile_into(cache), compiled=True)
    except OSError as error:
        raise BuildError(f"no cache directory for the C++ backend: {error}") from error


def cache_directory() -> Path:
    """`$MOLEHILL_CACHE_DIR`, or `molehill` in the user's cache.

    By the rule of the XDG base directories, as platformdirs has it on Linux.
    """
    chosen = os.environ.get("MOLEHILL_CACHE_DIR")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "molehill"


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """While no other process compiles into the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "lock").open("w") as file:
        reported = None
        while not _lock(file.fileno()):
            if reported is None or monotonic() - reported >= PROGRESS_SECONDS:
                what = "waiting for another process that compiles the C++ kernels"
                _tell(what, f"{what} into {directory}")
                reported = monotonic()
            sleep(LOOK_SECONDS)
        yield


def _lock(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@dataclass(frozen=True)
class _Unit:
    source: str
    name: str
    flags: list[str]


def _units() -> list[_Unit]:
    x86 = platform.machine() in ("x86_64", "AMD64")
    define = ["-DMOLEHILL_X86"] if x86 else []
    isas = {"portable": [], **(X86_ISAS if x86 else {})}
    kernels = [
        _Unit("kernels.cpp", isa, ["-O3", "-ffp-contract=fast", f"-DMOLEHILL_ISA={isa}", *flags])
        for isa, flags in isas.items()
    ]
    names = ("policies", "routing", "state", "linear", "ffn", "scale")
    logic = [_Unit(f"{name}.cpp", name, ["-O2"]) for name in names]
    flags = ["-O1", *define, *_torch_flags()]
    ops = [_Unit(f"{name}.cpp", name, flags) for name in ("instance", "packing", "ops")]
    # The longest first, so that no processor waits for them at the end.
    return [*ops, *kernels, *logic]


def _torch() -> Path:
    return Path(torch.__file__).parent


def _torch_flags() -> list[str]:
    abi = int(torch.compiled_with_cxx11_abi())
    return [
        f"-I{_torch()}/include",
        f"-I{_torch()}/include/torch/csrc/api/include",
        f"-D_GLIBCXX_USE_CXX11_ABI={abi}",
    ]


def _link_flags() -> list[str]:
    # OpenMP is not linked: its symbols must come from the runtime that torch has loaded, or there
    # would be two pools of threads.
    return [f"-L{_torch()}/lib", "-lc10", "-ltorch_cpu"]


def _compiler() -> str:
    for name in (os.environ.get("CXX"), "g++", "c++", "clang++"):
        path = shutil.which(name) if name else None
        if path:
            return path
    raise NoCompilerError("no C++ compiler: looked for $CXX, g++, c++ and clang++")


def _compile(compiler: str, unit: _Unit, directory: Path) -> Path:
    target = directory / f"{unit.name}.o"
    source = str(SOURCES / unit.source)
    _run([compiler, *COMMON, *unit.flags, "-c", source, "-o", str(target)])
    return target


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()[:20]
        raise BuildError("\n".join(["compiling the C++ backend failed:", *lines]))
