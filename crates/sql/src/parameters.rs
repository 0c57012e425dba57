//! The placeholders of a prepared statement: their types, and their values.
//!
//! The grammar decides every type, so a client need not declare any: a placeholder stands where a text is expected or
//! where a job's id is. Those in a query of PostgreSQL's are the server's to decide.

use std::num::IntErrorKind;

use pgerror::{PgError, SqlState};

use crate::control::ControlJobs;
use crate::grant::Grant;
use crate::rows::Sourced;
use crate::script::PartWork;
use crate::selection::{Query, Selection};
use crate::settings::Settings;
use crate::statement::{
    Backup, BackupOptions, Number, Restore, RestoreOptions, ShowBackup, ShowJobs, Statement, Subdir, Text,
};

/// No statement has more parameters: a Bind message has no room for more values.
pub(crate) const PARAMETERS_MAX: usize = u16::MAX as usize;

/// The type of a parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ParameterType {
    /// `text`
    Text,
    /// `int8`
    Int8,
}

impl ParameterType {
    fn name(self) -> &'static str {
        match self {
            Self::Text => "text",
            Self::Int8 => "bigint",
        }
    }
}

impl Statement {
    /// The types of `$1`, `$2`, … in order; `None` for one that only a query of PostgreSQL's has.
    ///
    /// # Errors
    ///
    /// 42P18 when a number is left out, 42P08 when one parameter stands in places of different types.
    pub fn parameters(&self) -> Result<Vec<Option<ParameterType>>, PgError> {
        deduce(&self.uses(), &self.of_server())
    }

    /// The statement with `values` in the places of `$1`, `$2`, …; a value is in its type's text form, `None` is NULL.
    ///
    /// A simple query has no values: bound to none, a statement with a placeholder is refused as PostgreSQL would.
    /// Values beyond the highest placeholder are not looked at.
    ///
    /// # Errors
    ///
    /// 42P02 for a placeholder without a value, 22004 for NULL in a text's place, 22P02 or 22003 for an id that is no
    /// `bigint`.
    pub fn bind(self, values: &[Option<String>]) -> Result<Self, PgError> {
        let text = |text| bind_text(text, values);
        Ok(match self {
            Self::ShowLocality => Self::ShowLocality,
            Self::ShowNodes => Self::ShowNodes,
            Self::ShowRanges(ranges) => Self::ShowRanges(ranges),
            Self::ShowRegions { databases } => Self::ShowRegions { databases },
            Self::Backup(backup) => Self::Backup(bind_backup(backup, values)?),
            Self::ExplainBackup(backup) => Self::ExplainBackup(bind_backup(backup, values)?),
            Self::Restore(restore) => Self::Restore(bind_restore(restore, values)?),
            Self::ShowBackups { collection } => Self::ShowBackups { collection: text(collection)? },
            Self::ShowBackup(ShowBackup { what, from, collection, options }) => {
                let (from, collection) = (bind_subdir(from, values)?, text(collection)?);
                Self::ShowBackup(ShowBackup { what, from, collection, options })
            }
            Self::ShowJobs(ShowJobs::All) => Self::ShowJobs(ShowJobs::All),
            Self::ShowJobs(ShowJobs::These { jobs, when_complete }) => {
                Self::ShowJobs(ShowJobs::These { jobs: bind_selection(jobs, values)?, when_complete })
            }
            Self::ControlJobs(ControlJobs { verb, jobs, reason }) => {
                let (jobs, reason) = (bind_selection(jobs, values)?, reason.map(text).transpose()?);
                Self::ControlJobs(ControlJobs { verb, jobs, reason })
            }
            Self::Settings(Settings::Set { name, value }) => {
                Self::Settings(Settings::Set { name, value: value.map(text).transpose()? })
            }
            Self::Settings(shown) => Self::Settings(shown),
            Self::CreateExternalConnection { name, uri, if_not_exists } => {
                Self::CreateExternalConnection { name: text(name)?, uri: text(uri)?, if_not_exists }
            }
            Self::DropExternalConnection { name } => Self::DropExternalConnection { name: text(name)? },
            Self::Grant(Grant { gives, privileges, connections, roles }) => {
                let connections = connections.into_iter().map(text).collect::<Result<_, _>>()?;
                Self::Grant(Grant { gives, privileges, connections, roles })
            }
            Self::ShowExternalConnections { name } => {
                Self::ShowExternalConnections { name: name.map(text).transpose()? }
            }
        })
    }

