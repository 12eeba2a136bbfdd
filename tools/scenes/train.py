"""Trains the bundled model `scenes`, or the small Qwen3.5 of the tests, from nothing.

    python -m tools.scenes.train --tokenizer qwencli/bundled/scenes --out OUT --max-seconds 480

OUT gets the weights and the log anew at every check, so that a run that is cut off is of use. The
data stream depends on the seed alone. The learning rate follows the elapsed time, so that it
always reaches its end; the number of steps therefore depends on the machine, and two runs agree
exactly only in their data and their start.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader

from tools.scenes.batches import Batch, Batches, DataPlan
from tools.scenes.device_batch import pixels, to_device
from tools.scenes.dialogue import Encoder
from tools.scenes.evaluate import HeldOut, HeldOutBatches, evaluate
from tools.scenes.export import SHAPES
from tools.scenes.heads import DenseHeads
from tools.scenes.hybrid import HybridShape, Qwen35, initialize_delta
from tools.scenes.model import ModelShape, Qwen3VL, initialize

DENSE_WEIGHT = 0.25
DRAFT_WEIGHT = 0.25
DRAFT_DEPTH = 3
EMA_DECAY = 0.998
CLIP = 1.0


def build(shape: ModelShape) -> Qwen3VL:
    return Qwen35(shape) if isinstance(shape, HybridShape) else Qwen3VL(shape)


class Trainer:
    """fp32 master weights and their average; the model itself computes in bf16 on a GPU."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.device = torch.device(options.device)
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.peak, self.max_seconds, self.seed = options.peak_lr, options.max_seconds, options.seed
        self.warm_up = options.warm_up_steps
        shape = SHAPES[options.model]()
        model = build(shape)
        initialize(model, options.seed)
        if isinstance(model, Qwen35):
            initialize_delta(model, torch.Generator().manual_seed(options.seed))
        torch.manual_seed(options.seed)
        heads = DenseHeads(shape.hidden)
        self.modules = torch.nn.ModuleDict({"net": model, "heads": heads}).to(self.device)
        self.masters = [p.detach().float().clone() for p in self.modules.parameters()]
        self.modules.to(self.dtype)
        self.parameters = list(self.modules.parameters())
        self.gradients = [torch.zeros_like(m) for m in self.masters]
        for parameter, master, gradient in zip(
            self.parameters, self.masters, self.gradients, strict=True
        ):
            parameter.grad = torch.zeros_like(parameter)
            master.grad = gradient
        self.average = [m.clone() for m in self.masters]
        matrices = [m for m in self.masters if m.ndim > 1]
        vectors = [m for m in self.masters if m.ndim <= 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}],
            lr=0.0,
            betas=(0.9, 0.98),
            fused=self.device.type == "cuda",
        )
        self.step = 0
        self.noise = torch.Generator(self.device).manual_seed(options.seed)
        if options.begin_with:
            self._begin_with(options.begin_with)
        if options.resume:
            self._resume(options.resume)
        self.first_step = self.step

    @property
    def model(self) -> Qwen3VL:
        model = self.modules["net"]
        assert isinstance(model, Qwen3VL)
        return model

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Of the answers, of the read-outs of visual tokens, of the drafts, where there are any."""
        pictures = [pixels(g, self.device, self.noise).to(self.dtype) for g in batch.pictures]
        tokens, deep = self.model.see(pictures)
        hidden = self.model.hidden(batch.ids, batch.positions, batch.image_index, tokens, deep)
        logits = self.model.logits(hidden.flatten(0, 1).index_select(0, batch.picked))
        losses = {"text": F.cross_entropy(logits.float(), batch.wanted)}
        if isinstance(self.model, Qwen35):
            # In turns with the pictures as they are and as token ids: engines differ there.
            seen = tokens if self.step % 2 else None
            losses["draft"] = torch.stack(draft_losses(self.model, hidden, batch, seen)).mean()
        if tokens is None:
            return losses
        sizes = [p.shape[2] * p.shape[3] // 1024 for p in pictures]
        heads = self.modules["heads"]
        dense = [
            heads.loss(part, group.object_labels, group.number_labels)
            for part, group in zip(tokens.split(sizes, 1), batch.pictures, strict=True)
        ]
        return losses | {"dense": torch.stack(dense).mean()}

    @torch.no_grad()
    def _update(self, progress: float) -> None:
        torch._foreach_copy_(self.gradients, [p.grad for p in self.parameters])
        torch._foreach_zero_([p.grad for p in self.parameters])
        torch.nn.utils.clip_grad_norm_(self.masters, CLIP)
        warm = min(1.0, (self.step - self.first_step + 1) / self.warm_up)
        for group in self.optimizer.param_groups:
            group["lr"] = (
                self.peak * warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))
            )
        self.optimizer.step()
        self.step += 1
        torch._foreach_copy_(self.parameters, self.masters)
        decay = min(EMA_DECAY, self.step / (self.step + 20))
        torch._foreach_lerp_(self.average, self.masters, 1 - decay)

    def train_step(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """One update; returns the losses without waiting for the device."""
        losses = self.losses(batch)
        weights = {"text": 1.0, "dense": DENSE_WEIGHT, "draft": DRAFT_WEIGHT}
        torch.stack([weights[name] * loss for name, loss in losses.items()]).sum().backward()
        self._update(progress)
        return {name: loss.detach() for name, loss in losses.items()}

    def averaged(self) -> Qwen3VL:
        """A copy of the model with the averaged weights, rounded as they will be shipped."""
        names = [name for name, _ in self.modules.named_parameters()]
        state = {
            name.removeprefix("net."): tensor.to(torch.bfloat16)
            for name, tensor in zip(names, self.average, strict=True)
            if name.startswith("net.")
        }
        model = build(self.model.shape).to(self.device, self.dtype)
        model.load_state_dict(state)
        return model.eval()

    def save(self, out: Path, checkpoint: Path | None) -> None:
        state = {
            k: v.to("cpu", torch.bfloat16).contiguous()
            for k, v in self.averaged().state_dict().items()
        }
        written = out / "model.safetensors.new"
        save_file(state, str(written), metadata={"format": "pt"})
        written.replace(out / "model.safetensors")
        if checkpoint:
            content = {
                "masters": self.masters,
                "average": self.average,
                "optimizer": self.optimizer.state_dict(),
                "step": self.step,
            }
            written = checkpoint.with_suffix(".new")
            torch.save(content, written)
            written.replace(checkpoint)

    def _begin_with(self, path: Path) -> None:
        """Take the weights of a model that was saved; what only training has begins anew."""
        saved = load_file(str(path))
        names = [name for name, _ in self.modules.named_parameters()]
        with torch.no_grad():
            for name, *mine in zip(names, self.masters, self.average, self.parameters, strict=True):
                if name.startswith("net."):
                    for each in mine:
                        each.copy_(saved[name.removeprefix("net.")])

    def _resume(self, path: Path) -> None:
        content = torch.load(path, map_location=self.device, weights_only=True)
        for mine, saved in ((self.masters, content["masters"]), (self.average, content["average"])):
            torch._foreach_copy_(mine, saved)
        self.optimizer.load_state_dict(content["optimizer"])
        self.step = content["step"]
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, self.masters)


def drafted(model: Qwen35, hidden: Tensor, batch: Batch, tokens: Tensor | None) -> list[Tensor]:
    """Of each draft, where an answer's tokens are predicted: logits [T, vocab], the wanted token
    [T], and bool [T], whether that is a token of the same answer."""
    picked, size = batch.picked, batch.ids.numel()
    answers = torch.zeros(size + DRAFT_DEPTH, dtype=torch.bool, device=picked.device)
    answers[picked] = True
    following = F.pad(batch.ids.flatten(), (0, DRAFT_DEPTH + 1))
    rows = []
    made = model.drafts(hidden, batch.ids, batch.positions, batch.image_index, tokens, DRAFT_DEPTH)
    for d, states in enumerate(made, 1):
        logits = model.draft_logits(states.flatten(0, 1).index_select(0, picked)).float()
        rows.append((logits, following[picked + 1 + d], answers[picked + d]))
    return rows


def draft_losses(
    model: Qwen35, hidden: Tensor, batch: Batch, tokens: Tensor | None
) -> list[Tensor]:
    """Mean cross entropy of each draft."""
    return [
        (F.cross_entropy(logits, wanted, reduction="none") * counts).sum() / counts.sum()
        for logits, wanted, counts in drafted(model, hidden, batch, tokens)
    ]


@torch.no_grad()
def check(model: Qwen3VL, items: list[HeldOut], device: torch.device) -> dict[str, float]:
    """By teacher forcing, in percent: exact captions (greedy is exact iff every argmax on the way
    is), and how many first, second, third drafts are the model's own next tokens."""
    if not items:
        return {}
    right = total = 0
    dtype = next(model.parameters()).dtype
    accepted = torch.zeros(DRAFT_DEPTH, 2, device=device)
    for item in items:
        batch = to_device(item.batch, device)
        tokens, deep = model.see([pixels(batch.pictures[0], device, None).to(dtype)])
        hidden = model.hidden(batch.ids, batch.positions, batch.image_index, tokens, deep)
        guess = model.logits(hidden.flatten(0, 1).index_select(0, batch.picked)).argmax(-1)
        wrong = torch.zeros(len(batch.ids), dtype=torch.long, device=device)
        wrong.index_add_(0, batch.picked // batch.ids.shape[1], (guess != batch.wanted).long())
        right += int((wrong == 0).sum())
        total += len(wrong)
        if isinstance(model, Qwen35):
            still = torch.ones_like(batch.picked, dtype=torch.bool)
            for d, (logits, wanted, counts) in enumerate(drafted(model, hidden, batch, None)):
                still &= logits.argmax(-1) == wanted
                accepted[d] += torch.stack(((still & counts).sum(), counts.sum()))
    result = {"exact_percent": 100 * right / total}
    if isinstance(model, Qwen35):
        rates = (100 * accepted[:, 0] / accepted[:, 1]).tolist()
        result |= {f"draft_{d}_percent": round(rate, 2) for d, rate in enumerate(rates, 1)}
    return result


def train(options: argparse.Namespace) -> None:
    options.out.mkdir(parents=True, exist_ok=True)
    fonts = ("", "", *(str(path) for path in options.fonts))
    if options.device == "cuda":
        torch.set_float32_matmul_precision("high")  # the delta rule's products
    plan = DataPlan(
        options.tokenizer,
        options.seed,
        options.samples,
        pil_share=options.pil_share,
        easy_batches=options.easy_batches,
        captions_only=options.captions_only,
        fonts=fonts,
    )
    encoder = Encoder(options.tokenizer)
    checks = HeldOutBatches(encoder, options.check_batches, 48, seed=1)
    validation = [checks[i] for i in range(len(checks))]
    data = Batches(plan, 10**9)
    started = time.monotonic()
    trainer = Trainer(options)
    first = trainer.step
    loader = DataLoader(
        data,
        batch_size=None,
        sampler=range(first, first + 10**6),
        num_workers=options.workers,
        prefetch_factor=4 if options.workers else None,
    )
    log: list[dict[str, float]] = []
    marks = {"log": 0.0, "check": time.monotonic(), "began": time.monotonic()}
    waited = 0.0
    batches = iter(loader)
    while True:
        elapsed = time.monotonic() - marks["began"]
        progress = max(elapsed / trainer.max_seconds, (trainer.step - first) / options.max_steps)
        if progress >= 1:
            break
        asked = time.monotonic()
        batch = to_device(next(batches), trainer.device)
        waited += time.monotonic() - asked
        losses = trainer.train_step(batch, progress)
        if trainer.step % options.log_every == 0:
            row = {
                "step": trainer.step,
                "elapsed_s": round(elapsed, 2),
                **{f"{name}_loss": round(float(loss), 5) for name, loss in losses.items()},
                "lr": trainer.optimizer.param_groups[0]["lr"],
                "data_wait_s": round(waited, 2),
            }
            if time.monotonic() - marks["check"] > options.check_every:
                trainer.save(options.out, options.checkpoint)
                row |= check(trainer.averaged(), validation, trainer.device)
                marks["check"] = time.monotonic()
            log.append(row)
            print(json.dumps(row), flush=True)
            _write_log(options.out / "training.csv", log)
    del batches, loader
    trainer.save(options.out, options.checkpoint)
    trained_s = time.monotonic() - started
    held_out = HeldOutBatches(encoder, options.eval_batches)
    report: dict[str, object] = {}
    if options.eval_batches:
        questions = not options.captions_only
        report = evaluate(trainer.averaged(), encoder, held_out, options.workers, questions)
    report["validation"] = check(trainer.averaged(), validation, trainer.device)
    report["run"] = {
        "steps": trainer.step,
        "seconds": round(trained_s, 1),
        "samples_a_step": options.samples,
        "seed": options.seed,
        "peak_lr": options.peak_lr,
        "device": torch.cuda.get_device_name() if trainer.device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "shape": asdict(trainer.model.shape),
        "evaluation_seconds": round(time.monotonic() - started - trained_s, 1),
    }
    text_report = json.dumps(report, indent=1)
    (options.out / "evaluation.json").write_text(text_report + "\n", encoding="utf-8")
    print(json.dumps({k: v for k, v in report.items() if k != "examples"}, indent=1), flush=True)


def _write_log(path: Path, rows: list[dict[str, float]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        names = [
            "step",
            "elapsed_s",
            "text_loss",
            "dense_loss",
            *(("draft_loss",) if any("draft_loss" in row for row in rows) else ()),
            "lr",
            "data_wait_s",
            *dict.fromkeys(name for row in rows for name in row if name.endswith("_percent")),
        ]
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of tokenizer.json")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", choices=SHAPES, default="scenes")
    parser.add_argument("--max-seconds", type=float, default=480)
    parser.add_argument("--max-steps", type=int, default=10**6)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peak-lr", type=float, default=1e-3)
    parser.add_argument("--warm-up-steps", type=int, default=200)
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--pil-share", type=float, default=0.4)
    parser.add_argument("--easy-batches", type=int, default=400, help="of one or two objects")
    parser.add_argument("--captions-only", action="store_true", help="no questions, one picture")
    parser.add_argument("--fonts", type=Path, nargs="*", default=[], help="more TrueType files")
    parser.add_argument("--checkpoint", type=Path, help="full state, for --resume")
    parser.add_argument("--resume", type=Path)
    parser.add_argument("--begin-with", type=Path, help="model.safetensors of an earlier run")
    parser.add_argument("--eval-batches", type=int, default=36)
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--check-every", type=float, default=40, help="seconds")
    parser.add_argument("--check-batches", type=int, default=6, help="of 48 scenes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


if __name__ == "__main__":
    train(parse())
