//! Application drivers, through every node. `scripts/prepare --tests` puts them under `target/drivers`.

use std::path::PathBuf;
use std::process::Command;

use crate::support::demo::Demo;
use crate::support::run;

pub(super) fn drivers() -> PathBuf {
    let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("target/drivers");
    assert!(dir.exists(), "the drivers are not there; run scripts/prepare --tests");
    dir
}

pub(super) fn script(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/drivers").join(name)
}

/// psycopg with its C binding (`binary`) or without (`python`).
fn python(binding: &str, name: &str, url: &str) -> String {
    let mut command = Command::new(drivers().join("venv/bin/python"));
    run(command.env("PSYCOPG_IMPL", binding).env("PYTHONIOENCODING", "utf-8").arg(script(name)).arg(url))
}

fn node_js(url: &str, arguments: &[&str]) -> String {
    let mut command = Command::new("node");
    run(command.env("NODE_PATH", drivers().join("node_modules")).arg(script("session.js")).arg(url).args(arguments))
}

#[test]
fn drivers_get_the_server_s_own_answers() {
    let demo = Demo::start(&[]);
    let direct = demo.direct_url(1);
    let direct_js = format!("socket:{}?db=movr&user=root", demo.node_dir(1).join("socket").display());
    for binding in ["python", "binary"] {
        let expected = python(binding, "session.py", &direct);
        for node in &demo.nodes {
            assert_eq!(python(binding, "session.py", &node.url), expected, "{binding} through {}", node.address);
        }
    }
    let expected = node_js(&direct_js, &[]);
    for node in &demo.nodes {
        assert_eq!(node_js(&node.url, &[]), expected, "through {}", node.address);
    }
}

#[test]
fn drivers_get_our_answers_too() {
    let demo = Demo::start(&[]);
    let expected = "\
locality 25 [('region=us-west-1,zone=b',)] SHOW
['int', 'str', 'str', 'str', 'str', 'bool', 'bool', 'str', 'datetime', 'datetime', 'int', 'str'] 4
locality 25 [('region=us-west-1,zone=b',)] SHOW
['int', 'str', 'str', 'str', 'str', 'bool', 'bool', 'str', 'datetime', 'datetime', 'int', 'str'] 4
('region=us-west-1,zone=b',)
('region=us-west-1,zone=b',)
('region=us-west-1,zone=b',)
[1, 'region=us-west-1,zone=b', 2, 'region=us-west-1,zone=b']
42601 at or near \"now\": syntax error 15 try \\h SHOW
42601 IDLE
(None,)
";
    for binding in ["python", "binary"] {
        assert_eq!(python(binding, "ours.py", &demo.nodes[3].url), expected, "{binding}");
    }
    let row = "[{\"locality\":\"region=us-west-1,zone=b\"}] SHOW null\n";
    let array = "[[\"region=us-west-1,zone=b\"]] SHOW null\n";
    let error = "42601 at or near \"now\": syntax error 15 try \\h SHOW\n";
    assert_eq!(node_js(&demo.nodes[3].url, &["ours"]), format!("{row}{row}{row}{array}{error}"));
}

#[test]
fn drivers_back_up_with_parameters() {
    let demo = Demo::start(&[]);
    let row = "['int', 'str', 'str', 'str', 'str', 'str', 'NoneType', 'datetime', 'datetime', 'datetime', 'datetime', \
               'float', 'str', 'int', 'NoneType', 'datetime', 'NoneType', 'int', 'list']
True BACKUP succeeded 1.0 True True []
";
    // E20: one column.
    let detached = format!("['job_id'] BACKUP\nint 19\n{row}");
    let refused = "XXUUU BACKUP cannot be used inside a multi-statement transaction without DETACHED option";
    let columns = "['job_id', 'status', 'fraction_completed', 'rows', 'index_entries', 'bytes']";
    let expected = format!(
        "{detached}{detached}['int', 'str', 'float', 'int', 'int', 'int'] {columns}
XXUUU ERROR True
(1,) succeeded [] (2,)
22P02 invalid input syntax for type bigint: \"first\"
CANCEL JOBS 0
XXUUU job with status succeeded cannot be requested to be paused
succeeded INTRANS
succeeded
None
{refused}
{refused}
('usable',)
"
    );
    for binding in ["python", "binary"] {
        assert_eq!(python(binding, "backup.py", &demo.nodes[0].url), expected, "{binding}");
    }
    let printed = node_js(&demo.nodes[1].url, &["backup"]);
    let expected = "[\"job_id\"] BACKUP\nBACKUP succeeded 1\nXXUUU true\nBEGIN BACKUP COMMIT SELECT 19 1\n";
    assert_eq!(printed, expected);
}

#[test]
fn drivers_back_up_in_their_transactions() {
    let demo = Demo::start(&[]);
    let expected = "\
None [] INTRANS
succeeded
None
succeeded None succeeded
XXUUU BACKUP cannot be used inside a multi-statement transaction without DETACHED option
succeeded
22012 None
succeeded
succeeded True
25006 a job cannot be made in a transaction on a standby
";
    for binding in ["python", "binary"] {
        assert_eq!(python(binding, "transactions.py", &demo.nodes[2].url), expected, "{binding}");
    }
}