    /// The jobs that it is about, where it names some.
    fn selection(&self) -> Option<&Selection> {
        match self {
            Self::ShowJobs(ShowJobs::These { jobs, .. }) | Self::ControlJobs(ControlJobs { jobs, .. }) => Some(jobs),
            _ => None,
        }
    }

    /// The query that has to be run before it.
    pub fn query(&self) -> Option<&Query> {
        match self.selection() {
            Some(Selection::Query(query)) => Some(query),
            Some(Selection::Ids(_) | Selection::All(_)) | None => None,
        }
    }

    /// Puts what its query gave in the query's place.
    pub fn answer_query(&mut self, ids: Vec<i64>) {
        if let Self::ShowJobs(ShowJobs::These { jobs, .. }) | Self::ControlJobs(ControlJobs { jobs, .. }) = self {
            *jobs = Selection::Ids(ids.into_iter().map(Number::Literal).collect());
        }
    }

    /// The placeholders whose types are the server's to decide.
    fn of_server(&self) -> Vec<usize> {
        self.query().map(|query| query.sourced.of_server()).unwrap_or_default()
    }

    /// Every place of a placeholder, with its type.
    fn uses(&self) -> Vec<(usize, ParameterType)> {
        let texts: Vec<&Text> = match self {
            Self::ShowLocality | Self::ShowNodes | Self::ShowJobs(_) => Vec::new(),
            Self::ShowRanges(_) | Self::ShowRegions { .. } => Vec::new(),
            Self::Backup(Backup { into, options, .. }) | Self::ExplainBackup(Backup { into, options, .. }) => {
                [into].into_iter().chain(&options.execution_locality).chain(&options.replica).collect()
            }
            Self::Restore(Restore { from, collection, options, .. }) => {
                let options = options.new_db_name.iter().chain(&options.execution_locality).chain(&options.shard_map);
                named(from).chain([collection]).chain(options).collect()
            }
            Self::ControlJobs(control) => control.reason.iter().collect(),
            Self::Settings(Settings::Set { value, .. }) => value.iter().collect(),
            Self::Settings(_) => Vec::new(),
            Self::ShowBackups { collection } => vec![collection],
            Self::ShowBackup(ShowBackup { from, collection, .. }) => named(from).chain([collection]).collect(),
            Self::CreateExternalConnection { name, uri, .. } => vec![name, uri],
            Self::DropExternalConnection { name } => vec![name],
            Self::Grant(grant) => grant.connections.iter().collect(),
            Self::ShowExternalConnections { name } => name.iter().collect(),
        };
        let ids: &[Number] = match self.selection() {
            Some(Selection::Ids(ids)) => ids,
            Some(Selection::Query(_) | Selection::All(_)) | None => &[],
        };
        let texts = texts.into_iter().filter_map(|text| match text {
            Text::Placeholder(n) => Some((*n, ParameterType::Text)),
            Text::Literal(_) => None,
        });
        let ids = ids.iter().filter_map(|id| match id {
            Number::Placeholder(n) => Some((*n, ParameterType::Int8)),
            Number::Literal(_) | Number::Null => None,
        });
        let nested = self.query().map(|query| query.sourced.uses()).unwrap_or_default();
        texts.chain(ids).chain(nested).collect()
    }
}

impl Sourced {
    /// The types of `$1`, `$2`, … in order; `None` for one that stands in no row source.
    ///
    /// # Errors
    ///
    /// As [`Statement::parameters`].
    pub fn parameters(&self) -> Result<Vec<Option<ParameterType>>, PgError> {
        deduce(&self.uses(), &self.of_server())
    }

    /// The text with `values` in its row sources.
    ///
    /// # Errors
    ///
    /// As [`Statement::bind`].
    pub fn bind(mut self, values: &[Option<String>]) -> Result<Self, PgError> {
        for source in self.sources_mut() {
            source.statement = source.statement.clone().bind(values)?;
        }
        Ok(self)
    }

    fn uses(&self) -> Vec<(usize, ParameterType)> {
        self.sources().iter().flat_map(|source| source.statement.uses()).collect()
    }

    fn of_server(&self) -> Vec<usize> {
        self.placeholders().chain(self.sources().iter().flat_map(|source| source.statement.of_server())).collect()
    }
}

