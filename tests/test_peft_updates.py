"""Updates that PEFT has too: with the same numbers in PEFT's own layers the answers and the gradients are the same."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from adapting import X, compiled, far, network, trained

peft = pytest.importorskip("peft", reason="the test compares with PEFT, which is not installed")

ROUNDING = 5e-6
"""Of float32 networks of two layers, relative to the largest number: PEFT sums in another order, and takes DoRA's base out of a sum."""


@dataclass(frozen=True)
class Peer:
    """Our settings, PEFT's, and where PEFT keeps each of our tensors, with how it lies there."""

    ours: Mapping[str, Any]
    config: Callable[[], Any]
    places: Mapping[str, tuple[str, Callable[[torch.Tensor], torch.Tensor]]]


def as_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def turned(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.T


TARGETS = ["0", "2"]
PEERS: Mapping[str, Peer] = {
    "dora": Peer(
        {"rank": 3, "alpha": 6},
        lambda: peft.LoraConfig(r=3, lora_alpha=6, use_dora=True, target_modules=TARGETS),
        {
            "down": ("lora_A.default.weight", turned),
            "up": ("lora_B.default.weight", turned),
            "magnitude": ("lora_magnitude_vector.default.weight", as_is),
        },
    ),
    "loha": Peer(
        {"rank": 2, "alpha": 4},
        lambda: peft.LoHaConfig(r=2, alpha=4, target_modules=TARGETS),
        {
            "up_1": ("hada_w1_a.default", as_is),
            "down_1": ("hada_w1_b.default", as_is),
            "up_2": ("hada_w2_a.default", as_is),
            "down_2": ("hada_w2_b.default", as_is),
        },
    ),
    "lokr": Peer(
        {"rank": 1, "alpha": 2},
        lambda: peft.LoKrConfig(r=1, alpha=2, target_modules=TARGETS),
        {"left": ("lokr_w1.default", as_is), "up": ("lokr_w2_a.default", turned), "down": ("lokr_w2_b.default", turned)},
    ),
    "ia3": Peer(
        {},
        lambda: peft.IA3Config(target_modules=TARGETS, feedforward_modules=[]),
        {"outputs": ("ia3_l.default", lambda tensor: tensor[:, None])},
    ),
    "ia3 of inputs": Peer(
        {"of": "inputs"},
        lambda: peft.IA3Config(target_modules=TARGETS, feedforward_modules=TARGETS),
        {"inputs": ("ia3_l.default", lambda tensor: tensor[None, :])},
    ),
}


@pytest.mark.parametrize("name", PEERS)
def test_answers_and_gradients_are_those_of_peft(name: str) -> None:
    peer, method = PEERS[name], name.split()[0]
    found = compiled({method: dict(peer.ours)})
    values = trained(found)
    ready = found.load_trained(values).module
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(network(), peer.config())
    theirs.eval()
    parameters = dict(theirs.named_parameters())
    places = {
        f"{layer}.{method}.{part}": (parameters[f"base_model.model.{layer}.{place}"], change)
        for layer in TARGETS
        for part, (place, change) in peer.places.items()
    }
    assert places.keys() == values.keys()
    assert {id(place) for place, _ in places.values()} == {id(one) for one in parameters.values() if one.requires_grad}
    with torch.no_grad():
        for path, (place, change) in places.items():
            place.copy_(change(values[path]))
    assert far(ready(X), network()(X)) > 0.01  # the update is felt
    assert far(ready(X), theirs(X)) < ROUNDING
    for module in (ready, theirs):
        module(X).square().sum().backward()
    ours = dict(ready.named_parameters())
    for path, (place, change) in places.items():
        assert far(change(ours[path].grad), place.grad) < 20 * ROUNDING, path
