"""Patches for installed engines: applied whole, taken back exactly.

names -> diff -> catalog -> {status, plan} are pure; fsops is the only module
that changes a file; store and transaction go through it.
"""
