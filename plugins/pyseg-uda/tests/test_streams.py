"""Four streams against blocks that are written out stream by stream."""

import math

import pytest
import torch
from pyseg_uda.streams import attended, four_streams, mix_transformer

from pyseg.errors import PysegError

SIZES = [(64, 96), (40, 56), (70, 33)]  # the last ones leave remainders in every reduction


def images(seed, size, count=2):
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(seed))


def heads_of(attention, x, size):
    """Queries, keys and values of one head after the other, by matrices."""
    n, _, width = x.shape
    source = x
    if attention.reduction > 1:
        plane = x.transpose(1, 2).reshape(n, width, *size)
        step = attention.reduction
        plane = torch.nn.functional.pad(
            plane, (0, max(0, step - size[1]), 0, max(0, step - size[0]))
        )
        source = attention.norm(attention.sr(plane).flatten(2).transpose(1, 2))
    q, kv = attention.q(x), attention.kv(source)
    each = width // attention.heads
    for h in range(attention.heads):
        own = slice(h * each, (h + 1) * each)
        yield q[..., own], kv[..., :width][..., own], kv[..., width:][..., own]


def attend(attention, queries, others, size, detach=False):
    """One stream's attention with queries of one and keys and values of another."""
    found = []
    for (q, _, _), (_, k, v) in zip(
        heads_of(attention, queries, size), heads_of(attention, others, size), strict=True
    ):
        q = q.detach() if detach else q
        scores = torch.einsum("nic,njc->nij", q, k) / math.sqrt(q.shape[2])
        weights = scores.exp() / scores.exp().sum(2, keepdim=True)
        found.append(torch.einsum("nij,njc->nic", weights, v))
    return attention.proj(torch.cat(found, 2))


def plain_streams(trunk, source, mixed):
    s, m, m_to_s, s_to_m = source, mixed, source, mixed
    outputs = [[], [], [], []]
    for embed, blocks, norm in zip(trunk.embeds, trunk.stages, trunk.norms, strict=True):
        (s, size), (m, _), (m_to_s, _), (s_to_m, _) = (embed(x) for x in (s, m, m_to_s, s_to_m))
        for block in blocks:
            one, other = block.norm1(s), block.norm1(m)
            found = (
                attend(block.attn, one, one, size),
                attend(block.attn, other, other, size),
                attend(block.attn, other, one, size, detach=True),
                attend(block.attn, one, other, size, detach=True),
            )
            after = [x + y for x, y in zip((s, m, m_to_s, s_to_m), found, strict=True)]
            s, m, m_to_s, s_to_m = (x + block.mlp(block.norm2(x), size) for x in after)
        maps = [norm(x).transpose(1, 2).unflatten(2, size) for x in (s, m, m_to_s, s_to_m)]
        s, m, m_to_s, s_to_m = maps
        for stream, x in zip(outputs, maps, strict=True):
            stream.append(x)
    return outputs


@pytest.mark.parametrize("size", SIZES)
def test_streams_and_their_gradients_are_those_of_the_equations(transformer, size):
    trunk = transformer().network.trunk
    source, mixed = images(0, size), images(1, size)
    found, _ = four_streams(trunk, source, mixed)
    wanted = plain_streams(trunk, source, mixed)
    weights = [torch.randn_like(x) for stream in wanted for x in stream]
    gradients = []
    for streams in (found, wanted):
        flat = [x for stream in streams for x in stream]
        for one, other in zip(flat, [x for stream in wanted for x in stream], strict=True):
            assert torch.allclose(one, other, atol=1e-4)
        total = sum((x * w).sum() for x, w in zip(flat, weights, strict=True))
        gradients.append(torch.autograd.grad(total, list(trunk.parameters())))
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, atol=1e-3 * other.abs().max().item() + 1e-4)


def test_the_first_streams_are_the_trunks_own(transformer):
    trunk = transformer().network.trunk
    source, mixed = images(0, (64, 96)), images(1, (64, 96))
    (own, other, _, _), attention = four_streams(trunk, source, mixed)
    seen, maps = attended(trunk, mixed)
    for streams, x in ((own, source), (other, mixed), (seen, mixed)):
        for one, wanted in zip(streams, trunk(x), strict=True):
            assert torch.allclose(one, wanted, atol=1e-5)
    for one, wanted in zip(attention, maps, strict=True):
        assert torch.allclose(one.weights, wanted.weights, atol=1e-6)
        assert (one.queries, one.keys) == (wanted.queries, wanted.keys)
        assert one.weights.shape[2:] == tuple(h * w for h, w in (one.queries, one.keys))
        assert torch.allclose(one.weights.sum(3), torch.ones(one.weights.shape[:3]))


def test_equal_images_give_four_equal_streams(transformer):
    trunk = transformer().network.trunk
    x = images(0, (40, 56))
    streams, _ = four_streams(trunk, x, x)
    for stream in streams[1:]:
        for one, other in zip(stream, streams[0], strict=True):
            assert torch.allclose(one, other, atol=1e-5)


def test_no_gradient_goes_through_queries_across(transformer):
    """With one block a stream across depends on the queries' weights by its queries alone."""
    trunk = transformer(depths=(1, 0, 0, 0)).network.trunk
    source = images(0, (40, 56)).requires_grad_()
    mixed = images(1, (40, 56)).requires_grad_()
    streams, _ = four_streams(trunk, source, mixed)
    queries = list(trunk.stages[0][0].attn.q.parameters())
    for number, other in ((2, mixed), (3, source)):
        asked = (other, *queries, trunk.stages[0][0].attn.kv.weight)
        *none, some = torch.autograd.grad(
            streams[number][0].square().sum(), asked, retain_graph=True, allow_unused=True
        )
        assert all(x is None or not x.any() for x in none) and some.any()
    grads = torch.autograd.grad(streams[0][0].square().sum(), queries)
    assert grads[0].any()  # the source's own stream has them


def test_other_networks_are_refused(convolutional):
    with pytest.raises(PysegError, match=r"needs a mix transformer.*is a Small; method='self-tr"):
        mix_transformer(convolutional())
