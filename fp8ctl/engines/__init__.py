"""What fp8ctl knows about starting each engine.

`base`, `sglang` and `vllm` are pure: a request in, a command line out, or a
refusal with its reason. `hooks` is what runs inside the engine's own
interpreter; so this file imports nothing.
"""
