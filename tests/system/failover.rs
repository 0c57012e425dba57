//! Servers and nodes that die, are promoted, and come back.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::support::demo::{Demo, directory, psql};
use crate::support::faults::{DEATH_KNOWN, Fleet};
use crate::support::fleet::{Node, Server};
use crate::support::jobs::{WEST, extern_dirs};
use crate::support::store::LocalBackup;
use crate::support::wire::Wire;
use crate::support::{backhaul, both, run, until};

/// Waits until it is noted that the registry has begun on the server beside node `number` as that is now: on its timeline,
/// since its start. From then on claims of the dead are left alone for a while.
#[track_caller]
fn until_incarnation_noted(demo: &Demo, number: usize) {
    let registry = demo.direct_url(number).replace("/movr?", "/backhaul?");
    until("the registry's beginning there to be noted", || {
        let query = "SELECT count(*) FROM registry.incarnations WHERE started = pg_postmaster_start_time()
                     AND timeline = left(pg_walfile_name(pg_current_wal_lsn()), 8)";
        let seen = both(&psql(&registry).args(["-Atc", query]).output().unwrap());
        if seen.trim() == "1" { Ok(()) } else { Err(seen) }
    });
}

/// Waits until node `number` leads its clients to a server on this timeline.
#[track_caller]
fn until_leads_to_timeline(demo: &Demo, number: usize, timeline: u32) {
    until("the new leaseholder", || {
        let query = "SELECT ('x' || substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8))::bit(32)::int";
        let seen = demo.ask(number, query);
        if seen == timeline.to_string() { Ok(()) } else { Err(seen) }
    });
}

#[test]
fn clients_of_every_node_follow_a_promotion_and_an_old_primary_is_refused() {
    let demo = Demo::start(&[]);
    // Before the crash: sessions that lead to the old primary, one of them through a hop.
    let mut sessions: Vec<Wire> = [2, 4].iter().map(|n| Wire::login(&demo.nodes[n - 1].address, "movr")).collect();
    kill(demo.server_pid(1), Signal::SIGKILL).unwrap();
    for wire in &mut sessions {
        let heard = wire.hear();
        assert!(heard.contains("FATAL") || heard == "end", "{heard}");
    }
    until("the loss to be known", || {
        // libpq does not print the SQLSTATE of a refused connection.
        let seen = demo.ask(3, "SELECT 1");
        if seen.contains("FATAL:  shard \"s1\" has no leaseholder now") { Ok(()) } else { Err(seen) }
    });

    demo.promote(2);
    for number in 1..=4 {
        until_leads_to_timeline(&demo, number, 2);
    }
    until("the registry to be back", || {
        let seen = demo.ask(4, "SHOW NODES");
        let leads = seen.lines().any(|row| row.starts_with("2|") && row.contains("|leaseholder|t|t|"));
        if leads { Ok(()) } else { Err(seen) }
    });

    // The old primary returns, out of recovery, on timeline 1: nobody is led to it, not even beside it.
    demo.restart_server(1);
    until("node 1 to see its server again, and node 3 its own for what it follows", || {
        let seen = demo.ask(1, "SHOW NODES");
        let row = |start: &str, role: &str| seen.lines().any(|row| row.starts_with(start) && row.contains(role));
        if row("1|", "|overtaken primary|") && row("3|", "|detached standby|") { Ok(()) } else { Err(seen) }
    });
    let mut local = demo.psql(1);
    local.env("PGOPTIONS", "-c backhaul.target=local").args(["-c", "CREATE TABLE lost (i int)"]);
    let refused = both(&local.output().unwrap());
    assert!(refused.contains("the server beside node 1 is a primary that has been overtaken"), "{refused}");
    for number in 1..=4 {
        assert_eq!(demo.ask(number, "SELECT pg_is_in_recovery(), (SELECT count(*) FROM rides)"), "f|1000");
        until_leads_to_timeline(&demo, number, 2);
    }
}

