//! A detached backup is part of its client's transaction: there when that has committed, and otherwise never was.

use nix::sys::signal::{Signal, kill};

use crate::support::demo::{Demo, psql};
use crate::support::faults::Fleet;
use crate::support::wire::Wire;
use crate::support::{both, run, until};

const DETACHED: &str = "BACKUP DATABASE movr INTO 'nodelocal://1/t' WITH DETACHED";
const ATTACHED: &str = "BACKUP DATABASE movr INTO 'nodelocal://1/t'";
const REFUSED: &str =
    "E SERROR CXXUUU MBACKUP cannot be used inside a multi-statement transaction without DETACHED option";

/// Runs statements one by one; gives the ids of the jobs that the detached backups among them are to be.
#[track_caller]
fn say(wire: &mut Wire, statements: &[&str]) -> Vec<String> {
    let mut jobs = Vec::new();
    for statement in statements {
        let heard = wire.query(statement).hear();
        assert!(!heard.contains("E SERROR") || statement.contains("nothing"), "{statement}: {heard}");
        jobs.extend(job_in(&heard));
    }
    jobs
}

/// The id that a detached backup is answered with.
fn job_in(heard: &str) -> Option<String> {
    let is_id = |value: &&str| value.len() == 19 && value.parse::<i64>().is_ok();
    heard.lines().filter_map(|line| line.strip_prefix("D ")).find(is_id).map(str::to_owned)
}

fn registry(demo: &Demo, query: &str) -> String {
    run(psql(&demo.direct_url(1).replace("/movr?", "/backhaul?")).args(["-Atc", query])).trim().to_owned()
}

/// Statements on the primary itself, around all nodes.
fn direct(demo: &Demo, statements: &[&str]) -> String {
    let mut psql = demo.psql_direct(1);
    psql.args(["-v", "ON_ERROR_STOP=1", "-Atq"]);
    run(psql.args(statements.iter().flat_map(|statement| ["-c", statement]))).trim().to_owned()
}

/// Waits until no job is undecided; whoever does that, it is done without being asked for one.
#[track_caller]
fn until_decided(demo: &Demo) {
    until("every job to be decided", || {
        let left = "SELECT count(*) FROM registry.transactions t FULL JOIN
                    (SELECT id FROM registry.jobs WHERE status = 'undecided') j ON t.job_id = j.id";
        let seen = registry(demo, left);
        if seen == "0" { Ok(()) } else { Err(seen) }
    });
}

/// Of these jobs, those that have a row.
fn there(demo: &Demo, jobs: &[String]) -> Vec<String> {
    let query = format!("SELECT id FROM registry.jobs WHERE id IN ({}) ORDER BY id", jobs.join(", "));
    registry(demo, &query).lines().map(str::to_owned).collect()
}

#[test]
fn a_job_is_there_when_its_transaction_has_committed() {
    let demo = Demo::start(&[]);
    for (number, isolation) in [(1, "ISOLATION LEVEL SERIALIZABLE"), (4, "READ ONLY")] {
        let mut wire = Wire::login(&demo.nodes[number - 1].address, "movr");
        let mut jobs = say(&mut wire, &[&format!("BEGIN {isolation}"), DETACHED, "SHOW LOCALITY", DETACHED]);
        assert_eq!(jobs.len(), 2);
        for job in &jobs {
            // Not even in the transaction itself, as in CockroachDB.
            assert_eq!(wire.query(&format!("SHOW JOB WHEN COMPLETE {job}")).hear().lines().last(), Some("Z T"));
            for other in 1..=4 {
                assert_eq!(demo.ask(other, &format!("SHOW JOB {job}")), "");
                assert!(!demo.ask(other, "SHOW JOBS").contains(job.as_str()));
            }
            let told = demo.ask(2, &format!("CANCEL JOB {job}"));
            assert!(told.contains(&format!("job with ID {job} does not exist")), "{told}");
        }
        // Whoever has heard of the COMMIT finds its jobs at every node.
        let mut others: Vec<Wire> = demo.nodes.iter().map(|node| Wire::login(&node.address, "movr")).collect();
        assert_eq!(wire.query("COMMIT AND CHAIN").hear(), "C COMMIT\nZ T");
        for other in &mut others {
            let heard = other.query(&format!("SHOW JOBS VALUES ({}), ({})", jobs[0], jobs[1])).hear();
            assert!(
                heard.ends_with("C SHOW\nZ I") && heard.lines().filter(|row| row.contains("|BACKUP|")).count() == 2
            );
        }
        // The next of the chain is another one.
        jobs.extend(say(&mut wire, &[DETACHED, "ROLLBACK"]));
        until_decided(&demo);
        assert_eq!(there(&demo, &jobs), jobs[..2]);
        for job in &jobs[..2] {
            let row = demo.ask(3, &format!("SHOW JOB WHEN COMPLETE {job}"));
            assert!(row.contains("|succeeded|"), "{row}");
        }
    }
}

