"""Trains the bundled model `scenes` from nothing.

    python -m tools.scenes.train --tokenizer qwencli/bundled/scenes --out OUT --max-seconds 480

The data stream depends on the seed alone. The learning rate follows the elapsed time, so that it
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
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader

from tools.scenes.batches import Batch, Batches, DataPlan
from tools.scenes.device_batch import pixels, to_device
from tools.scenes.dialogue import Encoder
from tools.scenes.evaluate import HeldOut, HeldOutBatches, evaluate
from tools.scenes.heads import DenseHeads
from tools.scenes.model import ModelShape, Qwen3VL, initialize

WARM_UP_STEPS = 200
DENSE_WEIGHT = 0.25
EMA_DECAY = 0.998
CLIP = 1.0


class Trainer:
    """fp32 master weights and their average; the model itself computes in bf16 on a GPU."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.device = torch.device(options.device)
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.peak, self.max_seconds, self.seed = options.peak_lr, options.max_seconds, options.seed
        shape = ModelShape()
        model = Qwen3VL(shape)
        initialize(model, options.seed)
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
        if options.resume:
            self._resume(options.resume)
        self.first_step = self.step

    @property
    def model(self) -> Qwen3VL:
        model = self.modules["net"]
        assert isinstance(model, Qwen3VL)
        return model

    def losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        pictures = [pixels(g, self.device, self.noise).to(self.dtype) for g in batch.pictures]
        tokens, deep = self.model.see(pictures)
        hidden = self.model.hidden(batch.ids, batch.positions, batch.image_index, tokens, deep)
        logits = self.model.logits(hidden.flatten(0, 1).index_select(0, batch.picked))
        text = F.cross_entropy(logits.float(), batch.wanted)
        if tokens is None:
            return text, torch.zeros_like(text)
        sizes = [p.shape[2] * p.shape[3] // 1024 for p in pictures]
        heads = self.modules["heads"]
        dense = [
            heads.loss(part, group.object_labels, group.number_labels)
            for part, group in zip(tokens.split(sizes, 1), batch.pictures, strict=True)
        ]
        return text, torch.stack(dense).mean()

    @torch.no_grad()
    def _update(self, progress: float) -> None:
        torch._foreach_copy_(self.gradients, [p.grad for p in self.parameters])
        torch._foreach_zero_([p.grad for p in self.parameters])
        torch.nn.utils.clip_grad_norm_(self.masters, CLIP)
        warm = min(1.0, (self.step - self.first_step + 1) / WARM_UP_STEPS)
        for group in self.optimizer.param_groups:
            group["lr"] = (
                self.peak * warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))
            )
        self.optimizer.step()
        self.step += 1
        torch._foreach_copy_(self.parameters, self.masters)
        decay = min(EMA_DECAY, self.step / (self.step + 20))
        torch._foreach_lerp_(self.average, self.masters, 1 - decay)

    def train_step(self, batch: Batch, progress: float) -> tuple[Tensor, Tensor]:
        """One update; returns the two losses without waiting for the device."""
        text, dense = self.losses(batch)
        (text + DENSE_WEIGHT * dense).backward()
        self._update(progress)
        return text.detach(), dense.detach()

    def averaged(self) -> Qwen3VL:
        """A copy of the model with the averaged weights, rounded as they will be shipped."""
        names = [name for name, _ in self.modules.named_parameters()]
        state = {
            name.removeprefix("net."): tensor.to(torch.bfloat16)
            for name, tensor in zip(names, self.average, strict=True)
            if name.startswith("net.")
        }
        model = Qwen3VL(self.model.shape).to(self.device, self.dtype)
        model.load_state_dict(state)
        return model.eval()

    def save(self, out: Path, checkpoint: Path | None) -> None:
        state = {
            k: v.to("cpu", torch.bfloat16).contiguous()
            for k, v in self.averaged().state_dict().items()
        }
        save_file(state, str(out / "model.safetensors"), metadata={"format": "pt"})
        if checkpoint:
            content = {
                "masters": self.masters,
                "average": self.average,
                "optimizer": self.optimizer.state_dict(),
                "step": self.step,
            }
            torch.save(content, checkpoint)

    def _resume(self, path: Path) -> None:
        content = torch.load(path, map_location=self.device, weights_only=True)
        for mine, saved in ((self.masters, content["masters"]), (self.average, content["average"])):
            torch._foreach_copy_(mine, saved)
        self.optimizer.load_state_dict(content["optimizer"])
        self.step = content["step"]
        with torch.no_grad():
            torch._foreach_copy_(self.parameters, self.masters)


def quick_exact(model: Qwen3VL, items: list[HeldOut], device: torch.device) -> float:
    """Exact-caption percent by teacher forcing: greedy is exact iff every argmax on the way is."""
    right = total = 0
    dtype = next(model.parameters()).dtype
    for item in items:
        batch = to_device(item.batch, device)
        with torch.no_grad():
            picture = pixels(batch.pictures[0], device, None).to(dtype)
            hidden = model.hidden(
                batch.ids, batch.positions, batch.image_index, *model.see([picture])
            )
            guess = model.logits(hidden.flatten(0, 1).index_select(0, batch.picked)).argmax(-1)
        wrong = torch.zeros(len(batch.ids), dtype=torch.long, device=device)
        wrong.index_add_(0, batch.picked // batch.ids.shape[1], (guess != batch.wanted).long())
        right += int((wrong == 0).sum())
        total += len(wrong)
    return 100 * right / total


def train(options: argparse.Namespace) -> None:
    options.out.mkdir(parents=True, exist_ok=True)
    fonts = ("", "", *(str(path) for path in options.fonts))
    plan = DataPlan(options.tokenizer, options.seed, options.samples, fonts=fonts)
    encoder = Encoder(options.tokenizer)
    validation = [HeldOutBatches(encoder, 6, 48, seed=1)[i] for i in range(6)]
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
        text, dense = trainer.train_step(batch, progress)
        if trainer.step % options.log_every == 0:
            row = {
                "step": trainer.step,
                "elapsed_s": round(elapsed, 2),
                "text_loss": round(float(text), 5),
                "dense_loss": round(float(dense), 5),
                "lr": trainer.optimizer.param_groups[0]["lr"],
                "data_wait_s": round(waited, 2),
            }
            if time.monotonic() - marks["check"] > options.check_every:
                row["exact_percent"] = quick_exact(trainer.averaged(), validation, trainer.device)
                trainer.save(options.out, options.checkpoint)
                marks["check"] = time.monotonic()
            log.append(row)
            print(json.dumps(row), flush=True)
            _write_log(options.out / "training.csv", log)
    del batches, loader
    trainer.save(options.out, options.checkpoint)
    trained_s = time.monotonic() - started
    held_out = HeldOutBatches(encoder, options.eval_batches)
    report = evaluate(trainer.averaged(), encoder, held_out, options.workers)
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
            "lr",
            "data_wait_s",
            "exact_percent",
        ]
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of tokenizer.json")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--max-seconds", type=float, default=480)
    parser.add_argument("--max-steps", type=int, default=10**6)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peak-lr", type=float, default=1e-3)
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--fonts", type=Path, nargs="*", default=[], help="more TrueType files")
    parser.add_argument("--checkpoint", type=Path, help="full state, for --resume")
    parser.add_argument("--resume", type=Path)
    parser.add_argument("--eval-batches", type=int, default=36)
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--check-every", type=float, default=40, help="seconds")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


if __name__ == "__main__":
    train(parse())
