//! The grammar, statement by statement: `sql-fixtures/grammar/*.txt`.
//!
//! A sound statement is answered with its canonical form, and in a second line with the form for logs where that is
//! another one; any other statement with its error, all of it. The numbers in the notes (A2, B7) are those of our list of
//! what CockroachDB's own tests assert; where we differ on purpose, the note says so. What
//! is answered otherwise is printed as it would have to stand in the file.

#[path = "../../../tests/support/golden.rs"]
mod golden;

use pgerror::PgError;
use sql::{Literals, parse};

const FILES: [(&str, &str); 6] = [
    ("backup.txt", include_str!("../../../sql-fixtures/grammar/backup.txt")),
    ("jobs.txt", include_str!("../../../sql-fixtures/grammar/jobs.txt")),
    ("restore.txt", include_str!("../../../sql-fixtures/grammar/restore.txt")),
    ("schedules.txt", include_str!("../../../sql-fixtures/grammar/schedules.txt")),
    ("settings.txt", include_str!("../../../sql-fixtures/grammar/settings.txt")),
    ("stores.txt", include_str!("../../../sql-fixtures/grammar/stores.txt")),
];

/// What a client would hear, or the statement as it was understood.
fn answer(statement: &str) -> String {
    assert!(sql::is_ours(statement.as_bytes()), "not taken: {statement}");
    match parse(statement) {
        Ok(statements) => {
            let printed = |literals| statements.iter().map(|s| s.print(literals)).collect::<Vec<_>>().join("; ");
            let (shown, hidden) = (printed(Literals::Shown), printed(Literals::Hidden));
            if shown == hidden { shown } else { format!("{shown}\n{hidden}") }
        }
        Err(error) => told(&error),
    }
}

fn told(error: &PgError) -> String {
    let mut told = format!("ERROR: {}: {}", error.code.as_str(), error.message);
    for (name, part) in [("DETAIL", &error.detail), ("HINT", &error.hint)] {
        told.extend(part.iter().map(|part| format!("\n{name}: {part}")));
    }
    told.extend(error.position.map(|position| format!("\nPOSITION: {position}")));
    told
}

#[test]
fn every_statement_is_understood_as_it_is_written_down() {
    let mut wrong = Vec::new();
    for (name, file) in FILES {
        let before = wrong.len();
        let cases: Vec<_> = golden::cases(file).collect();
        assert!(!cases.is_empty(), "{name} has no statements");
        for case in &cases {
            let answer = answer(&case.statement);
            if answer != case.answer {
                wrong.push(format!("{}\n----\n{answer}", case.statement));
            }
        }
        if wrong.len() > before {
            wrong.insert(before, format!("# {name}"));
        }
    }
    assert!(wrong.is_empty(), "these are answered otherwise:\n\n{}\n\n", wrong.join("\n\n"));
}

/// What is printed for people can be sent again, and means the same.
#[test]
fn a_printed_statement_reads_back_as_itself() {
    for case in FILES.iter().flat_map(|(_, file)| golden::cases(file)) {
        let printed = |text: &str| {
            let statements = parse(text).ok()?;
            Some(statements.iter().map(|s| s.print(Literals::Shown)).collect::<Vec<_>>().join("; "))
        };
        if let Some(once) = printed(&case.statement) {
            assert_eq!(printed(&once).as_ref(), Some(&once), "{}", case.statement);
        }
    }
}
