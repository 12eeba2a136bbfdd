"""Programs that compete with a run from processes of their own, for `python -c`.

Each prints a line when it is ready, and ends by itself when its standard input is closed: when the
process that started it is gone.
"""

from __future__ import annotations

_BEGIN = """
import os, threading
threading.Thread(target=lambda: (os.read(0, 1), os._exit(0)), daemon=True).start()
"""
COMPUTING = f"""{_BEGIN}
print(flush=True)
while True:
    pass
"""
# Copies more than any cache holds, in pieces small enough to go through the caches.
COPYING = f"""{_BEGIN}
source, target = memoryview(bytearray(b"x") * (1 << 26)), memoryview(bytearray(1 << 26))
print(flush=True)
while True:
    for at in range(0, 1 << 26, 1 << 19):
        target[at : at + (1 << 19)] = source[at : at + (1 << 19)]
"""
