"""Whether a cell's answers are right: exact captions, and divergence from the unquantized model.

The bundled model is asked for the captions of shipped held-out pictures. They are files, not a
renderer: exact rates of two campaigns can be compared only over equal pictures, and every version
of Pillow draws its own digits.

Other models are held against the same model unquantized, by the mean Kullback-Leibler divergence.
The reference is the transformers engine without quantization (bf16 on a GPU, float32 on the CPU),
read once a model by a process of its own. Fixed passages are fed token by token, whatever either
model would have said. Of each position the reference's likeliest TOP tokens are kept and the rest
counts as one outcome, which makes the figure a lower bound (data processing inequality; Cover and
Thomas, "Elements of Information Theory", 2.8), and a close one while TOP hold most of the mass.
"""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwencli.bench.storage.campaign_files import REFERENCE, read_file
from qwencli.config import LoadFormat, ModelSource, ModelSpec, SamplingOptions
from qwencli.engine.protocol import Engine
from qwencli.messages import GenerationRequest, user_message

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from qwencli.engine.base_engine import BaseEngine

    LogProbs = npt.NDArray[np.float32]


FOLDER = Path(__file__).parents[1] / "assets" / "heldout"
# What the bundled model answers with the caption that the files hold.
PROMPT = "Describe this image."
# The longest caption has fewer tokens; a model that rambles is wrong either way.
MAX_NEW_TOKENS = 96
Row = dict[str, Any]
RawRow = Mapping[str, str]

# A mode that compiles for each picture's size would take hours over them; then fewer count.
MOST_S = 20.0
PASSAGES = Path(__file__).parents[1] / "assets" / "passages.txt"
TOP = 32
MOST_TOKENS = 64

# Token id -> log-probability of the reference, at one position.
Likeliest = Mapping[int, float]


def heldout(count: int) -> list[tuple[Path, str]]:
    """The first `count` pictures and captions, or as many as there are."""
    captions: dict[str, str] = json.loads((FOLDER / "captions.json").read_text(encoding="utf-8"))
    return [(FOLDER / name, caption) for name, caption in list(captions.items())[:count]]


def count_heldout() -> int:
    return len(heldout(1 << 30))


def captions_fit(model: ModelSpec, load_format: LoadFormat) -> bool:
    """Whether the model is the one that the held-out captions are those of."""
    return model.source is ModelSource.BUNDLED and load_format is LoadFormat.AUTO


def has_captions(engine: Engine) -> bool:
    """The same of an engine's model."""
    return captions_fit(engine.config.model, engine.config.load_format)


def caption_rows(engine: Engine, samples: int) -> Iterator[Row]:
    """One row of quality.csv a picture: greedy, ended by the model itself."""
    from qwencli.engine.frontend.images import open_image

    begun = time.monotonic()
    for path, expected in heldout(samples):
        if time.monotonic() - begun > MOST_S:
            return
        request = GenerationRequest(
            messages=(user_message(PROMPT, (open_image(path),)),),
            sampling=SamplingOptions(do_sample=False, max_new_tokens=MAX_NEW_TOKENS),
        )
        answer = engine.generate(request).text.strip()
        yield {
            "sample": path.stem,
            "exact": int(answer == expected),
            "expected": expected,
            "answer": answer,
        }


def quality_columns(rows: Sequence[RawRow]) -> dict[str, float | int | None]:
    """The columns of cells.csv, from the rows of one cell in quality.csv."""
    exact = [int(row["exact"]) for row in rows if row["exact"]]
    kl = [(float(row["mean_kl"]), int(row["positions"])) for row in rows if row["mean_kl"]]
    positions = sum(count for _, count in kl)
    return {
        "exact_match_percent": 100 * sum(exact) / len(exact) if exact else None,
        "mean_kl": sum(mean * count for mean, count in kl) / positions if positions else None,
        "quality_samples": len(exact) or len(kl) or None,
    }


def wants_reference(model: ModelSpec, load_format: LoadFormat) -> bool:
    """Whether the model's quality is told by divergence: real weights that are here, and not the
    bundled model's, which is told by its captions."""
    told_otherwise = (ModelSource.BUNDLED, ModelSource.REMOTE)
    return model.source not in told_otherwise and load_format is LoadFormat.AUTO


def passages() -> list[str]:
    return [text.strip() for text in PASSAGES.read_text(encoding="utf-8").split("\n\n")]


def reference_rows(engine: BaseEngine, model: str) -> Iterator[Row]:
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


def divergence_rows(engine: BaseEngine, reference: Path, model: str) -> Iterator[Row]:
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
