"""New weights on one device are the host's numbers, on either backend."""

import pytest

from tests import small
from tests.new_weights import assert_new, source
from tptrain.backends.torch_backend import TorchBackend
from tptrain.backends.xla.backend import XlaBackend
from tptrain.train.state import fresh_state


@pytest.mark.parametrize("config", [small.LLAMA3, small.LLAMA3_TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", ["xla", "torch"])
def test_they_are_the_numbers_of_the_host(kind, config):
    plan = small.small_plan(backend=kind, topology="cpu-1", config=config)
    backend = XlaBackend(plan, (0,)) if kind == "xla" else TorchBackend(plan)
    assert_new(backend, plan, fresh_state(backend, source()))
