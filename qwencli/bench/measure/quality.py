"""Whether a cell is right, beside how fast it is: exact captions of the held-out pictures."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qwencli.bench.measure.heldout import MAX_NEW_TOKENS, PROMPT, heldout
from qwencli.config import LoadFormat, ModelSource, ModelSpec, SamplingOptions
from qwencli.engine.protocol import Engine
from qwencli.messages import GenerationRequest, user_message

Row = dict[str, Any]
RawRow = Mapping[str, str]

# A mode that compiles for each picture's size would take hours over them; then fewer count.
MOST_S = 20.0


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
