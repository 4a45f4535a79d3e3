"""Delivering: from the finished PyTorch model to an ONNX file that was checked, and the account of what was done."""
