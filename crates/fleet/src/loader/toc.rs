//! Which parts of a schema's last section can be built side by side, and in which order the others come.
//!
//! `pg_restore` lists what is in a dump with what each entry depends on; its own `--jobs` goes by the same lists. Only
//! three kinds of entries take long, and only these are taken out of the dump's order: indexes, constraints that are
//! indexes, and foreign keys, and of them only those for which nothing that stays behind is needed. Whatever else there
//! is, and whatever a newer release brings, comes after them in the order in which the dump has it, as one. So a wrong
//! guess here about an entry costs time and never an object. Names are not looked at, because a list does not quote
//! them: entries are known by their kinds, numbers and OIDs.
//!
//! Event triggers come at the very end, by themselves: their commands set off no event trigger, ours neither.

use std::collections::{BTreeMap, BTreeSet};

/// Tables up to this size have their entries built many in one transaction: a session costs more than their indexes.
const SMALL_BYTES: u64 = 8 * 1024 * 1024;

/// Entries in one such transaction; each of them is locked in it. More of them become another one.
const ENTRIES_TOGETHER: usize = 200;

const PG_CLASS: u32 = 1259;
const PG_EVENT_TRIGGER: u32 = 3466;

/// An entry of a dump's list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) id: u32,
    catalog: u32,
    oid: u32,
    /// Kind, schema, name and owner, as the list has them.
    what: String,
    needs: Vec<u32>,
}

/// Entries that are made in one transaction, in this order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Group {
    pub(super) ids: Vec<u32>,
    /// The tables that they lock, as entries of the list.
    tables: BTreeSet<u32>,
    /// Whether others may be built on the same tables meanwhile.
    shares: bool,
    /// How large these tables are.
    bytes: u64,
    pub(super) is_of_event_triggers: bool,
}

impl Group {
    /// What it is called in the state; the same entries have the same name each time.
    pub(super) fn name(&self) -> String {
        let (first, last) = (self.ids.first().unwrap_or(&0), self.ids.last().unwrap_or(&0));
        format!("{first}-{last}-{}", self.ids.len())
    }

    /// Whether one would wait for the other's locks.
    pub(super) fn is_in_the_way_of(&self, other: &Self) -> bool {
        let is_shared = self.shares && other.shares;
        !(is_shared || self.tables.is_disjoint(&other.tables))
    }
}

/// Reads what `pg_restore --list --verbose` says.
pub(super) fn parse(list: &str) -> Vec<Entry> {
    let mut entries: Vec<Entry> = Vec::new();
    for line in list.lines() {
        if let Some(needs) = line.strip_prefix(";\tdepends on:") {
            if let Some(entry) = entries.last_mut() {
                entry.needs.extend(needs.split_ascii_whitespace().filter_map(|id| id.parse::<u32>().ok()));
            }
        } else if !line.starts_with(';') {
            entries.extend(entry(line));
        }
    }
    entries
}

/// `3235; 1259 16410 INDEX public c_p_idx owner`
fn entry(line: &str) -> Option<Entry> {
    let (id, rest) = line.split_once("; ")?;
    let mut fields = rest.splitn(3, ' ');
    let (catalog, oid, what) = (fields.next()?, fields.next()?, fields.next()?);
    let (id, catalog, oid) = (id.parse().ok()?, catalog.parse().ok()?, oid.parse().ok()?);
    Some(Entry { id, catalog, oid, what: what.to_owned(), needs: Vec::new() })
}

impl Entry {
    fn is(&self, kind: &str) -> bool {
        self.what.strip_prefix(kind).is_some_and(|rest| rest.starts_with(' '))
    }

    fn is_index(&self) -> bool {
        self.is("INDEX") || self.is("CONSTRAINT")
    }

    fn is_relation(&self) -> bool {
        self.catalog == PG_CLASS && (self.is("TABLE") || self.is("MATERIALIZED VIEW"))
    }

    fn is_of_event_trigger(&self, event_triggers: &BTreeSet<u32>) -> bool {
        let is_about_one = !self.needs.is_empty() && self.needs.iter().all(|id| event_triggers.contains(id));
        self.catalog == PG_EVENT_TRIGGER || is_about_one
    }
}

/// Groups that may be made at the same time, after all those of the stages before.
pub(super) type Stage = Vec<Group>;

