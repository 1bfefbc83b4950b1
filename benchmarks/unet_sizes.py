"""What the contestants of the diffusion benchmark share; imported in each one's environment."""

from __future__ import annotations

HORIZON = 16
ACTIONS = 7
WINDOW = 2
OBSERVATION = 20
ROWS_OF_DATA = 4_096
#: Widths of the U-Net's levels.
WIDTHS = ((128, 256, 512), (256, 512, 1024), (512, 1024, 2048))
