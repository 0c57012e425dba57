//! Our statements, as what they say.
//!
//! A statement that was prepared may still have placeholders in the places of texts and job ids; `parameters.rs` names
//! their types and puts the values in. Printing follows CockroachDB v23.1 and is for people: job descriptions and the
//! `statement` column. What is printed of a URI is the caller's choice, who knows how to redact it.

use std::fmt;

use crate::names::{quoted_literal, quoted_name};

/// One statement of ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Statement {
    /// `SHOW LOCALITY`: the gateway's locality.
    ShowLocality,
    /// `SHOW NODES`: every node that the fleet knows.
    ShowNodes,
    /// `BACKUP DATABASE … INTO …`: a job that writes a backup.
    Backup(Backup),
    /// `SHOW JOBS` and its relatives: rows about jobs, now or when they have ended.
    ShowJobs(ShowJobs),
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
            Self::Backup(_) => "BACKUP",
            Self::CreateExternalConnection { .. } => "CREATE EXTERNAL CONNECTION",
            Self::DropExternalConnection { .. } => "DROP EXTERNAL CONNECTION",
        }
    }
}

/// `BACKUP DATABASE a, b INTO uri WITH …`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backup {
    /// The databases, as named: folded to lower case unless quoted, in order, repetitions kept.
    pub databases: Vec<String>,
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

    fn print(&self, destination: &str) -> String {
        let names: Vec<_> = self.databases.iter().map(|name| quoted_name(name)).collect();
        let mut options = Vec::new();
        if self.options.detached {
            options.push("detached".to_owned());
        }
        if let Some(filter) = &self.options.execution_locality {
            options.push(format!("execution locality = {}", filter.print()));
        }
        let with = if options.is_empty() { "" } else { " WITH " };
        format!("BACKUP DATABASE {} INTO {destination}{with}{}", names.join(", "), options.join(", "))
    }
}

/// The options of a `BACKUP` that we have.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BackupOptions {
    /// `EXECUTION LOCALITY`: the locality filter of the nodes that may work on it, not yet looked into.
    pub execution_locality: Option<Text>,
    /// `DETACHED`: answer with the job's id at once.
    pub detached: bool,
}

/// Which jobs to show.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ShowJobs {
    /// `SHOW JOBS`: all that are running or ended lately.
    All,
    /// `SHOW JOB id`, `SHOW JOBS VALUES (id), …`, with or without `WHEN COMPLETE`.
    These {
        /// Their ids, in order, repetitions kept.
        ids: Vec<Number>,
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

    fn print(&self) -> String {
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

#[cfg(test)]
mod tests {
    use super::*;

    fn literal(text: &str) -> Text {
        Text::Literal(text.to_owned())
    }

    #[test]
    fn a_backup_is_printed_in_canonical_form() {
        let mut backup = Backup {
            databases: vec!["a".to_owned(), "B b".to_owned()],
            into: literal("nodelocal://1/x"),
            options: BackupOptions::default(),
        };
        assert_eq!(backup.redacted("it's"), "BACKUP DATABASE a, \"B b\" INTO 'it''s'");
        backup.options = BackupOptions { execution_locality: Some(literal("region=a")), detached: true };
        assert_eq!(
            backup.description("/2026/11/22-105816.12", "nodelocal://1/x"),
            "BACKUP DATABASE a, \"B b\" INTO '/2026/11/22-105816.12' IN 'nodelocal://1/x' \
             WITH detached, execution locality = 'region=a'"
        );
        backup.options = BackupOptions { execution_locality: Some(Text::Placeholder(2)), detached: false };
        assert_eq!(backup.redacted("u"), "BACKUP DATABASE a, \"B b\" INTO 'u' WITH execution locality = $2");
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
