"""`molehill env`: what is installed and which backend applies adapters here, and why."""

import platform
from importlib.metadata import version

import torch
from rich.console import Console
from rich.table import Table

from molehill.engine.vllm import backends, compat


def facts() -> dict[str, str]:
    """What a bug report should say, by name."""
    cuda = torch.cuda.is_available()
    return {
        "molehill": version("molehill"),
        "vLLM": vllm(),
        "torch": str(torch.__version__),
        "Python": platform.python_version(),
        "processor": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "GPU": torch.cuda.get_device_name() if cuda else "none",
        "backend": backend(cuda),
    }


def backend(cuda: bool) -> str:
    """What `--adapter-backend auto` takes here."""
    if cuda:
        return "triton: a GPU is here"
    chosen, why = backends.on_cpu("auto")
    return f"{chosen.name}: {why}"


def vllm() -> str:
    """The installed version, or what is wrong with it."""
    try:
        compat.check_version()
        return compat.installed_version()
    except RuntimeError as error:
        return str(error)


def run() -> int:
    table = Table(show_header=False, box=None)
    for name, fact in facts().items():
        table.add_row(name, fact)
    Console().print(table)
    return 0
