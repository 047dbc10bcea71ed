"""Where the decoder layers of a model of transformers are."""

import inspect
from collections.abc import Iterator
from typing import Any, cast

from torch import nn
from transformers import DynamicCache, PreTrainedModel


def decoder_layers(model: PreTrainedModel) -> tuple[nn.Module, nn.ModuleList]:
    """Return the part of the model that calls its decoder layers, and the layers.

    Raises:
        ValueError: there are none that can be found, or none whose attention is causal.
    """
    find = getattr(getattr(model, "config", None), "get_text_config", None)
    if find is None:
        raise ValueError(
            f"model: expected one of transformers, as AutoModelForCausalLM.from_pretrained "
            f"returns, got {type(model).__name__}"
        )
    config = find(decoder=True)
    count = getattr(config, "num_hidden_layers", None)
    has_encoder = getattr(config, "is_encoder_decoder", False)
    found = [] if has_encoder else list(_lists(model, count))
    for owner, layers in found:
        if _is_causal(layers):
            return owner, layers
    if found:
        raise ValueError(
            f"model: expected a causal one, as AutoModelForCausalLM.from_pretrained returns, got "
            f"{type(model).__name__}, whose attention sees later tokens, too"
        )
    raise ValueError(
        f"model: expected a decoder with a ModuleList of {count} layers (num_hidden_layers), got "
        f"{type(model).__name__} without one"
    )


def check_attends(model: PreTrainedModel) -> None:
    """Raise a ValueError unless calls of the model take a cache of keys and values."""
    decoder, _ = decoder_layers(model)
    taken = inspect.signature(decoder.forward).parameters
    if taken.keys() & {"cache", "past_key_values"}:
        try:
            DynamicCache(config=cast(Any, decoder).config).get_seq_length()
        except ValueError:
            pass  # It has layers without attention alone.
        else:
            return
    raise ValueError(
        f"model: expected one with attention, whose cache takes the memories along, got "
        f"{type(model).__name__}, which has none; add_stored_memory needs none"
    )


def _lists(model: PreTrainedModel, count: int | None) -> Iterator[tuple[nn.Module, nn.ModuleList]]:
    """Yield the lists of so many layers, those of the text before those of pictures or sound."""
    for part in (model.get_decoder(), model):
        for module in part.modules():
            for layers in module.children():
                if isinstance(layers, nn.ModuleList) and len(layers) == count:
                    yield module, layers


def _is_causal(layers: nn.ModuleList) -> bool:
    """Return whether some attention sees what came before alone, or none says what it sees.

    What is computed of later tokens, too, is of no step.
    """
    said = [part.is_causal for part in layers.modules() if hasattr(part, "is_causal")]
    return any(said) or not said
