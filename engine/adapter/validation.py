"""Whether an adapter can be served: by itself, and on a given base model.

Runs before anything is allocated for serving.
"""

import math
from collections.abc import Iterator, Mapping
from functools import partial

from torch import Tensor

from molehill.engine.adapter import (
    classifier_validation,
    invocation,
    token_validation,
    vocabulary_validation,
)
from molehill.engine.adapter.base_model import BaseModel, Limits
from molehill.engine.adapter.errors import (
    AdapterError,
    BaseMismatchError,
    LimitError,
    NonFiniteError,
    NothingBoundError,
    ShapeError,
    UnknownTargetError,
    UnsupportedError,
)
from molehill.engine.adapter.expert_sites import PROJECTIONS, split
from molehill.engine.adapter.model import Adapter, bias_tensor, natural_key
from molehill.engine.adapter.module_names import split_layer
from molehill.engine.adapter.vocabulary_sites import is_on_vocabulary
from molehill.kernels.activation import ACTIVATIONS
from molehill.kernels.mixture import (
    Bias,
    ClassifierMixture,
    Experts,
    FfnMixture,
    LinearMixture,
    Mixture,
    Reflection,
    RoutedMixture,
    ScaleMixture,
)

_NO_REFLECTION = 1e-5


def validate(adapter: Adapter, base: BaseModel, limits: Limits) -> None:
    """Raises the first of `problems`."""
    for problem in problems(adapter, base, limits):
        raise problem


def check(adapter: Adapter, limits: Limits) -> None:
    """Raises the first problem that no choice of base model can mend."""
    for problem in adapter_problems(adapter, limits):
        raise problem


def problems(adapter: Adapter, base: BaseModel, limits: Limits) -> list[AdapterError]:
    """All that stands against serving the adapter on this base, the most telling first.

    LimitError, NonFiniteError, NothingBoundError, ShapeError, UnsupportedError from the adapter
    itself; UnknownTargetError and ShapeError where it does not fit the base; ahead of those, a
    BaseMismatchError if most sites do not.
    """
    if adapter.by_token is not None:
        return [
            *token_validation.problems(
                adapter, partial(problems, base=base, limits=limits), limits.adapter_bytes
            ),
            *token_validation.misfits(adapter, base),
        ]
    misfits = [
        problem
        for site in sorted(adapter.sites, key=natural_key)
        for problem in _misfits(site, adapter.sites[site], base)
    ]
    misfits += vocabulary_validation.misfits(adapter, base)
    misfits += classifier_validation.misfits(adapter, base)
    misfits += invocation.misfits(adapter, base)
    for site in sorted(adapter.biases, key=natural_key):
        misfits += _bias_misfits(site, adapter.biases[site], base)
    return [*adapter_problems(adapter, limits), *_mismatch(adapter, base, misfits), *misfits]


def adapter_problems(adapter: Adapter, limits: Limits) -> list[AdapterError]:
    """The problems that need no base model to be seen."""
    if adapter.by_token is not None:
        members = partial(adapter_problems, limits=limits)
        return list(token_validation.problems(adapter, members, limits.adapter_bytes))
    errors: list[AdapterError] = []
    if adapter.num_bytes > limits.adapter_bytes:
        errors.append(
            LimitError(
                "adapter", f"{adapter.num_bytes} bytes", f"at most {limits.adapter_bytes} bytes"
            )
        )
    for site in sorted(adapter.sites, key=natural_key):
        mixture = adapter.sites[site]
        errors += [*_inconsistent(site, mixture), *_over_limits(site, mixture, limits)]
        errors += _unservable(site, mixture, adapter.sites)
    errors += vocabulary_validation.adapter_problems(adapter)
    errors += classifier_validation.adapter_problems(adapter)
    for site in sorted(adapter.biases, key=natural_key):
        errors += _unservable_bias(site, adapter.biases[site], adapter)
    for name, tensor in adapter.tensors():
        if not is_finite(tensor):
            errors.append(NonFiniteError(name, "NaN or Inf", "finite values"))
    acting = (*map(_acts, adapter.sites.values()), *map(_bias_acts, adapter.biases.values()))
    if not errors and not adapter.rows and not any(acting):
        sites = len(adapter.sites)
        errors.append(NothingBoundError("adapter", f"{sites} sites, no effect", "at least one"))
    return errors