impl PartWork {
    /// The statement of a text, which has no values: a placeholder in it is refused.
    ///
    /// # Errors
    ///
    /// As [`Statement::bind`].
    pub fn bind(self, values: &[Option<String>]) -> Result<Self, PgError> {
        match self {
            Self::Ours(statement) => statement.bind(values).map(Self::Ours),
            Self::Theirs(sourced) => sourced.bind(values).map(Self::Theirs),
        }
    }
}

fn named(subdir: &Subdir) -> impl Iterator<Item = &Text> {
    match subdir {
        Subdir::Latest => None,
        Subdir::Named(text) => Some(text),
    }
    .into_iter()
}

/// `elsewhere` are placeholders that have a type which is not known here.
fn deduce(uses: &[(usize, ParameterType)], elsewhere: &[usize]) -> Result<Vec<Option<ParameterType>>, PgError> {
    let count = uses.iter().map(|(n, _)| *n).chain(elsewhere.iter().copied()).max().unwrap_or_default();
    // The server refuses what is beyond.
    let mut types = vec![None; count.min(PARAMETERS_MAX)];
    for &(n, found) in uses {
        let known = types[n - 1].get_or_insert(found);
        if *known != found {
            let text = format!("inconsistent types deduced for parameter ${n}");
            let detail = format!("{} versus {}.", known.name(), found.name());
            return Err(PgError::new(SqlState::AMBIGUOUS_PARAMETER, text).detail(detail));
        }
    }
    let left_out = types.iter().enumerate().find(|(index, found)| found.is_none() && !elsewhere.contains(&(index + 1)));
    match left_out {
        None => Ok(types),
        Some((index, _)) => {
            let text = format!("could not determine data type of parameter ${}", index + 1);
            Err(PgError::new(SqlState::INDETERMINATE_DATATYPE, text))
        }
    }
}

fn bind_text(text: Text, values: &[Option<String>]) -> Result<Text, PgError> {
    let Text::Placeholder(n) = text else { return Ok(text) };
    let null = || PgError::new(SqlState::NULL_VALUE_NOT_ALLOWED, format!("parameter ${n} must not be NULL"));
    Ok(Text::Literal(value(n, values)?.ok_or_else(null)?.to_owned()))
}

/// A value may well be `latest`.
fn bind_subdir(subdir: Subdir, values: &[Option<String>]) -> Result<Subdir, PgError> {
    match subdir {
        Subdir::Latest => Ok(Subdir::Latest),
        Subdir::Named(text) => bind_text(text, values).map(Subdir::new),
    }
}

fn bind_backup(backup: Backup, values: &[Option<String>]) -> Result<Backup, PgError> {
    let Backup { targets, into, options } = backup;
    let text = |text| bind_text(text, values);
    let options = BackupOptions {
        execution_locality: options.execution_locality.map(text).transpose()?,
        replica: options.replica.map(text).transpose()?,
        ..options
    };
    Ok(Backup { targets, into: text(into)?, options })
}

fn bind_restore(restore: Restore, values: &[Option<String>]) -> Result<Restore, PgError> {
    let Restore { targets, from, collection, options } = restore;
    let text = |text| bind_text(text, values);
    let options = RestoreOptions {
        new_db_name: options.new_db_name.map(text).transpose()?,
        execution_locality: options.execution_locality.map(text).transpose()?,
        shard_map: options.shard_map.map(text).transpose()?,
        ..options
    };
    Ok(Restore { targets, from: bind_subdir(from, values)?, collection: text(collection)?, options })
}

fn bind_selection(jobs: Selection, values: &[Option<String>]) -> Result<Selection, PgError> {
    match jobs {
        Selection::Ids(ids) => {
            ids.into_iter().map(|id| bind_number(id, values)).collect::<Result<_, _>>().map(Selection::Ids)
        }
        Selection::Query(mut query) => {
            query.sourced = query.sourced.bind(values)?;
            Ok(Selection::Query(query))
        }
        Selection::All(kind) => Ok(Selection::All(kind)),
    }
}

fn bind_number(number: Number, values: &[Option<String>]) -> Result<Number, PgError> {
    let Number::Placeholder(n) = number else { return Ok(number) };
    value(n, values)?.map_or(Ok(Number::Null), |text| parse_int8(text).map(Number::Literal))
}

fn value(n: usize, values: &[Option<String>]) -> Result<Option<&str>, PgError> {
    let missing = || PgError::new(SqlState::UNDEFINED_PARAMETER, format!("there is no parameter ${n}"));
    n.checked_sub(1).and_then(|index| values.get(index)).map(Option::as_deref).ok_or_else(missing)
}

