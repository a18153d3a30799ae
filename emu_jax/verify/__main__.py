"""python -m emu_jax.verify FILE.npz ...: see __init__.py."""

import sys

from emu_jax.verify import main

if __name__ == "__main__":
    sys.exit(main())
