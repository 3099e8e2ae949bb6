"""The fields that each trainer's adapter_config.json may have, and a word on all others.

A field that is listed here is read, or refused where it is set, or is for training only. What a
reader does not know may change the answer, so it is named in a warning.
"""

from collections.abc import Collection

from molehill.engine.formats.io.fields import Fields, shortened

_SHOWN = 8
_LONGEST_NAME = 80

# Of every PEFT, and of every fork of it. `task_type` says what the model was, not what is in the
# file: a head that was saved is refused by its tensor. `alora_invocation_tokens` is read of all.
_COMMON = {
    "alora_invocation_tokens",
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "inference_mode",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "revision",
    "target_modules",
    "task_type",
}

# How training begins, and how weights are spread while it lasts. `merge_weights` and
# `runtime_config` are about the process, `ensure_weight_tying` about what is targeted beside
# a tied weight, which `vocabulary` reads.
_TRAINING = {
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "merge_weights",
    "runtime_config",
}

# LoraConfig of PEFT 0.18 to 0.21, and `enable_lora` of the first versions. `qalora_group_size` acts
# with `use_qalora` only.
_LORA = {
    *_COMMON,
    *_TRAINING,
    "alpha_pattern",
    "arrow_config",
    "base_is_residual",
    "enable_lora",
    "exclude_modules",
    "fan_in_fan_out",
    "init_lora_weights",
    "kasa_config",
    "layer_replication",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_bias",
    "monteclora_config",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
    "use_rslora",
    "velora_config",
}

# Balancing the experts' load is for training only.
_FORK = {*_LORA, "blc_alpha", "blc_weight", "lora_nums"}

# LD-MoLE's; with its router off it is a LoRAMoE.
_LDMOLE = {
    *_FORK,
    "lora_freeze",
    "router_freeze",
    "sparsegen",
    "sparsegen_cfg",
    "sparsegen_init",
}

_ADAMOLE = {
    *_COMMON,
    "base_is_residual",
    "exclude_modules",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "lora_rank",
    "num_experts",
    "use_rslora",
}

# GOAT's, and two of molehill's own for what it saves nowhere.
_GOAT = {
    *_LORA,
    "init_cof",
    "init_type",
    "molehill_eta",
    "molehill_scaling",
    "num_experts",
    "top_k",
}

# MoE-PEFT's and DynMoLE's; losses, noise and initial values are for training only.
_MOE_PEFT = {
    *_COMMON,
    "ffn_dropout",
    "jitter_noise",
    "lora_alpha",
    "lora_dropout",
    "lora_init",
    "num_experts",
    "r",
    "router_aux_loss_coef",
    "router_dyn_loss_coef",
    "router_init_range",
    "router_loss",
    "router_z_loss_coef",
    "routing_strategy",
    "use_dora",
    "use_rslora",
}
_MIXLORA = {*_MOE_PEFT, "act_fn", "expert_lora"}

# AdaLoRA's schedule, which has ended by the time its ranks are saved.
_RANK_ALLOCATION = {
    "beta1",
    "beta2",
    "deltaT",
    "init_r",
    "orth_reg_weight",
    "target_r",
    "tfinal",
    "tinit",
    "total_step",
}

# Of PEFT's other tuners.
_TUNER = {
    *_COMMON,
    "exclude_modules",
    "init_weights",
    "layers_pattern",
    "layers_to_transform",
    "r",
}
_LYCORIS = {*_TUNER, "alpha", "alpha_pattern", "module_dropout", "rank_dropout", "rank_pattern"}

