//! CockroachDB's own cases of EXECUTION LOCALITY (`TestBackupRestoreExecLocality`): four nodes whose tiers cross, data that
//! three of them lead, and files only where the filter says.

use serde_json::Value;

use crate::support::demo::{Demo, psql};
use crate::support::jobs::{completed, data_files, detached, extern_dirs, relocated, succeeded};
use crate::support::run;
use crate::support::store::LocalBackup;

/// n1, n2 and n3 lead a shard each, and n4 has no server.
const CROSSED: [&str; 10] = [
    "--nodes",
    "4",
    "--shards",
    "3",
    "--servers",
    "3",
    "--demo-locality",
    "tier=0,region=west:tier=1,region=west:tier=0,region=east:tier=1,region=east",
    "--rows",
    "300",
];

/// Who wrote files, and from which servers they were read, shard by shard.
fn places(manifest: &Value) -> Vec<(Vec<u64>, u64)> {
    let shard = |shard: &Value| {
        let files = shard["files"].as_array().unwrap().iter();
        let mut writers: Vec<u64> = files.map(|file| file["written_by"].as_u64().unwrap()).collect();
        writers.sort_unstable();
        writers.dedup();
        (writers, shard["read_from"].as_u64().unwrap())
    };
    manifest["shards"].as_array().unwrap().iter().map(shard).collect()
}

/// The rows of `rides` in each shard.
#[track_caller]
fn rides(demo: &Demo, database: &str) -> Vec<usize> {
    let count = |node: usize| {
        let url = demo.nodes[node - 1].url.replace("/movr", &format!("/{database}"));
        run(psql(&url).args(["-Atc", "SELECT count(*) FROM rides"])).trim().parse().unwrap()
    };
    (1..=3).map(count).collect()
}

#[test]
fn files_are_written_where_the_filter_says_and_each_shard_s_by_its_own_closest_nodes() {
    let demo = Demo::start(&CROSSED);
    let (rows, mut counts) = (rides(&demo, "movr"), [0; 4]);
    assert!(rows.iter().all(|rows| *rows > 0), "{rows:?}");
    for (gateway, filter, writers) in [
        // The leaseholders of s1 and s3 match; nobody who matches shares the first tier of s2's, so both help.
        // G1
        (3, "tier=0", [&[1][..], &[1, 3], &[3]]),
        // n4 shares tier=1 with the leaseholder of s2, and nobody shares tier=0 with that of s1 but n3.
        // G2
        (4, "region=east", [&[3], &[4], &[3]]),
        (4, "tier=1,region=east", [&[4], &[4], &[4]]),
        // The order of a filter's tiers is no matter.
        (1, "region=west,tier=1", [&[2], &[2], &[2]]),
    ] {
        let name = filter.replace([',', '='], "-");
        let statement = format!(
            "BACKUP DATABASE movr INTO 'nodelocal://self/{name}' WITH EXECUTION LOCALITY = '{filter}', DETACHED"
        );
        succeeded(&demo, gateway, &detached(&demo, gateway, &statement));
        let backup = LocalBackup::newest(&extern_dirs(&demo), &name);
        let expected: Vec<(Vec<u64>, u64)> =
            writers.iter().zip(1..).map(|(ids, shard)| (ids.to_vec(), shard)).collect();
        assert_eq!(places(&backup.manifest), expected, "{filter}");
        let written: Vec<u64> = expected.iter().flat_map(|(ids, _)| ids.clone()).collect();
        for node in 1..=4 {
            let now = data_files(&demo, node);
            assert_eq!(now > counts[node - 1], written.contains(&(node as u64)), "files on node {node} with {filter}");
            counts[node - 1] = now;
        }
        assert_eq!(backup.rows("rides").len(), rows.iter().sum::<usize>());
    }
    bytes_from_elsewhere_are_explained(&demo);
    bytes_from_elsewhere_are_counted(&demo);
    bytes_from_elsewhere_are_told(&demo);

    // G4
    let restore = "RESTORE DATABASE movr FROM LATEST IN 'nodelocal://self/tier-1-region-east'
                   WITH EXECUTION LOCALITY = 'tier=1,region=east', NEW_DB_NAME = 'restored', DETACHED";
    let columns = succeeded(&demo, 1, &detached(&demo, 4, restore));
    assert_eq!(columns[13], "4");
    assert_eq!(rides(&demo, "restored"), rows);

    // Its index is on n4 alone, and only n2, which looks into no other node's directory, may take part.
    let nowhere = restore.replace("tier=1,region=east'", "tier=1,region=west'").replace("restored", "nowhere");
    let columns = completed(&demo, 1, &detached(&demo, 4, &nowhere));
    assert_eq!((&*columns[5], &*columns[13]), ("failed", "2"), "{columns:?}");
    assert!(columns[12].contains("path does not contain a completed latest backup"), "{columns:?}");

    // Asked of a node that does not match, attached: told where the job is, and it goes on there.
    let told =
        demo.ask(1, "BACKUP DATABASE movr INTO 'nodelocal://self/moved' WITH EXECUTION LOCALITY = 'region=east'");
    let (job, to) = relocated(&told);
    assert!(["3", "4"].contains(&to), "{told}");
    assert_eq!(completed(&demo, 2, job)[5], "succeeded");
}

