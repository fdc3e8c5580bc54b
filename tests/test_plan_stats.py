"""`otseg.plan_stats`: distance and diversity of the maps of text prompts."""

import numpy as np
import pytest
import torch
from helpers import random_image, small_model

from otseg.mpsa import ATTENTIONS
from otseg.plan_stats import distance, diversity, plan_record, prompt_maps


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_maps_of_every_decoder(attention):
    maps = prompt_maps(small_model(attention=attention), random_image(1))
    assert [*maps] == ["mps", "layer 1", "layer 2", "layer 3"]
    for T in maps.values():
        torch.testing.assert_close(T.sum(-2), torch.ones_like(T[:, 0]))
        assert 0 <= distance(T) <= 1 and 0 <= diversity(T) <= 1
        permuted = T[..., torch.randperm(T.shape[-1])]
        assert distance(permuted) == pytest.approx(distance(T)) and diversity(permuted) == pytest.approx(diversity(T))
    if attention == "uniform":
        assert distance(maps["layer 1"]) < 1e-6 < distance(maps["mps"])


def test_one_prompt_has_one_plan():
    model = small_model()
    maps = prompt_maps(small_model(text=model.text[:, :1]), random_image(1))
    assert all(distance(T) == pytest.approx(0, abs=1e-5) and np.isnan(diversity(T)) for T in maps.values())


def test_a_record_has_the_mean_over_the_images():
    model, images = small_model(), [random_image(1, seed=seed)[0] for seed in range(2)]
    record = plan_record("run", model, [{"image": image} for image in images])
    each = [distance(prompt_maps(model, image[None])["layer 2"]) for image in images]
    assert record["name"] == "run@plans" and record["images"] == 2
    assert record["plans"]["layer 2"]["distance"] == pytest.approx(np.mean(each))
    alone = plan_record("run", small_model(text=model.text[:, :1]), [{"image": images[0]}])
    assert all(plan["diversity"] is None for plan in alone["plans"].values())
