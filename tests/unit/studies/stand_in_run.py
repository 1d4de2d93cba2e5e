"""What a process of a comparison does, without what is slow about it: `python -m ... FOLDER`."""

import os
import sys
import time
from pathlib import Path

folder = Path(sys.argv[1])
(folder / "pid").write_text(str(os.getpid()))
if folder.name.startswith("fails"):
    print("some words\nValueError: no good", file=sys.stderr)
    sys.exit(1)
if folder.name.startswith("waits"):
    # Until whoever started it lets go, as `compare_run` does.
    sys.stdin.read()
    (folder / "saved").touch()
    sys.exit(143)
time.sleep(0.2)
(folder / "ended").write_text(repr(time.time()))