/// The plan tells beforehand how many bytes come from other nodes' servers, and how many of them across localities.
#[track_caller]
fn bytes_from_elsewhere_are_explained(demo: &Demo) {
    let explain = |filter: &str| {
        let plan = demo.ask(
            1,
            &format!("EXPLAIN BACKUP DATABASE movr INTO 'nodelocal://self/x' WITH EXECUTION LOCALITY = '{filter}'"),
        );
        let total = plan.lines().find_map(|line| line.strip_prefix("total: ")).map(str::to_owned);
        total.unwrap_or_else(|| panic!("{plan}"))
    };
    let total = explain("tier=1,region=east");
    let figures = || {
        let (all, rest) = total.split_once(", of them ")?;
        let (remote, rest) = rest.split_once(" from another node's server and ")?;
        Some([all.split_once(", ")?.1, remote, rest.strip_suffix(" across localities")?])
    };
    let [all, remote, across] = figures().unwrap_or_else(|| panic!("{total}")).map(bytes);
    // Its only node has no server, and shares a leading tier with the node of the second shard's.
    assert!(0.0 < across && across < remote && remote <= all, "{total}");
    let inside = explain("");
    assert!(!inside.contains("another node's server") && !inside.contains("across localities"), "{inside}");
}

/// A number of bytes as it is told to a reader.
#[track_caller]
fn bytes(told: &str) -> f64 {
    let (number, unit) = told.split_once(' ').expect(told);
    let power = ["B", "KiB", "MiB"].iter().position(|known| *known == unit).expect(told);
    number.parse::<f64>().expect(told) * 1024_f64.powi(power as i32)
}

/// No replica matches: that is no error, and what is read across localities is told.
#[track_caller]
fn bytes_from_elsewhere_are_counted(demo: &Demo) {
    let manifest = LocalBackup::newest(&extern_dirs(demo), "tier-1-region-east").manifest;
    let nodes = manifest["nodes"].as_object().unwrap();
    assert_eq!(nodes.keys().collect::<Vec<_>>(), ["4"]);
    let bytes = |name: &str| nodes["4"][name].as_u64().unwrap();
    assert_eq!(bytes("bytes_read_locally"), 0);
    // It shares a leading tier with the node of the second shard's server.
    let across = bytes("bytes_read_across_localities");
    assert!(0 < across && across < bytes("bytes_read_remotely"), "{nodes:?}");
}

/// The job says so itself, and an attached client hears it; where everything was in the locality nothing is said.
#[track_caller]
fn bytes_from_elsewhere_are_told(demo: &Demo) {
    let backup = |filter: &str| {
        format!("BACKUP DATABASE movr INTO 'nodelocal://self/told' WITH EXECUTION LOCALITY = '{filter}'")
    };
    let said = demo.ask(4, &backup("tier=1,region=east"));
    let job = said.lines().find(|line| line.contains("|succeeded|")).and_then(|row| row.split('|').next());
    let status = &completed(demo, 2, job.unwrap_or_else(|| panic!("{said}")))[6];
    assert!(status.starts_with("read outside of the execution locality: "), "{status}");
    for (shard, place) in [(1, "tier=0,region=west"), (2, "tier=1,region=west"), (3, "tier=0,region=east")] {
        let from = format!(" bytes of shard s{shard} from node {shard} ({place})");
        let across = status.split(&from).nth(1).map(|rest| rest.starts_with(", "));
        // It shares its first tier with the second one's node alone.
        assert_eq!(across, Some(shard != 2), "{status}");
    }
    assert!(said.contains(&format!("NOTICE:  00000: {status}")), "{said}");
    let inside = detached(demo, 1, &format!("{}, DETACHED", backup("")));
    assert_eq!(succeeded(demo, 1, &inside)[6], "");
}
