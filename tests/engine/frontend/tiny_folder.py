"""A small model folder's text side in Qwen's layout, made in memory for the tests."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

CONTROL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
PLAIN_ADDED = ("<tool_call>", "<think>", "</think>")
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CORPUS = (
    "system\nuser\nassistant\nDescribe this image.\n\nA large red circle on the left, and a small "
    "blue star on the right.\n\n\nDon't you see it? I'll look... naïve café, 日本語 日本語 🙂🙂 \n"
    " \n     indented   text\twith\ttabs !?!\n (brackets) [more] 12 345 <|x|> <<|"
)


@cache
def tiny_tokenizer_json() -> str:
    fast = Tokenizer(BPE())
    fast.normalizer = normalizers.NFC()
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    fast.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=420,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    fast.train_from_iterator([_CORPUS] * 4, trainer)
    fast.add_special_tokens([AddedToken(token, normalized=False) for token in CONTROL])
    fast.add_tokens([AddedToken(token, normalized=False) for token in PLAIN_ADDED])
    return fast.to_str()


def tiny_tokenizer() -> Tokenizer:
    return Tokenizer.from_str(tiny_tokenizer_json())


def added_tokens_decoder() -> dict[str, dict[str, object]]:
    added = tiny_tokenizer().get_added_tokens_decoder()
    return {
        str(id_): {
            "content": token.content,
            "special": token.special,
            "normalized": False,
            "lstrip": False,
            "rstrip": False,
            "single_word": False,
        }
        for id_, token in added.items()
    }


def write_tiny_folder(folder: Path, *, template: str | None = None) -> Path:
    """tokenizer.json, tokenizer_config.json and, if given, chat_template.jinja."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tiny_tokenizer_json(), encoding="utf-8")
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "added_tokens_decoder": added_tokens_decoder(),
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "bos_token": None,
        "unk_token": None,
        "model_max_length": 32768,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return folder
