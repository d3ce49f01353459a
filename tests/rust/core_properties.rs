//! Random operations on tiny pools: the books balance after each one, and every request gets
//! what it would get alone.
//!
//! The seed is fixed and printed; `cargo test -- --nocapture` shows the mix of operations.
#![expect(clippy::unwrap_used, reason = "a test ends at the first surprise")]

mod core_scene;
mod fake_executor;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use nano_core::BlockId;
use nano_core::kv_cache::BlockAllocator;
use proptest::prelude::*;
use proptest::test_runner::{Config, RngSeed, TestRunner};

use core_scene::{Scene, machine, op};

const SEED: u64 = 20_240_229;

fn runner(cases: u32) -> TestRunner {
    TestRunner::new(Config {
        cases,
        failure_persistence: None,
        rng_seed: RngSeed::Fixed(SEED),
        ..Config::default()
    })
}

/// How often what happened, over all cases.
type Mix = BTreeMap<&'static str, u64>;

fn count(mix: &RefCell<Mix>, what: &'static str, times: u64) {
    *mix.borrow_mut().entry(what).or_default() += times;
}

/// Asserts that all of `operations` together happened `total` times, and each thing of the mix
/// at least `each` times.
fn assert_mix(mix: &Mix, operations: &[&str], total: u64, things: &[&str], each: u64) {
    let num_operations: u64 = operations.iter().map(|what| mix[what]).sum();
    assert!(num_operations >= total, "{num_operations} operations");
    for what in operations.iter().chain(things) {
        let times = mix.get(what).copied().unwrap_or(0);
        assert!(times >= each, "{what}: {times} times");
    }
}

#[derive(Clone, Debug)]
enum BlockOp {
    Allocate,
    /// One of the blocks in use, counted around.
    Retain(usize),
    Free(usize),
}

fn block_op() -> impl Strategy<Value = BlockOp> {
    prop_oneof![
        3 => Just(BlockOp::Allocate),
        2 => any::<usize>().prop_map(BlockOp::Retain),
        4 => any::<usize>().prop_map(BlockOp::Free),
    ]
}

fn check_allocator(num_blocks: u32, ops: &[BlockOp], mix: &RefCell<Mix>) {
    let mut allocator = BlockAllocator::new(num_blocks);
    let mut holders: BTreeMap<BlockId, u32> = BTreeMap::new();
    for op in ops {
        let in_use = |nth: usize| holders.keys().nth(nth % holders.len().max(1)).copied();
        match *op {
            BlockOp::Allocate => {
                let block = allocator.allocate();
                assert_eq!(block.is_some(), holders.len() < num_blocks as usize);
                count(mix, if block.is_some() { "allocate" } else { "allocate in vain" }, 1);
                if let Some(block) = block {
                    assert!(block.0 < num_blocks);
                    assert_eq!(holders.insert(block, 1), None, "{block:?} is handed out twice");
                }
            }
            BlockOp::Retain(nth) => {
                let Some(block) = in_use(nth) else { continue };
                allocator.retain(block);
                *holders.get_mut(&block).unwrap() += 1;
                count(mix, "retain", 1);
            }
            BlockOp::Free(nth) => {
                let Some(block) = in_use(nth) else { continue };
                let left = holders[&block] - 1;
                assert_eq!(allocator.free(block), left == 0);
                if left == 0 {
                    holders.remove(&block)
                } else {
                    holders.insert(block, left)
                };
                count(mix, if left == 0 { "free the last" } else { "free one of several" }, 1);
            }
        }
        allocator.check_invariants();
        assert_eq!(allocator.num_free(), num_blocks - holders.len() as u32);
        for block in (0..num_blocks).map(BlockId) {
            assert_eq!(allocator.ref_count(block), holders.get(&block).copied().unwrap_or(0));
        }
    }
}

#[test]
fn blocks_are_free_or_held_exactly_as_often_as_the_model_says() {
    let mix = RefCell::new(Mix::new());
    let scenario = (0_u32..8, prop::collection::vec(block_op(), 0..200));
    runner(300)
        .run(&scenario, |(num_blocks, ops)| {
            check_allocator(num_blocks, &ops, &mix);
            Ok(())
        })
        .unwrap();
    let mix = mix.into_inner();
    println!("seed {SEED}: {mix:#?}");
    let operations =
        ["allocate", "allocate in vain", "retain", "free the last", "free one of several"];
    assert_mix(&mix, &operations, 20_000, &[], 1000);
}

#[test]
fn every_request_gets_what_it_would_get_alone_whatever_the_batch() {
    let mix = Rc::new(RefCell::new(Mix::new()));
    let scenario = (machine(), prop::collection::vec(op(), 1..300));
    runner(1000)
        .run(&scenario, |(machine, ops)| {
            let mut scene = Scene::new(machine, &mix);
            for op in &ops {
                if !scene.has_failed {
                    scene.apply(op);
                }
            }
            scene.drain();
            Ok(())
        })
        .unwrap();
    let mix = mix.borrow();
    println!("seed {SEED}: {mix:#?}");
    let operations = ["add", "add in vain", "step", "abort", "abort in vain"];
    let things = [
        "preemptions",
        "ended by eos",
        "ended by a stop token",
        "ended by length",
        "ended with all logits",
        "ended by abort",
        "rows with bans",
        "prompt chunks without a sample",
        "tokens named before they were seen",
        "steps of decodes and chunks",
        "steps of several sequences",
    ];
    assert_mix(&mix, &operations, 100_000, &things, 1000);
    assert!(mix["failed steps"] >= 20 && mix["ended by an error"] >= 20);
}
