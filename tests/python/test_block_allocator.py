"""The block allocator against a model of it, by random operations through Python."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from nano_batch import BlockAllocator


class AllocatorAgainstModel(RuleBasedStateMachine):
    """The model: a dictionary of reference counts."""

    @initialize(num_blocks=st.integers(0, 6))
    def create(self, num_blocks):
        self.num_blocks = num_blocks
        self.allocator = BlockAllocator(num_blocks)
        self.counts = {}

    @rule()
    def allocate(self):
        block = self.allocator.allocate()
        if len(self.counts) == self.num_blocks:
            assert block is None
        else:
            assert 0 <= block < self.num_blocks
            assert block not in self.counts
            self.counts[block] = 1

    @rule(block=st.integers(0, 7))
    def retain(self, block):
        if block in self.counts:
            self.allocator.retain(block)
            self.counts[block] += 1
        else:
            with pytest.raises(ValueError, match=str(block)):
                self.allocator.retain(block)

    @rule(block=st.integers(0, 7))
    def free(self, block):
        if block in self.counts:
            self.counts[block] -= 1
            became_free = self.counts[block] == 0
            if became_free:
                del self.counts[block]
            assert self.allocator.free(block) is became_free
        else:
            with pytest.raises(ValueError, match=str(block)):
                self.allocator.free(block)

    @invariant()
    def counts_agree(self):
        assert self.allocator.num_blocks == self.num_blocks
        assert self.allocator.num_free == self.num_blocks - len(self.counts)
        for block in range(self.num_blocks):
            assert self.allocator.ref_count(block) == self.counts.get(block, 0)
        with pytest.raises(ValueError, match=str(self.num_blocks)):
            self.allocator.ref_count(self.num_blocks)


AllocatorAgainstModel.TestCase.settings = settings(max_examples=150, stateful_step_count=40)
TestAllocatorAgainstModel = AllocatorAgainstModel.TestCase


def test_it_says_what_it_is():
    assert repr(BlockAllocator(4)) == "BlockAllocator(num_blocks=4, num_free=4)"


@pytest.mark.parametrize("num_blocks", [-1, 2**24 + 1, 2**32 - 1])
def test_a_size_out_of_range_is_refused(num_blocks):
    with pytest.raises(ValueError, match=f"num_blocks.*{num_blocks}"):
        BlockAllocator(num_blocks)


@pytest.mark.parametrize("num_blocks", [1.5, "3"])
def test_a_size_of_another_type_is_refused(num_blocks):
    with pytest.raises(TypeError, match="num_blocks"):
        BlockAllocator(num_blocks)
