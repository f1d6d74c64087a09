"""KV blocks survive the way to bytes and back, whole and exact."""

import itertools

import numpy
import pytest
import torch
from vllm import _custom_ops as ops

from kevlarflow.node.kv_blocks import HostKvBlocks, find_token_slots


def layers(dtype):
    torch.manual_seed(0)
    return [torch.randn(6, 2, 4, 8).to(dtype) for _ in range(3)]


def copied(blocks, block):
    data = memoryview(bytearray(blocks.block_bytes))
    blocks.read(block, data)
    return data


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_block_is_restored_exactly_and_nothing_else_changes(dtype):
    source, target = layers(dtype), [torch.zeros(6, 2, 4, 8, dtype=dtype) for _ in range(3)]
    blocks, other = HostKvBlocks(source), HostKvBlocks(target)
    assert blocks.block_bytes == 3 * 2 * 4 * 8 * source[0].element_size()
    other.write([(1, copied(blocks, 4))])
    for have, want in zip(target, source, strict=True):
        assert torch.equal(have[1], want[4])
        assert not have[0].any()
        assert not have[2:].any()


@pytest.mark.parametrize("shape", [(2, 4, 8), (1, 3, 1)], ids=["in large words", "in bytes"])
@pytest.mark.parametrize(
    "targets",
    [range(3, 150), range(0, 200, 2), [*range(5, 25), 40, *range(60, 63), *range(100, 190)], [7]],
    ids=["one row", "none beside another", "rows and others", "one"],
)
def test_many_copies_are_put_in_place_exactly_wherever_they_lie(targets, shape):
    """As replicas: places of one arena, in any order."""
    torch.manual_seed(0)
    target = [torch.randn(200, *shape).to(torch.bfloat16) for _ in range(3)]
    before = [layer.clone() for layer in target]
    blocks = HostKvBlocks(target)
    arena = memoryview(bytearray(torch.randint(0, 256, (300 * blocks.block_bytes,), dtype=torch.uint8).numpy()))
    places = torch.randperm(300)[: len(targets)].tolist()
    data = [arena[place * blocks.block_bytes : (place + 1) * blocks.block_bytes] for place in places]
    blocks.write(list(zip(targets, data, strict=True)))
    for block, copy in zip(targets, data, strict=True):
        assert copied(blocks, block) == copy
    untouched = sorted(set(range(200)) - set(targets))
    for layer, was in zip(target, before, strict=True):
        assert torch.equal(layer[untouched].view(torch.int16), was[untouched].view(torch.int16))


def test_copies_that_lie_anywhere_are_put_in_place_too():
    target = [torch.zeros(40, 2, 4, 8) for _ in range(3)]
    blocks = HostKvBlocks(target)
    data = [memoryview(bytearray([number]) * blocks.block_bytes) for number in range(30)]
    blocks.write([(number + 2, each) for number, each in enumerate(data)])
    assert [copied(blocks, number + 2) for number in range(30)] == data


def test_what_was_read_does_not_follow_the_block():
    source = layers(torch.float32)
    blocks = HostKvBlocks(source)
    data = copied(blocks, 0)
    before = bytes(data)
    source[0][0].zero_()
    assert bytes(data) == before


@pytest.mark.parametrize("block", [-1, 6])
def test_a_block_that_does_not_exist_is_never_touched(block):
    blocks = HostKvBlocks(layers(torch.float32))
    with pytest.raises(ValueError, match="of 6"):
        blocks.write([(block, memoryview(bytes(blocks.block_bytes)))])


def test_when_one_of_several_is_wrong_none_is_written():
    source = layers(torch.float32)
    blocks = HostKvBlocks(source)
    data = copied(blocks, 4)
    before = source[0].clone()
    with pytest.raises(ValueError, match="of 6"):
        blocks.write([(1, data), (6, data)])
    assert torch.equal(source[0], before)


def test_data_of_another_length_is_never_written():
    blocks = HostKvBlocks(layers(torch.float32))
    with pytest.raises(ValueError, match="bytes of"):
        blocks.write([(0, memoryview(bytes(blocks.block_bytes - 1)))])
    with pytest.raises(ValueError, match="bytes of"):
        blocks.read(0, memoryview(bytearray(blocks.block_bytes + 1)))


