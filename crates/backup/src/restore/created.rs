//! The statements that create what is in a backup, as SHOW BACKUP SCHEMAS gives them.
//!
//! `pg_restore` prints a verified schema file as a script, and each part of the script has a head that says what it is.
//! Indexes, constraints and defaults are parts of their own there; they are given with their table. Heads are text, and
//! so a function's body may look as if it had one: what is made of them is shown, never run.

use std::collections::BTreeMap;
use std::process::Stdio;
use std::time::Duration;

use anyhow::Context as _;
use bytes::Bytes;
use fleet::private::Installation;
use pgerror::{PgError, SqlState};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::{Child, Command};
use tokio::time::timeout;

use super::source::Source;
use crate::manifest::FileEntry;

/// A schema that is longer, as a file or as a script, is not shown.
const SCRIPT_BYTES_MAX: u64 = 64 * 1024 * 1024;

/// The statements of all databases of a backup; more are not shown.
const STATEMENTS_BYTES_MAX: usize = 64 * 1024 * 1024;

/// A `pg_restore` that takes longer is ended.
const SCRIPT_DEADLINE: Duration = Duration::from_secs(60);

/// What is told of what `pg_restore` says on standard error.
const SAID_MAX: u64 = 600;

/// The statements that create one object.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Created {
    /// The shard whose part of the backup it is in.
    pub shard: String,
    /// Its database.
    pub database: String,
    /// `database`, `table`, `sequence` or `materialized view`.
    pub kind: String,
    /// Its schema; empty for a database.
    pub schema: String,
    /// Its name.
    pub name: String,
    /// The statements.
    pub statement: String,
}

/// The statements for all objects of a backup that have one.
///
/// # Errors
///
/// A schema file is missing or damaged, or too long; this node does not have PostgreSQL's programs.
pub(super) async fn created(source: &Source) -> anyhow::Result<Vec<Created>> {
    let (mut all, mut bytes) = (Vec::new(), 0);
    for part in &source.manifest.shards {
        for database in &part.databases {
            let file = part.schemas.iter().find(|file| file.database == database.name);
            let file = file.with_context(|| format!("find the schema of {}", database.name))?;
            if file.file_bytes > SCRIPT_BYTES_MAX {
                return Err(too_long(&file.database).into());
            }
            let script = script(source.read(file).await?, file).await?;
            let script = Script::read(&script);
            let tables = database.tables.iter().map(|it| ("table", it.schema.as_str(), it.name.as_str()));
            let views = database.materialized_views.iter();
            let views = views.map(|it| ("materialized view", it.schema.as_str(), it.name.as_str()));
            let sequences = database.sequences.iter().map(|it| ("sequence", it.schema.as_str(), it.name.as_str()));
            let itself = ("database", "", database.name.as_str());
            for (kind, schema, name) in [itself].into_iter().chain(tables).chain(views).chain(sequences) {
                let Some(statement) = script.statement(kind, schema, name) else { continue };
                bytes += statement.len();
                all.push(Created {
                    shard: part.shard.clone(),
                    database: database.name.clone(),
                    kind: kind.to_owned(),
                    schema: schema.to_owned(),
                    name: name.to_owned(),
                    statement,
                });
            }
            if bytes > STATEMENTS_BYTES_MAX {
                return Err(too_long(&file.database).into());
            }
        }
    }
    Ok(all)
}

fn too_long(database: &str) -> PgError {
    let message = format!("the schema of database \"{database}\" is too long to be shown");
    PgError::new(SqlState::CONFIGURATION_LIMIT_EXCEEDED, message)
        .hint("SHOW BACKUP FILES names the schema's file; pg_restore --file=- prints it.")
}

/// A schema file as a script, in the database's own encoding: what is not UTF-8 in it is replaced by signs.
async fn script(dump: Bytes, file: &FileEntry) -> anyhow::Result<String> {
    let found = tokio::task::spawn_blocking(Installation::find).await.context("look for pg_restore")?;
    let missing = |detail: String| {
        PgError::new(SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE, "pg_restore was not found")
            .detail(detail)
            .hint("Install PostgreSQL's client and server programs on a node that reaches the store.")
    };
    let program = found.map_err(|error| missing(format!("On the node that looked: {error}.")))?.program("pg_restore");
    if !program.is_file() {
        return Err(missing(format!("On the node that looked: {} is not there.", program.display())).into());
    }
    let mut command = Command::new(program);
    command.args(["--file=-", "--schema-only", "--create", "--no-owner", "--no-privileges", "--no-comments"]);
    command.current_dir("/").env_clear().env("PATH", "/usr/bin:/bin").env("LC_ALL", "C.UTF-8");
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    let printed = print(command.spawn().context("start pg_restore")?, &dump);
    let (script, said) = timeout(SCRIPT_DEADLINE, printed).await.context("print a schema")??;
    match said {
        Some(said) => {
            let message = format!("pg_restore could not print the schema of database \"{}\"", file.database);
            let error = PgError::new(SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE, message);
            Err(error.detail(format!("It said: {}", said.trim_end())).into())
        }
        None if script.len() as u64 > SCRIPT_BYTES_MAX => Err(too_long(&file.database).into()),
        None => Ok(script),
    }
}

