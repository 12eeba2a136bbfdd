from __future__ import annotations

import sys

# Triton has wheels for Linux alone.
collect_ignore_glob = [] if sys.platform == "linux" else ["test_*.py"]
