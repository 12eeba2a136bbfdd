"""What requests want of a model beside text, and whether it can: told before it is loaded.

Whatever has a model loaded asks here: commands, ComfyUI's nodes, workers on devices. Requests are
looked at once more when they come (`BaseEngine`, `PromptBuilder.build`), as a server's may.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from qwencli.capabilities import check_pictures, check_thinking
from qwencli.config import EngineConfig, LoadFormat, ModelSource, ModelSpec
from qwencli.models.families import can_see


@dataclass(frozen=True)
class Abilities:
    """
    Args:
        pictures: to look at pictures or videos.
        thoughts: to think before it answers.
    """

    pictures: bool = False
    thoughts: bool = False


class KnownModel(Protocol):
    """What a loaded engine or a server says of its model, see `Engine`."""

    @property
    def model_type(self) -> str | None: ...

    @property
    def can_think(self) -> bool | None: ...


def check_known(model: ModelSpec, wanted: Abilities) -> None:
    """Refuse what a model cannot do, as far as that is known before its files are here; nothing is
    of a server's model.

    Raises:
        UnsupportedModeError: it cannot do what is wanted.
    """
    if model.source is not ModelSource.REMOTE:
        _check(model.name, wanted, (model.hub_config or {}).get("model_type"))


def fetch_model(config: EngineConfig, wanted: Abilities) -> None:
    """Have a model's files here, and refuse what it cannot do before its weights are read.

    Nothing is known of a server's model: see `check_loaded`.

    Raises:
        UnsupportedModeError: it cannot do what is wanted.
        ModelFileError, DownloadError: its files are not usable, or not to be had.
    """
    from qwencli.models.builtin import bundled_folder
    from qwencli.models.folder import read_config
    from qwencli.models.resolve import dummy_config, locate

    model = config.model
    if model.source is ModelSource.REMOTE:
        return
    check_known(model, wanted)
    if config.load_format is LoadFormat.DUMMY:
        folder, hub_config = bundled_folder(), dummy_config(model)
    else:
        folder = locate(model, offline=config.offline, allow_pickle=config.allow_pickle)
        hub_config = read_config(folder)
    kind, thinks = hub_config.get("model_type"), None
    if wanted.thoughts:
        from qwencli.engine.frontend.chat_template import ChatTemplate
        from qwencli.engine.frontend.prompt import can_think

        thinks = can_think(ChatTemplate.from_folder(folder), as_parts=bool(can_see(kind)))
    _check(model.name, wanted, kind, thinks)


def check_loaded(model: str, known: KnownModel, wanted: Abilities) -> None:
    """The same of an engine that is loaded, or of a server: ours say what they know.

    Raises:
        UnsupportedModeError: its model cannot do what is wanted.
    """
    _check(model, wanted, known.model_type, known.can_think)


def _check(model: str, wanted: Abilities, kind: object, can_think: bool | None = None) -> None:
    check_pictures(model, can_see=can_see(kind), wanted=wanted.pictures)
    check_thinking(model, can_think=can_think, wanted=wanted.thoughts)