#[test]
fn what_is_rolled_back_never_was() {
    let demo = Demo::start(&["--nodes", "2"]);
    for (statements, kept) in [
        (vec!["BEGIN", DETACHED, "ROLLBACK"], vec![]),
        (vec!["BEGIN", DETACHED, "SELECT nothing", "COMMIT"], vec![]),
        (vec!["BEGIN", DETACHED, "BACKUP DATABASE nothing INTO 'nodelocal://1/t' WITH DETACHED", "COMMIT"], vec![]),
        // A savepoint that is gone back to takes with it what was made behind it, released or not, and nothing else.
        (
            vec!["BEGIN", DETACHED, "SAVEPOINT a", DETACHED, "ROLLBACK TO a", DETACHED, "SAVEPOINT b", DETACHED]
                .into_iter()
                .chain(["RELEASE b", "SAVEPOINT c", DETACHED, "RELEASE c", "SAVEPOINT d", "SAVEPOINT e", DETACHED])
                .chain(["RELEASE e", DETACHED, "ROLLBACK TO d", "COMMIT"])
                .collect(),
            vec![0, 2, 3, 4],
        ),
        (vec!["BEGIN", "SAVEPOINT a", DETACHED, "SAVEPOINT b", "SELECT nothing", "ROLLBACK TO b", "END"], vec![0]),
        (vec!["BEGIN", DETACHED, "SAVEPOINT a", "CREATE TEMP TABLE t ()", DETACHED, "ROLLBACK TO a", "END"], vec![0]),
        // The client goes away.
        (vec!["BEGIN", DETACHED, "SAVEPOINT a", DETACHED], vec![]),
        // Several of ours in one text are one transaction.
        (vec!["BACKUP DATABASE movr INTO 'nodelocal://1/t' WITH DETACHED; SHOW LOCALITY"], vec![0]),
        (vec!["BACKUP DATABASE movr INTO 'nodelocal://1/t' WITH DETACHED; CANCEL JOB 1 /* nothing */"], vec![]),
    ] {
        let mut wire = Wire::login(&demo.nodes[1].address, "movr");
        let jobs = say(&mut wire, &statements);
        drop(wire);
        until_decided(&demo);
        let expected: Vec<&String> = kept.into_iter().map(|index: usize| &jobs[index]).collect();
        assert_eq!(there(&demo, &jobs).iter().collect::<Vec<_>>(), expected, "{statements:?}: {jobs:?}");
    }
}