def is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or Inf; several times as fast as `isfinite().all()`."""
    return not tensor.numel() or all(math.isfinite(end) for end in tensor.aminmax())


def _stacks(site: str, mixture: Mixture) -> list[tuple[str, Experts]]:
    if isinstance(mixture, LinearMixture):
        shared = [] if mixture.shared is None else [(f"{site}.shared", mixture.shared)]
        return [(site, mixture.experts), *shared]
    if isinstance(mixture, ClassifierMixture):
        return [(site, mixture.experts)]
    if isinstance(mixture, ScaleMixture | Reflection):
        return []
    return [(f"{site}.{name}", experts) for name, experts in sorted(mixture.experts.items())]


def _inconsistent(site: str, mixture: Mixture) -> Iterator[AdapterError]:
    if isinstance(mixture, Reflection):
        yield from _expect(f"{site}.u", mixture.u, list(reversed(mixture.a.shape)))
        return
    if isinstance(mixture, ClassifierMixture):
        yield from _inconsistent_pair(site, mixture.experts)
        return
    if isinstance(mixture, ScaleMixture):
        heads, width = mixture.num_heads, mixture.router.shape[-1]
        expected = [heads if mixture.of == "output" else 1, mixture.num_experts, width]
        yield from _expect(f"{site}.vectors", mixture.vectors, expected)
        more = mixture.policy.extra_rows or mixture.policy.num_parameters
        if more or mixture.policy.constant_weights is not None:
            found = f"{type(mixture.policy).__name__} over vectors"
            yield UnsupportedError(f"{site}.routing", found, "a policy of the probabilities alone")
        return
    for stem, experts in _stacks(site, mixture):
        yield from _inconsistent_pair(stem, experts)
        if stem != f"{site}.shared" and len(experts.ranks) != mixture.num_experts:
            found = f"{len(experts.ranks)} experts"
            yield ShapeError(stem, found, f"the router's {mixture.num_experts}")
    yield from _inconsistent_parameters(site, mixture)
    if isinstance(mixture, FfnMixture):
        yield from _inconsistent_widths(site, mixture)
        yield from _inconsistent_magnitudes(site, mixture)
        return
    a, b = mixture.experts.a, mixture.experts.b
    if mixture.router is not None:
        rows = mixture.num_experts + mixture.policy.extra_rows
        yield from _expect(f"{site}.router", mixture.router, [rows, a.shape[-1]])
    if mixture.magnitude is not None:
        yield from _expect(f"{site}.magnitude", mixture.magnitude, [b.shape[0]])
    if mixture.shared is not None:
        shared_a, shared_b = mixture.shared.a, mixture.shared.b
        yield from _expect(f"{site}.shared.a", shared_a, [shared_a.shape[0], a.shape[-1]])
        yield from _expect(f"{site}.shared.b", shared_b, [b.shape[0], shared_b.shape[1]])


def _inconsistent_pair(stem: str, experts: Experts) -> Iterator[AdapterError]:
    rows = sum(experts.ranks)
    yield from _expect(f"{stem}.a", experts.a, [rows, experts.a.shape[-1]])
    yield from _expect(f"{stem}.b", experts.b, [experts.b.shape[0], rows])


def _inconsistent_parameters(site: str, mixture: RoutedMixture) -> Iterator[AdapterError]:
    """A policy has all of the parameters that it learned, or none; and a router, unless its weights
    are constant."""
    where, count = f"{site}.parameters", mixture.policy.num_parameters
    if mixture.parameters is not None:
        yield from _expect(where, mixture.parameters, [count])
    elif count:
        yield ShapeError(where, "no tensor", [count])
    only = mixture.policy.only_experts
    if only not in (None, mixture.num_experts):
        found = f"{type(mixture.policy).__name__} for {only} experts"
        yield ShapeError(f"{site}.routing", found, f"one for {mixture.num_experts}")
    constant = mixture.policy.constant_weights is not None
    if mixture.router is None and not constant:
        expected = f"one for {type(mixture.policy).__name__}"
        yield ShapeError(f"{site}.router", "no tensor", expected)
    if mixture.router is not None and constant:
        yield UnsupportedError(f"{site}.router", "a router beside constant weights", "none")


def _inconsistent_widths(site: str, mixture: FfnMixture) -> Iterator[AdapterError]:
    """Gate and up read the router's input and write what down reads."""
    width, inner = mixture.router.shape[-1], None
    for name in ("gate_proj", "up_proj", "down_proj"):
        if name not in mixture.experts:
            continue
        a, b = mixture.experts[name].a, mixture.experts[name].b
        reads, writes = (b, a) if name == "down_proj" else (a, b)
        outer_half, outer = ("b", reads.shape[0]) if name == "down_proj" else ("a", reads.shape[1])
        if outer != width:
            where = f"{site}.{name}.{outer_half}"
            yield ShapeError(where, f"width {outer}", f"the router's {width}")
        inside = writes.shape[1] if name == "down_proj" else writes.shape[0]
        inner = inner or inside
        if inside != inner:
            where = f"{site}.{name}.{'a' if name == 'down_proj' else 'b'}"
            yield ShapeError(where, f"width {inside}", f"the FFN's inner width {inner}")


