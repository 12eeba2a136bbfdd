"""A GGUF file of a model's true shape and random weights, for llama.cpp's speed without a download.

python benchmarks/side_by_side/random_gguf.py --config Qwen3-VL-4B-Instruct --type q4_0 \\
    --out qwen3-vl-4b-q4_0.gguf

Reads config.json and tokenizer.json of a Qwen3 or Qwen3-VL folder and writes the text model, with
the types that `llama-quantize` gives each tensor: norms stay float32, and beside q4_0 the output
projection (with tied embeddings, the embedding) is q6_K. Needs numpy and the package `gguf`.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.side_by_side.foreign import main
from qwencli.errors import (
    BenchError,
    MissingDependencyError,
    ModelFileError,
    OutputError,
    UnsupportedModeError,
)
from qwencli.models.config_values import read_json_object
from qwencli.models.folder import read_config
from qwencli.models.shape_reader import read_shape
from qwencli.models.shapes import ModelShape, TextShape

ARCHITECTURES = {"qwen3": "qwen3", "qwen3_vl": "qwen3vl"}
FILE_TYPES = {"bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0", "q4_0": "MOSTLY_Q4_0"}
# Of any random values, repeated: nothing on the way to the answer's speed depends on them.
POOL_VALUES = 1 << 21
STANDARD_DEVIATION = 0.02


def script(arguments: Sequence[str]) -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="a folder of transformers'")
    parser.add_argument("--type", choices=list(FILE_TYPES), required=True)
    parser.add_argument("--out", type=Path, required=True, help="a new file")
    said = parser.parse_args(arguments)
    try:
        import gguf
    except ImportError as error:
        raise MissingDependencyError(f"gguf does not load: {error}", "pip install gguf") from error
    if said.out.exists():
        raise BenchError(f"{said.out} is there already", "give a new --out")
    shape = read_shape(read_config(said.config), str(said.config / "config.json"))
    check(shape, said.config)
    vocabulary = read_vocabulary(said.config / "tokenizer.json", shape.text.vocab_size)
    beside = said.out.with_name(said.out.name + ".new")
    writer = gguf.GGUFWriter(beside, ARCHITECTURES[shape.model_type])
    writer.add_name(said.config.resolve().name)
    writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[said.type]])
    add_sizes(writer, shape)
    add_vocabulary(writer, vocabulary)
    try:
        write_tensors(writer, shape.text, said.type)
        writer.close()
        beside.replace(said.out)
    except OSError as error:
        raise OutputError(f"{said.out} cannot be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
    print(f"{said.out}: {said.out.stat().st_size / 1e9:.2f} GB")


def check(shape: ModelShape, folder: Path) -> None:
    """Raises:
    UnsupportedModeError: it is not a dense Qwen3 or Qwen3-VL, or its rope is scaled.
    """
    known = ", ".join(ARCHITECTURES)
    if shape.model_type not in ARCHITECTURES:
        raise UnsupportedModeError(f"{folder}: {shape.model_type} is not one of {known}")
    if shape.text.rope.scaling != "default":
        raise UnsupportedModeError(f"{folder}: rope of type {shape.text.rope.scaling} is not known")


def tensors(text: TextShape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes, rows first as in transformers, in the file's order."""
    hidden, wide = text.hidden_size, text.intermediate_size
    queries, keys = text.num_heads * text.head_dim, text.num_kv_heads * text.head_dim
    layer = {
        "attn_norm": (hidden,),
        "attn_q": (queries, hidden),
        "attn_k": (keys, hidden),
        "attn_v": (keys, hidden),
        "attn_q_norm": (text.head_dim,),
        "attn_k_norm": (text.head_dim,),
        "attn_output": (hidden, queries),
        "ffn_norm": (hidden,),
        "ffn_gate": (wide, hidden),
        "ffn_up": (wide, hidden),
        "ffn_down": (hidden, wide),
    }
    yield "token_embd.weight", (text.vocab_size, hidden)
    for index in range(text.num_layers):
        for name, shape in layer.items():
            yield f"blk.{index}.{name}.weight", shape
    yield "output_norm.weight", (hidden,)
    if not text.tied_head:
        yield "output.weight", (text.vocab_size, hidden)


def type_of(name: str, shape: tuple[int, ...], wanted: str, *, tied: bool) -> str:
    """What `llama-quantize` makes of a tensor, by gguf's names of types."""
    if len(shape) == 1:
        return "F32"
    if wanted == "q4_0" and name == ("token_embd.weight" if tied else "output.weight"):
        return "Q8_0" if shape[-1] % 256 else "Q6_K"
    return wanted.upper()


