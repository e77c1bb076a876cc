"""Ways out of Python: models as graphs of tensors, and the scan in standard ONNX operators."""
