"""`molehill inspect`, run in this process."""

import argparse

from molehill.api.cli import inspect


def run(*arguments):
    parser = argparse.ArgumentParser()
    inspect.add_arguments(parser)
    return inspect.run(parser.parse_args([str(argument) for argument in arguments]))
