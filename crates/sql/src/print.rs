//! Our statements back as text, in CockroachDB's canonical form.
//!
//! Its users know that form from job descriptions: the words in capitals, the options in its order, one id as a row of
//! `VALUES`. v23.1 prints options without parentheses, later versions print `WITH OPTIONS (…)`; we print the former and
//! read both. What may not be seen by everybody is printed only where that was asked for.

use crate::names::{quoted_literal, quoted_name};
use crate::selection::{JobKind, Selection};
use crate::statement::{
    RangesOf, ShowBackup, ShowBackupWhat, ShowJobs, ShowRanges, Statement, Subdir, Text, print_options,
};

/// Whether a statement is printed with what may be secret in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Literals {
    /// As it is: for whoever sent it.
    Shown,
    /// With five stars in the place of every URI, and an ellipsis in the place of a query of the user's: for logs.
    Hidden,
}

/// What stands where something was hidden, as CockroachDB has it.
const STARS: &str = "'*****'";

impl Statement {
    /// The statement in canonical form. Placeholders stay what they are.
    pub fn print(&self, literals: Literals) -> String {
        let uri = |uri: &Text| literals.uri(uri);
        match self {
            Self::ShowLocality => "SHOW LOCALITY".to_owned(),
            Self::ShowNodes => "SHOW NODES".to_owned(),
            Self::Backup(backup) => backup.print(&uri(&backup.into)),
            Self::ExplainBackup(backup) => format!("EXPLAIN {}", backup.print(&uri(&backup.into))),
            Self::ShowRanges(ranges) => print_ranges(ranges),
            Self::ShowRegions { databases: true } => "SHOW REGIONS".to_owned(),
            Self::ShowRegions { databases: false } => "SHOW REGIONS FROM CLUSTER".to_owned(),
            Self::Restore(restore) => restore.print(&literals.subdir(&restore.from), &uri(&restore.collection)),
            Self::ShowBackups { collection } => format!("SHOW BACKUPS IN {}", uri(collection)),
            Self::ShowBackup(show) => print_show_backup(show, literals),
            Self::ShowJobs(ShowJobs::All) => "SHOW JOBS".to_owned(),
            Self::ShowJobs(ShowJobs::These { jobs, when_complete }) => {
                let when = if *when_complete { " WHEN COMPLETE" } else { "" };
                format!("SHOW JOBS{when} {}", jobs.print(literals))
            }
            Self::ControlJobs(control) => control.print(literals),
            Self::CreateExternalConnection { name, uri: to, if_not_exists } => {
                let unless = if *if_not_exists { "IF NOT EXISTS " } else { "" };
                format!("CREATE EXTERNAL CONNECTION {unless}{} AS {}", name.print(), uri(to))
            }
            Self::Settings(settings) => settings.print(),
            Self::Grant(grant) => grant.print(),
            Self::DropExternalConnection { name } => format!("DROP EXTERNAL CONNECTION {}", name.print()),
            Self::ShowExternalConnections { name: None } => "SHOW EXTERNAL CONNECTIONS".to_owned(),
            Self::ShowExternalConnections { name: Some(name) } => format!("SHOW EXTERNAL CONNECTION {}", name.print()),
        }
    }
}

impl Literals {
    fn uri(self, uri: &Text) -> String {
        match (self, uri) {
            (Self::Hidden, Text::Literal(_)) => STARS.to_owned(),
            _ => uri.print(),
        }
    }

    /// A subdirectory is a part of a URI, and somebody may have written a whole one in its place.
    fn subdir(self, subdir: &Subdir) -> String {
        match subdir {
            Subdir::Latest => quoted_literal("latest"),
            Subdir::Named(text) => self.uri(text),
        }
    }
}

impl Selection {
    /// The jobs, behind `JOBS`; or `ALL … JOBS` whole.
    pub(crate) fn print(&self, literals: Literals) -> String {
        match self {
            Self::All(JobKind::Backup) => "ALL BACKUP JOBS".to_owned(),
            Self::All(JobKind::Restore) => "ALL RESTORE JOBS".to_owned(),
            Self::Query(_) if literals == Literals::Hidden => "…".to_owned(),
            Self::Query(query) => query.print(),
            Self::Ids(ids) => {
                let ids: Vec<String> = ids.iter().map(|id| format!("({})", id.print())).collect();
                format!("VALUES {}", ids.join(", "))
            }
        }
    }
}

fn print_ranges(ranges: &ShowRanges) -> String {
    let of = match &ranges.of {
        RangesOf::Database(name) => format!("DATABASE {}", quoted_name(name)),
        RangesOf::Table { database, schema, name } => {
            let names: Vec<_> = [database.as_ref(), schema.as_ref(), Some(name)].into_iter().flatten().collect();
            format!("TABLE {}", names.iter().map(|name| quoted_name(name)).collect::<Vec<_>>().join("."))
        }
    };
    let options = [ranges.tables.then(|| "TABLES".to_owned()), ranges.details.then(|| "DETAILS".to_owned())];
    format!("SHOW RANGES FROM {of}{}", print_options(options))
}

fn print_show_backup(show: &ShowBackup, literals: Literals) -> String {
    let what = match show.what {
        ShowBackupWhat::Objects => "",
        ShowBackupWhat::Schemas => "SCHEMAS FROM ",
        ShowBackupWhat::Files => "FILES FROM ",
    };
    let told = &show.options;
    let options = [told.as_json.then(|| "as_json".to_owned()), told.check_files.then(|| "check_files".to_owned())];
    let (from, uri) = (literals.subdir(&show.from), literals.uri(&show.collection));
    format!("SHOW BACKUP {what}{from} IN {uri}{}", print_options(options))
}
