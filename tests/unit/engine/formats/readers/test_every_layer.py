"""That a target is adapted in every layer, of bases whose layers are of several kinds too."""

import pytest

from molehill.engine.adapter.base_model import BaseModel
from molehill.engine.adapter.errors import MissingTensorError
from molehill.engine.formats.readers.targets import check_every_layer

SITES = (
    "layers.0.linear_attn.out_proj",
    "layers.1.self_attn.o_proj",
    "layers.2.linear_attn.out_proj",
    "layers.3.self_attn.o_proj",
)
HYBRID = BaseModel("hybrid", "", dict.fromkeys((*SITES, "layers.0.mlp.up_proj"), (8, 8)), {})


def test_a_hybrid_has_each_target_where_its_base_has_it() -> None:
    check_every_layer("file", SITES, HYBRID)
    check_every_layer("file", SITES[1::2], HYBRID)


@pytest.mark.parametrize("lost", [0, 1])
def test_what_a_layer_of_the_base_has_and_the_file_has_not_is_missing(lost: int) -> None:
    rest = [site for site in SITES if site != SITES[lost]]
    with pytest.raises(MissingTensorError, match=f"file: {SITES[lost]}: found no tensors"):
        check_every_layer("file", rest, HYBRID)


def test_without_a_base_every_layer_has_it() -> None:
    check_every_layer("file", ["layers.0.self_attn.o_proj", "layers.1.self_attn.o_proj"], None)
    with pytest.raises(MissingTensorError, match=r"layers\.1\.linear_attn\.out_proj"):
        check_every_layer("file", SITES, None)
    with pytest.raises(MissingTensorError, match=r"layers\.0"):
        check_every_layer("file", ["layers.70000.self_attn.o_proj"], None)
