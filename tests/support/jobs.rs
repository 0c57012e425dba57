//! Jobs as a client sees them: made, waited for, and where their files are.

use std::path::PathBuf;

use super::demo::Demo;
use super::store::files_in;

/// The region of the demo's nodes 3 and 4.
pub const WEST: &str = "EXECUTION LOCALITY = 'region=us-west-1'";

/// Every node's external I/O directory.
pub fn extern_dirs(demo: &Demo) -> Vec<PathBuf> {
    (1..=demo.nodes.len()).map(|number| demo.node_dir(number).join("extern")).collect()
}

/// The data files in a node's external I/O directory.
pub fn data_files(demo: &Demo, number: usize) -> usize {
    let files = files_in(&demo.node_dir(number).join("extern"));
    files.iter().filter(|file| file.to_string_lossy().ends_with(".copy.zst")).count()
}

/// A DETACHED statement through node `number`; gives the job's id.
#[track_caller]
pub fn detached(demo: &Demo, number: usize, statement: &str) -> String {
    let id = demo.ask(number, statement);
    assert!(id.parse::<i64>().is_ok(), "{id}");
    id
}

/// Waits for a job through node `number`, and gives its columns: 5 is its status, 12 its error, 13 its coordinator.
#[track_caller]
pub fn completed(demo: &Demo, number: usize, job: &str) -> Vec<String> {
    let row = demo.ask(number, &format!("SHOW JOB WHEN COMPLETE {job}"));
    let columns: Vec<String> = row.split('|').map(str::to_owned).collect();
    assert_eq!(columns.len(), 19, "{row}");
    columns
}

/// The same for one that has succeeded.
#[track_caller]
pub fn succeeded(demo: &Demo, number: usize, job: &str) -> Vec<String> {
    let columns = completed(demo, number, job);
    assert_eq!((columns[5].as_str(), columns[12].as_str()), ("succeeded", ""), "{columns:?}");
    columns
}

/// The job and the node in `execution of job … relocated to …`, which an attached client was told.
#[track_caller]
pub fn relocated(told: &str) -> (&str, &str) {
    let rest = told.strip_prefix("ERROR:  XXUUU: execution of job ").expect(told);
    let (job, rest) = rest.split_once(" relocated to ").expect(told);
    (job, rest.split(|c: char| !c.is_ascii_digit()).next().unwrap_or_default())
}
