"""The small Qwen3.5 that the scenes tool trains: its arithmetic, its files, who can read them."""

from __future__ import annotations

import argparse
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from qwencli.config import EngineName, SamplingOptions
from qwencli.engine.hf.engine import TransformersEngine
from qwencli.engine.native.engine import NativeEngine
from qwencli.engine.ops.gated_delta import DeltaRows, recurrent_gated_delta_rule
from qwencli.messages import GenerationRequest, ImagePart, user_message
from tests.checkpoints import engine_config
from tools.scenes.batches import Batches, DataPlan
from tools.scenes.device_batch import to_device
from tools.scenes.dialogue import Encoder
from tools.scenes.export import export
from tools.scenes.grid import PATCH, merged_grid
from tools.scenes.heldout import PROMPT, heldout
from tools.scenes.hybrid import HybridShape, Qwen35, chunked_delta_rule, initialize_delta
from tools.scenes.model import _patchify, initialize
from tools.scenes.train import Trainer, drafted

BUNDLED = Path(__file__).resolve().parents[2] / "qwencli" / "bundled" / "scenes"


def random_model(seed: int) -> Qwen35:
    """Its norms and gates are random too, so that nothing is right by luck."""
    model = Qwen35(HybridShape())
    initialize(model, seed)
    generator = torch.Generator().manual_seed(seed)
    initialize_delta(model, generator)
    for name, parameter in model.named_parameters():
        spread = 0.1 if "norm" in name else 0.01
        parameter.data += spread * torch.randn(parameter.shape, generator=generator)
        parameter.data.copy_(parameter.data.bfloat16())
    return model.eval()


@pytest.fixture(scope="module")
def model() -> Qwen35:
    return random_model(3)


@pytest.fixture(scope="module")
def folder(model: Qwen35, tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("hybrid")
    export(model.state_dict(), model.shape, where)
    return where


def test_the_chunked_rule_is_the_recurrent_one_and_so_are_its_gradients() -> None:
    """Keys that are nearly alike and kept for long: there a careless inverse would break."""
    torch.manual_seed(0)
    heads, length, dim = 2, 150, 16
    q, v = torch.randn(2, heads, length, dim)
    k = torch.nn.functional.normalize(
        torch.randn(dim) + 0.1 * torch.randn(heads, length, dim), dim=-1
    )
    q = torch.nn.functional.normalize(q, dim=-1) * dim**-0.5
    g, beta = -0.01 * torch.rand(heads, length), 0.5 + 0.5 * torch.rand(heads, length)
    inputs = [x.requires_grad_() for x in (q, k, v, g, beta)]

    def one_by_one(*parts: Tensor) -> Tensor:
        queries, keys, values, decays, betas = parts
        state, out = torch.zeros(heads, dim, dim), []
        for t in range(length):
            state = state * decays[:, t].exp()[:, None, None]
            known = (state * keys[:, t, :, None]).sum(-2)
            delta = (values[:, t] - known) * betas[:, t, None]
            state = state + keys[:, t, :, None] * delta[:, None]
            out.append((state * queries[:, t, :, None]).sum(-2))
        return torch.stack(out, 1)

    mine = chunked_delta_rule(*(x[None] for x in inputs))[0]
    expected = one_by_one(*inputs)
    torch.testing.assert_close(mine, expected, atol=2e-5, rtol=1e-4)
    weights = torch.randn_like(expected)
    gradients = torch.autograd.grad((mine * weights).sum(), inputs)
    wanted = torch.autograd.grad((expected * weights).sum(), inputs)
    for one, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)
    rows = DeltaRows(torch.zeros(1).long(), torch.zeros(1).long(), torch.zeros(1).bool())
    first = recurrent_gated_delta_rule(
        *(x[None, :, 0].detach() for x in (q, k, v)),
        *(x[None, :, 0].detach() for x in (g, beta)),
        torch.zeros(1, heads, dim, dim),
        rows,
    )
    torch.testing.assert_close(first[0], expected[:, 0].detach(), atol=1e-5, rtol=1e-4)


def test_the_folder_is_a_qwen3_5_of_at_most_4_mb(folder: Path) -> None:
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 4_000_000
    names = set(load_file(folder / "model.safetensors"))
    assert {"mtp.fc.weight", "mtp.norm.weight", "mtp.layers.0.self_attn.q_proj.weight"} <= names
    assert {"mtp.pre_fc_norm_embedding.weight", "mtp.pre_fc_norm_hidden.weight"} <= names
    layers = "model.language_model.layers"
    assert {f"{layers}.0.linear_attn.A_log", f"{layers}.3.self_attn.q_norm.weight"} <= names


