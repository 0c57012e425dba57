//! What a reader may rely on, checked: the size of files, the edges between crates, the words of the documents.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

/// A file that is longer has become two.
const LINES_MAX: usize = 700;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The files that git tracks, or would.
fn files() -> Vec<PathBuf> {
    let mut git = Command::new("git");
    git.args(["ls-files", "--cached", "--others", "--exclude-standard"]).current_dir(root());
    let output = git.output().expect("git is there");
    assert!(output.status.success());
    let text = String::from_utf8(output.stdout).expect("paths are UTF-8");
    text.lines().map(|line| root().join(line)).filter(|path| path.is_file()).collect()
}

fn sources_of(folder: &str) -> impl Iterator<Item = (PathBuf, String)> {
    let folder = root().join(folder);
    let sources = files()
        .into_iter()
        .filter(move |path| path.starts_with(&folder) && path.extension().is_some_and(|extension| extension == "rs"));
    sources.map(|path| (path.clone(), read(&path)))
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).expect("the file is text")
}

#[test]
fn no_file_outgrows_its_room() {
    for path in files() {
        let lines = std::fs::read(&path).expect("the file can be read").iter().filter(|byte| **byte == b'\n').count();
        let exempt = path.ends_with("Cargo.lock");
        assert!(exempt || lines <= LINES_MAX, "{} has {lines} lines", path.display());
    }
}

/// ARCHITECTURE.md: a crate depends on those before it in this list only, and on those only that are named.
#[test]
fn crates_depend_upwards_only() {
    let edges: BTreeMap<&str, &[&str]> = BTreeMap::from([
        ("pgerror", [].as_slice()),
        ("sql", &["pgerror"]),
        ("cluster", &["pgerror", "sql"]),
        ("storage", &["cluster", "pgerror"]),
        ("jobs", &["cluster", "pgerror"]),
        ("fleet", &["cluster", "pgerror"]),
        ("backup", &["cluster", "fleet", "jobs", "pgerror", "sql", "storage"]),
        ("gateway", &["backup", "cluster", "fleet", "jobs", "pgerror", "sql", "storage"]),
    ]);
    for (name, allowed) in &edges {
        let manifest = read(&root().join("crates").join(name).join("Cargo.toml"));
        let dependencies = manifest.split("[dependencies]").nth(1).expect("a section of dependencies");
        let section = dependencies.split("\n[").next().unwrap_or_default();
        let named = section.lines().filter_map(|line| line.split(['.', ' ', '=']).next());
        let ours: Vec<&str> = named.filter(|dependency| edges.contains_key(dependency)).collect();
        assert_eq!(ours, *allowed, "{name}");
    }
}

/// ARCHITECTURE.md: sql and pgerror do no I/O, only the gateway names pgwire, only storage names opendal, and jobs know
/// nothing of backups.
#[test]
fn libraries_stay_in_their_rooms() {
    for (folder, words) in [
        ("crates/pgerror", ["tokio", "pgwire", "async fn", "std::fs", "std::net"].as_slice()),
        ("crates/sql", &["tokio", "pgwire", "async fn", "std::fs", "std::net"]),
        ("crates/cluster", &["pgwire"]),
        ("crates/fleet", &["pgwire"]),
        ("crates/node", &["pgwire"]),
        ("crates/storage", &["pgwire"]),
        ("crates/jobs", &["pgwire", "opendal", "backup::", "BACKUP DATABASE"]),
        ("crates/backup", &["pgwire", "opendal", "tokio_postgres"]),
        ("crates/gateway", &["opendal"]),
        ("crates/node", &["opendal"]),
    ] {
        for (path, text) in sources_of(folder) {
            let found = words.iter().find(|word| text.contains(**word));
            assert_eq!(found, None, "{}", path.display());
        }
    }
    let with_pgwire = sources_of("crates/gateway").filter(|(_, text)| text.contains("pgwire::"));
    let names: Vec<String> =
        with_pgwire.map(|(path, _)| path.file_name().unwrap_or_default().to_string_lossy().into_owned()).collect();
    assert_eq!(names, ["answer.rs", "peer.rs"], "messages are built in one place, peers are proven in another");
}

