"""Opens a model's files once for an engine: configuration, prompt builder, generation defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwencli.engine.prompt import PromptBuilder

# Positions a model is trained for when its config.json does not say.
DEFAULT_MAX_SEQ_LEN = 32768


@dataclass(frozen=True)
class ModelFiles:
    """Everything about a model that an engine needs besides its weights.

    Args:
        folder: None for a dummy load of a model that is not on this machine.
        hub_config: config.json; for a dummy load with the token ids of the tokenizer in use.
        generation_defaults: the model's generation_config.json, {} without one.
        max_seq_len: longest sequence the model was made for, in tokens.
    """

    folder: Path | None
    hub_config: dict[str, Any]
    prompts: PromptBuilder
    generation_defaults: Mapping[str, Any]
    stop_token_ids: tuple[int, ...]
    pad_token_id: int
    max_seq_len: int

    @property
    def checkpoint_dtype(self) -> str | None:
        text = text_config(self.hub_config)
        for part in (self.hub_config, text):
            for key in ("dtype", "torch_dtype"):
                if part.get(key):
                    return str(part[key])
        return None