#[test]
fn an_attached_backup_stands_alone() {
    let demo = Demo::start(&["--nodes", "2"]);
    let restore = "RESTORE DATABASE movr FROM LATEST IN 'nodelocal://1/t'";
    for node in &demo.nodes {
        let mut wire = Wire::login(&node.address, "movr");
        assert_eq!(wire.query(&format!("{ATTACHED}; SELECT 1;")).hear(), format!("{REFUSED} P1\nZ I"));
        assert_eq!(wire.query("BEGIN").hear(), "C BEGIN\nZ T");
        assert_eq!(wire.query(ATTACHED).hear(), format!("{REFUSED}\nZ E"));
        assert_eq!(wire.query("ROLLBACK").hear(), "C ROLLBACK\nZ I");
        // What is wrong with it itself comes first.
        let tier = "E SERROR CXXUUU Mtier must be in the form \"key=value\" not \"abc\"";
        for text in [ATTACHED.to_owned(), restore.to_owned()] {
            let text = format!("{text} WITH EXECUTION LOCALITY = 'abc'");
            assert_eq!(wire.query("BEGIN").hear(), "C BEGIN\nZ T");
            assert_eq!(wire.query(&text).hear(), format!("{tier}\nZ E"));
            assert_eq!(wire.query("ROLLBACK").hear(), "C ROLLBACK\nZ I");
            wire.parse("", "SELECT 1 WHERE false").bind("", "", 0).execute("", 0);
            let heard = wire.parse("", &text).bind("", "", 0).execute("", 0).sync().hear();
            assert!(heard.ends_with(&format!("{tier}\nZ I")), "{heard}");
        }
        let switch = "SET CLUSTER SETTING feature.backup.enabled";
        assert_eq!(wire.query(&format!("{switch} = false")).hear(), "C SET CLUSTER SETTING\nZ I");
        assert_eq!(wire.query("BEGIN").hear(), "C BEGIN\nZ T");
        let heard = wire.query(&format!("{ATTACHED} WITH EXECUTION LOCALITY = 'abc'")).hear();
        assert!(heard.starts_with("E SERROR C57000 ") && heard.ends_with("Z E"), "{heard}");
        assert_eq!(wire.query("ROLLBACK").hear(), "C ROLLBACK\nZ I");
        assert_eq!(wire.query(&format!("{switch} = true")).hear(), "C SET CLUSTER SETTING\nZ I");
        // A block that the same pipeline has begun, and an implicit one.
        for first in ["BEGIN", "SELECT 1 WHERE false"] {
            wire.parse("", first)
                .bind("", "", 0)
                .execute("", 0)
                .parse("", restore)
                .bind("", "", 0)
                .execute("", 0)
                .sync();
            let heard = wire.hear();
            assert!(heard.contains(&REFUSED.replace("BACKUP", "RESTORE")), "{heard}");
            assert_eq!(wire.query("ROLLBACK").hear().lines().last(), Some("Z I"));
        }
    }
    assert_eq!(registry(&demo, "SELECT count(*) FROM registry.jobs"), "0");
}

/// A pipeline ends with its Sync. A Flush says nothing of what is still to come.
#[test]
fn what_stands_alone_is_all_of_its_pipeline() {
    let demo = Demo::start(&["--nodes", "2", "--rows", "100"]);
    let restore = "RESTORE DATABASE movr FROM LATEST IN 'nodelocal://1/t'";
    for node in &demo.nodes {
        let mut wire = Wire::login(&node.address, "movr");
        let mut send = |texts: &[&str]| {
            texts.iter().for_each(|text| _ = wire.parse("", text).bind("", "", 0).execute("", 0));
            wire.sync().hear()
        };
        for behind in ["SELECT 1", "SELECT 1/0", "SHOW LOCALITY", "BEGIN", "", ATTACHED] {
            assert_eq!(send(&[ATTACHED, behind]), format!("1\n2\n{REFUSED}\nZ I"), "{behind}");
        }
        for before in ["SHOW LOCALITY", "SHOW NODES", "SELECT locality FROM [SHOW LOCALITY]"] {
            let heard = send(&[before, ATTACHED]);
            assert!(heard.ends_with(&format!("\n1\n2\n{REFUSED}\nZ I")), "{before}: {heard}");
        }
        let refused = REFUSED.replace("BACKUP", "RESTORE");
        assert_eq!(send(&[restore, "SELECT 1"]), format!("1\n2\n{refused}\nZ I"));
        wire.parse("", ATTACHED).bind("", "", 0).execute("", 0).flush();
        assert_eq!(wire.hear_until(|tag| tag == b'E'), format!("1\n2\n{REFUSED}"));
        assert_eq!(wire.sync().hear(), "Z I");
        wire.parse("", ATTACHED).bind("", "", 0).execute("", 0).query("SELECT 1").sync();
        assert_eq!(wire.hear(), format!("1\n2\n{REFUSED}\nZ I"));
    }
    assert_eq!(registry(&demo, "SELECT count(*) FROM registry.jobs"), "0");

    for node in &demo.nodes {
        let mut wire = Wire::login(&node.address, "movr");
        let ran = |heard: &str, expected: &str| {
            let kinds: String = heard.lines().filter_map(|line| line.chars().next()).collect();
            assert!(kinds == expected && heard.contains("|succeeded|1.0|"), "{heard}");
        };
        wire.parse("", ATTACHED).bind("", "", 0).describe(b'P', "").execute("", 0).sync();
        ran(&wire.hear(), "12TDCZ");
        // Prepared before; in pieces, the Sync the last; and closed behind it.
        assert!(wire.parse("b", ATTACHED).describe(b'S', "b").sync().hear().ends_with("Z I"));
        wire.bind("", "b", 0).flush().execute("", 0);
        assert_eq!(wire.hear_until(|tag| tag == b'2'), "2");
        ran(&wire.sync().hear(), "DCZ");
        wire.bind("p", "b", 0).execute("p", 0).close(b'P', "p").close(b'S', "b").sync();
        ran(&wire.hear(), "2DC33Z");
        // A Sync on both sides.
        wire.parse("", "SHOW LOCALITY").bind("", "", 0).execute("", 0).sync();
        wire.parse("", ATTACHED).bind("", "", 0).execute("", 0).sync().query("SELECT 1/0");
        assert!(wire.hear().ends_with("C SHOW\nZ I"));
        ran(&wire.hear(), "12DCZ");
        assert!(wire.hear().starts_with("E SERROR C22012"));
    }
}

