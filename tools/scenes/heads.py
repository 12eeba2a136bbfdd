"""Training-only supervision: what each visual token should know about what stands on it.

Learning to ground words in pictures from scratch can stall for long; these linear read-outs of the
visual tokens end that. They are dropped after training and are no part of the model.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tools.scenes.batches import COLOR_NAMES, IGNORED
from tools.scenes.words import SHAPES, SIZES

PLACES = 9
DIGIT_CLASSES = 11
OBJECT_PARTS = (len(COLOR_NAMES), len(SHAPES), len(SIZES), PLACES)
NUMBER_PARTS = (DIGIT_CLASSES, DIGIT_CLASSES, DIGIT_CLASSES, PLACES)
# Nothing, the centre of an object, the centre of a printed number.
TOKEN_CLASSES = 3


class DenseHeads(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.token = nn.Linear(hidden, TOKEN_CLASSES)
        self.object = nn.Linear(hidden, sum(OBJECT_PARTS))
        self.number = nn.Linear(hidden, sum(NUMBER_PARTS))

    def loss(self, tokens: Tensor, objects: Tensor, numbers: Tensor) -> Tensor:
        """tokens [B, N, hidden]; labels [B, 4, 5] and [B, 5] as `batches` lays them out."""
        kinds = torch.zeros(tokens.shape[:2], dtype=torch.long, device=tokens.device)
        # A padding row writes class 0 to token 0 before the real rows write theirs.
        kinds.scatter_reduce_(
            1, objects[..., 0].clamp(min=0), (objects[..., 0] >= 0).long(), "amax"
        )
        number_token = numbers[:, :1]
        kinds.scatter_reduce_(1, number_token.clamp(min=0), 2 * (number_token >= 0).long(), "amax")
        kind_loss = F.cross_entropy(
            self.token(tokens).flatten(0, 1).float(),
            kinds.flatten(),
            weight=torch.tensor([0.2, 1.0, 1.0], device=tokens.device),
        )
        return (
            kind_loss
            + _parts_loss(self.object, tokens, objects, OBJECT_PARTS)
            + 0.5 * _parts_loss(self.number, tokens, numbers[:, None], NUMBER_PARTS)
        )


def _parts_loss(head: nn.Linear, tokens: Tensor, labels: Tensor, parts: tuple[int, ...]) -> Tensor:
    """Sum over attributes of the cross entropy at the labelled tokens; labels [B, K, 1 + parts]."""
    where = labels[..., :1].clamp(min=0).expand(-1, -1, tokens.shape[-1])
    scores = head(tokens.gather(1, where)).flatten(0, 1).float().split(parts, -1)
    total = torch.zeros((), device=tokens.device)
    for index, score in enumerate(scores):
        target = labels[..., index + 1].flatten()
        count = (target != IGNORED).sum().clamp(min=1)
        total = (
            total + F.cross_entropy(score, target, ignore_index=IGNORED, reduction="sum") / count
        )
    return total