/// The words of the comments that stand right above something. One that has nothing below it is about no case.
fn noted(path: &Path) -> Vec<String> {
    let sign = if path.extension().is_some_and(|extension| extension == "rs") { "//" } else { "#" };
    let text = read(path);
    let (mut words, mut above) = (Vec::new(), Vec::new());
    for line in text.lines().map(str::trim) {
        if line.starts_with(sign) {
            above.extend(line.split(|char: char| !char.is_ascii_alphanumeric()).map(str::to_owned));
            continue;
        }
        if !line.is_empty() {
            words.append(&mut above);
        }
        above.clear();
    }
    words
}

/// What our list of CockroachDB's behaviour numbers is shown by a case, or said there to differ on purpose: its number
/// stands in a comment right above the case.
#[test]
fn every_number_of_the_list_has_its_case() {
    let numbers = "A1 A2 A3 A5 A6 A8 A10 A11 A13 A15 A19 A21 A22 A24 A25 B1 B3 B6 B7 B10 B11 B12 B13 C1 C2 C4 C5 C7 C8 \
                   E1 E2 E3 E6 E7 E13 E14 E15 E17 E18 E19 E20 G1 G2 G4 G5 G7 G9 G12 G13 G14 G16 I1 I2 I3 I4 I6 I9 I11 \
                   I12 K1 K2 K3 K6 H1 H3 H4 H6 H9 H10";
    let cases = ["sql-fixtures", "tests/system", "crates/backup/src/assign.rs"].map(|place| root().join(place));
    let texts = files().into_iter().filter(|path| cases.iter().any(|folder| path.starts_with(folder)));
    let has_cases = |path: &PathBuf| path.extension().is_some_and(|extension| extension != "md");
    let said: BTreeSet<String> = texts.filter(has_cases).flat_map(|path| noted(&path)).collect();
    for number in numbers.split_ascii_whitespace() {
        assert!(said.contains(number), "{number} has no case in sql-fixtures, tests/system or the rule of assignment");
    }
}

#[test]
fn documents_have_one_title_and_no_dead_links() {
    for path in files().into_iter().filter(|path| path.extension().is_some_and(|extension| extension == "md")) {
        let text = read(&path);
        let mut fenced = false;
        let titles = text.lines().filter(|line| {
            fenced ^= line.starts_with("```");
            !fenced && line.starts_with("# ")
        });
        assert_eq!(titles.count(), 1, "{}", path.display());
        for target in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let file = target.split('#').next().unwrap_or_default();
            let elsewhere = file.is_empty() || file.contains("://");
            let folder = path.parent().expect("a file has a folder");
            assert!(elsewhere || folder.join(file).exists(), "{}: {target}", path.display());
        }
    }
}

/// The crates' own essays are the first thing a reader opens.
#[test]
fn every_source_file_says_what_it_is_for() {
    for (path, text) in sources_of("crates").chain(sources_of("tests")) {
        assert!(text.starts_with("//!"), "{} begins without a word", path.display());
    }
}

/// What an operator reads about flags is what the program understands.
#[test]
fn every_flag_in_the_documents_exists() {
    let help = |arguments: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_backhaul")).args(arguments).arg("--help").output();
        String::from_utf8(output.expect("the program runs").stdout).expect("help is UTF-8")
    };
    let known: String =
        [&["start"][..], &["init"], &["check"], &["node", "status"], &["demo"]].into_iter().map(help).collect();
    for document in ["README.md", "docs/operators.md"] {
        let text = read(&root().join(document));
        let commands = text.lines().filter(|line| line.contains("backhaul ") || line.trim_start().starts_with("--"));
        for line in commands {
            for flag in line.split_ascii_whitespace().filter(|word| word.starts_with("--") && word.len() > 2) {
                let flag = flag.split(['=', '`', ',', ')']).next().unwrap_or_default();
                assert!(known.contains(flag), "{document}: {flag} in: {line}");
            }
        }
    }
}
