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
# Computes after a "+" on its standard input and waits after a "-". It is never stopped by a signal:
# a process that is stopped would not see its input close, and stay for ever.
COMPUTING_WHEN_TOLD = """
import os, select
print(flush=True)
going = False
while True:
    if not going or select.select([0], [], [], 0)[0]:
        said = os.read(0, 1)
        if not said:
            break
        going = said == b"+"
    for _ in range(5000 * going):
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
