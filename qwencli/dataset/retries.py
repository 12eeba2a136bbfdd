"""What is asked instead when an answer has a fault: a reminder, other sampling, more tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from qwencli.config import SAMPLING_BOUNDS, SamplingOptions, SamplingParams
from qwencli.dataset.guards import Fault, FaultKind
from qwencli.dataset.languages import LANGUAGES

_WARMEST, _COOLEST_RETRY, _MOST_PENALTY = 1.5, 0.7, 1.3
DEFAULT_RETRIES = 2


@dataclass(frozen=True)
class Change:
    """How an attempt after a fault differs from the first.

    Args:
        warmer: added to the temperature for each attempt: another draw, and a wider one.
        repetition_penalty: added for each attempt.
        longer: the longest answer is multiplied by this for each attempt.
        reminder: a sentence after the prompt; `{language}` and `{words}` are filled in.
        advice: what the user may change where no attempt was good.
    """

    warmer: float = 0.2
    repetition_penalty: float = 0.0
    longer: float = 1.0
    reminder: str = ""
    advice: str = "another --prompt, --seed or --model"


_ALONE = "Answer with the caption alone, without an introduction or a closing remark."
_LONGER = "more --max-new-tokens"
CHANGES: Mapping[FaultKind, Change] = {
    FaultKind.EMPTY: Change(),
    FaultKind.THINKING: Change(longer=2.0, advice=_LONGER),
    FaultKind.REFUSAL: Change(reminder="Describe only what can be seen in the picture."),
    FaultKind.LOOP: Change(repetition_penalty=0.08),
    FaultKind.PREAMBLE: Change(reminder=_ALONE),
    FaultKind.CLOSING: Change(reminder=_ALONE),
    FaultKind.LANGUAGE: Change(reminder="Answer in {language}."),
    FaultKind.TRUNCATED: Change(warmer=0.0, longer=2.0, advice=_LONGER),
    FaultKind.TOO_LONG: Change(
        reminder="Use short sentences.", advice="a larger --max-caption-tokens"
    ),
    FaultKind.BANNED: Change(reminder="Do not use these words: {words}."),
    FaultKind.SCHEMA: Change(longer=1.5),
}


@dataclass(frozen=True)
class Retry:
    """Another attempt: with what sampling, and what is said after the prompt."""

    sampling: SamplingOptions
    reminder: str = ""

    def with_reminder(self, prompt: str) -> str:
        return f"{prompt.rstrip()} {self.reminder}" if self.reminder else prompt


def retry_of(
    fault: Fault,
    attempt: int,
    sampling: SamplingOptions,
    *,
    seed: int,
    ban: Sequence[str] = (),
    language: str | None = None,
) -> Retry:
    """What to try after `fault`.

    Args:
        attempt: 1 for the first after the first answer.
        sampling: of the first answer.
        seed: of this picture; another one is made of it for each attempt.
        ban: the run's banned words. language: see `Guards`; both for the reminder.
    """
    change = CHANGES[fault.kind]
    fields: dict[str, object] = {"seed": (seed + 7919 * attempt) % 2**32}
    if change.warmer:
        base = _COOLEST_RETRY if not sampling.temperature else sampling.temperature
        if sampling.do_sample is False:
            base = _COOLEST_RETRY - change.warmer
        fields |= {
            "temperature": round(min(max(base, _WARMEST), base + change.warmer * attempt), 3),
            "do_sample": True,
        }
    if change.repetition_penalty:
        base = sampling.repetition_penalty or SamplingParams.repetition_penalty
        penalty = base + change.repetition_penalty * attempt
        fields["repetition_penalty"] = round(max(base, min(penalty, _MOST_PENALTY)), 3)
    if change.longer != 1.0:
        length = sampling.max_new_tokens or SamplingParams.max_new_tokens
        longest = SAMPLING_BOUNDS["max_new_tokens"].high
        fields["max_new_tokens"] = int(min(length * change.longer**attempt, longest))
    name = LANGUAGES[language].name if language in LANGUAGES else "the language of this request"
    return Retry(
        replace(sampling, **fields),  # type: ignore[arg-type]
        change.reminder.format(language=name, words=", ".join(ban)),
    )
