//! The names of the objects in a collection. Everything but the seal carries a number that is never used twice.

use chrono::{DateTime, Utc};
use jobs::JobId;
use uuid::Uuid;

/// The sealed manifest: that it is there is what makes a backup complete.
pub(crate) const SEAL: &str = "BACKUP_MANIFEST";

/// The SHA-256 of the sealed manifest, in hexadecimal digits.
pub(crate) const CHECKSUM: &str = "BACKUP_MANIFEST-CHECKSUM";

/// How to restore this backup with PostgreSQL's own tools.
pub(crate) const RESTORE_TEXT: &str = "RESTORE.txt";

/// What the name of the lock begins with; the job's id follows.
pub(crate) const LOCK_PREFIX: &str = "BACKUP-LOCK-";

/// What the names of the pointers to backups begin with.
pub(crate) const LATEST_PREFIX: &str = "metadata/latest/";

/// What a backup's directory holds, for documents and tests.
pub const COLLECTION_FILES: [&str; 3] = [SEAL, CHECKSUM, RESTORE_TEXT];

/// A backup's directory in its collection: `/2026/11/22-105816.12`, by the time at which its job was made, in UTC.
pub(crate) fn subdir(created: DateTime<Utc>) -> String {
    format!("{}.{:02}", created.format("/%Y/%m/%d-%H%M%S"), created.timestamp_subsec_millis() / 10)
}

/// Whether a text is what [`subdir`] gives.
pub(crate) fn is_subdir(text: &str) -> bool {
    const SHAPE: &str = "/0000/00/00-000000.00";
    let fits = |(is, shape): (u8, u8)| if shape == b'0' { is.is_ascii_digit() } else { is == shape };
    text.len() == SHAPE.len() && text.bytes().zip(SHAPE.bytes()).all(fits)
}

/// The lock of a job on a backup's directory.
pub(crate) fn lock(job: JobId) -> String {
    format!("{LOCK_PREFIX}{job}")
}

/// A manifest that a claim has written, before the seal.
pub(crate) fn body(claim: Uuid) -> String {
    format!("MANIFEST-{claim}")
}

/// The rows of one span.
pub(crate) fn data(job: JobId, claim: Uuid, number: u64) -> String {
    format!("{}{claim}-{number}.copy.zst", data_of(job))
}

/// What the names of a job's rows begin with.
pub(crate) fn data_of(job: JobId) -> String {
    format!("data/{job}-")
}

/// Whether a file is a part of a backup, which its manifest has to name.
pub(crate) fn is_part(path: &str) -> bool {
    ["data/", "schema/", "MANIFEST-"].iter().any(|prefix| path.starts_with(prefix))
}

/// The schema of one database of one shard; the lease says of which point.
pub(crate) fn schema(shard: &str, database: &str, lease: Uuid) -> String {
    format!("schema/{}/{}.{}.dump", escape(shard), escape(database), lease.simple())
}

/// The newest of these sorts first: the time's complement is in the name (CockroachDB's way).
pub(crate) fn latest(created: DateTime<Utc>, job: JobId) -> String {
    let complement = !created.timestamp_millis().unsigned_abs();
    format!("{LATEST_PREFIX}LATEST-{complement:016x}-{job}")
}

/// A name of PostgreSQL may be anything; that of a file may not.
fn escape(name: &str) -> String {
    let plain = |c: &char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-');
    name.chars().map(|c| if plain(&c) { c.to_string() } else { format!("%{:x}", u32::from(c)) }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_safe_and_in_order() {
        let early: DateTime<Utc> = "2026-11-22T10:58:16.129Z".parse().unwrap();
        let late: DateTime<Utc> = "2026-11-22T10:58:17Z".parse().unwrap();
        assert_eq!(subdir(early), "/2026/11/22-105816.12");
        for (text, fits) in [
            (subdir(early).as_str(), true),
            ("", false),
            ("/2026/11/22-105816.1", false),
            ("/2026/11/22-105816.1é", false),
            ("/2026/../22-105816.12", false),
            ("2026/11/22-105816.129", false),
        ] {
            assert_eq!(is_subdir(text), fits, "{text}");
        }
        assert!(latest(late, JobId(1)) < latest(early, JobId(2)));
        let name = schema("s1", "../Bücher & more", Uuid::nil());
        assert_eq!(name, "schema/s1/%2e%2e%2fB%fccher%20%26%20more.00000000000000000000000000000000.dump");
    }
}
