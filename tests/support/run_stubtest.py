"""Compare torpor/_core.pyi with the module that was built, as `python -m mypy.stubtest torpor._core`.

stubtest imports the installed package, so it has to run away from ./python, which has the sources but no built module.
"""

import os
import subprocess
import sys
from pathlib import Path

here = Path(__file__).resolve().parent
command = [sys.executable, "-m", "mypy.stubtest", "torpor._core", "--allowlist", str(here / "stubtest-allowlist.txt")]
os.chdir(here)
sys.exit(subprocess.call(command))
