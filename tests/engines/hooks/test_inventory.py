"""What one rank tells that it holds."""

from __future__ import annotations

import torch

from fp8ctl.engines.hooks.receiver import Receiver
from tests.engines.hooks.receiving import NORM, Loading, Settled
from tests.engines.hooks.test_shards import checkpoint


def test_names_are_those_of_the_checkpoint_and_say_what_is_one_memory() -> None:
    whole = checkpoint("block")
    rank = Loading(whole, 0, 2)
    receiver = Receiver(rank.model, 0, Settled().engine())
    told = receiver.answer("names", {})
    assert sorted(told["names"]) == sorted({held["name"] for held in receiver.digests()["tensors"]})
    assert told["same"] == {}
    rank.model.other = torch.nn.Module()
    rank.model.other.weight = rank.model.get_parameter(NORM)
    assert receiver.names()["same"] == {"other.weight": NORM}
    assert receiver.names()["names"] == [*told["names"], "other.weight"]
