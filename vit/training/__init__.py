"""Training: the loop, and what it works with.

The loop, the step, the state, the plan and the optimizers take plain values; prepare.py, start.py,
reporting.py and explanation.py alone know the configuration.
"""
