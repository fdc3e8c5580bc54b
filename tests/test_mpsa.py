"""Attention layers and decoder: attended values and scores, gradients, dropout, initialisation."""

import pytest
import torch
import torch.nn.functional as F
from helpers import close
from torch import nn

from otseg.mps import cosine, score_map
from otseg.mpsa import ATTENTIONS, MPSA, Decoder, SoftmaxAttention, gather_values, init_identity_, uniform_plan
from otseg.ot import sinkhorn

b, k, n, m, d = 2, 5, 4, 30, 16
attentions = pytest.mark.parametrize("attention", ATTENTIONS)


def inputs(n=n):
    rng = torch.Generator().manual_seed(0)
    return torch.randn(b, k, n, d, generator=rng), torch.randn(b, m, d, generator=rng)


def make(kind=Decoder, *args, **options):
    torch.manual_seed(0)
    return kind(d, *args, **options).eval()


# one layer


def test_gather_values():
    T, v = torch.rand(b, k, m, n), torch.randn(b, m, d)
    close(gather_values(T, v), torch.einsum("bkmn,bmd->bknd", T, v))


@torch.no_grad()
def test_mpsa_equals_its_definition():
    layer, (q, x) = make(MPSA, eps=0.1), inputs()
    out, score = layer(q, x)
    S = cosine(layer.k(x), layer.q(q))
    T = sinkhorn(1 - S, eps=0.1)
    close(out, layer.proj(torch.einsum("bkmn,bmd->bknd", T, layer.v(x))))
    close(score, m * n * (T * S).sum(-1))


def test_each_prompt_gathers_its_own_mass():
    "1/n each: with values and output projection the identity, constant pixels give pixel / n."
    layer, (q, x) = make(MPSA), inputs()
    with torch.no_grad():
        for linear in layer.v, layer.proj:
            nn.init.eye_(linear.weight), nn.init.zeros_(linear.bias)
        x = x[:, :1].expand(b, m, d)
        close(layer(q, x)[0], (x[:, None, :1] / n).expand(b, k, n, d))


@torch.no_grad()
def test_softmax_attention_equals_pytorch():
    layer, (q, x) = make(SoftmaxAttention, heads=4), inputs()
    reference = nn.MultiheadAttention(d, 4, batch_first=True).eval()
    reference.in_proj_weight.copy_(torch.cat([layer.q.weight, layer.k.weight, layer.v.weight]))
    reference.in_proj_bias.copy_(torch.cat([layer.q.bias, layer.k.bias, layer.v.bias]))
    reference.out_proj.load_state_dict(layer.proj.state_dict())
    out, score = layer(q, x)
    close(out, reference(q.flatten(1, 2), x, x)[0].unflatten(1, (k, n)))
    heads = [
        (query @ key.mT) / 2 for query, key in zip(layer.q(q).chunk(4, -1), layer.k(x)[:, None].chunk(4, -1))
    ]  # sqrt(d / 4) = 2
    close(score, torch.stack(heads).mean((0, 3)))


def test_heads_must_divide():
    with pytest.raises(ValueError, match="3 heads do not divide the embedding size 16"):
        SoftmaxAttention(d, heads=3)


@torch.no_grad()
def test_uniform_is_the_limit_of_large_eps():
    q, x = inputs()
    close(make(attention="uniform")(q, x), make(attention="mpsa", eps=1e5)(q, x), 1e-4)
    C = torch.rand(2, m, n)
    close(uniform_plan(C), torch.full((2, m, n), 1 / (m * n)))


# the decoder


@attentions
@pytest.mark.parametrize("depth", [1, 2, 3, 5])
@torch.no_grad()
def test_masks_equal_their_definition(attention, depth):
    "Last score times the geometric mean of the other layers' sigmoids."
    decoder, (q, x) = make(depth=depth, attention=attention), inputs()
    masks, agreement = decoder(q, x), 1
    for layer in decoder.layers:
        out, score = layer.attn(q, x)
        q = layer.norm1(q + out)
        q = layer.norm2(q + layer.linear2(F.relu(layer.linear1(q))))
        agreement = agreement * score.sigmoid() ** (1 / (depth - 1))
    close(masks, decoder.score(q, x) * agreement)
    assert masks.shape == (b, k, m)


@attentions
@torch.no_grad()
def test_one_prompt(attention):
    assert make(attention=attention)(*inputs(n=1)).shape == (b, k, m)


@attentions
@torch.no_grad()
def test_permutations(attention):
    decoder, (q, x) = make(attention=attention), inputs()
    masks, order = decoder(q, x), torch.tensor([4, 2, 0, 1, 3])
    close(decoder(q[:, order], x), masks[:, order])
    close(decoder(q[:, :, [2, 0, 3, 1]], x), masks)
    close(decoder(q, x.flip(1)), masks.flip(-1))
    close(decoder(q[1:], x[1:]), masks[1:])
    close(decoder(q[:, :2], x), masks[:, :2])  # classes do not see each other


