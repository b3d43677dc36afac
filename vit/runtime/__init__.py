"""The machine that a run is computed on: device, precision, compiling, processes, signals, faults.

Nothing here but the precision changes the result of a run, beyond its last bits.
"""
