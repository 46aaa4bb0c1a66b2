"""NNCF: the graph, the hooks and the algorithms that run as pipeline steps."""

import os
import shutil
import sys
from pathlib import Path

# NNCF compiles its CPU kernels at first use. It gives up after 60 s, too soon for a busy two-core
# machine, and it looks for ninja on the PATH, where it is not when a virtual environment's python
# is called by its path.
os.environ.setdefault("NNCF_EXTENSION_LOAD_TIMEOUT", "600")
if shutil.which("ninja") is None:
    os.environ["PATH"] = os.pathsep.join(
        [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
    )