@attentions
def test_every_parameter_learns(attention):
    decoder, (q, x) = make(attention=attention).train(), inputs()
    decoder(q, x).square().sum().backward()
    for name, p in decoder.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0, name


@attentions
def test_autocast(attention):
    "Plans and cosines stay in float32, masks close to those of full precision, gradients in the weights' dtype."
    dtypes = set()

    def plan(C, eps):
        dtypes.add(C.dtype)
        return sinkhorn(C, eps=eps)

    decoder, (q, x) = make(attention=attention, plan=plan), inputs()
    with torch.autocast("cpu", torch.bfloat16):
        masks = decoder(q, x)
    masks.float().sum().backward()
    close(masks.float(), decoder(q, x), 0.1)
    assert dtypes == ({torch.float32} if attention == "mpsa" else set())
    assert all(p.grad.dtype == torch.float32 for p in decoder.parameters())


@attentions
def test_dropout_only_while_training(attention):
    decoder, (q, x) = make(attention=attention), inputs()
    assert torch.equal(decoder(q, x), decoder(q, x))
    decoder.train()
    assert not torch.equal(decoder(q, x), decoder(q, x))
    still = make(attention=attention, dropout=0.0)
    assert torch.equal(still(q, x), still.train()(q, x))


def seeded(layer, q, x):
    torch.manual_seed(3)
    return layer(q, x)[0]


@torch.no_grad()
def test_dropout_draws_the_same_numbers_as_the_function():
    "The modules give the same result and leave the generator in the same state as `F.dropout`."
    layer, (q, x) = make(MPSA, dropout=0.3).train(), inputs()
    ours, state = seeded(layer, q, x), torch.get_rng_state()
    torch.manual_seed(3)
    T = F.dropout(layer.transport(q, x)[0], 0.3, training=True)
    assert torch.equal(ours, layer.proj(gather_values(T, layer.v(x)))) and torch.equal(torch.get_rng_state(), state)

    layer = make(SoftmaxAttention, dropout=0.3).train()
    ours, state = seeded(layer, q, x), torch.get_rng_state()
    torch.manual_seed(3)
    A = F.dropout(layer.logits(q, x).softmax(-1), 0.3, training=True)
    out = torch.einsum("baknm,bmae->bknae", A, layer.v(x).unflatten(-1, (layer.heads, -1))).flatten(-2)
    assert torch.equal(ours, layer.proj(out)) and torch.equal(torch.get_rng_state(), state)


@attentions
def test_dropout_can_be_switched_off_by_module_type(attention):
    decoder, (q, x) = make(attention=attention, dropout=0.5), inputs()
    calm = decoder(q, x)
    for module in decoder.train().modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    assert torch.equal(decoder(q, x), calm)


@pytest.mark.parametrize("kind", [MPSA, SoftmaxAttention])
def test_state_dict_holds_four_projections(kind):
    assert {name.split(".")[0] for name in make(kind).state_dict()} == {"q", "k", "v", "proj"}


@pytest.mark.parametrize("kind", [MPSA, SoftmaxAttention])
def test_dropout_changes_the_values_and_not_the_score(kind):
    layer, (q, x) = make(kind, dropout=0.5), inputs()
    (out, score), (dropped, same) = layer(q, x), layer.train()(q, x)
    assert not torch.allclose(dropped, out) and torch.equal(same, score)


def test_unknown_attention():
    with pytest.raises(ValueError, match="attention = 'flash' is not one of mpsa, uniform, softmax"):
        Decoder(d, attention="flash")


@attentions
@torch.no_grad()
def test_attention_weights_sum_to_one(attention):
    decoder, (q, x) = make(attention=attention), inputs()
    weights = decoder.attention_weights(q, x)
    assert len(weights) == 3
    for A in weights:
        close(A.sum(-2), torch.ones(b, k, n))


@pytest.mark.parametrize("depth", [0, -1])
def test_depth_is_at_least_one(depth):
    with pytest.raises(ValueError, match=f"depth = {depth} must be at least 1"):
        Decoder(d, depth)


# initialisation with the identity


@torch.no_grad()
def test_init_identity_():
    "Every layer scores layer-normalised queries with the cosines of queries and pixels."
    decoder, (q, x) = make(), inputs()
    init_identity_(decoder)
    q = F.layer_norm(q, (d,))  # a layer whose branches are zero does not change it
    score = score_map(x, q)
    close(decoder(q, x), score * score.sigmoid(), 1e-4)


@attentions
def test_all_parameters_change_within_two_steps(attention):
    decoder, (q, x) = make(attention=attention), inputs()
    init_identity_(decoder)
    before = {name: p.detach().clone() for name, p in decoder.named_parameters()}
    opt = torch.optim.SGD(decoder.parameters(), 0.1)
    for _ in range(2):
        opt.zero_grad()
        decoder(q, x).square().mean().backward()
        opt.step()
    assert not [name for name, p in decoder.named_parameters() if torch.equal(p, before[name])]
