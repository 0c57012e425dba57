//! Our statements, as what they say.
//!
//! A statement that was prepared may still have placeholders in the places of texts and job ids; `parameters.rs` names
//! their types and puts the values in. Printing follows CockroachDB v23.1 and is for people: job descriptions and the
//! `statement` column. What is printed of a URI is the caller's choice, who knows how to redact it.

use std::fmt;

use crate::control::ControlJobs;
use crate::grant::Grant;
use crate::names::quoted_literal;
use crate::selection::Selection;
use crate::settings::Settings;
use crate::targets::Targets;

/// One statement of ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Statement {
    /// `SHOW LOCALITY`: the gateway's locality.
    ShowLocality,
    /// `SHOW NODES`: every node that the fleet knows.
    ShowNodes,
    /// `BACKUP … INTO …`: a job that writes a backup.
    Backup(Backup),
    /// `EXPLAIN BACKUP …`: where that backup would run, and what it would read. Nothing runs.
    ExplainBackup(Backup),
    /// `SHOW RANGES FROM …`: the spans that a backup would cut, and which nodes hold them.
    ShowRanges(ShowRanges),
    /// `SHOW REGIONS`: where nodes are. `FROM CLUSTER` leaves databases out.
    ShowRegions {
        /// Whether databases are told.
        databases: bool,
    },
    /// `RESTORE … FROM … IN …`: a job that makes databases from a backup.
    Restore(Restore),
    /// `SHOW BACKUPS IN uri`: the backups of a collection.
    ShowBackups {
        /// The URI of the collection.
        collection: Text,
    },
    /// `SHOW BACKUP … IN …`: what one backup holds.
    ShowBackup(ShowBackup),
    /// `SHOW JOBS` and its relatives: rows about jobs, now or when they have ended.
    ShowJobs(ShowJobs),
    /// `PAUSE JOB`, `RESUME JOB`, `CANCEL JOB` and their relatives: requests that change what becomes of jobs.
    ControlJobs(ControlJobs),
    /// `SET CLUSTER SETTING …` and its relatives: settings of the whole fleet.
    Settings(Settings),
    /// `CREATE EXTERNAL CONNECTION name AS uri`: a name for a store.
    CreateExternalConnection {
        /// The name.
        name: Text,
        /// What it stands for.
        uri: Text,
        /// `IF NOT EXISTS`: a name that is taken is no error.
        if_not_exists: bool,
    },
    /// `DROP EXTERNAL CONNECTION name`.
    DropExternalConnection {
        /// The name.
        name: Text,
    },
    /// `GRANT … ON EXTERNAL CONNECTION …` and `REVOKE`: who may use a name, or remove it.
    Grant(Grant),
    /// `SHOW EXTERNAL CONNECTIONS`, or `SHOW EXTERNAL CONNECTION name`.
    ShowExternalConnections {
        /// The only one to show; `None` for all.
        name: Option<Text>,
    },
}

impl Statement {
    /// The command tag that its completion is reported with.
    pub fn tag(&self) -> &'static str {
        match self {
            Self::ShowLocality | Self::ShowNodes | Self::ShowJobs(_) | Self::ShowExternalConnections { .. } => "SHOW",
            Self::ShowBackups { .. } | Self::ShowBackup(_) => "SHOW",
            Self::ShowRanges(_) | Self::ShowRegions { .. } => "SHOW",
            Self::ExplainBackup(_) => "EXPLAIN",
            Self::Backup(_) => "BACKUP",
            Self::Restore(_) => "RESTORE",
            Self::ControlJobs(control) => control.verb.tag(),
            Self::Settings(settings) => settings.tag(),
            Self::Grant(grant) => grant.tag(),
            Self::CreateExternalConnection { .. } => "CREATE EXTERNAL CONNECTION",
            Self::DropExternalConnection { .. } => "DROP EXTERNAL CONNECTION",
        }
    }
}

