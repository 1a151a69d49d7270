"""Several ranks over gloo: the method and the collectives."""

import functools

import pytest
import torch
import torch.distributed as dist
from helpers import run_ranks
from oracle import arrangement, build, golden_model, golden_steps, oracle_steps

from moco import distributed

CASES = [  # batch: of each rank
    {"arch": "resnet10", "dim": 16, "K": 24, "m": 0.9, "T": 0.2, "mlp": True, "alpha": 2.0, "n": 2, "batch": 4,
     "size": 32, "steps": 3, "lr": 0.03},
    {"arch": "resnet10", "dim": 16, "K": 25, "m": 0.99, "T": 0.1, "mlp": False, "alpha": 3.0, "n": 1, "batch": 5,
     "size": 32, "steps": 3, "lr": 0.03},
]  # fmt: skip


def share(x, ctx):
    return x.chunk(ctx.world_size)[ctx.rank]


# What each rank does. All these functions run in one process group of each size.


def shuffle_rows(ctx):
    distributed.seed_everything(7, ctx.rank)  # ranks need not draw alike
    rows = torch.arange(ctx.rank * 6, ctx.rank * 6 + 6).float().view(6, 1)
    order = distributed.draw_shuffle(len(rows))
    shuffled = distributed.exchange_rows(rows, order)
    back = distributed.exchange_rows(shuffled, order.argsort())
    return {"rows": rows, "shuffled": shuffled, "back": back, "gathered": distributed.gather(rows)}


def received_bytes(function):
    """The bytes that each exchange of rows hands to this rank during function()."""
    received_bytes, exchange = [], dist.all_to_all_single

    def counted(received, *rest):
        received_bytes.append(received.nbytes)
        return exchange(received, *rest)

    dist.all_to_all_single = counted
    function()
    dist.all_to_all_single = exchange
    return received_bytes


def shuffle_as_gathering(ctx):
    rows = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(ctx.rank))
    shuffled = []
    distributed.seed_shuffles(1, ctx.world_size)
    order = distributed.draw_shuffle(len(rows))
    there = received_bytes(lambda: shuffled.append(distributed.exchange_rows(rows, order)))
    everything = distributed.gather(rows)
    equal = torch.equal(shuffled[0], everything[share(order, ctx)])
    return {"equal": equal, "bytes": there, "all bytes": everything.nbytes}


def key_bytes(ctx):
    """The bytes of the images that reach this rank when keys are encoded, in fp32 and in bf16."""
    images = torch.randn(8, 3, 32, 32)
    models = [build(dim=16, K=8, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    # Of the two exchanges, the second returns the features.
    return [received_bytes(functools.partial(model._encode_keys, [images]))[0] for model in models]


def host_collectives(ctx):
    maxima, joined = distributed.all_reduce_max(ctx.rank, -ctx.rank, 5), distributed.gather_lists([ctx.rank] * ctx.rank)
    return maxima, joined, distributed.resolve_seed(100 - ctx.rank, {})


def train_cases(ctx):
    torch.randperm = arrangement  # of this process, which ends after this
    return [golden_steps(case, golden_model(case), ctx=ctx) for case in CASES]


FUNCTIONS = shuffle_rows, shuffle_as_gathering, key_bytes, host_collectives, train_cases


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request, tmp_path_factory):
    """{function's name: its result on each rank}"""
    return run_ranks(request.param, tmp_path_factory.mktemp("ranks"), *FUNCTIONS)


# What must hold of their results


def test_unshuffle_undoes_shuffle_which_sends_every_row_once(ranks):
    results = ranks["shuffle_rows"]
    everything = torch.arange(6.0 * len(results)).view(-1, 1)
    shuffled = torch.cat([rank["shuffled"] for rank in results])
    assert torch.equal(shuffled.sort(dim=0).values, everything)
    for rank in results:
        assert set(rank["shuffled"].flatten().tolist()) != set(rank["rows"].flatten().tolist())
        assert torch.equal(rank["back"], rank["rows"]) and torch.equal(rank["gathered"], everything)


def test_shuffling_equals_gathering_with_fewer_bytes(ranks):
    for rank in ranks["shuffle_as_gathering"]:
        assert rank["equal"] and rank["bytes"] == [rank["all bytes"] / len(ranks["shuffle_as_gathering"])]


def test_images_for_a_two_byte_encoder_travel_as_two_bytes(ranks):
    assert ranks["key_bytes"] == [[8 * 3 * 32 * 32 * 4, 8 * 3 * 32 * 32 * 2]] * len(ranks["key_bytes"])


def test_hosts_agree_on_maxima_lists_and_rank_0s_number(ranks):
    world = len(ranks["host_collectives"])
    expected = [world - 1, 0, 5], [rank for rank in range(world) for _ in range(rank)], 100
    assert ranks["host_collectives"] == [expected] * world


def test_every_step_of_several_ranks_equals_the_oracle(ranks):
    for number, case in enumerate(CASES):
        for result, expected in zip(ranks["train_cases"], oracle_steps(case, world=len(ranks["train_cases"]))):
            assert result[number]["loss"] == pytest.approx(expected["loss"], abs=1e-7, rel=0)
            torch.testing.assert_close(result[number]["logits"], expected["logits"], atol=1e-7, rtol=0)
            assert result[number]["queue_ptr"] == expected["queue_ptr"]