def _inconsistent_magnitudes(site: str, mixture: FfnMixture) -> Iterator[AdapterError]:
    for name, magnitude in sorted(mixture.magnitudes.items()):
        where = f"{site}.{name}.magnitude"
        if name not in mixture.experts:
            yield ShapeError(where, "magnitudes without experts", "experts of this projection")
        else:
            expected = [mixture.num_experts, mixture.experts[name].b.shape[0]]
            yield from _expect(where, magnitude, expected)


def _expect(where: str, tensor: Tensor, shape: list[int]) -> Iterator[AdapterError]:
    if list(tensor.shape) != shape:
        yield ShapeError(where, list(tensor.shape), shape)


def _over_limits(site: str, mixture: Mixture, limits: Limits) -> Iterator[AdapterError]:
    stacks = [experts.ranks for _, experts in _stacks(site, mixture)]
    if isinstance(mixture, Reflection):
        stacks = [(mixture.rank,)]
    sizes = {
        "experts": (mixture.num_experts, limits.experts),
        "rank": (max((max(ranks, default=0) for ranks in stacks), default=0), limits.rank),
        "rank rows": (sum(sum(ranks) for ranks in stacks), limits.total_rank),
    }
    for name, (size, limit) in sizes.items():
        if size > limit:
            yield LimitError(site, f"{name} {size}", f"at most {limit}")


def _unservable(
    site: str, mixture: Mixture, sites: Mapping[str, Mixture]
) -> Iterator[AdapterError]:
    if not isinstance(mixture, FfnMixture):
        return
    if mixture.activation is not None and mixture.activation not in ACTIVATIONS:
        expected = f"one of {', '.join(ACTIVATIONS)}"
        yield UnsupportedError(f"{site}.activation", mixture.activation, expected)
    if "down_proj" in mixture.magnitudes:
        # Factors on its output would not commute with the sum over the experts.
        found = "DoRA on the experts of down_proj, whose base GEMM would run once per expert"
        expected = "magnitudes on gate_proj and up_proj only"
        yield UnsupportedError(f"{site}.down_proj.magnitude", found, expected)
    for projection in ("gate_proj", "up_proj", "down_proj"):
        if f"{site}.{projection}" in sites:
            where = f"{site}.{projection}"
            yield UnsupportedError(where, "a linear inside an FFN mixture", "one of the two")


def _unservable_bias(site: str, bias: Bias, adapter: Adapter) -> Iterator[AdapterError]:
    """Beside the adapter's own sites, whatever the base."""
    where, mixture = f"{site}.bias", adapter.sites.get(site)
    widths = {name: tensor.shape[0] for name, tensor in bias.tensors().items()}
    if isinstance(mixture, LinearMixture):
        widths["b"] = mixture.experts.b.shape[0]
    if len(set(widths.values())) > 1:
        yield ShapeError(where, f"outputs {widths}", "one number of them")
    if is_on_vocabulary(site):
        expected = "biases of linears inside the layers"
        yield UnsupportedError(where, "a bias on the vocabulary", expected)
    if split(site):
        yield UnsupportedError(where, "a bias on an expert of the base model", "biases of linears")
    block = site.rpartition(".")[0]
    if isinstance(adapter.sites.get(block), FfnMixture):
        yield UnsupportedError(where, "a bias inside an FFN mixture", "one of the two")
    if bias.trained is not None and adapter.invocation_tokens:
        found = "a trained bias of the base, which PEFT has on every token,"
        expected = "lora_bias, which acts from the invocation on as lora_A and lora_B do"
        yield UnsupportedError(where, f"{found} beside alora_invocation_tokens", expected)


