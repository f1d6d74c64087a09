"""KV blocks survive the way to bytes and back, whole and exact."""

import pytest
import torch

from kevlarflow.node.kv_blocks import HostKvBlocks


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
