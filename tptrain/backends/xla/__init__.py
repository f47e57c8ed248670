"""The torch_xla backend: SPMD over a mesh, layers in a scan, one captured step."""