def _bias_misfits(site: str, bias: Bias, base: BaseModel) -> Iterator[AdapterError]:
    if refusal := base.refusal(site):
        yield UnsupportedError(f"{site}.bias", refusal, "a base model and settings that allow it")
        return
    shape = base.linear(site)
    if shape is None:
        yield _unknown(f"{site}.bias", "linear", _linear_names(base))
        return
    for name, tensor in bias.tensors().items():
        yield from _expect(bias_tensor(site, name), tensor, [shape[1]])
    if bias.trained is not None and site not in base.biased:
        found = "a trained bias, and the base's linear has none"
        yield UnsupportedError(f"{site}.bias", found, "the base that it was trained from")


def _bias_acts(bias: Bias) -> bool:
    """A trained one may be the base's own, which only a holder of the base can say."""
    return bias.trained is not None or bool(bias.added is not None and bias.added.any())


def _acts(mixture: Mixture) -> bool:
    """Whether the output can differ from the base's. Weights that do not sum to 1 scale a whole
    FFN even if every B is zero, and an output even if every vector is ones."""
    if isinstance(mixture, LinearMixture):
        stacks = [experts for _, experts in _stacks("", mixture)]
        return mixture.magnitude is not None or any(map(_nonzero, stacks))
    if isinstance(mixture, ClassifierMixture):
        return _nonzero(mixture.experts)
    if isinstance(mixture, Reflection):
        return _reflects(mixture)
    if not mixture.policy.sums_to_one:
        return True
    if isinstance(mixture, ScaleMixture):
        return bool((mixture.vectors != 1).any())
    return bool(mixture.magnitudes) or any(map(_nonzero, mixture.experts.values()))


def _reflects(mixture: Reflection) -> bool:
    """Whether U A is more than rounding, by its Frobenius norm: one reflection's is 2, those of
    HRA's initial values cancel in pairs."""
    u, a = mixture.u.double(), mixture.a.double()
    return float(((u.T @ u) * (a @ a.T)).sum()) > _NO_REFLECTION**2


def _nonzero(experts: Experts) -> bool:
    return bool((experts.a.any(dim=1) & experts.b.any(dim=0)).any())


def _misfits(site: str, mixture: Mixture, base: BaseModel) -> Iterator[AdapterError]:
    if refusal := base.refusal(site):
        yield UnsupportedError(site, refusal, "a base model and settings that allow it")
    elif isinstance(mixture, FfnMixture):
        yield from _ffn_misfits(site, mixture, base)
    elif isinstance(mixture, Reflection):
        yield from _misfit_reflection(site, mixture, base)
    elif isinstance(mixture, ScaleMixture):
        yield from _misfit_vectors(site, mixture, base)
    elif (shape := base.linear(site)) is None:
        yield _unknown(site, "linear", _linear_names(base))
    else:
        if is_on_vocabulary(site) and isinstance(mixture, LinearMixture):
            shape = vocabulary_validation.with_added_tokens(site, mixture, base) or shape
        for stem, experts in _stacks(site, mixture):
            yield from _misfit(stem, experts, shape)
        if split(site) and isinstance(mixture, LinearMixture):
            yield from _expert_misfits(site, mixture)


def _expert_misfits(site: str, mixture: LinearMixture) -> Iterator[AdapterError]:
    """The base's router has the say over its experts; what is on them is static."""
    if mixture.router is not None:
        found = "a router on an expert of the base model"
        yield UnsupportedError(site, found, "plain LoRA on experts")
    if mixture.magnitude is not None:
        yield UnsupportedError(site, "DoRA on an expert of the base model", "plain LoRA on experts")


