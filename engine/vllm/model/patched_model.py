"""Where adapters act in a loaded vLLM model: finds and hooks the places, cuts adapters to fit."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_tp_group, get_world_group
from vllm.logger import init_logger

from molehill.engine.adapter import classifier_validation, expert_pairs, token_validation
from molehill.engine.adapter.added_tokens import added_tokens
from molehill.engine.adapter.base_model import BaseModel
from molehill.engine.adapter.model import Adapter, natural_key
from molehill.engine.adapter.vocabulary_sites import is_on_vocabulary
from molehill.engine.vllm.model import (
    base_activations,
    discovery,
    linears_apart,
    moe_blocks,
    sharding,
    vocabulary,
    warmup,
)
from molehill.engine.vllm.model.base_activations import BaseActivations
from molehill.engine.vllm.model.base_linears import BaseLinears, SideStream
from molehill.engine.vllm.model.hooks import (
    hook_experts,
    hook_ffn,
    hook_linear,
    quantises_inputs,
    replace_activation,
    replace_linear,
)
from molehill.kernels.classified_linears import ClassifiedLinears
from molehill.kernels.classifier import ClassifierPiece, ClassifierPieces
from molehill.kernels.interface import (
    ActivatingBackend,
    Backend,
    BaseActivation,
    FfnPiece,
    FfnShape,
    LinearPiece,
    LinearShape,
    MoePiece,
    MoeShape,
    Run,
    ScalePiece,
    SlotWeights,
    SplitBackend,
)
from molehill.kernels.mixture import (
    ClassifierMixture,
    FfnMixture,
    LinearMixture,
    Reflection,
    ScaleMixture,
)
from molehill.kernels.moe_blocks import MoeBlocks
from molehill.kernels.vocabulary import Vocabulary

logger = init_logger("vllm.molehill")

NO_SECOND_CACHE = (
    "X-LoRA, whose classifier needs a first pass of the base with a KV cache of its own, on a "
    "server without --xlora"
)


class PatchedModel:
    """The linears, FFNs and MoE blocks of this rank, registered with the backend and hooked.

    base: the shapes of the whole model, all pipeline stages together.
    """

    def __init__(
        self,
        config: VllmConfig,
        device: torch.device,
        model: nn.Module,
        backend: Backend,
        moes: MoeBlocks,
        tables: Vocabulary,
        classified: ClassifiedLinears | None = None,
    ) -> None:
        self._backend, self._moes, self._vocabulary = backend, moes, tables
        self._classified = classified
        self._device = device
        self._tp = get_tp_group()
        self._dtype = config.model_config.dtype
        model_type = config.model_config.hf_text_config.model_type
        linears = discovery.find_linears(model, self._dtype, model_type)
        self._linears = linears_apart.of_text(model, linears)
        self._ffns = discovery.find_ffns(self._linears, model)
        self._blocks: dict[str, moe_blocks.MoeBlock] = {}
        self._block_handles: dict[str, int] = {}
        self._refusals = linears_apart.refused(model, self._linears)
        self._ignored = linears_apart.ignored(model)
        if not self._linears:
            raise RuntimeError(f"{type(model).__name__} has no linear that molehill can hook")
        self._by_name = {linear.name: linear for linear in self._linears}
        self._projections = {
            projection.site: (linear, projection)
            for linear in self._linears
            for projection in linear.sites
        }
        self._handles: dict[str, int] = {}
        self._ffn_handles: dict[str, int] = {}
        self._linear_shapes: dict[int, LinearShape] = {}
        self._ffn_shapes: dict[int, FfnShape] = {}
        self._base_linears: BaseLinears | None = None
        self._base_activations: BaseActivations | None = None
        if not config.model_config.enforce_eager:
            if isinstance(backend, SplitBackend):
                self._base_linears = BaseLinears(backend, SideStream(device))
            if isinstance(backend, ActivatingBackend):
                self._base_activations = BaseActivations(backend)
        self._install(self._dtype, device)
        self._install_experts(config, model, device)
        self._install_vocabulary(config, model, device)
        if classified is None:
            self._refusals[classifier_validation.FIELD] = NO_SECOND_CACHE
        self.base = self._describe_base(config)

    def _install(self, dtype: torch.dtype, device: torch.device) -> None:
        handles = self._handles
        for linear in self._linears:
            reduce = self._sum_over_ranks if linear.input_is_sharded else None
            shape = LinearShape(
                linear.name, linear.in_features, linear.out_features, dtype, device, reduce
            )
            handles[linear.name] = handle = self._backend.register_linear(shape)
            self._linear_shapes[handle] = shape
            base_linears = self._base_linears
            if base_linears is None or quantises_inputs(linear.module):
                hook_linear(linear.module, handle, self._linear_op(handle, shape))
            else:
                base_linears.add(handle, linear.module)
                replace_linear(linear.module, handle, base_linears.op, linear.out_features)
        for ffn in self._ffns:
            self._install_ffn(ffn)
        self._backend.seal()
        hooked = len(self._linears), len(self._ffns)
        logger.info("molehill: %d linears and %d FFNs hooked", *hooked)

    def _linear_op(self, handle: int, shape: LinearShape) -> Callable[..., Any]:
        """The backend's, and after it what a classifier weighs, where there may be such."""
        linear = self._backend.linear_op
        if self._classified is None:
            return linear
        self._classified.register(handle, shape)
        classified = self._classified.op

        def both(out: Tensor, x: Tensor, handle: Tensor) -> None:
            linear(out, x, handle)
            classified(out, x, handle)

        return both

    def _install_ffn(self, ffn: discovery.Ffn) -> None:
        width = self._by_name[ffn.down].in_features
        activation = self._activation_to_replace(ffn)
        gate_up, down = self._handles[ffn.gate_up], self._handles[ffn.down]
        shape = FfnShape(ffn.site, gate_up, down, width, activation)
        self._ffn_handles[ffn.site] = handle = self._backend.register_ffn(shape)
        self._ffn_shapes[handle] = shape
        if self._base_activations is None or activation is None:
            hook_ffn(ffn, handle, self._backend.ffn_op)
        else:
            module = getattr(ffn.module, ffn.activation_child)
            self._base_activations.add(handle, activation, module)
            replace_activation(ffn, handle, self._base_activations.op)

    def _activation_to_replace(self, ffn: discovery.Ffn) -> BaseActivation | None:
        """The base's, if the backend computes it in a launch of its own anyway. Where inputs are
        quantised, vLLM's compiler does that in the activation's launch."""
        modules = [self._by_name[name].module for name in (ffn.gate_up, ffn.down)]
        if (
            self._base_activations is None
            or any(quantises_inputs(module) for module in modules)
            or not discovery.activates_gate_up(ffn)
        ):
            return None
        module = getattr(ffn.module, ffn.activation_child)
        return base_activations.describe(ffn.activation, module)

    def _install_experts(self, config: VllmConfig, model: nn.Module, device: torch.device) -> None:
        graphs = device.type != "cpu" and not config.model_config.enforce_eager
        for site, runner in moe_blocks.find_blocks(model):
            if f"{site}.gate" not in self._projections:
                self._refusals[f"{site}.gate"] = "the base's router, in a kernel of its own"
            if refusal := moe_blocks.refusal(runner, graphs):
                self._refusals[f"{site}.experts"] = refusal
            block = self._blocks[site] = moe_blocks.describe(site, runner)
            if refusal:
                continue
            shape = MoeShape(
                site,
                block.sizes.experts,
                block.activation,
                moe_blocks.kernel(block),
                moe_blocks.MoeBlockWeights(block),
                self._dtype,
                device,
                hidden=block.sizes.hidden,
                intermediate=len(block.intermediate),
            )
            self._block_handles[site] = self._moes.register(shape)
            hook_experts(runner.routed_experts, self._block_handles[site], self._moes.op)

    def _install_vocabulary(
        self, config: VllmConfig, model: nn.Module, device: torch.device
    ) -> None:
        graphs = device.type != "cpu" and not config.model_config.enforce_eager
        text = config.model_config.hf_text_config
        self._tied = bool(getattr(text, "tie_word_embeddings", False))
        self._embedding = vocabulary.find_embedding(model)
        self._head = vocabulary.find_head(model, self._tied)
        extra = self._vocabulary.extra_tokens
        sites = (self._embedding, self._head)
        self._on_vocabulary = {site.name: site.shape(extra) for site in sites if site is not None}
        refusal = vocabulary.embedding_refusal(config, graphs)
        if self._embedding is not None and refusal:
            self._refusals[self._embedding.name] = refusal
            self._embedding = None
        refusal = vocabulary.head_refusal(config)
        if self._head is not None and refusal:
            self._refusals[self._head.name] = refusal
            self._head = None
        vocabulary.register(self._vocabulary, self._embedding, self._head, self._dtype, device)
        refusal = vocabulary.by_token_refusal(config, model, self._backend, graphs)
        if refusal:
            self._refusals[token_validation.FIELD] = refusal

    def _sum_over_ranks(self, tensor: Tensor) -> Tensor:
        total: Tensor = self._tp.all_reduce(tensor)
        return total

    def _describe_base(self, config: VllmConfig) -> BaseModel:
        """Shapes of the whole model: pipeline stages hold different layers, so they are united."""
        stage = (
            {
                site: (projection.in_features, projection.out_features)
                for site, (_, projection) in self._projections.items()
            },
            {ffn.site: ffn.activation for ffn in self._ffns},
            {site: block.sizes for site, block in self._blocks.items()},
            self._refusals,
            self._on_vocabulary,
            frozenset(site for site, (linear, _) in self._projections.items() if _has_bias(linear)),
            self._ignored,
        )
        world = get_world_group()
        everyone: list[Any] = [stage] * world.world_size
        if world.world_size > 1:
            torch.distributed.all_gather_object(everyone, stage, group=world.cpu_group)
        return BaseModel(
            name=config.model_config.model,
            architecture=config.model_config.architectures[0],
            linears={site: shape for stage in everyone for site, shape in stage[0].items()},
            ffns={site: name for stage in everyone for site, name in stage[1].items()},
            moes={site: sizes for stage in everyone for site, sizes in stage[2].items()},
            refused={site: why for stage in everyone for site, why in stage[3].items()},
            vocabulary={site: shape for stage in everyone for site, shape in stage[4].items()},
            extra_tokens=self._vocabulary.extra_tokens,
            tied=self._tied,
            biased=frozenset().union(*(stage[5] for stage in everyone)),
            ignored=frozenset().union(*(stage[6] for stage in everyone)),
        )

    def warm_up(self, most: int) -> None:
        """Launches the backend's kernels for steps of up to `most` tokens."""
        if self._base_activations is not None:
            self._base_activations.warm_up(
                [
                    (shape, self._linear_shapes[shape.gate_up].dtype, self._device)
                    for shape in self._ffn_shapes.values()
                    if shape.activation is not None
                ]
            )
        warmup.run(self._backend, self._linear_shapes, self._ffn_shapes, most)

    def begin_step(self, runs: Sequence[Run]) -> None:
        """Announces the next forward; rows in no run belong to the base. Never raises."""
        self._backend.begin_step(runs)
        self._moes.begin_step(runs)
        self._vocabulary.begin_step(runs)
        if self._base_linears is not None:
            self._base_linears.begin_step(runs)
        if self._base_activations is not None:
            self._base_activations.begin_step(runs)

    def has_counted(self, site: str) -> bool:
        """Whether a site is on this pipeline stage, and its tokens are counted."""
        return site in self._ffn_handles or site in self._projections

    def cut(self, adapter: Adapter) -> SlotWeights:
        """This rank's share of an adapter; sites of other pipeline stages are left out."""
        linears: dict[int, list[LinearPiece]] = {}
        scales: dict[int, list[ScalePiece]] = {}
        ffns: dict[int, FfnPiece] = {}
        ffn_scales: dict[int, ScalePiece] = {}
        classified: dict[int, list[ClassifierPiece]] = {}
        # In one order on all ranks: DoRA's norms and products with W are summed over them.
        for site in sorted(adapter.sites, key=natural_key):
            mixture = adapter.sites[site]
            if isinstance(mixture, FfnMixture):
                if site in self._ffn_handles:
                    ffns[self._ffn_handles[site]] = self._cut_ffn(site, mixture)
            elif site not in self._projections or is_on_vocabulary(site):
                continue
            elif isinstance(mixture, ClassifierMixture):
                linear, projection = self._projections[site]
                pieces = classified.setdefault(self._handles[linear.name], [])
                pieces.append(sharding.cut_classified(mixture, projection))
            elif isinstance(mixture, ScaleMixture):
                linear, projection = self._projections[site]
                if mixture.of == "input":
                    ffn = self._ffn_handles[site.rpartition(".")[0]]
                    ffn_scales[ffn] = sharding.cut_ffn_scale(mixture, projection)
                else:
                    vectors = sharding.cut_scale(mixture, linear, projection)
                    scales.setdefault(self._handles[linear.name], []).append(vectors)
            else:
                handle, piece = self._cut_linear(site, mixture)
                linears.setdefault(handle, []).append(piece)
        self._cut_biases(adapter, linears)
        on_vocabulary = vocabulary.cut(
            adapter, self._embedding, self._head, added_tokens(adapter, self.base.num_tokens)
        )
        moes = self._cut_moes(adapter)
        weighed = None
        if adapter.classifier is not None:
            weighed = ClassifierPieces(adapter.classifier, classified)
        return SlotWeights(linears, ffns, scales, ffn_scales, moes, on_vocabulary, weighed)

    def _cut_biases(self, adapter: Adapter, linears: dict[int, list[LinearPiece]]) -> None:
        """Biases go into the pieces of their sites, or are pieces by themselves."""
        for site in sorted(adapter.biases.keys() & self._projections.keys(), key=natural_key):
            linear, projection = self._projections[site]
            added = sharding.cut_bias(adapter.biases[site], linear, projection)
            if added is None:
                continue
            pieces = linears.setdefault(self._handles[linear.name], [])
            for i, piece in enumerate(pieces):
                if piece.site == site:
                    pieces[i] = replace(piece, added_bias=added)
                    break
            else:
                pieces.append(sharding.only_bias(added, linear, projection))

    def _cut_moes(self, adapter: Adapter) -> dict[int, MoePiece]:
        return {
            self._block_handles[site]: sharding.cut_moe(site, projections, self._blocks[site])
            for site, projections in expert_pairs.group(adapter.sites).items()
            if site in self._block_handles
        }

    def _cut_linear(
        self, site: str, mixture: LinearMixture | Reflection
    ) -> tuple[int, LinearPiece]:
        linear, projection = self._projections[site]
        if isinstance(mixture, Reflection):
            piece = sharding.cut_reflection(mixture, linear, projection, self._sum_over_ranks)
        else:
            piece = sharding.cut_linear(mixture, linear, projection, self._sum_over_ranks)
        return self._handles[linear.name], piece

    def _cut_ffn(self, site: str, mixture: FfnMixture) -> FfnPiece:
        ffn = next(ffn for ffn in self._ffns if ffn.site == site)
        down = self._by_name[ffn.down]
        bias = getattr(down.module, "bias", None) if self._tp.rank_in_group == 0 else None
        inner = down.projections[0].inputs
        return sharding.cut_ffn(mixture, ffn, self._by_name[ffn.gate_up], inner, bias)


def _has_bias(linear: discovery.Linear) -> bool:
    return getattr(linear.module, "bias", None) is not None