#[test]
fn sessions_on_a_leaseholder_that_was_overtaken_are_ended() {
    let demo = Demo::start(&["--voters", "1"]);
    let mut wires: Vec<Wire> = demo.nodes.iter().map(|node| Wire::login(&node.address, "movr")).collect();
    demo.promote(2);
    for wire in &mut wires {
        let heard = wire.hear();
        let words = "E SFATAL C57P01 Mterminating connection because shard \"s1\" has another leaseholder\nend";
        assert_eq!(heard, words);
    }
    for number in 1..=4 {
        until_leads_to_timeline(&demo, number, 2);
    }
    // The overtaken server still runs and still holds a registry: the nodes have left it for the new one.
    until("the sessions to live in the new registry", || {
        let query = "SELECT count(*) FROM registry.sessions WHERE expires_at > clock_timestamp()";
        let registry = demo.direct_url(2).replace("/movr", "/backhaul");
        let seen = run(psql(&registry).args(["-Atc", query]));
        let moved = demo.node_dir(3).join("node.log");
        let moved = std::fs::read_to_string(moved).unwrap().contains("the registry has moved to another server");
        if seen.trim() == "4" && moved { Ok(()) } else { Err(seen) }
    });
    until_incarnation_noted(&demo, 2);
}

#[test]
fn a_server_that_restarts_is_named_while_it_is_down() {
    let demo = Demo::start(&["--nodes", "2", "--servers", "1"]);
    let mut wire = Wire::login(&demo.nodes[1].address, "movr");
    kill(demo.server_pid(1), Signal::SIGINT).unwrap();
    let heard = wire.hear();
    assert!(heard.starts_with("E SFATAL C57P01 Mterminating connection due to administrator command"), "{heard}");
    until("the server to be down", || {
        let seen = demo.ask(2, "SELECT 1");
        let named =
            seen.contains("57P03") && seen.contains("node 1") || seen.contains("shard \"s1\" has no leaseholder now");
        if named { Ok(()) } else { Err(seen) }
    });
}

/// With it goes the registry, and the nodes' sessions run out; none is back as soon as the first client is.
#[test]
fn a_client_that_comes_right_after_its_server_has_crashed_is_given_its_job() {
    let demo = Demo::start(&["--nodes", "2", "--servers", "1"]);
    demo.set_session_life(DEATH_KNOWN);
    let backup = "BACKUP DATABASE movr INTO 'nodelocal://1/b'";
    let detached = format!("{backup} WITH DETACHED");
    for number in [1, 2, 1, 2] {
        kill(demo.server_pid(1), Signal::SIGKILL).unwrap();
        demo.restart_server(1);
        until("the server to be led to", || {
            let seen = demo.ask(number, "SELECT 1");
            if seen == "1" { Ok(()) } else { Err(seen) }
        });
        let mut psql = demo.psql(number);
        let told = both(&psql.args(["-Atq", "-c", "BEGIN", "-c", &detached, "-c", "COMMIT"]).output().unwrap());
        assert!(told.trim().parse::<i64>().is_ok(), "{told}");
        let row = demo.ask(number, backup);
        assert!(row.contains("|succeeded|"), "{row}");
        until_incarnation_noted(&demo, 1);
    }
}

#[test]
fn a_killed_node_is_dead_to_the_others_after_one_session_life() {
    let demo = Demo::start(&["--no-example-database"]);
    demo.set_session_life(DEATH_KNOWN);
    kill(Pid::from_raw(demo.nodes[2].pid), Signal::SIGKILL).unwrap();
    until("node 3 to be dead", || {
        let seen = demo.ask(4, "SHOW NODES");
        let dead = seen.lines().any(|row| row.starts_with("3|") && row.contains("|f|f|"));
        // With sessions this short, a slow moment may take another one's away for a moment, too.
        let live = seen.lines().filter(|row| row.contains("|t|t|")).count();
        if dead && live == 3 { Ok(()) } else { Err(seen) }
    });
}

