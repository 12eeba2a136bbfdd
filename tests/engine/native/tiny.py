"""Tiny random models of every family: their config.json contents, drawn by hypothesis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

IMAGE, VIDEO, START, END = 290, 291, 292, 293
VOCAB = 301
FAMILIES = ("qwen3_vl", "qwen2_5_vl", "qwen2_vl", "qwen3", "qwen2")
SPARSE = ("qwen3_vl_moe", "qwen3_moe")
PATCH, MERGE, FRAMES = 4, 2, 2


@dataclass(frozen=True)
class Case:
    """What is not left to chance: together the cases have each of these at least once.

    Args:
        groups: query heads to a key/value head. video: what the first picture is.
    """

    batch: int
    kv_heads: int
    groups: int
    head_dim: int
    tied: bool
    video: bool


CASES = (
    Case(batch=1, kv_heads=1, groups=3, head_dim=128, tied=True, video=True),
    Case(batch=2, kv_heads=2, groups=2, head_dim=64, tied=False, video=False),
    Case(batch=3, kv_heads=3, groups=1, head_dim=128, tied=True, video=False),
    Case(batch=4, kv_heads=1, groups=5, head_dim=64, tied=False, video=True),
)


@st.composite
def text_configs(draw: st.DrawFn, family: str, case: Case) -> dict[str, Any]:
    kv_heads, head_dim = case.kv_heads, case.head_dim
    heads = kv_heads * case.groups
    own_head_dim = family.startswith("qwen3")
    config: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": draw(st.sampled_from((96, 160))) if own_head_dim else heads * head_dim,
        "intermediate_size": draw(st.sampled_from((72, 136))),
        "num_hidden_layers": draw(st.integers(2, 4)),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 2048,
        "rms_norm_eps": draw(st.sampled_from((1e-6, 1e-5))),
    }
    if own_head_dim:
        config["head_dim"] = head_dim
        config["attention_bias"] = draw(st.booleans())
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": draw(st.sampled_from((1e4, 5e6)))}
    if family in SPARSE:
        config |= draw(experts(config["num_hidden_layers"], family))
    if "_vl" in family:
        first = draw(st.sampled_from((8, 12)))
        rest = head_dim // 2 - first
        rope["mrope_section"] = [first, rest // 2, rest - rest // 2]
        if family.startswith("qwen3_vl"):
            rope["mrope_section"] = [head_dim // 2 - 2 * (head_dim // 6), *[head_dim // 6] * 2]
            rope["mrope_interleaved"] = True
    config["rope_parameters"] = rope
    return config


@st.composite
def experts(draw: st.DrawFn, layers: int, family: str) -> dict[str, Any]:
    """Some layers without experts, and as many experts as a token takes or more."""
    count = draw(st.sampled_from((6, 4, 1)))
    config: dict[str, Any] = {
        "num_experts": count,
        "num_experts_per_tok": min(count, draw(st.sampled_from((2, 4, 1)))),
        "moe_intermediate_size": draw(st.sampled_from((24, 48, 80))),
        "mlp_only_layers": draw(st.sampled_from(([], [0]))),
        "decoder_sparse_step": draw(st.sampled_from((1, 1, 2))),
    }
    if family == "qwen3_moe":
        config["norm_topk_prob"] = draw(st.booleans())
    return config


@st.composite
def vision_configs(draw: st.DrawFn, family: str, text_hidden: int) -> dict[str, Any]:
    heads = draw(st.sampled_from((1, 2, 3)))
    width = heads * draw(st.sampled_from((16, 24)))
    depth = draw(st.integers(2, 4))
    config: dict[str, Any] = {
        "depth": depth,
        "num_heads": heads,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": FRAMES,
        "in_channels": 3,
    }
    if family == "qwen2_vl":
        return config | {"embed_dim": width, "hidden_size": text_hidden, "mlp_ratio": 2}
    config |= {
        "hidden_size": width,
        "out_hidden_size": text_hidden,
        "intermediate_size": 2 * width + 4,
    }
    some_layers = st.lists(st.integers(0, depth - 1), unique=True, min_size=1, max_size=2)
    if family.startswith("qwen3_vl"):
        config["num_position_embeddings"] = draw(st.sampled_from((25, 64)))
        config["deepstack_visual_indexes"] = sorted(draw(some_layers))
    else:
        config["window_size"] = draw(st.sampled_from((2, 3))) * PATCH * MERGE
        config["fullatt_block_indexes"] = sorted(draw(some_layers))
        config["tokens_per_second"] = draw(st.sampled_from((1, 2, 4)))
    return config


@st.composite
def configs(draw: st.DrawFn, family: str, case: Case) -> dict[str, Any]:
    """Contents of a config.json."""
    text = draw(text_configs(family, case))
    tied = case.tied
    if "_vl" not in family:
        return text | {"model_type": family, "tie_word_embeddings": tied}
    return {
        "model_type": family,
        "text_config": text,
        "vision_config": draw(vision_configs(family, text["hidden_size"])),
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "vision_start_token_id": START,
        "vision_end_token_id": END,
        "tie_word_embeddings": tied,
    }


@dataclass(frozen=True)
class Picture:
    grid: tuple[int, int, int]
    video: bool
    seconds: float


@dataclass(frozen=True)
class Row:
    """One prompt: runs of text around pictures (one more run than pictures)."""

    texts: tuple[tuple[int, ...], ...]
    pictures: tuple[Picture, ...]

    def ids(self, split_frames: bool) -> list[int]:
        ids = list(self.texts[0])
        for picture, text in zip(self.pictures, self.texts[1:], strict=True):
            t, h, w = picture.grid
            frames = t if picture.video and split_frames else 1
            for frame in range(frames):
                tokens = t * h * w // MERGE**2 // frames
                ids += [7 + frame, START, *[VIDEO if picture.video else IMAGE] * tokens, END]
            ids += text
        return ids


@st.composite
def rows(draw: st.DrawFn, count: int, first_is_video: bool) -> Row:
    """A prompt with `count` pictures and videos of different sizes."""
    sides = st.integers(1, 5).map(lambda n: n * MERGE)
    found: list[Picture] = []
    for _ in range(count):
        video = draw(st.booleans()) if found else first_is_video
        grid = (draw(st.integers(1, 3)) if video else 1, draw(sides), draw(sides))
        found.append(Picture(grid, video, draw(st.sampled_from((1.0, 2.0, 3.0)))))
    text = st.lists(st.integers(0, 280), min_size=1, max_size=9).map(tuple)
    return Row(tuple(draw(text) for _ in range(len(found) + 1)), tuple(found))


@st.composite
def batches(draw: st.DrawFn, family: str, case: Case) -> list[Row]:
    """`case.batch` prompts of different lengths, so that all but one are padded on the left.

    With a vision family the first has two pictures, and the others none to three.
    """
    vision = "_vl" in family
    drawn: list[Row] = []
    for index in range(case.batch):
        count = 2 if index == 0 else draw(st.integers(0, 3))
        row = draw(rows(count if vision else 0, case.video))
        while len(row.ids(False)) in {len(other.ids(False)) for other in drawn}:
            row = Row((row.texts[0] + (5,), *row.texts[1:]), row.pictures)
        drawn.append(row)
    return drawn
