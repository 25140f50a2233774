"""`calibrate`: measure what each model of a zoo costs, and write calibration.json (`messcli/calibration/file.py`).

measure    which cells, how often, until when
readings   what was read so far, kept for the next run
fit        the energy model through the cells
"""

from messcli.calibration.measure import CalibrateConfig, CalibrateProgress, CalibrateSummary, calibrate

__all__ = ["CalibrateConfig", "CalibrateProgress", "CalibrateSummary", "calibrate"]