#[test]
fn a_stopped_node_tells_its_clients() {
    let demo = Demo::start(&["--nodes", "2", "--servers", "1", "--no-example-database"]);
    let mut wire = Wire::login(&demo.nodes[1].address, "postgres");
    kill(Pid::from_raw(demo.nodes[1].pid), Signal::SIGTERM).unwrap();
    let heard = wire.hear();
    assert_eq!(heard, "E SFATAL C57P01 Mterminating connection due to administrator command\nend");
}

/// Has the standby beside node 2 follow the one beside node 3, and with it whatever that becomes.
#[track_caller]
fn follow_node_3(demo: &Demo) {
    let on = |number: usize, query: &str| {
        run(demo.psql_direct(number).args(["-v", "ON_ERROR_STOP=1", "-Atqc", query])).trim().to_owned()
    };
    let [from, to] = [1, 3].map(|number| demo.node_dir(number).join("socket").display().to_string());
    let source = on(2, "SHOW primary_conninfo");
    let follow = source.replace(&from, &to);
    assert_ne!(follow, source);
    on(2, &format!("ALTER SYSTEM SET primary_conninfo = '{}'", follow.replace('\'', "''")));
    on(2, "ALTER SYSTEM SET primary_slot_name = ''");
    on(2, "SELECT pg_reload_conf()");
    until("the standby to follow the other", || {
        let seen = on(3, "SELECT count(*) FROM pg_stat_replication WHERE state = 'streaming'");
        if seen == "1" { Ok(()) } else { Err(seen) }
    });
}

/// Waits until every node knows these servers for what they are.
#[track_caller]
fn until_roles(demo: &Demo, roles: &[(usize, &str)]) {
    until("every node to know the roles", || {
        for number in 1..=demo.nodes.len() {
            let seen = demo.ask(number, "SHOW NODES");
            let has = |(of, role): &(usize, &str)| {
                seen.lines().any(|row| row.starts_with(&format!("{of}|")) && row.contains(&format!("|{role}|t|t|")))
            };
            if !roles.iter().all(has) {
                return Err(format!("node {number}: {seen}"));
            }
        }
        Ok(())
    });
}

/// What is read outlives the promotion, and is the users' primary from then on, which the statement keeps away from.
#[test]
fn a_standby_that_is_promoted_while_it_is_read_is_read_no_more() {
    let point = "backup.after_first_span";
    for has_another in [true, false] {
        let fleet = Fleet::start(&["--voters", "1", "--rows", "2000"]);
        let demo = &fleet.demo;
        if has_another {
            follow_node_3(demo);
        }
        until_roles(demo, &[(1, "leaseholder"), (2, "non-voting replica"), (3, "non-voting replica")]);
        let job = fleet.held(
            &format!("BACKUP DATABASE movr INTO 'nodelocal://1/b' WITH {WEST}, replica = 'standby', DETACHED"),
            point,
        );
        let own = format!("FROM pg_stat_activity WHERE application_name LIKE 'backhaul job {job}%'");
        let on_3 = |query: &str| run(demo.psql_direct(3).args(["-v", "ON_ERROR_STOP=1", "-Atqc", query]));
        assert_ne!(on_3(&format!("SELECT count(*) {own}")).trim(), "0", "node 3 is read");
        if !has_another {
            // Whoever goes on with it finds the point there still.
            assert_eq!(demo.ask(2, &format!("PAUSE JOB {job}")), "PAUSE JOBS 1");
            until("the job to be paused", || match fleet.job(&job, "status") {
                status if status == "paused" => Ok(()),
                status => Err(status),
            });
        }
        let position = run(demo.psql_direct(1).args(["-Atc", "SELECT pg_current_wal_flush_lsn()"]));
        until("the standby to have what the registry has", || {
            let seen = on_3(&format!("SELECT pg_last_wal_replay_lsn() >= '{}'", position.trim()));
            if seen.trim() == "t" { Ok(()) } else { Err(seen) }
        });
        demo.promote(3);
        let other = if has_another { "non-voting replica" } else { "detached standby" };
        until_roles(demo, &[(1, "overtaken primary"), (2, other), (3, "leaseholder")]);
        let withdrawn = "the server beside node 3 may not be read any more; Its role is now \\\"leaseholder\\\", and the \
                         statement says replica = 'standby'.";
        if has_another {
            fleet.let_go(&job, point);
            assert_eq!(fleet.end_of(&job), ("succeeded".to_owned(), String::new()));
            let backup = LocalBackup::newest(&extern_dirs(demo), "b");
            let shard = &backup.manifest["shards"][0];
            let files = shard["files"].as_array().unwrap();
            assert!(shard["read_from"] == 2 && files.iter().all(|file| file["read_from"] != 3), "{shard}");
        } else {
            assert_eq!(demo.ask(2, &format!("RESUME JOB {job}")), "RESUME JOBS 1");
            until("the job to find nothing to read", || {
                let seen = fleet.job(&job, "concat_ws('|', status, execution_errors)");
                let told = seen.contains("has no server that the backup may read");
                if seen.starts_with("running|") && told { Ok(()) } else { Err(seen) }
            });
        }
        let errors = fleet.job(&job, "execution_errors::text");
        assert!(errors.contains(withdrawn), "{errors}");
        until("nothing of the job to be on the primary", || {
            let seen = on_3(&format!("SELECT count(*) {own}"));
            if seen.trim() == "0" { Ok(()) } else { Err(seen) }
        });
        if !has_another {
            assert_eq!(demo.ask(2, &format!("CANCEL JOB {job}")), "CANCEL JOBS 1");
            assert_eq!(fleet.end_of(&job).0, "canceled");
        }
    }
}

