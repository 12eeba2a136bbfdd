"""How likely tokens were, told by graphs of their own kind."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qwencli.config import DType, EngineName, Kernels, SamplingOptions
from qwencli.engine.native.engine import NativeEngine
from qwencli.messages import GenerationRequest, user_message
from tests.checkpoints import engine_config


@pytest.mark.parametrize("kernels", [Kernels.TRITON, Kernels.TORCH])
def test_logprobs_are_those_of_the_model_and_answers_stay_the_same(checkpoint, kernels):
    """Rows that ask beside rows that do not; a batch that does not ask runs the graphs it ran."""
    requests = [
        GenerationRequest(
            (user_message("Why? " * (1 + n % 5)),),
            SamplingOptions(do_sample=False, max_new_tokens=6 + n)
            if n % 3
            else SamplingOptions(temperature=1.0, top_k=20, seed=n, max_new_tokens=6 + n),
            ignore_eos=True,
        )
        for n in range(12)
    ]
    config = engine_config(
        checkpoint("qwen3_vl"),
        engine=EngineName.NATIVE,
        device="cuda",
        dtype=DType.FLOAT32,
        kernels=kernels,
    )
    with NativeEngine(config) as engine:

        def answered(asked):
            pieces = {engine.add(request): [] for request in asked}
            while engine.has_unfinished:
                for output in engine.step():
                    assert output.error is None, output.error
                    pieces[output.request].append(output.chunk)
            return list(pieces.values())

        before = answered(requests)
        runner = engine._queue._runner
        assert not any(key[4] for key in runner._captured)
        told = answered([replace(each, logprobs=n % 5) for n, each in enumerate(requests)])
        assert any(key[4] for key in runner._captured)
        same = 0
        for number, (plain, chunks) in enumerate(zip(before, told, strict=True)):
            ids = chunks[-1].result.token_ids
            same += ids == plain[-1].result.token_ids
            found = [each for chunk in chunks for each in chunk.logprobs]
            assert [each.chosen.token_id for each in found] == list(ids)
            prompt = engine.files.prompts.build(requests[number].messages).input_ids
            # Each step leaves its logits in the same memory.
            logits_of_steps = [each.clone() for each in engine._logits([*prompt, *ids])]
            rows = logits_of_steps[len(prompt) - 1 : -1]
            for each, logits in zip(found, rows, strict=True):
                expected = logits.float().log_softmax(-1).flatten().cpu()
                own = expected[each.chosen.token_id].item()
                assert each.chosen.logprob == pytest.approx(own, abs=2e-2)
                best = expected.topk(number % 5).values.tolist() if number % 5 else []
                assert [top.logprob for top in each.top] == pytest.approx(best, abs=2e-2)
        assert same >= 0.9 * len(requests)
