"""How far a cell's model is from the same model unquantized: the mean Kullback-Leibler divergence.

The reference is the transformers engine without quantization (bf16 on a GPU, float32 on the CPU),
read once a model by a process of its own. Fixed passages are fed token by token, whatever either
model would have said. Of each position the reference's likeliest TOP tokens are kept and the rest
counts as one outcome, which makes the figure a lower bound (data processing inequality; Cover and
Thomas, "Elements of Information Theory", 2.8), and a close one while TOP hold most of the mass.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwencli.bench.storage.campaign_files import REFERENCE, read_file
from qwencli.config import LoadFormat, ModelSource, ModelSpec

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from qwencli.engine.base_engine import LocalEngine

    LogProbs = npt.NDArray[np.float32]

PASSAGES = Path(__file__).parents[1] / "assets" / "passages.txt"
TOP = 32
MOST_TOKENS = 64

Row = dict[str, Any]
# Token id -> log-probability of the reference, at one position.
Likeliest = Mapping[int, float]


def wants_reference(model: ModelSpec, load_format: LoadFormat) -> bool:
    """Whether the model's quality is told by divergence: real weights that are not the bundled
    model's, which is told by its captions."""
    return model.source is not ModelSource.BUNDLED and load_format is LoadFormat.AUTO


def passages() -> list[str]:
    return [text.strip() for text in PASSAGES.read_text(encoding="utf-8").split("\n\n")]


def reference_rows(engine: LocalEngine, model: str) -> Iterator[Row]:
    """Rows of reference.csv: the likeliest tokens after each token of each passage."""
    for number, text in enumerate(passages()):
        for position, log_probs in enumerate(engine.log_probs(text, MOST_TOKENS)):
            for token in log_probs.argsort()[: -TOP - 1 : -1]:
                yield {
                    "model": model,
                    "passage": number,
                    "position": position,
                    "token_id": int(token),
                    "log_prob": float(log_probs[token]),
                }


def divergence_rows(engine: LocalEngine, reference: Path, model: str) -> Iterator[Row]:
    """Rows of quality.csv: the mean over each passage, in nats a token."""
    found = read_reference(reference, model)
    for number, text in enumerate(passages()):
        values = [
            divergence(found[number, position], log_probs)
            for position, log_probs in enumerate(engine.log_probs(text, MOST_TOKENS))
        ]
        yield {
            "sample": f"passage-{number}",
            "positions": len(values),
            "mean_kl": math.fsum(values) / len(values),
        }


def read_reference(file: Path, model: str) -> dict[tuple[int, int], dict[int, float]]:
    """(passage, position) -> the likeliest tokens."""
    found: dict[tuple[int, int], dict[int, float]] = defaultdict(dict)
    for row in read_file(file.parent, REFERENCE):
        if row["model"] == model:
            place = int(row["passage"]), int(row["position"])
            found[place][int(row["token_id"])] = float(row["log_prob"])
    return dict(found)


def divergence(reference: Likeliest, log_probs: LogProbs | Sequence[float]) -> float:
    """KL(reference || cell) over the kept tokens and the rest as one outcome, nats; not below 0."""
    total, kept, other = 0.0, 0.0, 0.0
    for token, log_p in reference.items():
        p, log_q = math.exp(log_p), float(log_probs[token])
        total += p * (log_p - log_q)
        kept, other = kept + p, other + math.exp(log_q)
    rest, other_rest = 1.0 - kept, max(1.0 - other, 1e-12)
    if rest > 1e-12:
        total += rest * math.log(rest / other_rest)
    return max(total, 0.0)