#[test]
fn a_pipeline_is_one_transaction_up_to_its_sync() {
    let demo = Demo::start(&["--nodes", "2"]);
    for node in &demo.nodes {
        let mut wire = Wire::login(&node.address, "movr");
        let mut send = |texts: &[&str]| {
            for text in texts {
                wire.parse("", text).bind("", "", 0).execute("", 0);
            }
            let heard = wire.sync().hear();
            (job_in(&heard), heard)
        };
        let mut ended = |texts: &[&str]| {
            let (job, heard) = send(texts);
            until_decided(&demo);
            (there(&demo, &[job.unwrap()]).len(), heard.lines().last().unwrap().to_owned())
        };
        for (texts, kept, last) in [
            (vec![DETACHED], 1, "Z I"),
            (vec![DETACHED, "SELECT 1"], 1, "Z I"),
            (vec!["SELECT 1", DETACHED], 1, "Z I"),
            (vec![DETACHED, "SELECT 1/0"], 0, "Z I"),
            (vec![DETACHED, DETACHED, "SHOW LOCALITY x"], 0, "Z I"),
            (vec!["BEGIN", DETACHED, "COMMIT"], 1, "Z I"),
            (vec!["BEGIN", DETACHED, "ROLLBACK"], 0, "Z I"),
            (vec!["BEGIN", "SAVEPOINT a", DETACHED, "ROLLBACK TO a", "COMMIT", "SELECT 1"], 0, "Z I"),
        ] {
            assert_eq!(ended(&texts), (kept, last.to_owned()), "{texts:?}");
        }
        let (job, heard) = send(&["BEGIN", DETACHED]);
        assert!(heard.ends_with("Z T"), "{heard}");
        assert_eq!(demo.ask(2, &format!("SHOW JOB {}", job.clone().unwrap())), "");
        assert!(send(&["COMMIT"]).1.ends_with("Z I"));
        assert!(demo.ask(2, &format!("SHOW JOB {}", job.unwrap())).contains("|BACKUP|"));

        // What is flushed is answered, and nothing has happened before the Sync.
        wire.parse("", DETACHED).bind("", "", 0).execute("", 0).flush();
        let job = job_in(&wire.hear_until(|tag| tag == b'C')).unwrap();
        assert_eq!(demo.ask(1, &format!("SHOW JOB {job}")), "");
        drop(wire);
        until_decided(&demo);
        assert!(there(&demo, &[job]).is_empty());
    }
}

