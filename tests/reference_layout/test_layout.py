"""A published model's own files, its true widths and random weights, through both engines.

The depth alone is cut, so that it fits a small machine; the depth is what the tests on tiny models
vary. Weights are written by transformers in the layout it saves.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qwencli.config import EngineName, SamplingOptions
from qwencli.engine.factory import create_engine
from qwencli.engine.frontend.model_files import open_model
from qwencli.engine.hf.load_model import FAMILIES, build_config
from qwencli.messages import GenerationRequest, TextPart, text_message, user_message
from qwencli.models.families import FAMILIES as READ
from qwencli.models.folder import check_folder
from tests.checkpoints import engine_config, film, picture
from tests.engine.frontend.tiny_folder import tiny_tokenizer_json

# As many as one layer with attention is among, of a model with gated delta nets.
TEXT_LAYERS, VISION_LAYERS = 4, 4
CUT = {"deepstack_visual_indexes": [0, 1, 3], "fullatt_block_indexes": [1, 3]}
STEPS = 16


def cut(config: dict[str, Any]) -> dict[str, Any]:
    text = config.get("text_config", config)
    text |= {"num_hidden_layers": TEXT_LAYERS, "max_window_layers": TEXT_LAYERS}
    if "layer_types" in text:
        text |= {"layer_types": text["layer_types"][:TEXT_LAYERS]}
    vision = config.get("vision_config")
    if vision is not None:
        vision |= {"depth": VISION_LAYERS}
        vision |= {key: value for key, value in CUT.items() if key in vision}
    return config


@pytest.fixture(scope="session")
def folder(published: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The published files with a cut config.json and random bfloat16 weights."""
    import transformers

    made = tmp_path_factory.mktemp("layout")
    config = cut(json.loads((published / "config.json").read_text(encoding="utf-8")))
    torch.manual_seed(0)
    model_class = getattr(transformers, FAMILIES[config["model_type"]].model_class)
    model = model_class(build_config(config)).to(torch.bfloat16)
    model.save_pretrained(made, max_shard_size="500MB")
    for file in published.iterdir():
        shutil.copyfile(file, made / file.name)
    (made / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if not (made / "tokenizer.json").exists():
        write_tokenizer(made)
    return made


def write_tokenizer(folder: Path) -> None:
    """Words of a tiny vocabulary, and the tokens that tokenizer_config.json names, at their ids."""
    named = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    added = {int(id_): token for id_, token in named["added_tokens_decoder"].items()}
    said = json.loads(tiny_tokenizer_json())
    words = said["model"]["vocab"]
    words |= {f"unused {id_}": id_ for id_ in range(len(words), min(added))}
    said["added_tokens"] = [{"id": id_, **added[id_]} for id_ in sorted(added)]
    (folder / "tokenizer.json").write_text(json.dumps(said), encoding="utf-8")


def request(folder: Path) -> GenerationRequest:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    shown = (picture(200, 120), film(4, 96, 64)) if READ[config["model_type"]].vision else ()
    return GenerationRequest(
        (text_message("system", "Be brief."), user_message("What is shown? 日本語 🙂", shown)),
        SamplingOptions(do_sample=False, max_new_tokens=STEPS),
        ignore_eos=True,
    )


def test_the_folder_is_whole_and_sharded(folder: Path) -> None:
    check_folder(folder)
    assert (folder / "model.safetensors.index.json").is_file()


def test_both_engines_agree(folder: Path) -> None:
    bounds = {"max_pixels": 70_000, "max_seq_len": 2048}
    asked = request(folder)
    tokens, scored = [], []
    for name in (EngineName.TRANSFORMERS, EngineName.NATIVE):
        with create_engine(engine_config(folder, engine=name, **bounds)) as engine:
            scored.append(np.stack(list(engine.log_probs("Some text to score. 日本語 🙂", 24))))
            tokens.append(engine.generate(asked).token_ids)
    np.testing.assert_allclose(scored[1], scored[0], atol=1e-4, rtol=1e-4)
    assert tokens[0] == tokens[1]
    assert len(set(tokens[0])) > 1


def test_ids_equal_the_published_tokenizers(folder: Path) -> None:
    import transformers

    source = folder / "chat_template.jinja"
    if source.is_file():
        template = source.read_text(encoding="utf-8")
    else:
        source = folder / "chat_template.json"
        template = json.loads(source.read_text(encoding="utf-8"))["chat_template"]
    theirs = transformers.AutoTokenizer.from_pretrained(folder).apply_chat_template(
        [
            {
                "role": message.role,
                "content": [
                    {"type": "text", "text": part.text}
                    for part in message.parts
                    if isinstance(part, TextPart)
                ],
            }
            for message in request(folder).messages
        ],
        chat_template=template,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=False,
    )
    text_alone = tuple(
        text_message(
            message.role, "".join(p.text for p in message.parts if isinstance(p, TextPart))
        )
        for message in request(folder).messages
    )
    config = engine_config(folder, engine=EngineName.NATIVE)
    np.testing.assert_array_equal(open_model(config).prompts.build(text_alone).input_ids, theirs)
