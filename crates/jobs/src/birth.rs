//! When a job begins to be there: at once, or together with something else of its client's.

/// A client's transaction, and the part of it in which a job is made.
///
/// PostgreSQL numbers a subtransaction like a transaction, and keeps of each number whether it committed; a
/// subtransaction's has committed only when nothing around it was rolled back. So one number decides, and it is
/// replicated with all others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Transaction {
    /// The shard on whose primary it is open.
    pub shard: String,
    /// The primary's timeline.
    pub timeline: i32,
    /// The number of the whole (`xid8`).
    pub top: i64,
    /// The number of the innermost subtransaction, or of the whole where there is none.
    pub part: i64,
}

/// When a job that is made begins to be there for others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Birth {
    /// When its row is written.
    Now,
    /// When this transaction has committed. Anybody can find out; see [`crate::Jobs::settle`].
    With(Transaction),
    /// When whoever makes it says so ([`crate::Jobs::publish`]); never, if that one dies before.
    Told,
}