/// `BACKUP INTO uri WITH …`, `BACKUP DATABASE a, b INTO uri WITH …`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backup {
    /// What it is of.
    pub targets: Targets,
    /// The URI of the collection.
    pub into: Text,
    /// What stands after `WITH`.
    pub options: BackupOptions,
}

impl Backup {
    /// The statement with its destination resolved, for the description of its job.
    ///
    /// `uri` is printed as it is given: it must be redacted already.
    pub fn description(&self, subdir: &str, uri: &str) -> String {
        self.print(&format!("{} IN {}", quoted_literal(subdir), quoted_literal(uri)))
    }

    /// The statement as its user wrote it, in canonical form.
    ///
    /// `uri` is printed as it is given: it must be redacted already.
    pub fn redacted(&self, uri: &str) -> String {
        self.print(&quoted_literal(uri))
    }

    pub(crate) fn print(&self, destination: &str) -> String {
        let BackupOptions { detached, execution_locality, strict, replica, skip_unreachable_shards } = &self.options;
        let options = [
            detached.then(|| "detached".to_owned()),
            print_option("execution locality", execution_locality.as_ref()),
            strict.then(|| "strict execution locality".to_owned()),
            print_option("replica", replica.as_ref()),
            skip_unreachable_shards.then(|| "skip_unreachable_shards".to_owned()),
        ];
        format!("BACKUP{} INTO {destination}{}", self.targets.print(), print_options(options))
    }
}

/// The options of a `BACKUP` that we have.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BackupOptions {
    /// `EXECUTION LOCALITY`: the locality filter of the nodes that may work on it, not yet looked into.
    pub execution_locality: Option<Text>,
    /// `DETACHED`: answer with the job's id at once.
    pub detached: bool,
    /// `STRICT EXECUTION LOCALITY`: no server is read whose node does not match the filter.
    pub strict: bool,
    /// `replica`: which servers may be read, not yet looked into.
    pub replica: Option<Text>,
    /// `skip_unreachable_shards`: a shard that cannot be reached is left out, and no error.
    pub skip_unreachable_shards: bool,
}

/// `SHOW RANGES FROM …`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShowRanges {
    /// Of what.
    pub of: RangesOf,
    /// `TABLES`: names the table of each range.
    pub tables: bool,
    /// `DETAILS`: tells its size and its leaseholder.
    pub details: bool,
}

/// Whose ranges are shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RangesOf {
    /// `DATABASE name`.
    Database(String),
    /// `TABLE name`, `TABLE schema.name` or `TABLE database.schema.name`.
    Table {
        /// The database; `None` for the session's.
        database: Option<String>,
        /// The schema; `None` for the first one of the session's search path that has such a table.
        schema: Option<String>,
        /// The table.
        name: String,
    },
}

/// `RESTORE FROM subdir IN uri WITH …`, `RESTORE DATABASE a, b FROM subdir IN uri WITH …`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Restore {
    /// What of the backup is restored, by the names that it has there.
    pub targets: Targets,
    /// Which backup of the collection.
    pub from: Subdir,
    /// The URI of the collection.
    pub collection: Text,
    /// What stands after `WITH`.
    pub options: RestoreOptions,
}

impl Restore {
    /// The statement with its backup resolved, for the description of its job.
    ///
    /// `uri` is printed as it is given: it must be redacted already.
    pub fn description(&self, subdir: &str, uri: &str) -> String {
        self.print(&quoted_literal(subdir), &quoted_literal(uri))
    }

    /// The statement as its user wrote it, in canonical form.
    ///
    /// `uri` is printed as it is given: it must be redacted already.
    pub fn redacted(&self, uri: &str) -> String {
        self.print(&self.from.print(), &quoted_literal(uri))
    }

    pub(crate) fn print(&self, from: &str, uri: &str) -> String {
        let RestoreOptions { new_db_name, execution_locality, detached, shard_map } = &self.options;
        let options = [
            detached.then(|| "detached".to_owned()),
            print_option("new_db_name", new_db_name.as_ref()),
            print_option("execution locality", execution_locality.as_ref()),
            print_option("shard_map", shard_map.as_ref()),
        ];
        format!("RESTORE{} FROM {from} IN {uri}{}", self.targets.print(), print_options(options))
    }
}

