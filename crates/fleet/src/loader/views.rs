//! Materialized views: those that were filled are filled again, each after all that it reads.
//!
//! One view may read another through plain views, so the order comes from the rules of both kinds. What a function
//! reads is in no catalog; a view that fails because another one is empty is therefore tried again after the rest.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Context as _;
use pgerror::SqlState;

use super::acting::Acting;
use crate::founders::MaterializedViewPlan;
use crate::founders::session::{has_code, quoted};

struct View {
    name: String,
    is_materialized: bool,
    is_filled: bool,
    was_filled: Option<bool>,
}

const VIEWS: &str = "
    SELECT c.oid, n.nspname::text, c.relname::text, c.relkind = 'm', c.relispopulated
    FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
    WHERE c.relkind IN ('v', 'm') AND c.oid >= 16384";

const READS: &str = "
    SELECT DISTINCT r.ev_class, d.refobjid
    FROM pg_catalog.pg_rewrite r
    JOIN pg_catalog.pg_depend d ON d.classid = 'pg_catalog.pg_rewrite'::pg_catalog.regclass AND d.objid = r.oid
                               AND d.refclassid = 'pg_catalog.pg_class'::pg_catalog.regclass
    JOIN pg_catalog.pg_class c ON c.oid = d.refobjid AND c.relkind IN ('v', 'm') AND c.oid >= 16384
    WHERE r.rulename = '_RETURN' AND d.refobjid <> r.ev_class";

/// Fills the views that the plan has as filled. What is filled already is left as it is.
pub(super) async fn refresh(inside: &Acting, plan: &[MaterializedViewPlan]) -> anyhow::Result<()> {
    let mut views = BTreeMap::new();
    for row in inside.session.rows(VIEWS, &[]).await.context("look for views")? {
        let (schema, name): (&str, &str) = (row.get(1), row.get(2));
        let was_filled = plan.iter().find(|view| view.schema == schema && view.name == name).map(|view| view.populated);
        let name = format!("{}.{}", quoted(schema), quoted(name));
        let view = View { name, is_materialized: row.get(3), is_filled: row.get(4), was_filled };
        views.insert(row.get::<_, u32>(0), view);
    }
    let mut reads: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
    for row in inside.session.rows(READS, &[]).await.context("look for what views read")? {
        reads.entry(row.get(0)).or_default().push(row.get(1));
    }
    let wanted = |view: &View| view.was_filled == Some(true) && !view.is_filled;
    let wanted: Vec<u32> = views.iter().filter(|(_, view)| wanted(view)).map(|(oid, _)| *oid).collect();
    // Also those that were empty, where one that was filled reads them: it had been filled before they were emptied.
    let order = order(&wanted, &reads);
    let open: Vec<&View> = order.iter().filter_map(|oid| views.get(oid)).collect();
    fill(inside, open.into_iter().filter(|view| view.is_materialized && !view.is_filled).collect()).await?;
    // Read anew, because an earlier attempt may have filled some of them.
    let emptied = "SELECT n.nspname::text, c.relname::text FROM pg_catalog.pg_class c
                   JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace WHERE c.relkind = 'm' AND c.relispopulated";
    for row in inside.session.rows(emptied, &[]).await.context("look for filled views")? {
        let (schema, name): (&str, &str) = (row.get(0), row.get(1));
        if plan.iter().any(|view| !view.populated && view.schema == schema && view.name == name) {
            let name = format!("{}.{}", quoted(schema), quoted(name));
            let statement = format!("REFRESH MATERIALIZED VIEW {name} WITH NO DATA");
            inside.session.run(&statement).await.with_context(|| format!("empty materialized view {name}"))?;
        }
    }
    Ok(())
}

async fn fill(inside: &Acting, mut open: Vec<&View>) -> anyhow::Result<()> {
    while !open.is_empty() {
        let (count, mut later) = (open.len(), Vec::new());
        for view in open {
            let filled = inside.run_long(&format!("REFRESH MATERIALIZED VIEW {}", view.name)).await;
            match filled.with_context(|| format!("fill materialized view {}", view.name)) {
                Ok(()) => {}
                Err(error) if has_code(&error, &[SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE]) => {
                    later.push((view, error));
                }
                Err(error) => return Err(error),
            }
        }
        if later.len() == count {
            let first = later.into_iter().next();
            return first.map_or(Ok(()), |(_, error)| Err(error));
        }
        open = later.into_iter().map(|(view, _)| view).collect();
    }
    Ok(())
}

/// All that `wanted` read, and they, each behind what it reads.
fn order(wanted: &[u32], reads: &BTreeMap<u32, Vec<u32>>) -> Vec<u32> {
    let (mut order, mut seen) = (Vec::new(), BTreeSet::new());
    // Twice on the stack: once to look at what it reads, and then, when that is done, itself.
    let mut stack: Vec<(u32, bool)> = wanted.iter().rev().map(|oid| (*oid, false)).collect();
    while let Some((oid, is_ready)) = stack.pop() {
        if is_ready {
            order.push(oid);
        } else if seen.insert(oid) {
            stack.push((oid, true));
            stack.extend(reads.get(&oid).into_iter().flatten().map(|read| (*read, false)));
        }
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_view_comes_behind_what_it_reads() {
        let reads = BTreeMap::from([(1, vec![2, 3]), (2, vec![4]), (3, vec![4]), (4, vec![5]), (9, vec![1])]);
        let order = order(&[1, 4, 6], &reads);
        assert_eq!(order.len(), 6, "{order:?}");
        let at = |oid: u32| order.iter().position(|one| *one == oid).unwrap();
        for (view, reads) in reads.iter().filter(|(view, _)| **view != 9) {
            assert!(reads.iter().all(|read| at(*read) < at(*view)), "{order:?}");
        }
    }
}
