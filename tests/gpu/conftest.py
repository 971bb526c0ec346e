"""What ranks from the pool need on a GPU."""

import os

# The pool's server loads Inductor, which must not start its compiler processes there: ranks would share their pipes.
os.environ.setdefault("TORCH_WARM_POOL", "0")
