"""Weights of other libraries, read and written.

loading.py reads a file of any known format and builds a model for it, fitting.py puts weights into
a model that exists already, writing.py lists the formats that can be written. Every format has one
file: a table of names, `read` and `write`.
"""