/// A difference from CockroachDB, where requests are written in the transaction.
#[test]
fn a_request_takes_effect_at_once_whatever_becomes_of_its_transaction() {
    let demo = Demo::start(&["--nodes", "2", "--rows", "100"]);
    let mut wire = Wire::login(&demo.nodes[1].address, "movr");
    let jobs = say(&mut wire, &["SET backhaul.debug_pausepoints = 'backup.after_lock:hold'", DETACHED]);
    say(&mut wire, &["BEGIN", &format!("PAUSE JOB {}", jobs[0])]);
    let mut show = demo.psql(1);
    show.args(["-Atc", &format!("SELECT status FROM [SHOW JOB {}]", jobs[0])]);
    until("the job to be paused", || {
        let seen = both(&show.output().unwrap());
        if seen == "paused\n" { Ok(()) } else { Err(seen) }
    });
    say(&mut wire, &[&format!("CANCEL JOB {}", jobs[0]), "ROLLBACK"]);
    let row = demo.ask(1, &format!("SHOW JOB WHEN COMPLETE {}", jobs[0]));
    assert!(row.contains("|canceled|"), "{row}");
}

#[test]
fn a_setting_of_the_fleet_stands_alone() {
    let demo = Demo::start(&["--nodes", "2", "--no-example-database"]);
    let refused = "E SERROR C25001 MSET CLUSTER SETTING cannot be used inside a multi-statement transaction";
    let sets = ["SET CLUSTER SETTING feature.backup.enabled = false", "RESET CLUSTER SETTING feature.backup.enabled"];
    for (node, set) in demo.nodes.iter().flat_map(|node| sets.map(|set| (node, set))) {
        let mut wire = Wire::login(&node.address, "postgres");
        assert_eq!(wire.query("BEGIN").hear(), "C BEGIN\nZ T");
        assert_eq!(wire.query(set).hear(), format!("{refused}\nZ E"));
        assert_eq!(wire.query("ROLLBACK").hear(), "C ROLLBACK\nZ I");
        assert_eq!(wire.query(&format!("{set}; SHOW LOCALITY")).hear(), format!("{refused}\nZ I"));
        for texts in [["SELECT 1 WHERE false", set], ["SHOW LOCALITY", set], [set, "SELECT 1"], [set, "SELECT 1/0"]] {
            texts.iter().for_each(|text| _ = wire.parse("", text).bind("", "", 0).execute("", 0));
            let heard = wire.sync().hear();
            assert!(heard.ends_with(&format!("1\n2\n{refused}\nZ I")), "{texts:?}: {heard}");
        }
        assert_eq!(wire.query("SHOW CLUSTER SETTING feature.backup.enabled").hear().lines().nth(1), Some("D true"));
        wire.parse("", set).bind("", "", 0).execute("", 0).sync();
        assert_eq!(wire.hear(), "1\n2\nC SET CLUSTER SETTING\nZ I");
        assert!(wire.query("RESET CLUSTER SETTING feature.backup.enabled").hear().ends_with("Z I"));
    }
}

#[test]
fn a_prepared_transaction_decides_when_it_is_committed() {
    let demo = Demo::start(&["--nodes", "1"]);
    run(demo.psql_direct(1).args(["-c", "ALTER SYSTEM SET max_prepared_transactions = 5"]));
    kill(demo.server_pid(1), Signal::SIGKILL).unwrap();
    demo.restart_server(1);
    until("node 1 to see its server again", || {
        let seen = demo.ask(1, "SHOW max_prepared_transactions");
        if seen == "5" { Ok(()) } else { Err(seen) }
    });
    for (end, kept) in [("COMMIT PREPARED 'p'", 1), ("ROLLBACK PREPARED 'p'", 0)] {
        let mut wire = Wire::login(&demo.nodes[0].address, "movr");
        let jobs = say(&mut wire, &["BEGIN", "SAVEPOINT a", DETACHED, "PREPARE TRANSACTION 'p'"]);
        drop(wire);
        assert_eq!(demo.ask(1, &format!("SHOW JOB {}", jobs[0])), "");
        assert_eq!(there(&demo, &jobs), jobs, "undecided");
        // Around the node: nobody sees it.
        run(demo.psql_direct(1).args(["-v", "ON_ERROR_STOP=1", "-qc", end]));
        until_decided(&demo);
        assert_eq!(there(&demo, &jobs).len(), kept);
    }
}