/// The options of a `RESTORE` that we have.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RestoreOptions {
    /// `new_db_name`: the name of the database that is made, as it is to be; nothing is folded in it.
    pub new_db_name: Option<Text>,
    /// `EXECUTION LOCALITY`: the locality filter of the nodes that may work on it, not yet looked into.
    pub execution_locality: Option<Text>,
    /// `DETACHED`: answer with the job's id at once.
    pub detached: bool,
    /// `shard_map`: which shard's part goes to which other shard, not yet looked into.
    pub shard_map: Option<Text>,
}

/// One backup of a collection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Subdir {
    /// `LATEST`, as a word, a literal, or the value of a parameter: the newest.
    Latest,
    /// Its directory, as it is named; a placeholder may turn out to mean the newest.
    Named(Text),
}

impl Subdir {
    pub(crate) fn new(text: Text) -> Self {
        match text.literal() {
            Some(word) if word.eq_ignore_ascii_case("latest") => Self::Latest,
            _ => Self::Named(text),
        }
    }

    fn print(&self) -> String {
        match self {
            Self::Latest => quoted_literal("latest"),
            Self::Named(text) => text.print(),
        }
    }
}

/// `SHOW BACKUP … FROM subdir IN uri WITH …`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShowBackup {
    /// What of it to show.
    pub what: ShowBackupWhat,
    /// Which backup of the collection.
    pub from: Subdir,
    /// The URI of the collection.
    pub collection: Text,
    /// What stands after `WITH`.
    pub options: ShowBackupOptions,
}

/// What of a backup to show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ShowBackupWhat {
    /// Its databases, schemas and tables.
    Objects,
    /// `SCHEMAS`: the same, with the statements that create them.
    Schemas,
    /// `FILES`: its files.
    Files,
}

/// The options of a `SHOW BACKUP` that we have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ShowBackupOptions {
    /// `check_files`: look whether every file is there.
    pub check_files: bool,
    /// `as_json`: show the manifest itself.
    pub as_json: bool,
}

pub(crate) fn print_option(name: &str, value: Option<&Text>) -> Option<String> {
    value.map(|value| format!("{name} = {}", value.print()))
}

pub(crate) fn print_options<const N: usize>(options: [Option<String>; N]) -> String {
    let told: Vec<String> = options.into_iter().flatten().collect();
    if told.is_empty() { String::new() } else { format!(" WITH {}", told.join(", ")) }
}

/// Which jobs to show.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ShowJobs {
    /// `SHOW JOBS`: all that are running or ended lately.
    All,
    /// `SHOW JOB id`, `SHOW JOBS VALUES (id), …`, `SHOW JOBS SELECT …`, with or without `WHEN COMPLETE`.
    These {
        /// Which.
        jobs: Selection,
        /// Wait until all of them have ended.
        when_complete: bool,
    },
}

/// A text in a statement: a literal, a bare or quoted word, or a placeholder for one.
///
/// It may be a URI with keys in it, so its `Debug` hides what it says.
#[derive(Clone, PartialEq, Eq)]
pub enum Text {
    /// The text itself; a bare word is folded to lower case.
    Literal(String),
    /// `$n`, counted from 1.
    Placeholder(usize),
}

impl Text {
    /// What it says; `None` for a placeholder, which a bound statement has none of.
    pub fn literal(&self) -> Option<&str> {
        match self {
            Self::Literal(text) => Some(text),
            Self::Placeholder(_) => None,
        }
    }

    pub(crate) fn print(&self) -> String {
        match self {
            Self::Literal(text) => quoted_literal(text),
            Self::Placeholder(n) => format!("${n}"),
        }
    }
}

impl fmt::Debug for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Literal(_) => f.write_str("Text(\"…\")"),
            Self::Placeholder(n) => write!(f, "Text(${n})"),
        }
    }
}

