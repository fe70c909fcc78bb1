"""A vLLM plug-in: models without attention, and models without MLPs, from those that vLLM has.

`register` is what an entry point `vllm.general_plugins` of a copy of this file names (see `start`): the engine may live
in another environment, so nothing of this package is imported. Which model is taken apart stands in the environment.
Written against vLLM 0.26.

A part that is left out passes on what it is given. Its weights stay, as does the KV cache that its attention asked
for: only the kernels are gone, so that memory, batches and graphs are those of the whole model.
"""

from __future__ import annotations

import os
from typing import Any

BASE = "MPS_ADVISOR_BASE_ARCHITECTURE"
# What is left out, by the architecture that a model's configuration then names: the layers' attributes.
PARTS = {
    "MpsAdvisorWithoutAttention": ("self_attn",),
    "MpsAdvisorWithoutMlp": ("mlp",),
    "MpsAdvisorWithoutBoth": ("self_attn", "mlp"),
}


def register() -> None:
    """Make the models known to vLLM; called once in each of its processes."""
    from vllm import ModelRegistry

    for name in PARTS:
        ModelRegistry.register_model(name, f"{__name__}:{name}")


def __getattr__(name: str) -> type:
    """The model class of an architecture, made when vLLM asks for it: that imports torch and the whole model."""
    if name not in PARTS:
        raise AttributeError(name)
    from vllm import ModelRegistry

    made = without(ModelRegistry.models[os.environ[BASE]].load_model_cls(), PARTS[name], name)
    globals()[name] = made  # one class, however often it is asked for
    return made


def without(base: type, attributes: tuple[str, ...], name: str) -> type:
    """A model class like `base`, whose layers pass by what `attributes` name."""

    # vLLM reads these names off the signature.
    def __init__(self: Any, *, vllm_config: Any, prefix: str = "") -> None:  # noqa: ANN401
        base.__init__(self, vllm_config=vllm_config, prefix=prefix)  # type: ignore[misc]
        for attribute in attributes:
            parts = [part for layer in self.modules() if (part := getattr(layer, attribute, None)) is not None]
            if not parts:
                raise ValueError(f"{base.__name__} has no layer with “{attribute}”: it cannot be taken apart")
            for part in parts:
                pass_by(part)

    return type(name, (base,), {"__init__": __init__, "__module__": __name__})


def pass_by(part: object) -> None:
    """Let a module return the hidden states that it is given.

    By its class, not by an attribute of the object: that is where the compiler looks for `forward`.
    """
    part.__class__ = type(f"PassedBy{type(part).__name__}", (type(part),), {"forward": _hidden_states})


def _hidden_states(self: object, *args: Any, hidden_states: Any = None, **rest: object) -> Any:  # noqa: ANN401
    """They come by name, or last: attention is called with positions and hidden states, an MLP with them alone."""
    return args[-1] if hidden_states is None else hidden_states
