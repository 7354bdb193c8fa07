"""Models behind HTTP: an OpenAI-compatible API, continuous batching, and a page to look into the routing.

Takes opened models (`pipeline.any_model.open_model`); gives generated tokens, metrics and an inspector page.
Read `request.py` first, then `engine.py`.
"""
