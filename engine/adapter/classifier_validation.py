"""Whether an adapter whose gate weights come from a classifier (X-LoRA) can be served."""

from collections.abc import Iterator

from molehill.engine.adapter.base_model import BaseModel
from molehill.engine.adapter.errors import AdapterError, LimitError, ShapeError, UnsupportedError
from molehill.engine.adapter.expert_sites import split
from molehill.engine.adapter.model import Adapter, classifier_tensor
from molehill.engine.adapter.vocabulary_sites import EMBEDDINGS, is_on_vocabulary
from molehill.kernels.classifier import Classifier
from molehill.kernels.mixture import ClassifierMixture

# In errors, and among a server's refusals.
FIELD = "classifier"
# Gate weights of one token.
MOST_WEIGHTS = 1 << 16


def adapter_problems(adapter: Adapter) -> Iterator[AdapterError]:
    """Whatever the base."""
    sites = {s: m for s, m in adapter.sites.items() if isinstance(m, ClassifierMixture)}
    classifier = adapter.classifier
    if classifier is None:
        for site in sites:
            yield UnsupportedError(site, "experts for a classifier", "one in the adapter")
        return
    others = [*(adapter.sites.keys() - sites.keys()), *adapter.rows, *adapter.biases]
    for name in sorted(others):
        found = "what no classifier weighs, beside a classifier (X-LoRA)"
        yield UnsupportedError(name, found, "low-rank pairs alone")
    if adapter.invocation_tokens or adapter.by_token is not None:
        found = "a classifier (X-LoRA) in an adapter that acts on a part of the tokens"
        yield UnsupportedError(FIELD, found, "one that acts on all")
    yield from _inconsistent(classifier)
    for site, mixture in sites.items():
        if mixture.num_experts != classifier.experts:
            found = f"{mixture.num_experts} experts"
            yield ShapeError(site, found, f"the classifier's {classifier.experts}")
        if mixture.place >= classifier.places:
            found = f"place {mixture.place}"
            yield ShapeError(site, found, f"one of the classifier's {classifier.places}")
        if is_on_vocabulary(site) or split(site):
            where = "the base's experts" if split(site) else "the embedding or the LM head"
            found = f"gate weights of a classifier (X-LoRA) on {where}"
            yield UnsupportedError(site, found, "linears inside the layers")


def misfits(adapter: Adapter, base: BaseModel) -> Iterator[AdapterError]:
    """Where the classifier does not fit the base, or the server."""
    if adapter.classifier is None:
        return
    if refusal := base.refusal(FIELD):
        yield UnsupportedError(FIELD, refusal, "a base model and settings that allow it")
    shape = next((base.vocabulary[n] for n in EMBEDDINGS if n in base.vocabulary), None)
    inputs = adapter.classifier.layers[0][0].shape[1]
    if shape is not None and shape[1] != inputs:
        where = classifier_tensor("0.weight")
        yield ShapeError(where, f"{inputs} inputs", f"the base's hidden size {shape[1]}")


def _inconsistent(classifier: Classifier) -> Iterator[AdapterError]:
    places = classifier.places if classifier.layerwise else 1
    outputs = places * classifier.experts
    if outputs > MOST_WEIGHTS:
        yield LimitError(FIELD, f"{outputs} gate weights a token", f"at most {MOST_WEIGHTS}")
    if classifier.top_k is not None and classifier.top_k > classifier.experts:
        expected = f"at most the {classifier.experts} experts"
        yield UnsupportedError(f"{FIELD}: top_k", classifier.top_k, expected)
    if classifier.top_k is not None and classifier.first_pass != 0:
        found = f"{classifier.first_pass} beside top_k, which would choose among equal weights"
        yield UnsupportedError(f"{FIELD}: first_pass", found, "0")
    width = None
    for i, (weight, bias) in enumerate(classifier.layers):
        where = classifier_tensor(f"{i}.weight")
        if width not in (None, weight.shape[1]):
            yield ShapeError(where, list(weight.shape), f"{width} inputs, of the layer before it")
        if bias.shape[0] != weight.shape[0]:
            yield ShapeError(classifier_tensor(f"{i}.bias"), list(bias.shape), [weight.shape[0]])
        width = weight.shape[0]
    if width != outputs:
        where = classifier_tensor(f"{len(classifier.layers) - 1}.weight")
        what = f"{classifier.experts} experts" + (f" at {places} linears" * classifier.layerwise)
        yield ShapeError(where, f"{width} outputs", f"{outputs}, for {what}")
