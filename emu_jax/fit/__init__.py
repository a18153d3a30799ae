"""Whether a run fits and how fast it can be, found by compiling its step without hardware.

compile.py compiles the real train step for devices that need not be present. report.py reports what
each device will hold, receive and compute. search.py looks for changes that would fit. Read next:
__main__.py.
"""
