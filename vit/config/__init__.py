"""The configuration: one dataclass a group, what each key may hold, and Hydra's command line. No
torch here.
"""
