"""Batches that one seed determines, crops, and labels that training may see."""

from collections import Counter

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from otseg.benchmarks import BenchmarkSource, load_benchmark
from otseg.data import UNLABELLED, Benchmark, EndlessBatches, TrainCrops, generator, label_table
from otseg.data import random_crop as place_of_crop
from otseg.images import IGNORE, NORMALIZATIONS, normalize
from otseg.recipes import resolve

MEAN, STD = NORMALIZATIONS["imagenet"]


class Noise(Dataset):
    "Images of several sizes; a pixel's red channel is its label / 10."

    def __len__(self):
        return 7

    def __getitem__(self, i):
        label = torch.randint(5, (20 + i, 30 - i), generator=generator(i))
        return {"image": (label / 10).expand(3, -1, -1), "label": label}


def random_crop(image, label, size, rng, **options):
    "Image and label at the place of a crop."
    place = place_of_crop(label, size, rng, **options)
    return image[:, place[0], place[1]], label[place]


def plain(size, **changes):
    "A recipe whose crops are crops and nothing else."
    return resolve("digits", image_size=size, stride=size, **changes)


# the order of images


@pytest.mark.parametrize("size, batch", [(10, 4), (4, 4), (3, 8), (7, 3), (1, 2)])
def test_every_epoch_shows_every_image_once(size, batch):
    keys = [
        key for keys in EndlessBatches(size, batch, seed=0, stop=size * 3) for key in keys
    ]  # batch whole epochs, 3 times
    assert len(keys) == 3 * size * batch and Counter(keys) == Counter(
        (e, i) for e in range(3 * batch) for i in range(size)
    )
    assert [e for e, _ in keys] == sorted(e for e, _ in keys)


def test_epochs_and_seeds_differ():
    order = lambda seed, epoch: EndlessBatches(50, 5, seed, 1).order(epoch)
    assert (
        order(0, 0) == order(0, 0)
        and order(0, 0) != order(0, 1)
        and order(0, 0) != order(1, 0)
        and order(0, 1) != order(1, 0)
    )


@pytest.mark.parametrize("start", [0, 1, 5, 12])
def test_a_resumed_run_sees_what_the_whole_one_does(start):
    whole = list(EndlessBatches(10, 4, seed=1, stop=12))
    rest = EndlessBatches(10, 4, seed=1, stop=12, start=start)
    assert list(rest) == whole[start:] and len(rest) == 12 - start


@pytest.mark.parametrize("world", [1, 2, 4])
def test_processes_share_the_batch(world):
    whole = list(EndlessBatches(10, 8, seed=1, stop=6))
    parts = [list(EndlessBatches(10, 8, seed=1, stop=6, rank=rank, world=world)) for rank in range(world)]
    for batch, *shares in zip(whole, *parts):
        assert sorted(key for share in shares for key in share) == sorted(batch) and {len(s) for s in shares} == {
            8 // world
        }


def test_a_batch_that_cannot_be_shared():
    with pytest.raises(ValueError, match="batch of 6 images cannot be shared by 4 processes"):
        EndlessBatches(10, 6, 0, 1, world=4)


def test_generators_differ():
    first = lambda *key: torch.randint(2**40, (), generator=generator(*key)).item()
    keys = [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 1, 2), (0, 2, 1), (2, 1, 0)]
    assert len({first(*key) for key in keys}) == len(keys) and first(3, 4) == first(3, 4)


# crops


@pytest.mark.parametrize("workers", [0, 2])
def test_a_key_determines_the_crop(workers):
    "Whatever was drawn before, and in whatever process."
    crops = TrainCrops(Noise(), plain(16, seed=3), label_table(5, (0, 1, 2, 3, 4)))
    batches = EndlessBatches(len(crops), 4, seed=3, stop=4)
    torch.manual_seed(workers)
    for keys, batch in zip(batches, DataLoader(crops, batch_sampler=batches, num_workers=workers)):
        torch.rand(5)
        for key, image, label in zip(keys, batch["image"], batch["label"]):
            assert torch.equal(image, crops[key]["image"]) and torch.equal(label, crops[key]["label"])


def test_crops_differ_by_epoch_and_seed():
    table = label_table(5, (0, 1, 2, 3, 4))
    views = [TrainCrops(Noise(), plain(10, seed=seed), table)[epoch, 2]["label"] for seed in (0, 1) for epoch in (0, 1)]
    assert not any(torch.equal(a, b) for i, a in enumerate(views) for b in views[:i])


def test_a_crop_is_normalised_and_relabelled():
    image, label, *_ = TrainCrops(Noise(), plain(10), label_table(5, (1, 3), UNLABELLED))[0, 1].values()
    red = (image[0] * STD[0] + MEAN[0]) * 10  # the label before
    want = red.round().long()
    assert torch.equal(label, torch.where((want == 1) | (want == 3), want, UNLABELLED))
    assert image.dtype == torch.float32 and label.dtype == torch.int64


def test_image_and_label_are_cut_alike():
    label = torch.randint(9, (40, 50), generator=generator(0))
    image, part = random_crop(label.float().expand(3, -1, -1), label, 16, generator(1))
    assert part.shape == (16, 16) and torch.equal(image, part.float().expand(3, -1, -1))


def test_every_corner_is_reached():
    label = torch.arange(24).reshape(4, 6)
    corners = {random_crop(label.expand(3, -1, -1), label, 3, generator(i))[1][0, 0].item() for i in range(200)}
    assert corners == {y * 6 + x for y in range(2) for x in range(4)}


