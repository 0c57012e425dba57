//! Runs `sql-fixtures/**/*.slt` against a fleet: SQL logic test files as a user would write them.
//!
//! A file says in its first lines which fleet it needs (`# demo: --nodes 2`; files with the same line share one fleet),
//! and a statement says on which node it runs with a comment of its own, `-- on n2`; without one it runs on n1. Every
//! statement of ours is also sent to the bare server beside n1, which must refuse it: what PostgreSQL understands is
//! never taken from it. So is every statement of `sql-fixtures/grammar/*.txt`, whose answers `crates/sql` checks.
//! The trial `stock` runs all files once more as the stock `sqllogictest` command would: on one node of one fleet.
//! `cargo slt nodes/` runs the files whose path has that in it.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use libtest_mimic::{Arguments, Failed, Trial};
use sqllogictest::{AsyncDB, DBOutput, DefaultColumnType, Runner};
use support::demo::Demo;
use tokio_postgres::{Client, NoTls, SimpleQueryMessage};

mod support;

/// One fleet for all files that ask for the same; it starts with the first of them.
type Fleet = Arc<OnceLock<Demo>>;

fn main() {
    let arguments = Arguments::from_args();
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("sql-fixtures");
    let mut fleets: BTreeMap<String, Fleet> = BTreeMap::new();
    let mut files = Vec::new();
    collect(&root, &mut files);
    files.sort();
    let all = files.clone();
    let trials = files.into_iter().map(|file| {
        let name = file.strip_prefix(&root).expect("a file of the folder").display().to_string();
        let text = std::fs::read_to_string(&file).expect("the file can be read");
        let header = text.lines().find_map(|line| line.strip_prefix("# demo:")).unwrap_or_default().trim().to_owned();
        let fleet = Arc::clone(fleets.entry(header.clone()).or_default());
        Trial::test(name, move || run(&file, &header, &fleet))
    });
    let mut trials: Vec<Trial> = trials.collect();
    let bare = Arc::clone(fleets.entry("--no-example-database".to_owned()).or_default());
    trials.push(Trial::test("grammar", move || run_grammar(&root.join("grammar"), &bare)));
    trials.push(Trial::test("stock", move || run_as_stock(&all)));
    let conclusion = libtest_mimic::run(&arguments, trials);
    // Ends the fleets: `exit` would not.
    drop(fleets);
    conclusion.exit();
}

fn collect(dir: &Path, files: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).expect("the folder can be read").flatten() {
        let path = entry.path();
        let hidden = entry.file_name().to_string_lossy().starts_with('_');
        if path.is_dir() {
            collect(&path, files);
        } else if !hidden && path.extension().is_some_and(|extension| extension == "slt") {
            files.push(path);
        }
    }
}

/// Every statement of the grammar's files goes to a bare server, which must not know it.
fn run_grammar(folder: &Path, fleet: &Fleet) -> Result<(), Failed> {
    let demo = fleet.get_or_init(|| Demo::start(&["--no-example-database"]));
    let session = Session::new(Vec::new(), Some(demo.direct_url(1)));
    let checked = include_str!("../crates/sql/tests/grammar.rs");
    let runtime = tokio::runtime::Runtime::new()?;
    for file in std::fs::read_dir(folder)?.flatten() {
        let name = file.file_name().to_string_lossy().into_owned();
        assert!(checked.contains(&name), "{name} is not a file of the test of the grammar");
        let text = std::fs::read_to_string(file.path())?;
        for case in support::golden::cases(&text) {
            assert!(sql::is_ours(case.statement.as_bytes()), "{name}: {}", case.statement);
            let theirs = runtime.block_on(session.check_is_not_theirs(&case.statement));
            theirs.map_err(|error| Failed::from(format!("{name}: {}: {error}", case.statement)))?;
        }
    }
    Ok(())
}

fn run(file: &Path, header: &str, fleet: &Fleet) -> Result<(), Failed> {
    let arguments: Vec<&str> = header.split_ascii_whitespace().collect();
    let demo = fleet.get_or_init(|| Demo::start(&arguments));
    let urls: Vec<String> = demo.nodes.iter().map(|node| node.url.clone()).collect();
    let bare = demo.direct_url(1);
    let runtime = tokio::runtime::Runtime::new()?;
    let outcome = runtime.block_on(async {
        let mut runner = Runner::new(|| async { Ok(Session::new(urls.clone(), Some(bare.clone()))) });
        runner.run_file_async(file).await
    });
    outcome.map_err(|error| Failed::from(error.display(false).to_string()))
}

/// Runs all files as the stock command does with its PostgreSQL engine; building that takes minutes, so this is it again: it
/// knows one node, hears no more of a text's answer than the first of its statements, and tells an error without its code.
fn run_as_stock(files: &[PathBuf]) -> Result<(), Failed> {
    let demo = Demo::start(&["--rows", "300"]);
    let urls = vec![demo.nodes[0].url.clone()];
    let runtime = tokio::runtime::Runtime::new()?;
    let mut wrong = Vec::new();
    for file in files {
        if std::fs::read_to_string(file)?.contains("# demo: --nodes 4 --servers 4 --shards") {
            continue;
        }
        let mut runner = Runner::new(|| async { Ok(Session::new(urls.clone(), None)) });
        let outcome = runtime.block_on(runner.run_file_async(file));
        wrong.extend(outcome.err().map(|error| error.display(false).to_string()));
    }
    if wrong.is_empty() { Ok(()) } else { Err(Failed::from(wrong.join("\n\n"))) }
}

