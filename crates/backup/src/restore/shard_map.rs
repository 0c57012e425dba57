//! `shard_map`: which shard's part of a backup goes into which other shard.
//!
//! Without it every part goes back into the shard of the same name. What the fleet can tell (whether a target exists) is
//! judged when the statement is planned; what only the manifest can tell (whether there is such a source, and whether
//! two of them hold the database and would meet in one shard) when the job has read it. Names of shards that have a
//! comma or an equals sign in them cannot be mapped.

use std::collections::BTreeMap;

use pgerror::{PgError, SqlState};
use serde::{Deserialize, Serialize};

/// The targets of those sources that do not go into the shard of their own name.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub(crate) struct ShardMap(BTreeMap<String, String>);

impl ShardMap {
    /// Reads `s2=s1,s3=s1`; an empty text maps nothing.
    ///
    /// # Errors
    ///
    /// 22023 for what is no list of pairs, 42712 for a source that is named twice.
    pub(crate) fn parse(text: &str) -> Result<Self, PgError> {
        let mut map = BTreeMap::new();
        for pair in text.split(',').filter(|_| !text.trim().is_empty()) {
            let names = pair.split_once('=').map(|(source, target)| (source.trim(), target.trim()));
            let Some((source, target)) = names.filter(|(source, target)| is_name(source) && is_name(target)) else {
                let message = format!("invalid value for option \"shard_map\": \"{text}\"");
                return Err(PgError::new(SqlState::INVALID_PARAMETER_VALUE, message)
                    .hint("Name pairs of shards, the backup's first and this fleet's second: 's2=s1,s3=s1'."));
            };
            if map.insert(source.to_owned(), target.to_owned()).is_some() {
                let message = format!("shard \"{source}\" is named more than once in shard_map");
                return Err(PgError::new(SqlState::DUPLICATE_ALIAS, message));
            }
        }
        Ok(Self(map))
    }

    /// Where the part of `source` goes.
    pub(crate) fn target<'m>(&'m self, source: &'m str) -> &'m str {
        self.0.get(source).map_or(source, String::as_str)
    }

    /// Those of the fleet's shards that a part may come into, as far as can be told without the backup: not those that
    /// are only a source.
    pub(crate) fn possible_targets<'f>(&self, fleet: &'f [String]) -> Vec<&'f str> {
        let is_target =
            |shard: &&String| !self.0.contains_key(*shard) || self.0.values().any(|target| target == *shard);
        fleet.iter().filter(is_target).map(String::as_str).collect()
    }

    /// Sees to it that every target is one of the fleet's shards.
    ///
    /// # Errors
    ///
    /// 42704 naming the first that is not.
    pub(crate) fn check_targets(&self, fleet: &[String]) -> Result<(), PgError> {
        match self.0.values().find(|target| !fleet.contains(target)) {
            None => Ok(()),
            Some(unknown) => Err(PgError::new(
                SqlState::UNDEFINED_OBJECT,
                format!("shard \"{unknown}\" of shard_map does not exist"),
            )
            .detail(format!("This fleet has: {}.", fleet.join(", ")))
            .hint("A pair of shards names the backup's first and this fleet's second.")),
        }
    }

    /// Sees to it that every source is one of the backup's shards, those included that it leaves out.
    ///
    /// # Errors
    ///
    /// 42704 naming the first that is not.
    pub(crate) fn check_sources(&self, backup: &[&str]) -> Result<(), PgError> {
        match self.0.keys().find(|source| !backup.contains(&source.as_str())) {
            None => Ok(()),
            Some(unknown) => {
                let message = format!("shard \"{unknown}\" of shard_map is not in the backup");
                Err(PgError::new(SqlState::UNDEFINED_OBJECT, message)
                    .detail(format!("It holds: {}.", backup.join(", ")))
                    .hint("A pair of shards names the backup's first and this fleet's second."))
            }
        }
    }

    /// Sees to it that of these sources, all of which hold the database, each comes into a shard of its own, and that
    /// this is one of the fleet's.
    ///
    /// # Errors
    ///
    /// 42704 for a shard that the fleet does not have, with the option that gives it another place; 22023 for two that
    /// would meet.
    pub(crate) fn check_parts(&self, database: &str, sources: &[&str], fleet: &[String]) -> Result<(), PgError> {
        let mut taken: BTreeMap<&str, &str> = BTreeMap::new();
        for source in sources {
            if let Some(other) = taken.insert(self.target(source), source) {
                let message =
                    format!("two shards' parts of the backup would come into shard \"{}\"", self.target(source));
                return Err(PgError::new(SqlState::INVALID_PARAMETER_VALUE, message)
                    .detail(format!("Shards \"{other}\" and \"{source}\" both hold database \"{database}\"."))
                    .hint("Give each a shard of its own: WITH shard_map = '…'."));
            }
        }
        let Some(lost) = sources.iter().find(|source| !fleet.iter().any(|shard| shard == self.target(source))) else {
            return Ok(());
        };
        let free = fleet.iter().find(|shard| !taken.contains_key(shard.as_str())).map_or("…", String::as_str);
        Err(PgError::new(
            SqlState::UNDEFINED_OBJECT,
            format!("shard \"{lost}\" of the backup does not exist in this fleet"),
        )
        .detail(format!("The backup's part of it holds database \"{database}\". This fleet has: {}.", fleet.join(", ")))
        .hint(format!("Say into which shard it is to go: WITH shard_map = '{lost}={free}'.")))
    }
}