#[test]
fn a_gateway_that_dies_leaves_its_jobs_to_be_decided() {
    let mut fleet = Fleet::mortal(&[]);
    let mut wire = Wire::login(&fleet.demo.nodes[3].address, "movr");
    let jobs = say(&mut wire, &["BEGIN", DETACHED, "SAVEPOINT a", DETACHED]);
    fleet.end_node(4, Signal::SIGKILL);
    until_decided(&fleet.demo);
    assert!(there(&fleet.demo, &jobs).is_empty());

    // A COMMIT that the server has, and cannot answer: it waits for a standby that is not there.
    let set = |name: &str, value: &str| format!("ALTER SYSTEM SET {name} = '{value}'");
    let nobody = set("synchronous_standby_names", "nobody");
    direct(&fleet.demo, &[&set("synchronous_commit", "local"), &nobody, "SELECT pg_reload_conf()"]);
    let mut wire = Wire::login(&fleet.demo.nodes[2].address, "movr");
    until("the server to wait for nobody", || {
        let names = wire.query("SHOW synchronous_standby_names").hear() + &wire.query("SHOW synchronous_commit").hear();
        if names.contains("D nobody") && names.contains("D local") { Ok(()) } else { Err(names) }
    });
    let jobs = say(&mut wire, &["SET synchronous_commit = on", "BEGIN", DETACHED]);
    wire.query("COMMIT").send_and_close();
    until("the commit to wait", || {
        let seen = direct(&fleet.demo, &["SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"]);
        if seen == "1" { Ok(()) } else { Err(seen) }
    });
    fleet.end_node(3, Signal::SIGKILL);
    let (gateway, looked) = ("SELECT s.expires_at < clock_timestamp()", "t.next_look > s.expires_at + interval '1 s'");
    until("another node to have looked, in vain", || {
        let query =
            format!("{gateway} AND {looked} FROM registry.transactions t JOIN registry.sessions s ON s.id = gateway");
        let seen = registry(&fleet.demo, &query);
        if seen == "t" { Ok(()) } else { Err(seen) }
    });
    // Nobody else sees that commit yet, and it may still be lost with the server.
    let seen = "SELECT status FROM registry.jobs j JOIN registry.transactions ON job_id = id";
    assert_eq!(registry(&fleet.demo, seen), "undecided");
    direct(&fleet.demo, &[&set("synchronous_standby_names", ""), "SELECT pg_reload_conf()"]);
    until_decided(&fleet.demo);
    assert_eq!(there(&fleet.demo, &jobs), jobs);
    assert_eq!(fleet.end_of(&jobs[0]), ("succeeded".to_owned(), String::new()));
}

#[test]
fn a_promoted_standby_knows_which_transactions_have_committed() {
    let demo = Demo::start(&[]);
    let mut wire = Wire::login(&demo.nodes[3].address, "movr");
    let jobs = say(&mut wire, &["BEGIN", DETACHED, "COMMIT", "BEGIN", DETACHED]);
    kill(demo.server_pid(1), Signal::SIGKILL).unwrap();
    demo.promote(2);
    let mut show = demo.psql(4);
    show.args(["-v", "ON_ERROR_STOP=1", "-Atc", "SHOW JOBS"]);
    until("the registry to be back", || {
        let seen = both(&show.output().unwrap());
        if seen.contains(&jobs[0]) { Ok(()) } else { Err(seen) }
    });
    let query = format!("SELECT id FROM registry.jobs WHERE id IN ({})", jobs.join(", "));
    let mut left = psql(&demo.nodes[3].url.replace("/movr", "/backhaul"));
    left.args(["-v", "ON_ERROR_STOP=1", "-Atc", &query]);
    until("the other one to be gone", || {
        let seen = both(&left.output().unwrap());
        if seen.trim() == jobs[0] { Ok(()) } else { Err(seen) }
    });
}
