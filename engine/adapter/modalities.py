"""The parts of a multimodal base that read images or sounds, and not a request's tokens."""

from collections.abc import Iterator

from torch import nn

# What Transformers calls them, of the models that it has.
NAMES = (
    "vision_tower",
    "vision_model",
    "vision_encoder",
    "visual",
    "audio_tower",
    "audio_model",
    "audio_encoder",
    "multi_modal_projector",
    "embed_vision",
    "embed_audio",
    "connector",
)
REFUSAL = (
    "a part of the base that reads images or sounds, whose rows are patches and frames of all "
    "requests and no request's tokens"
)


def apart(model: nn.Module, text: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names in `model` and modules of the parts that share nothing with `text`, its language
    model, and do not have it inside. An LM head beside it is among them."""
    yield from _below(model, "", {id(module) for module in text.modules()})


def _below(parent: nn.Module, prefix: str, inside: set[int]) -> Iterator[tuple[str, nn.Module]]:
    for name, child in parent.named_children():
        if id(child) in inside:
            continue
        if any(id(module) in inside for module in child.modules()):
            yield from _below(child, f"{prefix}{name}.", inside)
        else:
            yield f"{prefix}{name}", child
