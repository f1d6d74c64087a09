"""KV blocks survive the way to bytes and back, whole and exact."""

import torch

from kevlarflow.node.kv_blocks import HostKvBlocks


def layers(dtype):
    torch.manual_seed(0)
    return [torch.randn(6, 2, 4, 8).to(dtype) for _ in range(3)]


def test_a_block_is_restored_exactly_and_nothing_else_changes():
    for dtype in (torch.float32, torch.bfloat16):
        source, target = layers(dtype), [torch.zeros(6, 2, 4, 8, dtype=dtype) for _ in range(3)]
        blocks, other = HostKvBlocks(source), HostKvBlocks(target)
        data = blocks.read(4)
        assert len(data) == blocks.block_bytes == 3 * 2 * 4 * 8 * source[0].element_size()
        other.write(1, bytes(data))
        for have, want in zip(target, source, strict=True):
            assert torch.equal(have[1], want[4])
            assert not have[0].any()
            assert not have[2:].any()


def test_what_was_read_does_not_follow_the_block():
    source = layers(torch.float32)
    blocks = HostKvBlocks(source)
    before = bytes(blocks.read(0))
    copied = blocks.read(0)
    source[0][0].zero_()
    assert bytes(copied) == before
