"""What fp8ctl runs inside an engine's processes.

Imported by the engine's own interpreter through a path that `launch` sets:
standard library and torch only, Python 3.10 and later. Nothing here changes a
file; the engine is reached through its extension points and by wrapping
functions as they are imported.
"""