/// What it prints, and, when it fails, what it says.
async fn print(mut child: Child, dump: &[u8]) -> anyhow::Result<(String, Option<String>)> {
    let mut stdin = child.stdin.take().context("write to pg_restore")?;
    let out = child.stdout.take().context("read from pg_restore")?;
    let err = child.stderr.take().context("read from pg_restore")?;
    let give = async move {
        // It closes its end when it has seen enough.
        let _ = stdin.write_all(dump).await;
    };
    let ((), script, said) = tokio::join!(give, begin(out, SCRIPT_BYTES_MAX + 1), begin(err, SAID_MAX));
    let status = child.wait().await.context("wait for pg_restore")?;
    Ok((script?, (!status.success()).then_some(said?)))
}

/// The beginning of what comes; the rest is read too, so that nobody waits for a full pipe.
async fn begin(mut from: impl AsyncRead + Unpin, most: u64) -> anyhow::Result<String> {
    let mut kept = Vec::new();
    (&mut from).take(most).read_to_end(&mut kept).await.context("read from pg_restore")?;
    tokio::io::copy(&mut from, &mut tokio::io::sink()).await.context("read from pg_restore")?;
    Ok(String::from_utf8_lossy(&kept).into_owned())
}

/// The types of parts that are given with their table.
const BELONGING: [&str; 6] = ["DEFAULT", "CONSTRAINT", "CHECK CONSTRAINT", "FK CONSTRAINT", "INDEX", "TABLE ATTACH"];

/// A script in its parts.
struct Script<'s> {
    /// By their heads, up to the owner.
    parts: BTreeMap<&'s str, &'s str>,
    /// By the table as the script writes it, in the script's order.
    belonging: BTreeMap<&'s str, Vec<&'s str>>,
}

impl<'s> Script<'s> {
    fn read(script: &'s str) -> Self {
        let mut parts = BTreeMap::new();
        let mut belonging: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        let mut rest = script;
        while let Some((_, after)) = rest.split_once("\n--\n-- Name: ") {
            let Some((head, after)) = after.split_once('\n') else { break };
            let end = after.find("\n--\n-- Name: ").unwrap_or(after.len());
            let text = body(&after[..end]);
            rest = &after[end..];
            let Some((head, _)) = head.rsplit_once("; Owner: ") else { continue };
            let of = |kind: &&str| head.rsplit_once("; Schema: ").is_some_and(|(head, _)| ends_in_type(head, kind));
            match BELONGING.iter().find(|kind| of(kind)) {
                Some(kind) => {
                    if let Some(table) = table_of(kind, text) {
                        belonging.entry(table).or_default().push(text);
                    }
                }
                None => {
                    parts.entry(head).or_insert(text);
                }
            }
        }
        Self { parts, belonging }
    }

    fn statement(&self, kind: &str, schema: &str, name: &str) -> Option<String> {
        let line = |name: &str| name.replace(['\n', '\r'], " ");
        let schema = if schema.is_empty() { "-".to_owned() } else { line(schema) };
        let part = |kind: &str| self.parts.get(format!("{}; Type: {kind}; Schema: {schema}", line(name)).as_str());
        let first = *part(&kind.to_uppercase())?;
        let mut all = vec![first];
        all.extend(part("SEQUENCE OWNED BY").filter(|_| kind == "sequence"));
        let made = ["TABLE ", "VIEW "].iter().find_map(|word| Some(relation(first.split_once(word)?.1)));
        if matches!(kind, "table" | "materialized view")
            && let Some(belonging) = made.and_then(|made| self.belonging.get(made))
        {
            all.extend(belonging);
        }
        Some(all.join("\n"))
    }
}

fn ends_in_type(head: &str, kind: &str) -> bool {
    head.strip_suffix(kind).is_some_and(|rest| rest.ends_with("; Type: "))
}

/// The statements of a part, without what is around them: the head's last line, settings for the next part, and
/// psql's commands.
fn body(part: &str) -> &str {
    let mut text = part.strip_prefix("--\n").unwrap_or(part);
    for command in ["\n\\unrestrict ", "\n\\connect ", "\n--\n-- PostgreSQL database dump complete"] {
        text = text.split_once(command).map_or(text, |(before, _)| before);
    }
    loop {
        text = text.trim();
        let (before, last) = text.rsplit_once('\n').unwrap_or(("", text));
        if last != "--" && !(last.starts_with("SET default_") && last.ends_with(';')) {
            return text;
        }
        text = before;
    }
}

