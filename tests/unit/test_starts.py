"""What `make check` leaves out is found by itself."""

import pytest
from support import server, starts


def directly():
    with server.serve("model", "log"):
        pass


def through_another():
    directly()


def in_an_inner_function():
    def inner():
        directly()

    return inner


def only_a_name():
    return server.free_port(), server.Server.__name__


@pytest.mark.parametrize(
    ("function", "starters"),
    [
        (directly, {"server"}),
        (through_another, {"server"}),
        (in_an_inner_function, {"server"}),
        (only_a_name, set()),
    ],
)
def test_what_a_function_starts_is_found(function, starters):
    assert starts.reached(function) == starters


# Of files whose tests all start something: the mark, and who shares it.
KNOWN = {
    "test_golden.py": ("engine", "tests/engine/test_golden.py"),
    "test_architectures.py": ("engine", "tests/engine/test_architectures.py"),
    "test_serving.py": ("server", "tests/server::api"),
    "test_operations.py": ("server", "tests/server/test_operations.py"),
}


def test_tests_are_marked_by_what_their_fixtures_start(request):
    """In this very run, as far as it collected them."""
    assert not any(request.node.get_closest_marker(mark) for mark in starts.STARTERS.values())
    for item in request.session.items:
        if item.path.name in KNOWN:
            mark, group = KNOWN[item.path.name]
            assert item.get_closest_marker(mark), item.nodeid
            assert starts.group(item) == group