# By method; MixLoRA's by routing strategy. `expert_capacity` and `sparse_step` are read by no
# forward pass of the trainer's, or drop tokens, which a server must not.
FIELDS: dict[str, Collection[str]] = {
    "lora": {*_LORA, "lora_B_layout", "unsloth_fused_expert_lora"},
    "mola-official": {*_FORK, "top_k"},
    "loramoe-official": _LDMOLE,
    "hydralora": _FORK,
    "ldmole": {*_LDMOLE, "ReLUMoE_cfg", "selected_topk", "use_abs"},
    "flylora": {*_LORA, "bias_u", "top_k"},
    "goat": _GOAT,
    "moelora": {*_LORA, "expert_num", "task_embedding_dim", "task_num"},
    "mole": {*_ADAMOLE, "threshold", "top_k"},
    "adamole": {*_ADAMOLE, "max_threshold"},
    "mixlora": {*_MIXLORA, "top_k"},
    "mixlora-dynamic": {*_MIXLORA, "temperature", "top_p"},
    "mixlora-switch": {*_MIXLORA, "expert_capacity", "sparse_step"},
    "mola": {*_MOE_PEFT, "top_k"},
    "loramoe": _MOE_PEFT,
    "dynmole": {
        *_MOE_PEFT,
        "entropy_eps",
        "entropy_index",
        "entropy_threshold",
        "entropy_type",
        "include_crossing",
        "keep_top_k",
        "normalize_entropy",
        "normalize_weights",
        "top_p",
    },
    "mov": {*_COMMON, "num_experts", "top_k"},
    "adalora": {*_LORA, *_RANK_ALLOCATION},
    "vera": {
        *_TUNER,
        "d_initial",
        "fan_in_fan_out",
        "projection_prng_key",
        "save_projection",
        "vera_dropout",
    },
    "loha": {*_LYCORIS, "use_effective_conv2d"},
    "lokr": {
        *_LYCORIS,
        "decompose_both",
        "decompose_factor",
        "rank_dropout_scale",
        "use_effective_conv2d",
    },
    "hra": {*_TUNER, "apply_GS"},
    "miss": {*_TUNER, "mini_r", "miss_dropout"},
    "bone": _TUNER,
    "xlora": {
        *_COMMON,
        "adapters",
        "enable_softmax",
        "enable_softmax_topk",
        "global_scaling_weight",
        "hidden_size",
        "layerwise_scalings",
        "non_granular_after",
        "scaling_pass_value",
        "softmax_temperature",
        "top_k_lora",
        "use_trainable_adapters",
        "xlora_depth",
        "xlora_dropout_p",
        "xlora_size",
    },
    "xlora_package": {
        "adapters",
        "base_model_id",
        "enable_relu_and_dropout",
        "enable_softmax",
        "enable_softmax_topk",
        "global_scaling_weight",
        "hidden_size",
        "layerwise_scalings",
        "non_granular_after",
        "scaling_pass_value",
        "softmax_temperature",
        "stop_token_id",
        "top_k_lora",
        "use_bias",
        "use_trainable_adapters",
        "xlora_depth",
        "xlora_dropout_p",
        "xlora_size",
    },
    "ia3": {*_TUNER, "fan_in_fan_out", "feedforward_modules", "init_ia3_weights"},
}
EXPERT_LORA = {"bias", "lora_alpha", "lora_dropout", "r", "use_dora", "use_rslora"}
SPARSEGEN = {"enabled", "hidden_sizes", "init_strategy", "input_sizes"}


def warnings(config: Fields, known: Collection[str]) -> tuple[str, ...]:
    """What to say of the fields that are none of `known` and hold something: at most one line.

    Null and what is empty count as absent; false does not, for nobody knows what it switches off.
    """
    unknown = [name for name, value in config.values.items() if name not in known and _set(value)]
    if not unknown:
        return ()
    shown = ", ".join(_shown(name, config.values[name]) for name in sorted(unknown)[:_SHOWN])
    more = f" and {len(unknown) - _SHOWN} more" if len(unknown) > _SHOWN else ""
    return (
        f"{config.where}: fields that molehill does not know, served as if they were not there: "
        f"{shown}{more}",
    )


def _set(value: object) -> bool:
    return value is not None and value not in ("", [], {})


def _shown(name: str, value: object) -> str:
    return f"{ascii(name)[1:-1][:_LONGEST_NAME]} = {shortened(value)}"