fn is_name(text: &str) -> bool {
    !text.is_empty() && !text.contains('=')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(text: &str) -> ShardMap {
        ShardMap::parse(text).unwrap()
    }

    fn fleet(names: &str) -> Vec<String> {
        names.split(' ').map(str::to_owned).collect()
    }

    #[test]
    fn pairs_are_read_and_the_others_stay() {
        let two = map(" s2 = s1,s3=s1 ");
        assert_eq!(["s1", "s2", "s3", "s4"].map(|source| two.target(source)), ["s1", "s1", "s1", "s4"]);
        assert_eq!(map(" "), ShardMap::default());
        for (text, code) in [
            ("s2", "22023"),
            ("s2=", "22023"),
            ("=s1", "22023"),
            ("s2=s1,", "22023"),
            ("s2=s1=s3", "22023"),
            (",", "22023"),
            ("s2=s1, s2=s3", "42712"),
        ] {
            assert_eq!(ShardMap::parse(text).expect_err(text).code.as_str(), code, "{text}");
        }
    }

    #[test]
    fn a_source_that_is_no_target_needs_no_room() {
        let fleet = fleet("s1 s2 s3");
        for (text, possible) in
            [("", "s1 s2 s3"), ("s1=s3", "s2 s3"), ("s1=s2,s2=s1", "s1 s2 s3"), ("x=s1", "s1 s2 s3")]
        {
            assert_eq!(map(text).possible_targets(&fleet).join(" "), possible, "{text}");
        }
    }

    #[test]
    fn what_cannot_be_is_named_with_what_to_do() {
        let two = fleet("s1 s2");
        assert!(map("s9=s2").check_targets(&two).is_ok());
        let unknown = map("s1=s9").check_targets(&two).unwrap_err();
        assert_eq!((unknown.code.as_str(), &*unknown.message), ("42704", "shard \"s9\" of shard_map does not exist"));
        let unknown = map("s9=s1").check_sources(&["s1", "s2"]).unwrap_err();
        assert_eq!((unknown.code.as_str(), unknown.detail.as_deref()), ("42704", Some("It holds: s1, s2.")));

        for (text, sources, code, hint) in [
            ("", &["s1", "s2"][..], "", ""),
            ("s1=s2,s2=s1", &["s1", "s2"], "", ""),
            // Only those that hold the database count.
            ("s2=s1", &["s2"], "", ""),
            ("s2=s1", &["s1", "s2"], "22023", "shard_map"),
            ("", &["s3"], "42704", "WITH shard_map = 's3=s1'."),
            ("", &["s1", "s3"], "42704", "WITH shard_map = 's3=s2'."),
            ("", &["s1", "s2", "s3"], "42704", "WITH shard_map = 's3=…'."),
        ] {
            let error = map(text).check_parts("db", sources, &two).err();
            assert_eq!(error.as_ref().map_or("", |error| error.code.as_str()), code, "{text} {sources:?}");
            let told = error.and_then(|error| error.hint).unwrap_or_default();
            assert!(told.contains(hint), "{text} {sources:?}: {told}");
        }
    }
}
