"""What benchmarks that start a server are asked alike."""

import argparse
from pathlib import Path


def server_parser(description: str | None) -> argparse.ArgumentParser:
    """Of the model and of how its server starts. description: as it is written."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--eager", action="store_true", help="without compiling the base")
    parser.add_argument(
        "--warm", action="store_true", help="start from a process that has imported vLLM: sooner"
    )
    return parser