/// The id of a job in a statement.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Number {
    /// The id.
    Literal(i64),
    /// NULL: no job has it.
    Null,
    /// `$n`, counted from 1.
    Placeholder(usize),
}

impl Number {
    pub(crate) fn print(&self) -> String {
        match self {
            Self::Literal(id) => id.to_string(),
            Self::Null => "NULL".to_owned(),
            Self::Placeholder(n) => format!("${n}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn literal(text: &str) -> Text {
        Text::Literal(text.to_owned())
    }

    #[test]
    fn a_backup_is_printed_in_canonical_form() {
        let mut backup = Backup {
            targets: Targets::Databases(vec!["a".to_owned(), "B b".to_owned()]),
            into: literal("nodelocal://1/x"),
            options: BackupOptions::default(),
        };
        assert_eq!(backup.redacted("it's"), "BACKUP DATABASE a, \"B b\" INTO 'it''s'");
        backup.options = BackupOptions {
            execution_locality: Some(literal("region=a")),
            detached: true,
            strict: true,
            replica: Some(literal("standby")),
            skip_unreachable_shards: true,
        };
        assert_eq!(
            backup.description("/2026/11/22-105816.12", "nodelocal://1/x"),
            "BACKUP DATABASE a, \"B b\" INTO '/2026/11/22-105816.12' IN 'nodelocal://1/x' \
             WITH detached, execution locality = 'region=a', strict execution locality, replica = 'standby', \
             skip_unreachable_shards"
        );
        backup.options = BackupOptions { execution_locality: Some(Text::Placeholder(2)), ..BackupOptions::default() };
        assert_eq!(backup.redacted("u"), "BACKUP DATABASE a, \"B b\" INTO 'u' WITH execution locality = $2");
        backup.targets = Targets::Cluster;
        assert_eq!(backup.description("/d", "u"), "BACKUP INTO '/d' IN 'u' WITH execution locality = $2");
    }

    #[test]
    fn a_restore_is_printed_in_canonical_form() {
        let mut restore = Restore {
            targets: Targets::Databases(vec!["B b".to_owned()]),
            from: Subdir::Latest,
            collection: literal("nodelocal://1/x"),
            options: RestoreOptions::default(),
        };
        assert_eq!(restore.redacted("it's"), "RESTORE DATABASE \"B b\" FROM 'latest' IN 'it''s'");
        restore.options = RestoreOptions {
            execution_locality: Some(literal("region=a")),
            new_db_name: Some(literal("it's")),
            detached: true,
            shard_map: Some(literal("s2=s1")),
        };
        assert_eq!(
            restore.description("/2026/11/22-105816.12", "nodelocal://1/x"),
            "RESTORE DATABASE \"B b\" FROM '/2026/11/22-105816.12' IN 'nodelocal://1/x' \
             WITH detached, new_db_name = 'it''s', execution locality = 'region=a', shard_map = 's2=s1'"
        );
        restore.from = Subdir::Named(Text::Placeholder(1));
        restore.options = RestoreOptions { new_db_name: Some(Text::Placeholder(2)), ..RestoreOptions::default() };
        assert_eq!(restore.redacted("u"), "RESTORE DATABASE \"B b\" FROM $1 IN 'u' WITH new_db_name = $2");
        (restore.targets, restore.options) = (Targets::Cluster, RestoreOptions::default());
        assert_eq!(restore.redacted("u"), "RESTORE FROM $1 IN 'u'");
    }

    #[test]
    fn debug_output_hides_every_text() {
        let uri = literal("s3://b/p?AWS_SECRET_ACCESS_KEY=hunter2");
        let statement = Statement::CreateExternalConnection { name: literal("x"), uri, if_not_exists: false };
        assert_eq!(
            format!("{statement:?}"),
            "CreateExternalConnection { name: Text(\"…\"), uri: Text(\"…\"), if_not_exists: false }"
        );
    }
}
