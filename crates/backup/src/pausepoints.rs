//! Places in the stories of backups and restores where a job can be made to stop (`SET backhaul.debug_pausepoints`).
//!
//! There is one between any two steps that leave something behind. `docs/jobs.md` lists them with what is there then.

pub(crate) const AFTER_LOCK: &str = "backup.after_lock";
pub(crate) const AFTER_POINTS: &str = "backup.after_points";
pub(crate) const AFTER_SCHEMAS: &str = "backup.after_schemas";
pub(crate) const AFTER_FIRST_SPAN: &str = "backup.after_first_span";
pub(crate) const AFTER_EXPORT: &str = "backup.after_export";
pub(crate) const AFTER_RECORD: &str = "backup.after_record";
pub(crate) const AFTER_CHECKSUM: &str = "backup.after_checksum";
pub(crate) const AFTER_SEAL: &str = "backup.after_seal";
pub(crate) const AFTER_LATEST: &str = "backup.after_latest";

pub(crate) const AFTER_SOURCE: &str = "restore.after_source";
pub(crate) const AFTER_CREATE: &str = "restore.after_create";
pub(crate) const AFTER_PRE_DATA: &str = "restore.after_pre_data";
pub(crate) const AFTER_FIRST_FILE: &str = "restore.after_first_file";
pub(crate) const AFTER_LOAD: &str = "restore.after_load";
pub(crate) const AFTER_FINISH: &str = "restore.after_finish";
pub(crate) const AFTER_PUBLISH: &str = "restore.after_publish";
pub(crate) const AFTER_RELEASE: &str = "restore.after_release";

/// All of them, in the order in which a job comes by.
pub const PAUSEPOINTS: &[&str] = &[
    AFTER_LOCK,
    AFTER_POINTS,
    AFTER_SCHEMAS,
    AFTER_FIRST_SPAN,
    AFTER_EXPORT,
    AFTER_RECORD,
    AFTER_CHECKSUM,
    AFTER_SEAL,
    AFTER_LATEST,
    AFTER_SOURCE,
    AFTER_CREATE,
    AFTER_PRE_DATA,
    AFTER_FIRST_FILE,
    AFTER_LOAD,
    AFTER_FINISH,
    AFTER_PUBLISH,
    AFTER_RELEASE,
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_documentation_lists_them_in_order() {
        let text = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/jobs.md")).unwrap();
        let rows = text.lines().filter_map(|line| line.strip_prefix("| `")?.split('`').next());
        let listed: Vec<&str> =
            rows.filter(|name| name.starts_with("backup.") || name.starts_with("restore.")).collect();
        assert_eq!(listed, PAUSEPOINTS);
    }
}
