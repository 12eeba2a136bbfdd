"""An engine without a model for studies; as a script, a worker of a study.

The prompt says nothing and the name of the model nothing either: what it does otherwise is what
conditions do to any engine, and `no-grad`, which only the transformers engine has, fails on it.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[3]))

from qwencli.bench.inject import contention
from qwencli.bench.studies import study_worker as worker
from tests.bench.fake_engine import FakeEngine


class StudiedFake(FakeEngine):
    @property
    def overrides(self):
        return None

    @overrides.setter
    def overrides(self, overrides):
        if getattr(overrides, "no_grad", False):
            raise RuntimeError("this engine knows no gradients\nat all")


if __name__ == "__main__":
    contention.COMPUTING_S = 0.4  # a run here is over in less, but for waiting for that thread
    sys.exit(worker.main(sys.argv[1:], StudiedFake))
