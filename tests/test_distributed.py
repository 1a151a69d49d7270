import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from moco import distributed, launch
from moco.builder import MoCo
from moco.encoders import build_encoder
from moco.loader import GlobalBatchSampler
from moco.errors import UsageError

GLOBAL_BATCH = 8


def rank_main(rank, world, port, folder, function):
    ctx = distributed.DistContext(rank, world, rank, world)
    torch.set_num_threads(1)
    launch._join_and_run(ctx, f"tcp://127.0.0.1:{port}", "nccl", save_result, (function, folder))


def save_result(ctx, function, folder):
    torch.save(function(ctx), os.path.join(folder, f"{ctx.rank}.pt"))


def run_ranks(world, folder, function):
    """What function(ctx) gives on each rank of a gloo group of `world` processes."""
    mp.spawn(rank_main, (world, launch.free_port(), str(folder), function), nprocs=world)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


def share(x, ctx):
    return x.chunk(ctx.world_size)[ctx.rank]


def steps_in_eval_mode(ctx):
    """Three steps on a fixed global batch with BatchNorm in eval mode, where sharding must not matter."""
    torch.manual_seed(0)
    model = MoCo(lambda num_classes: build_encoder("resnet10", num_classes), dim=16, K=20, m=0.9, T=0.2, alpha=2.0).eval()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    wrapped = torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False) if dist.is_initialized() else model
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(3):
        images = torch.randn(3, GLOBAL_BATCH, 3, 32, 32, generator=generator)
        query, key, negative = (share(x, ctx) for x in images)
        logits, labels = wrapped(query, key, negative.unsqueeze(1))
        loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append((distributed.all_reduce(loss.detach().clone()) / ctx.world_size).item())
    return {"losses": losses, "queue": model.queue, "pointer": model.queue_ptr, "fc": model.encoder_q.fc.weight.detach()}


@pytest.mark.parametrize("world", [2, 4])
def test_world_size_changes_neither_queue_nor_loss(world, tmp_path):
    alone = steps_in_eval_mode(distributed.DistContext())
    ranks = run_ranks(world, tmp_path, steps_in_eval_mode)
    assert alone["pointer"].item() == 3 * GLOBAL_BATCH % 20           # K is no multiple of the batch: it wrapped
    for rank in ranks:
        assert torch.equal(rank["queue"], ranks[0]["queue"]) and torch.equal(rank["pointer"], alone["pointer"])
        assert rank["losses"] == pytest.approx(alone["losses"], abs=1e-5)
        torch.testing.assert_close(rank["queue"], alone["queue"], atol=1e-5, rtol=0)
        torch.testing.assert_close(rank["fc"], alone["fc"], atol=1e-5, rtol=0)


def shuffle_rows(ctx):
    distributed.seed_everything(7, ctx.rank)                        # ranks need not draw alike
    rows = torch.arange(ctx.rank * 6, ctx.rank * 6 + 6).float().view(6, 1)
    shuffled, order = distributed.batch_shuffle(rows)
    return {"rows": rows, "shuffled": shuffled, "back": distributed.batch_unshuffle(shuffled, order),
            "gathered": distributed.gather(rows)}


def uneven_rows(ctx):
    return distributed.gather_uneven(torch.full((2 * ctx.rank + 1, 3), float(ctx.rank)))


@pytest.mark.parametrize("world", [1, 3])
def test_tensors_of_uneven_length_are_joined_by_rank(world, tmp_path):
    expected = torch.cat([torch.full((2 * rank + 1, 3), float(rank)) for rank in range(world)])
    assert all(torch.equal(rank, expected) for rank in run_ranks(world, tmp_path, uneven_rows))


@pytest.mark.parametrize("world", [1, 2, 4])
def test_unshuffle_undoes_shuffle_and_shuffle_deals_every_row_once(world, tmp_path):
    ranks = run_ranks(world, tmp_path, shuffle_rows)
    everything = torch.arange(6.0 * world).view(-1, 1)
    dealt = torch.cat([rank["shuffled"] for rank in ranks])
    assert torch.equal(dealt.sort(dim=0).values, everything)
    if world > 1:
        assert not torch.equal(dealt, everything)
        strangers = sum(set(rank["shuffled"].flatten().tolist()) != set(rank["rows"].flatten().tolist()) for rank in ranks)
        assert strangers == world                                     # each rank's BatchNorm sees other images
    for rank in ranks:
        assert torch.equal(rank["back"], rank["rows"]) and torch.equal(rank["gathered"], everything)


def shuffle_and_count(ctx):
    """A shuffle there and back, the same by gathering the global batch, and the bytes the process group handed over."""
    rows = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(ctx.rank))
    came_in, exchange = [], dist.all_to_all_single

    def counted(received, *rest):
        came_in.append(received.nbytes)
        return exchange(received, *rest)
    dist.all_to_all_single = counted
    distributed.seed_shuffles(1, ctx.world_size)
    shuffled, order = distributed.batch_shuffle(rows)
    everything = distributed.gather(rows)
    by_gathering = everything[order.chunk(ctx.world_size)[ctx.rank]]
    return {"equal": torch.equal(shuffled, by_gathering), "back": torch.equal(distributed.batch_unshuffle(shuffled, order), rows),
            "bytes": came_in, "gathered": everything.nbytes}


@pytest.mark.parametrize("world", [2, 4])
def test_shuffling_equals_gathering_and_moves_every_image_once(world, tmp_path):
    ranks = run_ranks(world, tmp_path, shuffle_and_count)
    assert all(rank["equal"] and rank["back"] for rank in ranks)
    assert all(rank["bytes"] == 2 * [rank["gathered"] / world] for rank in ranks)         # there and back


