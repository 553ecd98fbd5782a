"""A policy as one file that acts without this package: its graph, the file, and proof that both act alike.

``onnx`` needs the extra of that name; nothing here is imported before somebody exports.
"""
