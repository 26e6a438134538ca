"""Turn on FP8 in vLLM 0.9.1 and SGLang 0.4.8, and prove that it is on.

Importing this package costs nothing: it has no imports, because the same
package is put on the path of an engine's interpreter (see `engines.hooks`).
"""

__version__ = "0.1.0"
