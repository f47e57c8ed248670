"""One plain-PyTorch decoder for every family: mathematics and dim names, nothing about devices."""