#[test]
fn standbys_may_stream_through_the_port_even_that_of_their_own_node() {
    let dir = directory();
    let primary = Server::primary(dir.path(), "primary", &Vec::new());
    let first = Node::start(dir.path(), "n1", &["--insecure", "--postgres", &primary.instance.conninfo("backhaul")]);
    run(backhaul().args(["init", "--insecure", "--user", "root", "--host", &first.address]));
    // Its source is the port of the node that will stand beside it, which has no server yet.
    let gateway = Node::start(dir.path(), "gateway", &["--insecure", "--join", &first.address]);
    let address = gateway.address.clone();
    let (host, port) = address.rsplit_once(':').unwrap();
    let standby = Server::standby(dir.path(), "standby", &format!("host={host} port={port} user=root"));
    drop(gateway);
    let conninfo = standby.instance.conninfo("backhaul");
    let flags = ["--insecure", "--listen-addr", &address, "--join", &first.address, "--postgres", &conninfo];
    let _own = Node::start(dir.path(), "own", &flags);
    let streams = || {
        primary.ask("CREATE TABLE IF NOT EXISTS seen AS SELECT 1 AS i");
        let upstream = "SELECT status || ' ' || sender_port FROM pg_stat_wal_receiver";
        let count = "SELECT count(*) FROM pg_class WHERE relname = 'seen'";
        let seen = format!("{} {}", standby.ask(upstream), standby.ask(count));
        if seen == format!("streaming {port} 1") { Ok(()) } else { Err(seen) }
    };
    until("the standby to stream through its own node", streams);
    until("its role to be known", || {
        let seen = both(&first.psql("root", "postgres").args(["-Atc", "SHOW NODES"]).output().unwrap());
        if seen.contains("|non-voting replica|t|t|") { Ok(()) } else { Err(seen) }
    });
    // Asked for the server beside the node, it would get itself.
    let itself = format!(
        "host={host} port={port} user=root replication=true application_name=standby options='-c backhaul.target=local'"
    );
    let refused = both(&crate::support::demo::psql(&itself).args(["-c", "IDENTIFY_SYSTEM"]).output().unwrap());
    assert!(refused.contains("FATAL:  the standby beside node 3 cannot follow itself"), "{refused}");
}
