"""NNCF: the graph, the hooks and the algorithms that run as pipeline steps."""

import os
import sys
from pathlib import Path

# NNCF compiles its CPU kernels at first use. It gives up after 60 s, too soon for a busy machine.
os.environ.setdefault("NNCF_EXTENSION_LOAD_TIMEOUT", "600")
# It takes the ninja that the PATH finds: the one beside this Python comes first, whether or not its
# environment is activated, because two versions would build the kernels again and again.
_scripts = str(Path(sys.executable).parent)
if _scripts not in os.environ.get("PATH", "").split(os.pathsep):
    os.environ["PATH"] = os.pathsep.join([_scripts, os.environ.get("PATH", "")])
