"""Whether a run fits and how fast it can be, from compiling its step without hardware.

compile.py compiles the real train step for devices that need not be present, report.py says what
each will hold, send and compute, and search.py what would fit. Read next: __main__.py.
"""