def _ffn_misfits(site: str, mixture: FfnMixture, base: BaseModel) -> Iterator[AdapterError]:
    if site in base.moes:
        found = f"an FFN mixture on a block of {base.moes[site].experts} experts"
        yield UnsupportedError(site, found, "a base model with one FFN per layer")
        return
    if site not in base.ffns:
        yield _unknown(site, "gated FFN", list(base.ffns))
        return
    inputs, _ = base.ffn_projection(site, "gate_proj")
    yield from _expect(f"{site}.router", mixture.router, [mixture.router.shape[0], inputs])
    if mixture.activation is None and base.ffns[site] not in ACTIVATIONS:
        expected = f"one of {', '.join(ACTIVATIONS)}"
        yield UnsupportedError(f"{site}: the base's activation", base.ffns[site], expected)
    for projection, experts in sorted(mixture.experts.items()):
        shape = base.ffn_projection(site, projection)
        yield from _misfit(f"{site}.{projection}", experts, shape)


def _linear_names(base: BaseModel) -> list[str]:
    experts = [f"{block}.experts.0.{name}" for block in base.moes for name in PROJECTIONS]
    return [*base.linears, *experts]


def _misfit(name: str, experts: Experts, shape: tuple[int, int]) -> Iterator[AdapterError]:
    inputs, outputs = shape
    yield from _expect(f"{name}.a", experts.a, [experts.a.shape[0], inputs])
    yield from _expect(f"{name}.b", experts.b, [outputs, experts.b.shape[1]])


def _misfit_vectors(site: str, mixture: ScaleMixture, base: BaseModel) -> Iterator[AdapterError]:
    if site not in base.linears:
        yield _unknown(site, "linear", list(base.linears))
        return
    parent, _, leaf = site.rpartition(".")
    if mixture.of == "input" and (leaf != "down_proj" or parent not in base.ffns):
        yield UnsupportedError(site, "vectors on its input", "the down_proj of a gated FFN")
    inputs, outputs = base.linears[site]
    heads, _, width = mixture.vectors.shape
    expected = outputs if mixture.of == "output" else inputs
    if heads * width != expected:
        found = f"{heads} heads of width {width}"
        yield ShapeError(f"{site}.vectors", found, f"{expected} {mixture.of}s in all")


def _misfit_reflection(site: str, mixture: Reflection, base: BaseModel) -> Iterator[AdapterError]:
    if site not in base.linears:
        yield _unknown(site, "linear", list(base.linears))
        return
    yield from _expect(f"{site}.a", mixture.a, [mixture.rank, base.linears[site][0]])


def _unknown(site: str, noun: str, known: list[str]) -> UnknownTargetError:
    """With some of the base's names, of the same layer if it has it."""
    layer, block = ".".join(site.split(".")[:2]), ".".join(site.split(".")[:3])
    near = [name for name in known if name.startswith(f"{layer}.")] or known
    near.sort(key=lambda name: not name.startswith(f"{block}."))
    examples = ", ".join(near[:4]) or f"a base with a {noun}"
    return UnknownTargetError(site, f"no such {noun} in the base model", f"e.g. {examples}")


def _layer(site: str) -> int | None:
    split = split_layer(site)
    return split and split[0]


def _mismatch(adapter: Adapter, base: BaseModel, misfits: list[AdapterError]) -> list[AdapterError]:
    """A base of another size: most sites are of other widths or in layers it does not have."""
    names = [*base.linears, *base.moes]
    layers = 1 + max((layer for name in names if (layer := _layer(name)) is not None), default=-1)
    beyond = [site for site in adapter.sites if (_layer(site) or 0) >= layers]
    wide = [
        site
        for site in adapter.sites
        if any(isinstance(p, ShapeError) and p.where.startswith(f"{site}.") for p in misfits)
    ]
    other_size = len(beyond) + len(wide)
    if other_size < 2 or 2 * other_size <= len(adapter.sites):
        return []
    first = next(p for p in misfits if isinstance(p, ShapeError | UnknownTargetError))
    return [
        BaseMismatchError(
            f"adapter for {adapter.base_model or 'an unnamed base model'}",
            f"{other_size} of {len(adapter.sites)} sites of other widths or layers ({first})",
            f"the shapes of {base.name} ({base.architecture}, {layers} layers)",
        )
    ]
