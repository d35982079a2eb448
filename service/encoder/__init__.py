"""Sentence encoders: ONNX models that turn texts into vectors, in a process of their own."""
