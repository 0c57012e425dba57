//! What nodes ask each other over a peer session.

use std::fmt;
use std::str::FromStr;

/// A question between nodes, printed and read as a short text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    /// `BACKHAUL WHO ARE YOU [SINCE revision]`: the node's description of itself, as JSON.
    ///
    /// With a revision the answer may wait until the node has something newer to say, for a bounded time: asked again
    /// and again, this carries news at once and proves life without a second kind of message.
    WhoAreYou {
        /// The revision of the last answer that the asking node has seen.
        since: Option<u64>,
    },
    /// `BACKHAUL NODES`: the rows of `SHOW NODES`, for tools that hold the cluster secret and no PostgreSQL login.
    Nodes,
}

impl fmt::Display for Verb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::WhoAreYou { since: None } => f.write_str("BACKHAUL WHO ARE YOU"),
            Self::WhoAreYou { since: Some(revision) } => write!(f, "BACKHAUL WHO ARE YOU SINCE {revision}"),
            Self::Nodes => f.write_str("BACKHAUL NODES"),
        }
    }
}

/// A text that is no verb; a node of another version may have sent it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnknownVerb;

impl FromStr for Verb {
    type Err = UnknownVerb;

    fn from_str(text: &str) -> Result<Self, UnknownVerb> {
        let words: Vec<&str> = text.split_ascii_whitespace().collect();
        match words.as_slice() {
            ["BACKHAUL", "WHO", "ARE", "YOU"] => Ok(Self::WhoAreYou { since: None }),
            ["BACKHAUL", "WHO", "ARE", "YOU", "SINCE", revision] => {
                Ok(Self::WhoAreYou { since: Some(revision.parse().map_err(|_| UnknownVerb)?) })
            }
            ["BACKHAUL", "NODES"] => Ok(Self::Nodes),
            _ => Err(UnknownVerb),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_printed_verb_reads_back_as_itself() {
        for verb in [Verb::WhoAreYou { since: None }, Verb::WhoAreYou { since: Some(7) }, Verb::Nodes] {
            assert_eq!(verb.to_string().parse(), Ok(verb));
        }
        for text in ["", "BACKHAUL", "BACKHAUL WHO ARE YOU SINCE yesterday", "SELECT 1"] {
            assert_eq!(text.parse::<Verb>(), Err(UnknownVerb), "{text}");
        }
    }
}