/// A number as PostgreSQL's `bigint` is read: a sign and white space around are allowed.
pub(crate) fn parse_int8(text: &str) -> Result<i64, PgError> {
    text.trim_matches(|c: char| c.is_ascii_whitespace() || c == '\x0b').parse().map_err(
        |error: std::num::ParseIntError| match error.kind() {
            IntErrorKind::PosOverflow | IntErrorKind::NegOverflow => PgError::new(
                SqlState::NUMERIC_VALUE_OUT_OF_RANGE,
                format!("value \"{text}\" is out of range for type bigint"),
            ),
            _ => PgError::new(
                SqlState::INVALID_TEXT_REPRESENTATION,
                format!("invalid input syntax for type bigint: \"{text}\""),
            ),
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::parse;

    fn statement(text: &str) -> Statement {
        parse(text).expect(text).remove(0)
    }

    fn bound(text: &str, values: &[Option<&str>]) -> Result<Statement, PgError> {
        let values: Vec<_> = values.iter().map(|value| value.map(str::to_owned)).collect();
        statement(text).bind(&values)
    }

    #[test]
    fn the_place_of_a_placeholder_gives_its_type() {
        use ParameterType::{Int8, Text};
        for (text, types) in [
            ("SHOW JOBS", vec![]),
            ("BACKUP DATABASE a INTO $1 WITH EXECUTION LOCALITY = $2, DETACHED", vec![Text, Text]),
            ("BACKUP DATABASE a INTO ($2) WITH EXECUTION LOCALITY = $1", vec![Text, Text]),
            ("EXPLAIN BACKUP DATABASE a INTO $1 WITH replica = $3, EXECUTION LOCALITY = $2", vec![Text; 3]),
            ("SHOW RANGES FROM TABLE a", vec![]),
            (
                "RESTORE DATABASE a FROM $2 IN $1 WITH new_db_name=$3, execution locality=$4, shard_map=$5",
                vec![Text; 5],
            ),
            ("RESTORE DATABASE a FROM LATEST IN ($1)", vec![Text]),
            ("SHOW BACKUPS IN $1", vec![Text]),
            ("SHOW BACKUP FILES FROM $1 IN $2 WITH check_files", vec![Text; 2]),
            ("CREATE EXTERNAL CONNECTION $1 AS $1", vec![Text]),
            ("SHOW JOBS WHEN COMPLETE VALUES ($2), (7), ($1)", vec![Int8, Int8]),
            ("PAUSE JOB $2 WITH REASON = $1", vec![Text, Int8]),
            ("CANCEL JOBS VALUES ($1), ($2)", vec![Int8, Int8]),
            ("RESUME ALL BACKUP JOBS", vec![]),
            ("SHOW JOBS SELECT job_id FROM [SHOW JOB $1] WHERE 'x' = ''", vec![Int8]),
        ] {
            assert_eq!(statement(text).parameters(), Ok(types.into_iter().map(Some).collect()), "{text}");
        }
        for (text, types) in [
            ("CANCEL JOBS SELECT id FROM t WHERE x = $1", vec![None]),
            (
                "PAUSE JOBS SELECT id FROM t WHERE x = $3 OR '$4' = $$ $5 $$ WITH REASON = $2",
                vec![None, Some(Text), None],
            ),
            ("SHOW JOB (SELECT $1 FROM [SHOW JOBS SELECT $2 FROM [SHOW JOB $3]])", vec![None, None, Some(Int8)]),
        ] {
            // `$1` of the second has no place at all.
            let found = statement(text).parameters();
            match text.contains("$1") {
                true => assert_eq!(found, Ok(types), "{text}"),
                false => assert_eq!(found.expect_err(text).code, SqlState::INDETERMINATE_DATATYPE),
            }
        }
        let sourced =
            Sourced::read("SELECT $2 FROM [SHOW BACKUPS IN $1], [SHOW JOB $3] WHERE job_id = $3").expect("sound");
        assert_eq!(sourced.parameters(), Ok(vec![Some(Text), None, Some(Int8)]));
    }

    #[test]
    fn a_parameter_without_one_type_is_refused() {
        let error = statement("BACKUP DATABASE a INTO $2").parameters().expect_err("$1 is left out");
        assert_eq!(error.code, SqlState::INDETERMINATE_DATATYPE);
        assert_eq!(error.message, "could not determine data type of parameter $1");
        let error = deduce(&[(1, ParameterType::Text), (1, ParameterType::Int8)], &[]).expect_err("two types");
        assert_eq!(error.code, SqlState::AMBIGUOUS_PARAMETER);
        assert_eq!(error.detail.as_deref(), Some("text versus bigint."));
    }

    #[test]
    fn values_take_the_places_of_placeholders() {
        for (text, values, expected) in [
            (
                "BACKUP DATABASE a INTO $1 WITH EXECUTION LOCALITY = $2, DETACHED",
                [Some("x"), Some("region=a")],
                "BACKUP DATABASE a INTO 'x' WITH EXECUTION LOCALITY = 'region=a', DETACHED",
            ),
            (
                "EXPLAIN BACKUP DATABASE a INTO $1 WITH replica = $2",
                [Some("x"), Some("standby")],
                "EXPLAIN BACKUP DATABASE a INTO 'x' WITH replica = 'standby'",
            ),
            ("SHOW JOBS VALUES ($2), ($1), (3)", [Some(" -5 "), None], "SHOW JOBS VALUES (NULL), (-5), (3)"),
            ("CREATE EXTERNAL CONNECTION $2 AS $1", [Some("u"), Some("N")], "CREATE EXTERNAL CONNECTION 'N' AS 'u'"),
            (
                "RESTORE DATABASE a FROM $1 IN $2 WITH new_db_name = $2, execution locality = $1, detached",
                [Some("x=y"), Some("B")],
                "RESTORE DATABASE a FROM 'x=y' IN 'B' WITH new_db_name = 'B', execution locality = 'x=y', detached",
            ),
            ("RESTORE DATABASE a FROM $1 IN $2", [Some("Latest"), Some("u")], "RESTORE DATABASE a FROM LATEST IN 'u'"),
            (
                "RESTORE DATABASE a FROM LATEST IN $1 WITH shard_map = $2",
                [Some("u"), Some("s2=s1")],
                "RESTORE DATABASE a FROM LATEST IN 'u' WITH shard_map = 's2=s1'",
            ),
            ("SHOW BACKUPS IN $1", [Some("x"), None], "SHOW BACKUPS IN 'x'"),
            ("PAUSE JOB $2 WITH REASON = $1", [Some("It"), Some("5")], "PAUSE JOB 5 WITH REASON = 'It'"),
            ("RESUME JOBS VALUES ($2), ($1)", [None, Some("5")], "RESUME JOBS VALUES (5), (NULL)"),
            ("CANCEL JOBS TABLE x", [None, None], "CANCEL JOBS TABLE x"),
            ("SHOW BACKUP SCHEMAS FROM $2 IN $1", [Some("x"), Some("/2")], "SHOW BACKUP SCHEMAS FROM '/2' IN 'x'"),
            ("SHOW BACKUP LATEST IN $1", [Some("x"), None], "SHOW BACKUP LATEST IN 'x'"),
            ("DROP EXTERNAL CONNECTION $1", [Some("x"), None], "DROP EXTERNAL CONNECTION x"),
            ("SHOW EXTERNAL CONNECTION $2", [None, Some("x")], "SHOW EXTERNAL CONNECTION x"),
        ] {
            assert_eq!(bound(text, &values), Ok(statement(expected)), "{text}");
        }
    }

    #[test]
    fn a_value_that_does_not_fit_is_refused() {
        for (text, values, code, message) in [
            ("SHOW JOB $1", &[] as &[_], "42P02", "there is no parameter $1"),
            ("BACKUP DATABASE a INTO $1", &[None], "22004", "parameter $1 must not be NULL"),
            ("RESTORE DATABASE a FROM $1 IN 'x'", &[None], "22004", "parameter $1 must not be NULL"),
            ("SHOW BACKUP LATEST IN $2", &[None], "42P02", "there is no parameter $2"),
            ("SHOW JOB $1", &[Some("x")], "22P02", "invalid input syntax for type bigint: \"x\""),
            ("SHOW JOB $1", &[Some("")], "22P02", "invalid input syntax for type bigint: \"\""),
            (
                "SHOW JOB $1",
                &[Some("9223372036854775808")],
                "22003",
                "value \"9223372036854775808\" is out of range for type bigint",
            ),
        ] {
            let error = bound(text, values).expect_err(text);
            assert_eq!((error.code.as_str(), error.message.as_str()), (code, message), "{text}");
        }
    }
}
