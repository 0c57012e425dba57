//! Which of the databases of a restore job.
//!
//! A job may bring several databases to one server, and each of them has a name, a mark, sessions and a turn of its
//! own. The first is called by the job's number alone, in names, marks, messages and on the wire.

use std::fmt;

use serde::{Deserialize, Serialize};

/// One of the databases that a restore job makes on a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(from = "Wire", into = "Wire")]
pub struct JobDatabase {
    /// The job.
    pub job: i64,
    /// Which of its databases, counted from 0; the same on each server.
    pub nth: u32,
}

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Wire {
    First(i64),
    Nth(i64, u32),
}

impl JobDatabase {
    /// The name of the database until it gets its own.
    pub(super) fn own_name(self) -> String {
        match self.nth {
            0 => format!("_backhaul_{}", self.job),
            nth => format!("_backhaul_{}_{nth}", self.job),
        }
    }

    /// Reads what [`Display`](fmt::Display) wrote.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let (job, nth) = match text.split_once('.') {
            Some((job, nth)) => (job, nth.parse().ok().filter(|nth| *nth > 0)?),
            None => (text, 0),
        };
        Some(Self { job: job.parse().ok()?, nth })
    }
}

impl fmt::Display for JobDatabase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.nth {
            0 => write!(f, "{}", self.job),
            nth => write!(f, "{}.{nth}", self.job),
        }
    }
}

/// The first database of a job.
impl From<i64> for JobDatabase {
    fn from(job: i64) -> Self {
        Self { job, nth: 0 }
    }
}

impl From<Wire> for JobDatabase {
    fn from(wire: Wire) -> Self {
        match wire {
            Wire::First(job) => job.into(),
            Wire::Nth(job, nth) => Self { job, nth },
        }
    }
}

impl From<JobDatabase> for Wire {
    fn from(JobDatabase { job, nth }: JobDatabase) -> Self {
        if nth == 0 { Self::First(job) } else { Self::Nth(job, nth) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_is_called_by_its_job_and_all_are_read_back() {
        for (nth, shown, name, wire) in [(0, "7", "_backhaul_7", "7"), (2, "7.2", "_backhaul_7_2", "[7,2]")] {
            let it = JobDatabase { job: 7, nth };
            assert_eq!((it.to_string().as_str(), it.own_name().as_str()), (shown, name));
            assert_eq!(JobDatabase::parse(shown), Some(it));
            assert_eq!(serde_json::to_string(&it).unwrap(), wire);
            assert_eq!(serde_json::from_str::<JobDatabase>(wire).unwrap(), it);
        }
        for text in ["", ".", "7.", "7.0", "7.x", ".1", "7.1.2"] {
            assert_eq!(JobDatabase::parse(text), None, "{text}");
        }
    }
}
