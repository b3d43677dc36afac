"""The machine a run is computed on: device, precision, compiling, processes, signals and faults.

Nothing here may change the result of a run.
"""
