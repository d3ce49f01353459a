//! Which rows of a step attend together, and to what: plain data, no tensors.
//!
//! A sequence with one row, as in decoding, attends by itself, reading the cache in place. The rows
//! of a prefill attend in tiles, which bounds the matrix of scores and the work on keys that none
//! of the rows may see. No sequence's sums depend on its neighbours.

use std::ops::Range;

use crate::batch::{Batch, BatchSequence};

/// Rows of a tile at most.
const MAX_TILE_ROWS: usize = 128;
const MIN_TILE_ROWS: usize = 16;
/// Scores of a tile, unless its fewest rows have more.
const MAX_SCORES: usize = 1 << 23;

/// One row and the positions that it sees.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Single {
    pub(super) row: usize,
    /// Its sequence's number in the batch.
    pub(super) sequence: usize,
    pub(super) seen: Range<usize>,
}

/// Rows of one prefill.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Tile {
    pub(super) first_row: usize,
    pub(super) num_rows: usize,
    /// Its sequence's number in the batch.
    pub(super) sequence: usize,
    /// The position of the first row.
    pub(super) first_position: usize,
    /// The positions that any of the rows sees.
    pub(super) seen: Range<usize>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct AttentionPlan {
    pub(super) singles: Vec<Single>,
    pub(super) tiles: Vec<Tile>,
}

/// The positions that the row at `position` sees.
pub(super) fn seen(position: usize, window: Option<u32>) -> Range<usize> {
    window.map_or(0, |window| (position + 1).saturating_sub(window as usize))..position + 1
}

impl AttentionPlan {
    pub(super) fn new(batch: &Batch, window: Option<u32>, num_heads: usize) -> Self {
        let mut plan = Self::default();
        for (index, sequence) in batch.sequences.iter().enumerate() {
            let &BatchSequence { first_row, num_rows, first_position, .. } = sequence;
            if num_rows == 1 {
                let seen = seen(first_position, window);
                plan.singles.push(Single { row: first_row, sequence: index, seen });
                continue;
            }
            let most = MAX_SCORES / (num_heads * sequence.context_len());
            let tile_rows = most.clamp(MIN_TILE_ROWS, MAX_TILE_ROWS);
            for first in (0..num_rows).step_by(tile_rows) {
                let num_rows = tile_rows.min(num_rows - first);
                let first_position = first_position + first;
                plan.tiles.push(Tile {
                    first_row: first_row + first,
                    num_rows,
                    sequence: index,
                    first_position,
                    seen: seen(first_position, window).start..first_position + num_rows,
                });
            }
        }
        plan
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(window: Option<u32>, sequences: &[(usize, usize)]) -> AttentionPlan {
        let mut batch = Batch::default();
        let mut first_row = 0;
        for &(first_position, num_rows) in sequences {
            let block_table = Vec::new();
            batch.sequences.push(BatchSequence {
                first_row,
                num_rows,
                first_position,
                block_table,
            });
            first_row += num_rows;
        }
        AttentionPlan::new(&batch, window, 4)
    }

    #[test]
    fn a_decoding_row_sees_its_window_and_itself() {
        let rows = [(9, 1), (1, 1)];
        let seen = |window| plan(window, &rows).singles.iter().map(|it| it.seen.clone()).collect();
        let (all, some): (Vec<_>, Vec<_>) = (seen(None), seen(Some(3)));
        assert_eq!(all, [0..10, 0..2]);
        assert_eq!(some, [7..10, 0..2]);
    }

    #[test]
    fn a_prefill_is_cut_into_tiles_that_read_no_later_key() {
        let plan = plan(None, &[(3, 1), (10, 300)]);
        assert_eq!(plan.singles.iter().map(|single| single.row).collect::<Vec<_>>(), [0]);
        let tiles = plan.tiles.iter().map(|it| (it.first_row, it.num_rows, it.seen.clone()));
        assert_eq!(
            tiles.collect::<Vec<_>>(),
            [(1, 128, 0..138), (129, 128, 0..266), (257, 44, 0..310)]
        );
    }

    #[test]
    fn a_tile_of_a_window_starts_where_its_first_row_looks_back_to() {
        assert_eq!(plan(Some(5), &[(10, 2)]).tiles[0].seen, 6..12);
    }

    #[test]
    fn long_contexts_have_smaller_tiles() {
        let tiles = plan(None, &[(40_000, 200)]).tiles;
        assert_eq!(tiles[0].num_rows, 52);
        assert_eq!(tiles.iter().map(|tile| tile.num_rows).sum::<usize>(), 200);
    }
}