/// A session that has a connection to each node it was sent to.
struct Session {
    urls: Vec<String>,
    /// The server beside n1; `None` in a session that is like one of the stock command.
    bare: Option<String>,
    connections: HashMap<usize, Client>,
}

impl Session {
    fn new(urls: Vec<String>, bare: Option<String>) -> Self {
        Self { urls, bare, connections: HashMap::new() }
    }

    async fn on(&mut self, number: usize) -> Result<&Client, Told> {
        if !self.connections.contains_key(&number) {
            let url = self.urls.get(number - 1).ok_or_else(|| Told::own(format!("there is no node {number}")))?;
            self.connections.insert(number, connect(url).await?);
        }
        Ok(&self.connections[&number])
    }

    /// A bare server must refuse a statement of ours, as one that it does not know.
    async fn check_is_not_theirs(&self, statement: &str) -> Result<(), Told> {
        let text = statement.as_bytes();
        let is_ours = sql::is_ours(text) || sql::has_row_source(text) || sql::is_mixed(text);
        let Some(bare) = self.bare.as_ref().filter(|_| is_ours) else { return Ok(()) };
        let code = match connect(bare).await?.simple_query(statement).await {
            Ok(_) => return Err(Told::own("a bare PostgreSQL accepts this statement".to_owned())),
            Err(error) => error.code().map(|code| code.code().to_owned()),
        };
        match code.as_deref() {
            Some("42601" | "42704") => Ok(()),
            other => Err(Told::own(format!("a bare PostgreSQL refuses this statement with {other:?}"))),
        }
    }
}

async fn connect(url: &str) -> Result<Client, Told> {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await.map_err(Told::from)?;
    tokio::spawn(async move { drop(connection.await) });
    Ok(client)
}

/// `-- on n2`, anywhere in the statement.
fn node_of(statement: &str) -> usize {
    let number = |line: &str| line.trim().strip_prefix("-- on n")?.trim().parse().ok();
    statement.lines().find_map(number).unwrap_or(1)
}

#[async_trait::async_trait]
impl AsyncDB for Session {
    type Error = Told;
    type ColumnType = DefaultColumnType;

    async fn run(&mut self, statement: &str) -> Result<DBOutput<DefaultColumnType>, Told> {
        self.check_is_not_theirs(statement).await?;
        let number = if self.bare.is_some() { node_of(statement) } else { 1 };
        let is_stock = self.bare.is_none();
        let told = |error| if is_stock { Told::stock(error) } else { Told::from(error) };
        let client = self.on(number).await?;
        let mut rows = Vec::new();
        let mut width = None;
        let mut affected = 0;
        for message in client.simple_query(statement).await.map_err(told)? {
            match message {
                SimpleQueryMessage::RowDescription(columns) => width = Some(columns.len()),
                SimpleQueryMessage::Row(row) => {
                    let value = |index| match row.get(index) {
                        None => "NULL".to_owned(),
                        Some("") => "(empty)".to_owned(),
                        Some(text) => text.to_owned(),
                    };
                    rows.push((0..row.len()).map(value).collect());
                }
                SimpleQueryMessage::CommandComplete(count) => {
                    affected = count;
                    if is_stock {
                        break;
                    }
                }
                _ => {}
            }
        }
        Ok(match width {
            // The stock command cannot tell an answer without rows from none.
            Some(width) if !is_stock || !rows.is_empty() => {
                DBOutput::Rows { types: vec![DefaultColumnType::Any; width], rows }
            }
            Some(_) | None => DBOutput::StatementComplete(affected),
        })
    }

    async fn shutdown(&mut self) {
        self.connections.clear();
    }

    fn engine_name(&self) -> &str {
        if self.bare.is_some() { "backhaul" } else { "postgres" }
    }

    async fn sleep(duration: std::time::Duration) {
        tokio::time::sleep(duration).await;
    }

    fn error_sql_state(error: &Told) -> Option<String> {
        error.code.clone()
    }
}

/// An error as a client hears it, all of it, so that a fixture can pin code, text, detail and hint at once.
#[derive(Debug)]
struct Told {
    code: Option<String>,
    text: String,
}

impl Told {
    fn own(text: String) -> Self {
        Self { code: None, text }
    }

    /// In the words of the stock command, whose driver is an older one.
    fn stock(error: tokio_postgres::Error) -> Self {
        match error.as_db_error() {
            Some(said) => Self { code: Some(said.code().code().to_owned()), text: format!("db error: {said}") },
            None => Self::own(error.to_string()),
        }
    }
}

impl From<tokio_postgres::Error> for Told {
    fn from(error: tokio_postgres::Error) -> Self {
        let Some(said) = error.as_db_error() else { return Self::own(error.to_string()) };
        let code = said.code().code();
        let mut text = format!("{}: {code}: {}", said.severity(), said.message());
        for (name, part) in [("DETAIL", said.detail()), ("HINT", said.hint())] {
            text.extend(part.map(|part| format!("\n{name}: {part}")));
        }
        Self { code: Some(code.to_owned()), text }
    }
}

impl std::fmt::Display for Told {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.text)
    }
}

impl std::error::Error for Told {}
