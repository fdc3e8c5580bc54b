"""Cosine, score map and their gradient."""

import pytest
import torch
from helpers import close

from otseg.mps import cosine, plan_score, score_map
from otseg.mpsa import uniform_plan
from otseg.ot import sinkhorn

b, k, n, m, d = 2, 5, 4, 30, 16


def inputs(dtype=torch.float32, n=n, k=k):
    rng = torch.Generator().manual_seed(0)
    return torch.randn(b, m, d, generator=rng).to(dtype), torch.randn(b, k, n, d, generator=rng).to(dtype)


def test_cosine():
    x, q = inputs()
    S = cosine(x, q)
    assert S.shape == (b, k, m, n) and S.abs().max() <= 1 + 1e-6
    close(S, torch.cosine_similarity(x[:, None, :, None], q[:, :, None], dim=-1))
    close(cosine(3 * x, 0.1 * q), S)


def test_score_is_the_definition():
    "One problem at a time, written out."
    x, q = inputs()
    score = score_map(x, q, eps=0.1)
    for i in range(b):
        for c in range(k):
            S = torch.nn.functional.normalize(x[i], dim=-1) @ torch.nn.functional.normalize(q[i, c], dim=-1).T  # (m, n)
            close(score[i, c], m * n * (sinkhorn(1 - S, eps=0.1) * S).sum(-1))


def test_one_prompt_scores_its_cosine():
    x, q = inputs(n=1)
    close(score_map(x, q), cosine(x, q)[..., 0])


def test_equal_prompts_add_their_cosines():
    x, q = inputs(n=1)
    close(score_map(x, q.expand(b, k, 6, d)), 6 * cosine(x, q)[..., 0])


def test_large_eps_adds_the_cosines():
    x, q = inputs()
    S = cosine(x, q)
    close(score_map(x, q, eps=1e5), S.sum(-1), 1e-4)
    close(plan_score(S, uniform_plan(1 - S)), S.sum(-1))


def test_a_smaller_eps_has_a_higher_score():
    "The plan maximises similarity plus eps times entropy; the uniform plan has the largest entropy."
    S = cosine(*inputs())
    scores = [(sinkhorn(1 - S, eps=eps) * S).sum((-2, -1)) for eps in (0.02, 0.1, 1)] + [S.mean((-2, -1))]
    assert all((higher > lower).all() for higher, lower in zip(scores, scores[1:]))


def test_permutations():
    x, q = inputs()
    score, order = score_map(x, q), torch.tensor([4, 2, 0, 1, 3])
    close(score_map(x, q[:, order]), score[:, order])
    close(score_map(x, q[:, :, [2, 0, 3, 1]]), score)
    close(score_map(x.flip(1), q), score.flip(-1))
    close(score_map(x[:1], q[:1]), score[:1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_scored_in_float32(dtype):
    x, q = inputs(dtype)
    score = score_map(x, q)
    assert score.dtype == torch.float32 and torch.equal(score, score_map(x.float(), q.float()))


def test_autocast_changes_nothing():
    x, q = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        cast = score_map(x, q)
    assert cast.dtype == torch.float32 and torch.equal(cast, score_map(x, q))


def test_gradient():
    "It passes through the cosine and the plan, and is orthogonal to each embedding, whose length does not matter."
    x, q = (t[:1, :8].double().requires_grad_() for t in inputs(n=3, k=2))
    weight = torch.randn(1, 2, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def plan(C):
        return sinkhorn(C, eps=0.2, tol=1e-14)

    def score(x, q):
        S = cosine(x, q)
        return plan_score(S, plan(1 - S))

    assert torch.autograd.gradcheck(score, (x, q), eps=1e-5, atol=1e-6)
    gx, gq = torch.autograd.grad((score_map(x, q) * weight).sum(), (x, q))
    assert (gx * x).sum(-1).abs().max() < 1e-6 and (gq * q).sum(-1).abs().max() < 1e-6


def test_channels_must_agree():
    x, q = inputs()
    with pytest.raises(ValueError, match="pixels have 16 channels but queries 12"):
        score_map(x, q[..., :12])


def test_a_zero_embedding():
    "It scores 0 and causes no NaN."
    x, q = inputs()
    x[0, 3] = 0
    x.requires_grad_()
    score = score_map(x, q)
    score.sum().backward()
    assert (score[0, :, 3] == 0).all() and score.isfinite().all() and x.grad.isfinite().all()
