"""Wrong fields, and fields that ask for what is not served, are typed errors that say where."""

import pytest
import torch
from support.broken import refusal

from molehill.engine.adapter.errors import ConfigError, UnsupportedError

CONFIG_ERRORS = [
    ("lora", "r", 0),
    ("lora", "r", -2),
    ("lora", "r", "8"),
    ("lora", "r", 2.5),
    ("lora", "r", True),
    ("lora", "r", None),
    ("lora", "lora_alpha", 0),
    ("lora", "lora_alpha", "16"),
    ("lora", "lora_alpha", float("nan")),
    ("lora", "lora_alpha", float("inf")),
    ("lora", "lora_alpha", 10**400),
    ("lora", "use_rslora", "yes"),
    ("lora", "target_modules", 3),
    ("lora", "target_modules", [1]),
    ("lora", "rank_pattern", {"q_proj": 0}),
    ("lora", "rank_pattern", [3]),
    ("lora", "alpha_pattern", {"q_proj": -1}),
    ("lora", "alpha_pattern", {"(q_proj": 1}),
    ("lora", "base_model_name_or_path", 3),
    ("lora", "peft_type", 3),
    ("lora", "r", [2, 2, 2, 2]),
    ("mola-official", "r", []),
    ("mola-official", "r", [2, 3, 4]),
    ("mola-official", "r", [2, 3, 4, "2"]),
    ("mola-official", "r", {"0": 2}),
    ("mola-official", "top_k", 0),
    ("mola-official", "top_k", [2, 2, 2]),
    ("mola-official", "top_k", [2, 2, 2, True]),
    ("mola-official", "top_k", "2"),
    ("loramoe-official", "lora_nums", 0),
    ("loramoe-official", "lora_nums", [4]),
    ("hydralora", "lora_alpha", None),
    ("mola", "num_experts", 0),
    ("mola", "top_k", 0),
    ("mola", "top_k", -1),
    ("mola", "top_k", 1.5),
    ("mixlora", "top_k", "2"),
    ("mixlora", "act_fn", 7),
    ("mixlora", "expert_lora", [1]),
    ("mixlora", "expert_lora", {"r": 2}),
    ("mixlora", "routing_strategy", None),
    ("mixlora-dynamic-t0", "top_p", 0),
    ("mixlora-dynamic-t0", "top_p", 1.01),
    ("mixlora-dynamic-t0", "top_p", float("nan")),
    ("mixlora-dynamic-t0", "temperature", -1),
    ("dynmole-k1", "top_p", -0.1),
    ("dynmole-k1", "top_p", "0.75"),
    ("dynmole-k1", "keep_top_k", 0),
    ("dynmole-k1", "entropy_threshold", -0.5),
    ("dynmole-k1", "entropy_threshold", float("nan")),
    ("dynmole-k1", "entropy_index", 0),
    ("dynmole-k1", "entropy_index", 2.5),
    ("dynmole-k1", "entropy_type", "shannon"),
    ("dynmole-k1", "entropy_eps", -1e-5),
    ("dynmole-k1", "normalize_weights", 1),
]


@pytest.mark.slow
@pytest.mark.parametrize(("case", "field", "value"), CONFIG_ERRORS)
def test_config_fields_of_the_wrong_type_or_range(edited, case, field, value):
    error = refusal(ConfigError, edited(case, {field: value}))
    assert error.where.startswith("adapter_config.json: ")
    assert field in error.where or "pattern" in error.where
    assert error.found
    assert error.expected


UNSUPPORTED = [
    ("lora", "peft_type", "OFT", "LORA, MIXLORA, MOLA, LORAMOE, DYNMOLE"),
    ("lora", "peft_type", "lora", "LORA"),
    ("lora", "enable_lora", [True, False], "absent"),
    ("lora", "layer_replication", [[0, 4], [2, 4]], "absent"),
    ("lora", "trainable_token_indices", [1, 2], "absent"),
    ("hydralora", "lora_bias", True, "absent"),
    ("lora", "target_parameters", ["mlp.experts"], "gate_up_proj or down_proj"),
    ("lora", "init_lora_weights", "pissa", "leaves them alone"),
    ("lora", "lora_nums", 3, "absent"),
    ("lora", "sparsegen", True, "absent"),
    ("hydralora", "sparsegen", True, "absent"),
    ("hydralora", "fan_in_fan_out", True, "absent"),
    ("loramoe-official", "init_lora_weights", "pissa", "leaves them alone"),
    ("loramoe-official", "target_parameters", ["down_proj"], "absent"),
    ("loramoe-official", "enable_lora", [True, False], "absent"),
    ("mola-official", "use_dora", True, "absent"),
    ("mola-official", "use_rslora", True, "absent"),
    ("mola-official", "rank_pattern", {"q_proj": 2}, "absent"),
    ("dynmole-k1", "routing_strategy", "mola", "dynmole"),
    ("mixlora", "routing_strategy", "mixlora-best", "mixlora, mixlora-dynamic, mixlora-switch"),
    ("mixlora", "act_fn", "quick_gelu", "silu"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("case", "field", "value", "expected"), UNSUPPORTED)
def test_what_would_be_served_wrong_is_refused(edited, case, field, value, expected):
    error = refusal(UnsupportedError, edited(case, {field: value}))
    assert expected in error.expected
    assert field in error.where or "pattern" in error.where or "activation" in error.where


def test_an_unknown_strategy_without_a_type(edited):
    error = refusal(UnsupportedError, edited("mola", {"peft_type": None, "routing_strategy": "x"}))
    assert (error.found, "dynmole" in error.expected) == ("x", True)


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("LILY", "whose router averages over all tokens of a batch: an answer would depend on who"),
        ("POLY", "whose mixture goes by a task that no request names"),
    ],
)
def test_mixtures_that_no_server_can_mix_are_refused_with_the_reason(edited, kind, why):
    error = refusal(UnsupportedError, edited("lora", {"peft_type": kind}))
    assert error.found.startswith(f"{kind}, {why}")


def test_meteoras_gates_are_not_understood(edited):
    name = "base_model.model.model.layers.0.mlp.up_proj.moe_gate.weight"
    assert (
        name in refusal(UnsupportedError, edited("lora", tensors={name: torch.ones(2, 64)})).where
    )
