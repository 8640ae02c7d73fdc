"""Does the norm say how robust a network is? Association, peaks, U-shapes, coincidence, verdicts."""

from experiments.correlation.association import Within, within
from experiments.correlation.coincidence import Coincidence, coincide
from experiments.correlation.contrasts import Contrast, Layout
from experiments.correlation.peaks import Peak, locate
from experiments.correlation.ushape import UShape, u_shape

__all__ = ["Coincidence", "Contrast", "Layout", "Peak", "UShape", "Within", "coincide", "locate", "u_shape", "within"]
