//! Cutting tables into spans.

use std::collections::HashMap;

use fleet::founders::{DatabasePlan, TablePlan, What};
use serde::{Deserialize, Serialize};

/// A span is about this large, heap and TOAST together. Smaller ones would cost more in requests than they spread;
/// with larger ones more is done again after a failure.
const SPAN_BYTES: u64 = 64 * 1024 * 1024;

/// What a large object is taken for when work is dealt out.
const LARGE_OBJECT_BYTES: u64 = 64 * 1024;

/// A piece of work: what one worker reads in one go.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Span {
    /// Its place in the shard's list; finished ones are remembered by it.
    pub(crate) number: u32,
    /// The database.
    pub(crate) database: String,
    /// What is read.
    pub(crate) what: What,
    /// Bytes of heap and TOAST, as planned.
    pub(crate) weight: u64,
}

/// What they weigh together; an empty one is work, too.
pub(crate) fn weight(spans: &[Span]) -> u64 {
    spans.iter().map(|span| span.weight.max(1)).sum()
}

/// All spans of these databases, the heaviest tables first, so that the end is not spent waiting for one of them.
pub(crate) fn cut(databases: &[DatabasePlan]) -> Vec<Span> {
    let mut pieces: Vec<(String, What, u64)> = Vec::new();
    for database in databases {
        if database.large_objects > 0 {
            // Their contents' size is not known without reading them.
            let guess = database.large_objects.unsigned_abs().saturating_mul(LARGE_OBJECT_BYTES);
            pieces.push((database.name.clone(), What::LargeObjectData, guess));
            pieces.push((database.name.clone(), What::LargeObjects, 0));
        }
        for table in &database.tables {
            pieces.extend(ranges(table).map(|(what, weight)| (database.name.clone(), what, weight)));
        }
    }
    pieces.sort_by_key(|(_, _, weight)| std::cmp::Reverse(*weight));
    let numbered = pieces.into_iter().zip(0..);
    numbered.map(|((database, what, weight), number)| Span { number, database, what, weight }).collect()
}

/// Tables by the spans that are cut from them.
pub(crate) struct Tables<'p>(HashMap<(&'p str, u32), &'p TablePlan>);

impl<'p> Tables<'p> {
    pub(crate) fn of(databases: &'p [DatabasePlan]) -> Self {
        let tables = databases.iter().flat_map(|plan| plan.tables.iter().map(|table| (plan.name.as_str(), table)));
        Self(tables.map(|(database, table)| ((database, table.oid), table)).collect())
    }

    /// The table of a span; `None` for large objects.
    pub(crate) fn get(&self, span: &'p Span) -> Option<&'p TablePlan> {
        let What::Table { oid, .. } = span.what else { return None };
        self.0.get(&(span.database.as_str(), oid)).copied()
    }
}

/// The ranges of one table. The last one is open at its end: rows that were put behind the planned blocks before the
/// snapshot are in it, whatever the size that was read a moment later says.
fn ranges(table: &TablePlan) -> impl Iterator<Item = (What, u64)> + use<> {
    let oid = table.oid;
    let count = if table.ranges_possible && table.blocks > 0 {
        table.bytes.div_ceil(SPAN_BYTES).clamp(1, table.blocks)
    } else {
        1
    };
    let (blocks, weight) = (table.blocks, table.bytes / count);
    (0..count).map(move |index| {
        let at =
            |index: u64| u64::try_from(u128::from(blocks) * u128::from(index) / u128::from(count)).unwrap_or(blocks);
        let to_block = (index + 1 < count).then(|| at(index + 1));
        (What::Table { oid, from_block: at(index), to_block }, weight)
    })
}

#[cfg(test)]
mod tests {
    use fleet::founders::Identity;

    use super::*;

    fn table(oid: u32, blocks: u64, bytes: u64, ranges_possible: bool) -> TablePlan {
        let identity = Identity {
            oid,
            relkind: "r".to_owned(),
            relam: 2,
            relfilenode: oid,
            toast_relfilenode: None,
            columns: Vec::new(),
        };
        TablePlan {
            oid,
            schema: "public".to_owned(),
            name: format!("t{oid}"),
            columns: Vec::new(),
            blocks,
            bytes,
            estimated_rows: 0,
            ranges_possible,
            where_clause: None,
            identity,
            types: None,
        }
    }

    #[test]
    fn ranges_cover_a_table_once_and_the_last_is_open() {
        // In bytes, not in spans: on a primary a longer one would hold its lock for longer.
        const MIB: u64 = 1024 * 1024;
        for (blocks, bytes, possible, count) in [
            (0, 0, true, 1),
            (10, 81_920, true, 1),
            (8_192, 64 * MIB, true, 1),
            (8_193, 64 * MIB + 8_192, true, 2),
            (32_768, 256 * MIB, true, 4),
            // Few blocks with much behind them in TOAST.
            (3, 6_400 * MIB, true, 3),
            (32_768, 256 * MIB, false, 1),
        ] {
            let found: Vec<_> = ranges(&table(1, blocks, bytes, possible)).collect();
            assert_eq!(found.len(), count, "{blocks} blocks, {bytes} bytes");
            let mut next = 0;
            for (index, (what, _)) in found.iter().enumerate() {
                let What::Table { from_block, to_block, .. } = what else { panic!("{what:?}") };
                assert_eq!(*from_block, next);
                assert_eq!(to_block.is_none(), index + 1 == count);
                next = to_block.unwrap_or(blocks);
            }
        }
    }
}