/// Divides the entries of the last section, which are those numbered in `section`. `bytes` are the sizes of tables by
/// their OIDs.
pub(super) fn stages(list: &[Entry], section: &BTreeSet<u32>, bytes: &BTreeMap<u32, u64>) -> Vec<Stage> {
    let relations: BTreeMap<u32, u64> = list
        .iter()
        .filter(|entry| entry.is_relation())
        .map(|entry| (entry.id, bytes.get(&entry.oid).copied().unwrap_or(0)))
        .collect();
    let mut open: Vec<&Entry> = list.iter().filter(|entry| section.contains(&entry.id)).collect();
    let event_triggers = open.iter().filter(|entry| entry.catalog == PG_EVENT_TRIGGER).map(|entry| entry.id).collect();
    let is_last = |entry: &&Entry| entry.is_of_event_trigger(&event_triggers);
    let (last, others): (Vec<&Entry>, Vec<&Entry>) = open.into_iter().partition(is_last);
    open = others;
    let mut waiting: BTreeSet<u32> = section.clone();
    let mut stages = Vec::new();
    // A partition's index needs the one of its parent to be there.
    loop {
        let ready = take(&mut open, &mut waiting, |entry| entry.is_index() && is_of_tables(entry, &relations));
        if ready.is_empty() {
            break;
        }
        stages.push(divide(&ready, &relations));
    }
    // They are quick, and lock parents.
    stages.push(as_one(&take_in_order(&mut open, &mut waiting, |entry| entry.is("INDEX ATTACH"))));
    let foreign = |entry: &Entry| entry.is("FK CONSTRAINT") && is_of_tables(entry, &relations);
    stages.push(divide(&take(&mut open, &mut waiting, foreign), &relations));
    stages.push(as_one(&open));
    let mut event_triggers = as_one(&last);
    event_triggers.iter_mut().for_each(|group| group.is_of_event_triggers = true);
    stages.push(event_triggers);
    stages.retain(|stage| !stage.is_empty());
    stages
}

fn is_of_tables(entry: &Entry, relations: &BTreeMap<u32, u64>) -> bool {
    entry.needs.iter().any(|id| relations.contains_key(id))
}

/// Takes the entries of a kind that need nothing that is still waiting.
fn take<'e>(
    open: &mut Vec<&'e Entry>,
    waiting: &mut BTreeSet<u32>,
    is_wanted: impl Fn(&Entry) -> bool,
) -> Vec<&'e Entry> {
    let is_ready = |entry: &&Entry| is_wanted(entry) && !entry.needs.iter().any(|id| waiting.contains(id));
    let (ready, others): (Vec<&Entry>, Vec<&Entry>) = open.iter().partition(|entry| is_ready(entry));
    *open = others;
    for entry in &ready {
        waiting.remove(&entry.id);
    }
    ready
}

/// The same for entries that are made one after the other: one may need those before it.
fn take_in_order<'e>(
    open: &mut Vec<&'e Entry>,
    waiting: &mut BTreeSet<u32>,
    is_wanted: impl Fn(&Entry) -> bool,
) -> Vec<&'e Entry> {
    let (mut taken, mut others) = (Vec::new(), Vec::new());
    for entry in open.drain(..) {
        if is_wanted(entry) && !entry.needs.iter().any(|id| waiting.contains(id)) {
            waiting.remove(&entry.id);
            taken.push(entry);
        } else {
            others.push(entry);
        }
    }
    *open = others;
    taken
}

fn as_one(entries: &[&Entry]) -> Stage {
    if entries.is_empty() {
        return Vec::new();
    }
    vec![Group { ids: entries.iter().map(|entry| entry.id).collect(), ..Group::default() }]
}

