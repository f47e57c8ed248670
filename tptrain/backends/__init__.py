"""Where a run happens: the torch_xla mesh, or plain PyTorch as its oracle."""
