"""How this program was started, so that the commands it suggests can be pasted."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path


def suggested(command: str, *arguments: object) -> str:
    """A command to suggest, quoted for the shell: ``tlora export 'my run' --format peft``.

    Where this process is not the ``tlora`` script (``python -m``, a notebook, ``mlx.launch``), it
    is spelt ``python -m tlora_mlx``, which needs no script on the path.
    """
    script = Path(sys.argv[0]).name.removesuffix(".exe")
    program = "tlora" if script == "tlora" else "python -m tlora_mlx"
    return f"{program} {command} {shlex.join(map(str, arguments))}".rstrip()
