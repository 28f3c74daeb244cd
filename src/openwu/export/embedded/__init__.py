"""The embedded model as ONNX graphs, and a static page that runs them in a browser."""
