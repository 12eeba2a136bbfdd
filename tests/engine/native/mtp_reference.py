"""The head of Qwen3.5, 3.6 and 3.8 that drafts further tokens (MTP, multi-token prediction), to be
read: one sequence, no cache, every draft from the beginning.

transformers ignores these weights. Source: vLLM's `qwen3_5_mtp.py` (the head), `qwen3_next.py`
(what the model hands over, and the layer) and `v1/spec_decode/eagle.py` (which token stands beside
which hidden state); SGLang's `qwen3_5_mtp.py` agrees. What they do:

- Item i of the head is made of the hidden state of token i, *behind* the model's last norm, and of
  the embedding of token i + 1, each normed again (`pre_fc_norm_hidden`, `pre_fc_norm_embedding`):
  `fc` makes one vector of [embedding | hidden state]. For a token of a picture the embedding is the
  picture's feature.
- Its rotary position is that of token i. It sees items 0 to i.
- One layer of the model's own kind with full attention follows, then `mtp.norm`. What comes out has
  two uses: the model's own head makes logits of token i + 2 of it, and it is the hidden state of
  item i + 1 where the model has none, which is what a second draft begins with.
- All these norms are zero-centred, as the model's others are.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

Tensor = torch.Tensor


class MtpReference:
    """The head over a state dict of a whole model, by the names of the checkpoint.

    Args:
        text: `text_config`.
    """

    def __init__(self, text: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
        self._text, self._weights = text, weights
        self._embedding = next(w for n, w in weights.items() if n.endswith("embed_tokens.weight"))
        self._lm_head = weights.get("lm_head.weight", self._embedding)

    def drafts(self, ids: list[int], hidden: Tensor, positions: Tensor, count: int) -> list[int]:
        """The `count` likeliest tokens after `ids` [S + 1], one after the other.

        Args:
            hidden: [S, H] of all tokens but the last, behind the model's last norm.
            positions: [3, S], rotary.
        """
        ids, drafted = list(ids), []
        for _ in range(count):
            out = self.forward(self._embedding[ids[1:]], hidden, positions)
            drafted.append(int(self.logits(out)[-1].argmax()))
            ids.append(drafted[-1])
            hidden = torch.cat((hidden, out[-1:]))
            positions = torch.cat((positions, positions[:, -1:] + 1), 1)
        return drafted

    def forward(self, embeds: Tensor, hidden: Tensor, positions: Tensor) -> Tensor:
        """Embeddings [S, H] of the next tokens and hidden states [S, H] -> [S, H]."""
        embeds = self._norm("mtp.pre_fc_norm_embedding", embeds)
        hidden = self._norm("mtp.pre_fc_norm_hidden", hidden)
        x = self._linear("mtp.fc", torch.cat((embeds, hidden), 1))
        x = x + self._attention(self._norm("mtp.layers.0.input_layernorm", x), positions)
        x = x + self._mlp(self._norm("mtp.layers.0.post_attention_layernorm", x))
        return self._norm("mtp.norm", x)

    def logits(self, out: Tensor) -> Tensor:
        return F.linear(out, self._lm_head)

    def _attention(self, x: Tensor, positions: Tensor) -> Tensor:
        at, dim = "mtp.layers.0.self_attn.", self._text["head_dim"]
        heads, kv_heads = self._text["num_attention_heads"], self._text["num_key_value_heads"]
        queries, gate = self._linear(at + "q_proj", x).view(len(x), heads, 2 * dim).chunk(2, -1)
        keys = self._linear(at + "k_proj", x).view(len(x), kv_heads, dim)
        values = self._linear(at + "v_proj", x).view(len(x), kv_heads, dim)
        queries = self._turned(self._norm(at + "q_norm", queries), positions)
        keys = self._turned(self._norm(at + "k_norm", keys), positions)
        keys, values = (each.repeat_interleave(heads // kv_heads, dim=1) for each in (keys, values))
        scores = torch.einsum("qhd,khd->hqk", queries, keys) / dim**0.5
        seen = torch.ones(len(x), len(x), dtype=torch.bool).tril()
        probs = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        mixed = torch.einsum("hqk,khd->qhd", probs, values) * gate.sigmoid()
        return self._linear(at + "o_proj", mixed.flatten(1))

    def _turned(self, x: Tensor, positions: Tensor) -> Tensor:
        """The first dimensions of heads [S, heads, D] turned by the three positions in turns."""
        rope = self._text["rope_parameters"]
        turning = int(x.shape[-1] * rope["partial_rotary_factor"])
        frequencies = rope["rope_theta"] ** -(torch.arange(0, turning, 2) / turning)
        axis = torch.zeros(turning // 2, dtype=torch.int64)
        for place, section in ((1, rope["mrope_section"][1]), (2, rope["mrope_section"][2])):
            axis[place : 3 * section : 3] = place
        angles = positions[axis].t().float() * frequencies  # [S, turning / 2]
        cos, sin = (part.repeat(1, 2)[:, None] for part in (angles.cos(), angles.sin()))
        turned, rest = x[..., :turning], x[..., turning:]
        one, other = turned.chunk(2, -1)
        return torch.cat((turned * cos + torch.cat((-other, one), -1) * sin, rest), -1)

    def _mlp(self, x: Tensor) -> Tensor:
        at = "mtp.layers.0.mlp."
        if "num_experts" not in self._text:
            return self._feed_forward(at, x)
        odds = self._linear(at + "gate", x).softmax(-1)
        weights, chosen = odds.topk(self._text["num_experts_per_tok"], -1)
        weights = weights / weights.sum(-1, keepdim=True)
        shared_share = self._linear(at + "shared_expert_gate", x).sigmoid()
        rows = []
        for row, own, ids in zip(x, weights, chosen, strict=True):
            taken = [
                share * self._expert(at, int(index), row)
                for share, index in zip(own, ids, strict=True)
            ]
            rows.append(sum(taken))
        return torch.stack(rows) + shared_share * self._feed_forward(at + "shared_expert.", x)

    def _expert(self, at: str, index: int, x: Tensor) -> Tensor:
        """By the tensors of all experts in one, or of each by itself: checkpoints have either."""
        both = self._weights.get(f"{at}experts.gate_up_proj")
        if both is None:
            return self._feed_forward(f"{at}experts.{index}.", x)
        gate, up = (both[index] @ x).chunk(2, -1)
        return self._weights[f"{at}experts.down_proj"][index] @ (F.silu(gate) * up)

    def _feed_forward(self, at: str, x: Tensor) -> Tensor:
        gate, up = self._linear(at + "gate_proj", x), self._linear(at + "up_proj", x)
        return self._linear(at + "down_proj", F.silu(gate) * up)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self._weights[name + ".weight"])

    def _norm(self, name: str, x: Tensor) -> Tensor:
        scaled = x / (x.pow(2).mean(-1, keepdim=True) + self._text["rms_norm_eps"]).sqrt()
        return scaled * (1 + self._weights[name + ".weight"])


def head_weights(
    text: Mapping[str, Any], generator: torch.Generator, apart: bool = False
) -> dict[str, Tensor]:
    """Random weights of a head, by the names of a checkpoint.

    Args:
        apart: a tensor for each expert, where there are experts.
    """
    hidden, dim = text["hidden_size"], text["head_dim"]
    queries, values = text["num_attention_heads"] * dim, text["num_key_value_heads"] * dim
    at = "mtp.layers.0."
    sizes: dict[str, tuple[int, ...]] = {
        "mtp.fc.weight": (hidden, 2 * hidden),
        **{f"mtp.{name}.weight": (hidden,) for name in ("norm", "pre_fc_norm_hidden")},
        "mtp.pre_fc_norm_embedding.weight": (hidden,),
        at + "input_layernorm.weight": (hidden,),
        at + "post_attention_layernorm.weight": (hidden,),
        at + "self_attn.q_proj.weight": (2 * queries, hidden),
        at + "self_attn.k_proj.weight": (values, hidden),
        at + "self_attn.v_proj.weight": (values, hidden),
        at + "self_attn.o_proj.weight": (hidden, queries),
        at + "self_attn.q_norm.weight": (dim,),
        at + "self_attn.k_norm.weight": (dim,),
    }

    def feed_forward(below: str, inner: int) -> dict[str, tuple[int, ...]]:
        ups = {f"{at}mlp.{below}{part}_proj.weight": (inner, hidden) for part in ("gate", "up")}
        return ups | {f"{at}mlp.{below}down_proj.weight": (hidden, inner)}

    if "num_experts" not in text:
        sizes |= feed_forward("", text["intermediate_size"])
    else:
        count, inner = text["num_experts"], text["moe_intermediate_size"]
        sizes[at + "mlp.gate.weight"] = (count, hidden)
        sizes[at + "mlp.shared_expert_gate.weight"] = (1, hidden)
        sizes |= feed_forward("shared_expert.", text["shared_expert_intermediate_size"])
        if apart:
            for index in range(count):
                sizes |= feed_forward(f"experts.{index}.", inner)
        else:
            sizes[at + "mlp.experts.gate_up_proj"] = (count, 2 * inner, hidden)
            sizes[at + "mlp.experts.down_proj"] = (count, hidden, inner)
    return {name: 0.12 * torch.randn(size, generator=generator) for name, size in sizes.items()}


def with_head(checkpoint: Path, folder: Path) -> Path:
    """The same model with a head that drafts: random, so that it is hardly ever right."""
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["text_config"]["mtp_num_hidden_layers"] = 1
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    head = head_weights(config["text_config"], torch.Generator().manual_seed(1))
    file = folder / "model.safetensors"
    save_file({**load_file(file), **{n: t.bfloat16() for n, t in head.items()}}, file)
    return folder
