"""Runs of the command on two virtual devices, on word problems."""

import pytest

from tests.preemption.command import Command


@pytest.fixture(scope="session")
def settings(records):
    """40 short steps of a small model; nothing is saved but by the end or by a signal."""
    return {
        "data.path": records,
        "data.seq_len": 96,
        "data.batch_rows": 8,
        "model.config.vocab_size": 600,
        "topology": "cpu-2",
        "precision.compute": "float32",
        "schedule.max_steps": 40,
        "save.every_steps": 0,
        "export.enabled": "false",
        "log.progress": "false",
        "log.tensorboard": "false",
    }


@pytest.fixture(scope="session")
def start(settings):
    """Starts the command; what is still running at the end of the tests is killed."""
    started = []

    def go(run, *options, **changes):
        named = {name.replace("__", "."): value for name, value in changes.items()}
        started.append(Command(run, {**settings, **named}, *options))
        return started[-1]

    yield go
    for command in started:
        command.kill()
