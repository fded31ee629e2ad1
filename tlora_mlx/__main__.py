"""``python -m tlora_mlx COMMAND``: the same as ``tlora COMMAND``."""

import sys

from tlora_mlx.cli import script

if __name__ == "__main__":
    sys.exit(script())
