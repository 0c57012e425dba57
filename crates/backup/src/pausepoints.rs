//! Places in the stories of backups and restores where a job can be made to stop (`SET backhaul.debug_pausepoints`).
//!
//! There is one between any two steps that leave something behind. `docs/jobs.md` lists them with what is there then.

pub(crate) const AFTER_LOCK: &str = "backup.after_lock";
pub(crate) const AFTER_POINTS: &str = "backup.after_points";
pub(crate) const AFTER_SCHEMAS: &str = "backup.after_schemas";
pub(crate) const AFTER_FIRST_SPAN: &str = "backup.after_first_span";
pub(crate) const AFTER_EXPORT: &str = "backup.after_export";
pub(crate) const AFTER_RECORD: &str = "backup.after_record";
pub(crate) const AFTER_SEAL: &str = "backup.after_seal";
pub(crate) const AFTER_LATEST: &str = "backup.after_latest";

/// All of them, in the order in which a job comes by.
pub const PAUSEPOINTS: &[&str] =
    &[AFTER_LOCK, AFTER_POINTS, AFTER_SCHEMAS, AFTER_FIRST_SPAN, AFTER_EXPORT, AFTER_RECORD, AFTER_SEAL, AFTER_LATEST];
