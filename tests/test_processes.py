import pytest
import torch

from pyseg import processes
from pyseg.errors import PluginError


class Held:
    """A metric that holds a state and nothing else."""

    def __init__(self, **state):
        self.held = state

    def state(self):
        return self.held

    def load_state(self, state):
        self.held = state


@pytest.fixture
def two(monkeypatch):
    """As if a second process held the same."""
    monkeypatch.setattr(processes.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(processes.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(processes.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(processes.distributed, "get_backend", lambda: "gloo")
    monkeypatch.setattr(processes.distributed, "all_reduce", lambda value: value.mul_(2))

    def gather(into, value):
        into[:] = [value, value]

    monkeypatch.setattr(processes.distributed, "all_gather_object", gather)


def test_one_process_is_the_first_of_one():
    assert processes.rank_and_count() == (0, 1)
    assert processes.gather_objects("x") == ["x"]
    metric = Held(count=3)  # not even looked at
    processes.merge_states("held", metric)
    assert metric.held == {"count": 3}
    with processes.joined("cuda:3") as device:
        assert device == "cuda:3"
    processes.leave()


def test_states_are_added_and_joined(two):
    assert processes.rank_and_count() == (1, 2)
    counts = torch.arange(6).view(2, 3).T  # not contiguous
    metric = Held(counts=counts, records=[{"image": 1}])
    processes.merge_states("held", metric)
    assert torch.equal(metric.held["counts"], 2 * torch.arange(6).view(2, 3).T)
    assert torch.equal(counts, torch.arange(6).view(2, 3).T)  # what it held is left alone
    assert metric.held["records"] == [{"image": 1}, {"image": 1}]


def test_states_that_do_not_add_up_are_refused(two):
    with pytest.raises(PluginError, match=r"metric 'held' has a float as state 'mean'"):
        processes.merge_states("held", Held(mean=0.5))
