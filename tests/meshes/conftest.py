"""The runs of these tests are processes of their own, which inherit how XLA compiles."""

from tests.device_process import compile_quickly

compile_quickly()