@pytest.mark.parametrize("shape, cut", [((8, 40), (8, 16)), ((40, 8), (16, 8)), ((8, 8), (8, 8)), ((16, 16), (16, 16))])
def test_smaller_images(shape, cut):
    "A side shorter than the crop stays whole."
    label = torch.arange(shape[0] * shape[1]).reshape(shape) % 7
    image, part = random_crop(label.expand(3, -1, -1), label, 16, generator(0))
    assert image.shape == (3, *cut) and part.shape == cut


def test_no_class_dominates_a_crop():
    "One class left, another right: a crop astride the border is found."
    label = torch.zeros(20, 60, dtype=torch.long)
    label[:, 30:] = 1
    label[:4] = IGNORE  # does not count
    for i in range(50):
        _, part = random_crop(label.expand(3, -1, -1), label, 20, generator(i), redraws=99)
        count = part[part != IGNORE].bincount()
        assert len(count) == 2 and count.max() < 0.75 * count.sum()


RELABELLED = {
    "erased": lambda label: label.masked_fill(label >= 3, IGNORE),
    "merged": lambda label: label.clamp(max=3),
    "permuted": lambda label: torch.where(label >= 3, 7 - label, label),
}  # changes of the unseen classes 3 and 4


def views_of_blocks(change, unseen_as, crop_labels):
    "Training views of an image of random blocks after a change of its labels, stacked."
    blocks = torch.randint(5, (4, 5), generator=generator(1)).repeat_interleave(30, 0).repeat_interleave(30, 1)
    image, recipe = torch.rand(3, 120, 150, generator=generator(0)), plain(40, flip_prob=0.5, crop_labels=crop_labels)
    crops = TrainCrops([{"image": image, "label": change(blocks)}], recipe, label_table(5, (0, 1, 2), unseen_as))
    return torch.stack([torch.cat([crops[i, 0]["image"], crops[i, 0]["label"][None]]) for i in range(40)])


@pytest.mark.parametrize(
    "unseen_as, name",
    [(IGNORE, name) for name in RELABELLED] + [(UNLABELLED, "merged"), (UNLABELLED, "permuted")],
)
def test_crops_do_not_depend_on_labels_of_unseen_classes(unseen_as, name):
    "A transductive run knows which pixels belong to some unseen class, so there they must not be erased."
    before, after = (views_of_blocks(f, unseen_as, "training") for f in (lambda label: label, RELABELLED[name]))
    assert torch.equal(before, after)


@pytest.mark.parametrize("name", ["erased", "merged"])
def test_the_official_crop_rule_depends_on_labels_of_unseen_classes(name):
    before, after = (views_of_blocks(f, IGNORE, "all") for f in (lambda label: label, RELABELLED[name]))
    assert not torch.equal(before, after)


@pytest.mark.parametrize("fill", [2, IGNORE, UNLABELLED])
def test_the_last_try_is_kept(fill):
    "One class everywhere, or none at all: a crop all the same, after the given number of draws."
    label, rng = torch.full((20, 20), fill), generator(0)
    _, part = random_crop(label.expand(3, -1, -1), label, 8, rng, redraws=2)
    assert part.shape == (8, 8)
    other = generator(0)
    torch.randint(13, (6,), generator=other)  # three times y and x
    assert torch.randint(100, (), generator=rng) == torch.randint(100, (), generator=other)


def test_normalize():
    image = torch.rand(2, 3, 4, 5)
    want = torch.stack([(image[:, c] - MEAN[c]) / STD[c] for c in range(3)], 1)
    assert torch.allclose(normalize(image), want) and torch.allclose(normalize(image[0]), want[0])
    assert not torch.allclose(normalize(image, "clip"), normalize(image), atol=1e-3)


# labels


@pytest.mark.parametrize("unseen_as", [IGNORE, UNLABELLED])
@pytest.mark.parametrize("renumber", [False, True])
def test_label_table(unseen_as, renumber):
    "Seen classes keep their label or become rows of text[seen]; what is no class is ignored."
    seen, table = (0, 2, 3, 6), label_table(8, (0, 2, 3, 6), unseen_as, renumber)
    assert table.shape == (256,) and table.dtype == torch.int64
    for old, new in enumerate(table.tolist()):
        assert new == ((seen.index(old) if renumber else old) if old in seen else unseen_as if old < 8 else IGNORE)


# benchmarks


def test_seen_is_what_is_not_unseen():
    bench = Benchmark("b", ("a", "b", "c", "d"), (1, 3), Noise, None)
    assert bench.seen == (0, 2)


@pytest.mark.parametrize("split", [0, 1, 2])
def test_digits(split):
    bench = load_benchmark(BenchmarkSource("digits", split))
    assert bench.name == "digits" and len(bench.classes) == 16 and len(bench.unseen) == 4
    assert sorted(bench.seen + bench.unseen) == list(range(16))


@pytest.mark.parametrize(
    "args, says",
    [
        (("cocoa", 0), "dataset = 'cocoa' is not one of digits, ade, camvid, .*, folder"),
        (("digits", 3), "split is 3"),
        (("digits", -1), "split is -1"),
    ],
)
def test_unknown_benchmarks(args, says):
    with pytest.raises(ValueError, match=says):
        load_benchmark(BenchmarkSource(*args))
