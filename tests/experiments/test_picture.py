"""The picture of the README shows what its completions hold."""

from __future__ import annotations

import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments"))

from picture import k3, picture, sample


def test_the_picture_has_a_box_for_every_token_and_layer():
    scored = sample(num_prompts=1)
    assert len(scored) == 8
    # Replay brings the trainer nearer to the engine, summed over all tokens.
    live, replayed = (np.concatenate([getattr(s, n) for s in scored]) for n in ("live", "replayed"))
    assert k3(replayed) < k3(live)
    drawn = ElementTree.fromstring(picture(scored))
    shown = max(scored, key=lambda one: k3(one.live))
    kinds = [box.get("class") for box in drawn.iter("{http://www.w3.org/2000/svg}rect")]
    # A panel each, and one box in the legend.
    assert kinds.count("one") == (shown.differing == 1).sum() + 1
    assert kinds.count("none") == 2 * (shown.differing < 0).sum() + 1
    assert kinds.count("same") == ((shown.differing == 0).sum() + (shown.differing >= 0).sum() + 1)


def test_k3_is_that_of_the_definition():
    assert k3(np.log([2.0, 0.5])) == (2 - 1 - np.log(2) + 0.5 - 1 + np.log(2)) / 2
