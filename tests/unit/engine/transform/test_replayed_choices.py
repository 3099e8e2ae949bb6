"""A mixture's choices as vLLM gives a base's."""

import numpy as np
import pytest
from support.golden import Case

from molehill.engine import formats
from molehill.engine.transform.replayed_choices import ReplayedChoices, replayed_choices
from molehill.engine.transform.routers import DecidingRouter, routers

FFN = DecidingRouter("layers.1.mlp", None, 8, 2, is_fixed=True)
Q, V = (
    DecidingRouter(f"layers.0.self_attn.{name}", None, 3, k, is_fixed=True)
    for name, k in (("q_proj", 2), ("v_proj", 1))
)


def choices(*routers: DecidingRouter, layers: int = 3) -> ReplayedChoices:
    result = replayed_choices(routers, layers)
    assert isinstance(result, ReplayedChoices)
    return result


def test_routers_of_a_layer_lie_side_by_side() -> None:
    laid_out = choices(Q, V, FFN)
    assert (laid_out.layers, laid_out.k, laid_out.dtype) == (3, 3, np.uint8)
    ids = np.array([[[2, 0], [1, -1], [7, 5]], [[0, 1], [2, -1], [3, 4]]], np.int16)
    assert laid_out.array(ids).tolist() == [
        [[2, 0, 1], [7, 5, 0], [0, 0, 0]],
        [[0, 1, 2], [3, 4, 0], [0, 0, 0]],
    ]


def test_a_token_without_a_decision_has_each_id_once() -> None:
    """Before an invocation, and where a weight was too small for float32."""
    ids = np.array([[[-1, -1]], [[6, -1]], [[0, -1]], [[5, 0]]], np.int16)
    assert choices(FFN).array(ids)[:, 1].tolist() == [[0, 1], [6, 0], [0, 1], [5, 0]]


def test_more_experts_than_a_byte_holds_are_of_two_bytes() -> None:
    most = DecidingRouter("layers.0.mlp", None, 256, 1, is_fixed=True)
    more = DecidingRouter("layers.0.mlp", None, 257, 1, is_fixed=True)
    assert (choices(most).dtype, choices(more).dtype) == (np.uint8, np.uint16)
    assert choices(more).array(np.array([[[256]]], np.int16))[0, 0] == [256]


@pytest.mark.parametrize(
    ("routers", "refusal"),
    [
        ((), "no router chooses some of its experts"),
        ((DecidingRouter("layers.0.mlp", None, 4, 4, True),), "no router chooses some"),
        ((FFN, DecidingRouter("layers.2.mlp", None, 4, 2)), "how many experts layers.2.mlp"),
        ((DecidingRouter("layers.2.k_proj", 1, 4, 2, True),), "layers.2.k_proj decides head"),
        ((DecidingRouter("layers.3.mlp", None, 4, 2, True),), "in none of the base's 3 layers"),
        ((DecidingRouter("lm_head", None, 4, 2, True),), "lm_head is in none"),
    ],
)
def test_what_has_no_such_shape_is_refused(
    routers: tuple[DecidingRouter, ...], refusal: str
) -> None:
    result = replayed_choices(routers, 3)
    assert isinstance(result, str)
    assert refusal in result


@pytest.mark.parametrize(
    ("case", "shape"),
    [
        ("mixlora", (4, 2)),
        ("mixlora-switch", (4, 1)),
        # Of q_proj, v_proj and down_proj.
        ("mola", (4, 6)),
        ("mixlora-dynamic-t0", None),
        ("dynmole-soft", None),
        ("loramoe", None),
        ("mov", None),
        ("lora", None),
    ],
)
def test_which_methods_have_it(case: str, shape: tuple[int, int] | None) -> None:
    result = replayed_choices(routers(formats.read(Case(case).path)), 4)
    assert (None if isinstance(result, str) else (result.layers, result.k)) == shape
