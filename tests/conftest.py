"""Every test runs with shapes and types checked at each call of the library."""

import os

# Two test workers share two cores: each keeps to one thread, or they fight over both.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

from jaxtyping import install_import_hook

install_import_hook("steersman", "beartype.beartype")