def key_bytes(ctx):
    """The bytes of the images that reach this rank when keys are encoded, in fp32 and in bf16."""
    images, came_in, exchange = torch.randn(8, 3, 32, 32), [], dist.all_to_all_single

    def counted(received, *rest):
        came_in.append(received.numel() * received.element_size())
        return exchange(received, *rest)
    dist.all_to_all_single = counted
    for dtype in (torch.float32, torch.bfloat16):
        model = MoCo(lambda num_classes: build_encoder("resnet10", num_classes), dim=16, K=8, dtype=dtype)
        assert model._encode_key(images).dtype == torch.float32
    return came_in[::2]                                               # the others are features on their way back


def test_images_for_a_two_byte_encoder_travel_as_two_bytes(tmp_path):
    for full, half in run_ranks(2, tmp_path, key_bytes):
        assert full == 8 * 3 * 32 * 32 * 4 and half == full / 2


def shuffled_statistics(ctx):
    """The key of an image whose rank holds a batch unlike the others', with BatchNorm in train mode."""
    torch.manual_seed(0)
    model = MoCo(lambda num_classes: build_encoder("resnet10", num_classes), dim=16, K=8)
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(3)) * torch.arange(1, 9).view(-1, 1, 1, 1)
    distributed.seed_shuffles(5)
    return model._encode_key(share(images, ctx))


def test_keys_are_normalised_with_the_statistics_of_a_shuffled_batch(tmp_path):
    keys = torch.cat(run_ranks(2, tmp_path, shuffled_statistics))
    torch.manual_seed(0)
    model = MoCo(lambda num_classes: build_encoder("resnet10", num_classes), dim=16, K=8)
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(3)) * torch.arange(1, 9).view(-1, 1, 1, 1)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(distributed.derive_seed(5)))  # both ranks'
    expected = torch.empty_like(keys)
    for half in order.chunk(2):
        expected[half] = F.normalize(model.encoder_k(images[half]), dim=1).detach()
    torch.testing.assert_close(keys, expected, atol=1e-5, rtol=0)
    unshuffled = torch.cat([F.normalize(model.encoder_k(half), dim=1).detach() for half in images.chunk(2)])
    assert not torch.allclose(keys, unshuffled, atol=1e-3)


def exchange_on_the_host(ctx):
    return distributed.all_reduce_max(ctx.rank, -ctx.rank, 5), distributed.gather_lists([ctx.rank] * ctx.rank)


@pytest.mark.parametrize("world", [1, 3])
def test_hosts_agree_on_maxima_and_join_their_lists(world, tmp_path):
    expected = [world - 1, 0, 5], [rank for rank in range(world) for _ in range(rank)]
    assert run_ranks(world, tmp_path, exchange_on_the_host) == [expected] * world


def agree_on_rank(ctx):
    return distributed.broadcast_int(100 + ctx.rank, ctx.device)


def test_all_ranks_agree_on_rank_0s_number(tmp_path):
    assert run_ranks(2, tmp_path, agree_on_rank) == [100, 100]


def test_any_number_of_processes_sees_the_same_global_batches():
    alone = GlobalBatchSampler(30, 8, seed=3, ctx=distributed.DistContext())
    ranks = [GlobalBatchSampler(30, 2, seed=3, ctx=distributed.DistContext(rank, 4)) for rank in range(4)]
    for epoch in (0, 1):
        for batches in [alone, *ranks]:
            batches.epoch = epoch
        assert list(alone) == [sum(parts, []) for parts in zip(*ranks)]
        assert len(list(alone)) == len(alone) == 3
        indices = [index for batch in alone for index, _ in batch]
        assert len(set(indices)) == 24
    first = list(alone)
    alone.epoch = 0
    assert list(alone) != first


def test_seeds_differ_by_every_part():
    parts = [(), (0,), (0, 0), (0, 1), (1, 0), (1,), (10, 1), (1, 1, 0), ("order", 0)]
    assert len({distributed.derive_seed(*part) for part in parts}) == len(parts)
    assert all(0 <= distributed.derive_seed(*part) < 2**63 for part in parts)


def launched(ctx, *args):
    return ctx, args


def test_plain_launch_is_this_process_alone():
    ctx, args = launch.launch(launched, (1, 2))
    assert args == (1, 2) and ctx.world_size == 1 and not dist.is_initialized()


def test_a_process_of_several_takes_its_own_gpu_and_hosts_talk_over_gloo(monkeypatch):
    calls = {}
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.update(device=device))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **settings: calls.update(backend=backend, **settings))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: calls.update(ended=True))
    ctx = distributed.DistContext(3, 4, 1, 2, torch.device("cuda", 1))
    assert launch._join_and_run(ctx, "env://", "nccl", launched, (5,)) == (ctx, (5,))
    assert calls == {"device": ctx.device, "backend": "cpu:gloo,cuda:nccl", "world_size": 4, "rank": 3, "init_method": "env://",
                     "ended": True}


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for name, value in {"TORCHELASTIC_RUN_ID": "1", "LOCAL_WORLD_SIZE": "8", "WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="this machine has 4 GPUs"):
        launch.resolve_world_size()


@pytest.mark.parametrize("options, message", [
    ({"world_size": 2, "rank": 2, "dist_url": "tcp://127.0.0.1:1"}, "--rank 2"),
    ({"world_size": 2}, "--rank -1"),
    ({"world_size": 2, "rank": 0}, "--dist-url"),
    ({"world_size": 2, "rank": 0, "dist_url": "tcp://localhost:nowhere"}, "tcp://10.0.0.1:10001"),
    ({"world_size": 0}, "--world-size 0"),
    ({"rank": 1}, "--rank 1"),
    ({"backend": "smoke"}, "--dist-backend smoke"),
    ({"gpu": 99}, "--gpu 99"),
])
def test_launch_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        launch.launch(launched, (), **options)