def test_backing_a_block_leaves_its_content_alone():
    source = layers(torch.float32)
    blocks = HostKvBlocks(source)
    before = [layer.clone() for layer in source]
    for block in range(6):
        blocks.populate(block)
    assert all(torch.equal(now, then) for now, then in zip(source, before, strict=True))


HEADS, BLOCK_SIZE, HEAD_SIZE = 2, 64, 32
KINDS = [("vec", torch.float32), ("vec", torch.bfloat16), ("vec16", torch.float32)]
if torch.cpu._is_amx_tile_supported():
    KINDS.append(("amx", torch.bfloat16))


def written_by_vllm(isa, cache, keys, values, first):
    """What attention does with keys and values, each (tokens, heads, head size)."""
    key_cache, value_cache = cache.view(len(cache), HEADS, 2 * BLOCK_SIZE, HEAD_SIZE).chunk(2, dim=2)
    slots = torch.arange(first, first + len(keys))
    ops.cpu_attn_reshape_and_cache(keys, values, key_cache, value_cache, slots, isa)


def slots_of(isa, dtype):
    def write(block, values, first):
        kv = values.to(dtype).view(-1, 1, 1).expand(-1, HEADS, HEAD_SIZE).contiguous()
        written_by_vllm(isa, block, kv, kv, first)

    return find_token_slots(torch.zeros(3, HEADS, BLOCK_SIZE, 2 * HEAD_SIZE, dtype=dtype), BLOCK_SIZE, write)


@pytest.mark.parametrize(("isa", "dtype"), KINDS)
def test_tokens_are_copied_apart_wherever_attention_puts_them(isa, dtype):
    torch.manual_seed(0)
    caches = [torch.zeros(3, HEADS, BLOCK_SIZE, 2 * HEAD_SIZE, dtype=dtype) for _ in range(4)]
    for cache in caches:
        keys, values = (torch.randn(BLOCK_SIZE, HEADS, HEAD_SIZE).to(dtype) for _ in range(2))
        written_by_vllm(isa, cache, keys, values, BLOCK_SIZE)
    blocks = HostKvBlocks(caches, slots_of(isa, dtype))
    assert blocks.token_bytes * BLOCK_SIZE == blocks.block_bytes
    whole = copied(blocks, 1)

    put_together = memoryview(bytearray(blocks.block_bytes))
    cuts = [0, 1, 7, 40, 63, BLOCK_SIZE]
    for start, end in itertools.pairwise(cuts):
        tokens = memoryview(bytearray((end - start) * blocks.token_bytes))
        blocks.read_tokens(1, start, end, tokens)
        before = numpy.frombuffer(put_together, numpy.uint8).copy()
        blocks.merge_tokens(tokens, start, end, put_together)
        changed = numpy.count_nonzero(before != numpy.frombuffer(put_together, numpy.uint8))
        assert changed <= len(tokens), "a merge touches nothing but its tokens"
    assert put_together == whole


def test_a_block_whose_tokens_cannot_be_told_apart_is_copied_whole():
    cache = torch.zeros(3, HEADS, BLOCK_SIZE, 2 * HEAD_SIZE)
    assert find_token_slots(cache, BLOCK_SIZE, lambda block, values, first: block.fill_(1.0)) is None
    blocks = HostKvBlocks([cache])
    assert blocks.token_bytes == 0
    with pytest.raises(ValueError, match="only be copied whole"):
        blocks.read_tokens(0, 0, 1, memoryview(bytearray(8)))


def test_tokens_beyond_the_block_are_never_touched():
    blocks = HostKvBlocks([torch.zeros(3, HEADS, BLOCK_SIZE, 2 * HEAD_SIZE)], slots_of("vec", torch.float32))
    with pytest.raises(ValueError, match="of 64"):
        blocks.read_tokens(0, 60, 65, memoryview(bytearray(5 * blocks.token_bytes)))
    with pytest.raises(ValueError, match="bytes"):
        blocks.merge_tokens(memoryview(bytes(3)), 0, 1, memoryview(bytearray(blocks.block_bytes)))
