"""Run by Python at its start, where this folder is on the path: plants the fault that is named."""

import os
import sys

if fault := os.environ.get("DSPARK_LAB_FAULT"):
    from tests.faults import FAULTS, Planter

    sys.meta_path.insert(0, Planter(FAULTS[fault]))