/// The table that a statement of this type is about, as the script writes it.
fn table_of<'s>(kind: &str, text: &'s str) -> Option<&'s str> {
    let behind = |text: &'s str, heads: [&str; 2]| heads.iter().find_map(|head| text.strip_prefix(head));
    match kind {
        "INDEX" => {
            let named = behind(text, ["CREATE INDEX ", "CREATE UNIQUE INDEX "])?;
            behind(&named[relation(named).len()..], [" ON ONLY ", " ON "]).map(relation)
        }
        "TABLE ATTACH" => text.split_once(" ATTACH PARTITION ").map(|(_, rest)| relation(rest)),
        _ => behind(text, ["ALTER TABLE ONLY ", "ALTER TABLE "]).map(relation),
    }
}

/// The name at the beginning, with its schema and its quotes.
fn relation(text: &str) -> &str {
    let mut quoted = false;
    let end = text.find(|c: char| {
        quoted ^= c == '"';
        !quoted && (c.is_whitespace() || matches!(c, '(' | ';'))
    });
    &text[..end.unwrap_or(text.len())]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_script_falls_into_its_parts() {
        let part = |name: &str, kind: &str, schema: &str, text: &str| {
            format!("--\n-- Name: {name}; Type: {kind}; Schema: {schema}; Owner: -\n--\n\n{text}\n\n\n")
        };
        let script = [
            "--\n-- PostgreSQL database dump\n--\n\n\\restrict x\n\nSET row_security = off;\n\n".to_owned(),
            part(
                "d",
                "DATABASE",
                "-",
                "CREATE DATABASE d;\n\n\n\\unrestrict x\n\\connect d\n\\restrict x\n\nSET a = b;",
            ),
            part("f()", "FUNCTION", "s", "CREATE FUNCTION s.f();\n\n\nSET default_tablespace = '';\n"),
            part("t", "TABLE", "s", "CREATE TABLE s.t (\n    i integer\n);"),
            part(
                "t 1",
                "TABLE",
                "s",
                "CREATE UNLOGGED TABLE s.\"t 1\" (\n);\n\nSET default_table_access_method = heap;",
            ),
            part("q", "SEQUENCE", "s", "CREATE SEQUENCE s.q\n    CACHE 1;"),
            part("q", "SEQUENCE OWNED BY", "s", "ALTER SEQUENCE s.q OWNED BY s.t.i;"),
            part("v", "MATERIALIZED VIEW", "s", "CREATE MATERIALIZED VIEW s.v AS\n SELECT 1\n  WITH NO DATA;"),
            part("t i", "DEFAULT", "s", "ALTER TABLE ONLY s.t ALTER COLUMN i SET DEFAULT 1;"),
            part("t 1 k", "CONSTRAINT", "s", "ALTER TABLE ONLY s.\"t 1\"\n    ADD CONSTRAINT k UNIQUE (i);"),
            part("x", "INDEX", "s", "CREATE UNIQUE INDEX \"x ON y\" ON ONLY s.t USING btree (i);"),
            part("y", "INDEX", "s", "CREATE INDEX y ON s.v USING btree (i);"),
            "--\n-- PostgreSQL database dump complete\n--\n\n\\unrestrict x\n".to_owned(),
        ];
        let script = script.concat();
        let script = Script::read(&script);
        for (kind, schema, name, expected) in [
            ("database", "", "d", "CREATE DATABASE d;"),
            (
                "table",
                "s",
                "t",
                "CREATE TABLE s.t (\n    i integer\n);\nALTER TABLE ONLY s.t ALTER COLUMN i SET DEFAULT 1;\n\
                 CREATE UNIQUE INDEX \"x ON y\" ON ONLY s.t USING btree (i);",
            ),
            (
                "table",
                "s",
                "t\n1",
                "CREATE UNLOGGED TABLE s.\"t 1\" (\n);\nALTER TABLE ONLY s.\"t 1\"\n    ADD CONSTRAINT k UNIQUE (i);",
            ),
            ("sequence", "s", "q", "CREATE SEQUENCE s.q\n    CACHE 1;\nALTER SEQUENCE s.q OWNED BY s.t.i;"),
            (
                "materialized view",
                "s",
                "v",
                "CREATE MATERIALIZED VIEW s.v AS\n SELECT 1\n  WITH NO DATA;\nCREATE INDEX y ON s.v USING btree (i);",
            ),
        ] {
            assert_eq!(script.statement(kind, schema, name).as_deref(), Some(expected), "{kind} {name}");
        }
        assert_eq!(script.statement("table", "s", "u"), None);
    }
}
