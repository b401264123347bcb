"""Per-expert calibration: text through the model, layer by layer, to an imatrix.

Owns: reading text, the streamed forward, the statistics by matrix and expert, the imatrix file and
the importance computed from it. Leaves out: what the importance is used for (`plan`, `quants`).
"""

from moequant.calibrate.imatrix import ExpertReport, Imatrix, MatrixStatistics
from moequant.calibrate.run import calibrate
from moequant.calibration_options import CalibrationOptions

__all__ = [
    "CalibrationOptions",
    "ExpertReport",
    "Imatrix",
    "MatrixStatistics",
    "calibrate",
]
