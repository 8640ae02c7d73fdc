"""Does the norm say how robust a network is? Association, peaks, U-shapes, coincidence, verdicts."""

from experiments.correlation.association import Association, associate
from experiments.correlation.coincidence import Coincidence, coincide
from experiments.correlation.peaks import Peak, locate
from experiments.correlation.ushape import UShape, u_shape

__all__ = ["Association", "Coincidence", "Peak", "UShape", "associate", "coincide", "locate", "u_shape"]