def write_tensors(writer: Any, text: TextShape, wanted: str) -> None:
    """One at a time, so that memory holds no more than the largest."""
    import gguf
    import numpy as np

    kinds = {}
    for name, shape in tensors(text):
        kind = gguf.GGMLQuantizationType[type_of(name, shape, wanted, tied=text.tied_head)]
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        if shape[-1] % block:
            raise UnsupportedModeError(
                f"{name}: rows of {shape[-1]} do not divide into {kind.name}'s blocks of {block}",
                "try --type bf16",
            )
        size = prod(shape) // block * block_bytes
        writer.add_tensor_info(name, shape, np.dtype(np.float32), size, raw_dtype=kind)
        kinds[name] = kind, size
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    pools = {kind: random_pool(kind) for kind in {kind for kind, _ in kinds.values()}}
    for kind, size in kinds.values():
        writer.write_tensor_data(np.resize(pools[kind], size))


def random_pool(kind: Any) -> Any:
    """Bytes of POOL_VALUES values: normal ones, but 1 in float32, which only norms have."""
    import gguf
    import numpy as np

    random = np.random.default_rng(0)
    if kind == gguf.GGMLQuantizationType.F32:
        return np.ones(POOL_VALUES, np.float32).view(np.uint8)
    if kind == gguf.GGMLQuantizationType.Q6_K:
        return _random_q6_k(random)
    values = random.standard_normal(POOL_VALUES, np.float32) * np.float32(STANDARD_DEVIATION)
    return gguf.quantize(values, kind).view(np.uint8).reshape(-1)


def _random_q6_k(random: Any) -> Any:
    """gguf reads this type and does not make it: 192 bytes of 6-bit codes, 16 scales, their own."""
    import numpy as np

    blocks = random.integers(0, 256, (POOL_VALUES // 256, 210), np.uint8)
    blocks[:, 192:208] = random.integers(64, 128, (len(blocks), 16), np.uint8)
    # Codes are even from -32 to 31 (18.5 their standard deviation), scales 96 on average.
    own = np.float16(STANDARD_DEVIATION / 18.5 / 96)
    blocks[:, 208:] = np.frombuffer(own.tobytes(), np.uint8)
    return blocks.reshape(-1)


def add_sizes(writer: Any, shape: ModelShape) -> None:
    text = shape.text
    writer.add_context_length(text.max_position_embeddings)
    writer.add_embedding_length(text.hidden_size)
    writer.add_block_count(text.num_layers)
    writer.add_feed_forward_length(text.intermediate_size)
    writer.add_head_count(text.num_heads)
    writer.add_head_count_kv(text.num_kv_heads)
    writer.add_key_length(text.head_dim)
    writer.add_value_length(text.head_dim)
    writer.add_layer_norm_rms_eps(text.rms_norm_eps)
    writer.add_rope_freq_base(text.rope.theta)
    if shape.vision is not None:
        writer.add_rope_dimension_sections([*(text.rope.sections or ()), 0])
        writer.add_num_deepstack_layers(len(shape.vision.deepstack_layers))


def read_vocabulary(path: Path, size: int) -> dict[str, Any]:
    """`tokens` by number, whether each is a `special` one, and the `merges` ("a b").

    Raises:
        ModelFileError: it cannot be read, is no tokenizer.json of byte pairs, or has more than
            `size` tokens.
    """
    stored = read_json_object(path)
    try:
        named = {number: token for token, number in stored["model"]["vocab"].items()}
        special = {int(each["id"]): bool(each["special"]) for each in stored["added_tokens"]}
        named |= {int(each["id"]): str(each["content"]) for each in stored["added_tokens"]}
        pairs = stored["model"]["merges"]
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in pairs]
        most = max(named)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelFileError(
            f"{path}: is no tokenizer.json of byte pairs", "download it again"
        ) from error
    if most >= size:
        raise ModelFileError(f"{path}: has token {most}, config.json no more than {size}")
    # Models have more rows than tokens.
    tokens = [named.get(number, f"[PAD{number}]") for number in range(size)]
    return {"tokens": tokens, "named": named, "special": special, "merges": merges}


def add_vocabulary(writer: Any, vocabulary: Mapping[str, Any]) -> None:
    import gguf

    def kind(number: int) -> Any:
        if number not in vocabulary["named"]:
            return gguf.TokenType.UNUSED
        special = vocabulary["special"].get(number)
        if special is None:
            return gguf.TokenType.NORMAL
        return gguf.TokenType.CONTROL if special else gguf.TokenType.USER_DEFINED

    tokens = vocabulary["tokens"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([kind(number) for number in range(len(tokens))])
    writer.add_token_merges(vocabulary["merges"])
    writer.add_add_bos_token(False)
    for token, add in (
        ("<|im_end|>", writer.add_eos_token_id),
        ("<|endoftext|>", writer.add_bos_token_id),
        ("<|endoftext|>", writer.add_pad_token_id),
    ):
        if token in tokens:
            add(tokens.index(token))


if __name__ == "__main__":
    raise SystemExit(main(script))
