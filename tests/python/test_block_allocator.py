"""The block allocator against a model of it, by random operations through Python."""

import random
from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from nano_batch import BlockAllocator

NUM_OPERATIONS = 100_000


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


def test_many_random_operations_agree_with_the_model(capsys):
    """The same rules without hypothesis, which would take minutes for as many."""
    seed = 1
    generator = random.Random(seed)
    mix = Counter()
    while mix.total() < NUM_OPERATIONS:
        machine = AllocatorAgainstModel()
        machine.create(num_blocks=generator.randint(0, 6))
        for _ in range(200):
            name = generator.choice(["allocate", "allocate", "retain", "free", "free"])
            arguments = {} if name == "allocate" else {"block": generator.randint(0, 7)}
            refused = arguments and arguments["block"] not in machine.counts
            full = name == "allocate" and len(machine.counts) == machine.num_blocks
            getattr(machine, name)(**arguments)
            mix[f"{name}, {'refused' if refused or full else 'done'}"] += 1
        machine.counts_agree()
    with capsys.disabled():
        print(f"\noperations on the allocator with seed {seed}: {dict(mix)}")


def test_all_blocks_are_handed_out_once_and_then_none():
    allocator = BlockAllocator(3)
    assert {allocator.allocate() for _ in range(3)} == {0, 1, 2}
    assert allocator.allocate() is None
    assert (allocator.num_free, allocator.num_blocks) == (0, 3)


def test_a_shared_block_is_free_after_its_last_holder():
    allocator = BlockAllocator(1)
    block = allocator.allocate()
    allocator.retain(block)
    assert allocator.free(block) is False
    assert allocator.free(block) is True
    with pytest.raises(ValueError, match="block 0"):
        allocator.free(block)


@pytest.mark.parametrize("num_blocks", [-1, 2**32, 1.5, "3"])
def test_a_number_of_blocks_that_is_none_is_refused(num_blocks):
    with pytest.raises((ValueError, TypeError, OverflowError)):
        BlockAllocator(num_blocks)


def test_it_says_what_it_is():
    assert repr(BlockAllocator(4)) == "BlockAllocator(num_blocks=4, num_free=4)"


@pytest.mark.parametrize("num_blocks", [-1, 2**24 + 1, 2**32 - 1])
def test_a_size_out_of_range_is_refused(num_blocks):
    with pytest.raises(ValueError, match=f"num_blocks.*{num_blocks}"):
        BlockAllocator(num_blocks)