def test_parity_with_transformers(model: Qwen35, folder: Path) -> None:
    from transformers import Qwen3_5ForConditionalGeneration

    reference: Any = Qwen3_5ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    encoder = Encoder(BUNDLED)
    size = (320, 256)
    pixels = torch.rand(1, 3, size[1], size[0], generator=torch.Generator().manual_seed(1)) * 2 - 1
    dialogue = encoder.open([merged_grid(size)], "Describe it.", "Be brief.")
    encoder.answer(dialogue, Random(0).choice(("A red circle.", "No.")))
    ids, rows, columns = torch.tensor([dialogue.ids]), size[1] // PATCH, size[0] // PATCH
    flat = _patchify(pixels, rows, columns)[0].view(-1, 3, 1, PATCH, PATCH)
    with torch.no_grad():
        positions, index = torch.tensor([dialogue.positions]), torch.tensor([dialogue.image_tokens])
        mine = model.logits(model.hidden(ids, positions, index, *model.see([pixels])))
        theirs = reference.eval()(
            input_ids=ids,
            pixel_values=flat.expand(-1, -1, 2, -1, -1).flatten(1),
            image_grid_thw=torch.tensor([(1, rows, columns)]),
            mm_token_type_ids=(ids == encoder.image_pad).int(),
        ).logits
    assert float(theirs.abs().max()) > 1.0
    assert float((mine - theirs).abs().max()) < 1e-4


def test_both_engines_read_the_folder_and_say_the_same(folder: Path) -> None:
    picture = ImagePart(next(iter(heldout(1))).image, "scene.png")
    sampling = SamplingOptions(do_sample=False, max_new_tokens=24)
    request = GenerationRequest((user_message(PROMPT, (picture,)),), sampling, ignore_eos=True)
    answers = []
    for kind, name in (
        (NativeEngine, EngineName.NATIVE),
        (TransformersEngine, EngineName.TRANSFORMERS),
    ):
        with kind(engine_config(folder, engine=name)) as engine:
            answers.append(engine.generate(request))
    assert answers[0].token_ids == answers[1].token_ids
    assert answers[0].num_image_tokens >= 64 and len(set(answers[0].token_ids)) > 1


def test_a_step_trains_what_it_should_and_a_run_goes_on_where_it_was(tmp_path: Path) -> None:
    plan = DataPlan(BUNDLED, samples=2, captions_only=True, pil_share=0.5)
    batch = to_device(Batches(plan, 1)[0], torch.device("cpu"))
    options = argparse.Namespace(
        device="cpu",
        peak_lr=1e-3,
        max_seconds=9.0,
        warm_up_steps=1,
        seed=0,
        model="hybrid",
        resume=None,
        begin_with=None,
    )
    trainer = Trainer(options)
    losses = trainer.losses(batch)
    assert set(losses) == {"text", "dense", "draft"}
    losses["draft"].backward()
    reached = {
        n for n, p in trainer.model.named_parameters() if p.grad is not None and p.grad.any()
    }
    assert reached and all(name.startswith("mtp.") for name in reached)
    trainer.train_step(batch, 0.0)
    trainer.save(tmp_path, tmp_path / "state.pt")
    again = Trainer(argparse.Namespace(**{**vars(options), "resume": tmp_path / "state.pt"}))
    assert again.step == 1
    for one, other in zip(trainer.masters, again.masters, strict=True):
        assert torch.equal(one, other)
    saved = load_file(tmp_path / "model.safetensors")
    Qwen35(HybridShape()).load_state_dict(saved)
    begun = {"begin_with": tmp_path / "model.safetensors"}
    further = Trainer(argparse.Namespace(**{**vars(options), **begun}))
    assert further.step == 0
    for name, tensor in further.averaged().state_dict().items():
        assert torch.equal(tensor.bfloat16(), saved[name].bfloat16()), name


def test_a_draft_knows_the_tokens_in_front_of_it_alone(model: Qwen35) -> None:
    plan = DataPlan(BUNDLED, samples=2, captions_only=True, pil_share=0.0)
    batch = Batches(plan, 1)[0]
    shape = (*batch.ids.shape, model.shape.hidden)
    hidden = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    where = batch.picked[3]
    with torch.no_grad():
        before = drafted(model, hidden, batch, None)
        row, column = divmod(int(where), batch.ids.shape[1])
        hidden[row, column + 1 :] += 1.0
        batch.ids[row, column + 3] = 5
        after = drafted(model, hidden, batch, None)
    same = [torch.allclose(a[0][3], b[0][3], atol=1e-5) for a, b in zip(before, after, strict=True)]
    assert same == [True, True, False]
    assert [bool(counts[3]) for _, _, counts in before] == [True] * 3
    assert before[0][1][3] == batch.wanted[4]
