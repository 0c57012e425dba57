//! `backhaul node status`: the fleet as one node sees it, also while no PostgreSQL server answers.

use std::time::Duration;

use anyhow::Context as _;
use cluster::{Dialer, Purpose};
use serde::Deserialize;
use sql::Verb;

use crate::flags::Status;
use crate::print_line;

const DEADLINE: Duration = Duration::from_secs(10);

#[derive(Deserialize)]
struct Nodes {
    columns: Vec<String>,
    rows: Vec<Vec<Option<String>>>,
    notices: Vec<String>,
}

/// Asks the node and prints a table.
///
/// # Errors
///
/// The node cannot be reached or refuses the secret.
pub(crate) async fn run(flags: &Status) -> anyhow::Result<()> {
    let dialer = Dialer::new(flags.trust.secret(), flags.trust.authority()?, "backhaul node status".to_owned());
    let session = dialer.dial(&flags.host, &Purpose::Verbs).await?;
    let answer = session.ask(Verb::Nodes, DEADLINE).await?;
    let nodes: Nodes = serde_json::from_str(&answer).context("read the list of nodes")?;
    for notice in &nodes.notices {
        print_line(&format!("NOTICE: {notice}"));
    }
    table(&nodes.columns, &nodes.rows).iter().for_each(|line| print_line(line));
    Ok(())
}

/// Columns as wide as their widest value, as `cockroach node status` prints them.
fn table(columns: &[String], rows: &[Vec<Option<String>>]) -> Vec<String> {
    let text = |value: &Option<String>| value.clone().unwrap_or_else(|| "NULL".to_owned());
    let mut lines = vec![columns.to_vec()];
    lines.extend(rows.iter().map(|row| row.iter().map(text).collect()));
    let width = |column: usize| {
        lines.iter().filter_map(|line| line.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns.len()).map(width).collect();
    let print = |line: &Vec<String>| {
        let cells: Vec<String> = line.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        cells.join("  ").trim_end().to_owned()
    };
    let mut printed: Vec<String> = lines.iter().map(print).collect();
    printed.insert(1, widths.iter().map(|width| "-".repeat(*width)).collect::<Vec<_>>().join("--"));
    printed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_is_aligned_and_shows_null() {
        let columns = ["id".to_owned(), "address".to_owned()];
        let rows = vec![vec![Some("1".to_owned()), Some("n1:26257".to_owned())], vec![None, Some("é:1".to_owned())]];
        assert_eq!(table(&columns, &rows), ["id    address", "--------------", "1     n1:26257", "NULL  é:1"]);
    }
}
