"""What a plan needs of chips, hosts, disks and networks, and how fast it could be: arithmetic, no framework.

`workload` says what a step is, `activations` and `memory` count a chip's bytes, `hosts` those of hosts and
files, `collectives`, `network` and `roofline` give traffic and time, `changes` what would make a step fit,
`candidates` the other ways to lay out a run.
"""

from tptrain.estimate.changes import memory_problems
from tptrain.estimate.estimate import Estimate, estimate
from tptrain.estimate.hosts import host_memory_problems

__all__ = ["Estimate", "estimate", "host_memory_problems", "memory_problems"]