/// Each entry of a large table by itself, the others many together; those of the largest tables first.
fn divide(entries: &[&Entry], relations: &BTreeMap<u32, u64>) -> Stage {
    let mut groups: Stage = Vec::new();
    let mut together = Group::default();
    for entry in entries {
        let tables: BTreeSet<u32> = entry.needs.iter().filter(|id| relations.contains_key(id)).copied().collect();
        let bytes = tables.iter().filter_map(|id| relations.get(id)).sum();
        if bytes > SMALL_BYTES {
            let shares = entry.is("INDEX");
            groups.push(Group { ids: vec![entry.id], tables, shares, bytes, is_of_event_triggers: false });
            continue;
        }
        together.ids.push(entry.id);
        together.tables.extend(tables);
        together.bytes += bytes;
        if together.ids.len() == ENTRIES_TOGETHER {
            groups.push(std::mem::take(&mut together));
        }
    }
    if !together.ids.is_empty() {
        groups.push(together);
    }
    groups.sort_by_key(|group| std::cmp::Reverse(group.bytes));
    groups
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIST: &str = "\
;
;     dbname: postgres
;
216; 1259 16394 TABLE public c o
214; 1259 16384 TABLE public p o
220; 1259 16428 TABLE public pt o
221; 1259 16433 TABLE public pt1 o
;\tdepends on: 220
219; 1259 16423 MATERIALIZED VIEW public m2 o
3233; 2606 16390 CONSTRAINT public p p_pkey o
;\tdepends on: 214
218; 1259 16416 MATERIALIZED VIEW public mv o
;\tdepends on: 214 214 3233
3234; 1259 16411 INDEX public a b c o
;\tdepends on: 216
3235; 1259 16410 INDEX public c_p_idx o
;\tdepends on: 216
3412; 0 0 COMMENT public INDEX c_p_idx o
;\tdepends on: 3235
3238; 1259 16422 INDEX public mv_b_idx o
;\tdepends on: 218
3239; 1259 16427 INDEX public m2_n_idx o
;\tdepends on: 219
3240; 1259 16438 INDEX public pt_a_idx o
;\tdepends on: 220
3243; 1259 16439 INDEX public pt1_a_idx o
;\tdepends on: 3240 221 221
3246; 0 0 INDEX ATTACH public pt1_a_idx o
;\tdepends on: 3243 3240 221 220
3399; 2618 16457 RULE public c ru o
;\tdepends on: 216 216 216
3249; 2606 16400 FK CONSTRAINT public c c_p_fkey o
;\tdepends on: 3233 214 216
3250; 2606 16401 FK CONSTRAINT public c to_the_view o
;\tdepends on: 3238 216
3227; 3466 16455 EVENT TRIGGER - et o
;\tdepends on: 224
3228; 0 0 COMMENT - EVENT TRIGGER et o
;\tdepends on: 3227
9999; 1 2 SOMETHING NEW public c o
;\tdepends on: 216
";

    fn section() -> BTreeSet<u32> {
        let before = [214, 216, 219, 220, 221];
        parse(LIST).iter().map(|entry| entry.id).filter(|id| !before.contains(id)).collect()
    }

    fn ids(stages: &[Stage]) -> Vec<Vec<Vec<u32>>> {
        stages.iter().map(|stage| stage.iter().map(|group| group.ids.clone()).collect()).collect()
    }

    #[test]
    fn what_takes_long_goes_side_by_side_and_all_else_in_order() {
        let entries = parse(LIST);
        let large = BTreeMap::from([(16394, SMALL_BYTES + 2), (16433, SMALL_BYTES + 1)]);
        let found = stages(&entries, &section(), &large);
        let expected = vec![
            vec![vec![3234], vec![3235], vec![3233, 3239, 3240]],
            vec![vec![3243]],
            vec![vec![3246]],
            vec![vec![3249]],
            vec![vec![218, 3412, 3238, 3399, 3250, 9999]],
            vec![vec![3227, 3228]],
        ];
        assert_eq!(ids(&found), expected);
        assert!(found[5][0].is_of_event_triggers && !found[4][0].is_of_event_triggers);
        let [first, second, together] = &found[0][..] else { panic!("three groups") };
        assert!(!first.is_in_the_way_of(second) && !first.is_in_the_way_of(together));
        assert!(found[3][0].is_in_the_way_of(first) && first.is_in_the_way_of(&found[3][0]));
        assert!(found[3][0].is_in_the_way_of(together));
    }

    #[test]
    fn every_entry_is_made_once() {
        let mut text = String::new();
        for table in 0..1000 {
            let (index, key) = (10_000 + table, 20_000 + table);
            text.push_str(&format!("{table}; 1259 {table} TABLE public t{table} o\n"));
            text.push_str(&format!("{index}; 1259 {index} INDEX public i o\n;\tdepends on: {table}\n"));
            text.push_str(&format!("{key}; 2606 {key} FK CONSTRAINT public i o\n;\tdepends on: {table} {index}\n"));
        }
        let entries = parse(&text);
        let section: BTreeSet<u32> = entries.iter().map(|entry| entry.id).filter(|id| *id >= 10_000).collect();
        let found = stages(&entries, &section, &BTreeMap::new());
        assert_eq!(found.iter().map(Vec::len).collect::<Vec<_>>(), [5, 5]);
        let groups = || found.iter().flatten();
        assert_eq!(groups().map(|group| group.ids.len()).sum::<usize>(), section.len());
        assert_eq!(groups().flat_map(|group| group.ids.clone()).collect::<BTreeSet<_>>(), section);
        assert_eq!(groups().map(Group::name).collect::<BTreeSet<_>>().len(), 10);
    }
}
