"""The selective scan in standard ONNX operators without a loop."""
PREFIX = 'Prefix'
def function_text(name): raise NotImplementedError
